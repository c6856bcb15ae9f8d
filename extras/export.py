"""A checkpoint of ours back in Hugging Face's layout, which other programs read: GPT-2's, or the Llama family's.

    python -m extras.export runs/gpt2/best.pt OUT

OUT gets config.json and model.safetensors, an ordinary model without gates; the b of a sparse model's gates lie beside
them in gate_bias.json, a list (H) for each layer. `load_exported(OUT)` reads all of it again. Adapters must be merged:
they are, by load_model. A tokenizer.json that the checkpoint knows of is copied.
"""
import argparse
import json
import os
import re
import shutil

import torch

from extras.llama import NAMES, NORMS, OTHERS, SIZES, Llama, load_model
from support.files import UserError, make_folder, read_json, replacing, run_command, write_json

TRANSPOSED = r"c_(attn|proj|fc)\.weight$"    # GPT-2's file stores them (in, out)


def to_gpt2_layout(model):
    """Our GPT -> Hugging Face's tensors by name, and its config.json."""
    c = model.config
    tensors = {name: t.T if re.search(TRANSPOSED, name) else t for name, t in model.state_dict().items()}
    return tensors, {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "vocab_size": c.vocab_size,
                     "n_positions": c.block_size, "n_layer": c.n_layer, "n_head": c.n_head, "n_embd": c.n_embd,
                     "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True}


def to_llama_layout(model):
    """The same of extras/llama.py's."""
    tensors = {}
    for name, t in model.state_dict().items():
        for theirs, ours in NAMES:
            name = re.sub(("" if ours.startswith(".") else "^") + re.escape(ours), theirs, name)
        tensors[name] = t
    c, architecture = vars(model.config), {ours: theirs for theirs, ours in NORMS.items()}[model.config.norm]
    return tensors, {"architectures": [architecture], "model_type": architecture.removesuffix("ForCausalLM").lower(),
                     "hidden_act": "silu", "attention_bias": False, "rope_scaling": c["rope_scaling"],
                     **{theirs: c[ours] for ours, theirs in (SIZES | OTHERS).items()}}


def write_safetensors(tensors, path):
    """The format of support.weights.read_safetensors, in float32: header length (8 bytes), header (JSON), raw data."""
    header, end = {}, 0
    for name, t in tensors.items():
        begin, end = end, end + 4 * t.numel()
        header[name] = {"dtype": "F32", "shape": list(t.shape), "data_offsets": [begin, end]}
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    text += b" " * (-len(text) % 8)    # the data begin at a multiple of 8
    with replacing(path) as temporary, open(temporary, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for t in tensors.values():
            file.write(t.detach().float().contiguous().numpy().astype("<f4").tobytes())


def export(model, out):
    """Write the model into the folder `out`, which must be empty."""
    if not model.config.causal:
        raise UserError("GPT-2's layout has no place for a model without a causal mask\npass a causal one")
    make_folder(out)
    if os.listdir(out):
        raise UserError(f"{out} is not empty\npass an empty folder")
    tensors, config = (to_llama_layout if isinstance(model, Llama) else to_gpt2_layout)(model)
    biases = [tensors.pop(name).tolist() for name in list(tensors) if name.endswith("gate_bias")]
    write_safetensors(tensors, os.path.join(out, "model.safetensors"))
    if biases:
        write_json(os.path.join(out, "gate_bias.json"), {"gate_bias": biases})
    tokenizer = model.notes.get("tokenizer")
    if tokenizer and os.path.exists(tokenizer):
        shutil.copy(tokenizer, os.path.join(out, "tokenizer.json"))
    elif tokenizer:
        print(f"note: {tokenizer} is gone: no tokenizer.json is written")
    write_json(os.path.join(out, "config.json"), config)    # the last file: it says that all is there


def load_exported(folder):
    """The model that `export` wrote, with its gates and their b if it has them; on the CPU, in eval mode."""
    path = os.path.join(folder, "gate_bias.json")
    model = load_model(folder, gated=os.path.exists(path))
    if model.config.gated:
        with torch.no_grad():
            for block, b in zip(model.h, read_json(path)["gate_bias"], strict=True):
                block.attn.gate_bias.copy_(torch.tensor(b))
    return model


def run(args):
    export(load_model(args.checkpoint), args.out)
    print(f"config.json and model.safetensors are in {args.out}")


def main():
    parser = argparse.ArgumentParser(usage="python -m extras.export CHECKPOINT OUT",
                                     description="A checkpoint of ours back in Hugging Face's layout.")
    parser.add_argument("checkpoint", help="of train.py, or anything else that load_model reads")
    parser.add_argument("out", help="an empty folder")
    run_command(parser, run)


if __name__ == "__main__":
    main()
