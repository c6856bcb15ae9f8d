"""Weights in and out: Hugging Face's formats, GPT-2's names, our own checkpoints. Tensors by name, on the CPU."""
import dataclasses
import json
import os
import pickle
import re
import struct

import torch

from support.files import UserError, explained, fetch, read_json, replacing

GPT2_URL = "https://huggingface.co/openai-community/{}/resolve/main/model.safetensors"
GPT2_SHA256 = {    # None: not known to us
    "gpt2": "248dfc3911869ec493c76e65bf2fcf7f615828b0254c12b473182f0f81d3a707",
    "gpt2-medium": None, "gpt2-large": None, "gpt2-xl": None,
}
BAD_PICKLE = (OSError, RuntimeError, EOFError, pickle.UnpicklingError, LookupError, ValueError, TypeError,
              AttributeError, AssertionError, struct.error)    # all seen from torch.load on damaged files
REQUIRED = {"block_size", "vocab_size", "n_layer", "n_head", "n_embd"}
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
          "I64": torch.int64, "U8": torch.uint8, "BOOL": torch.bool}


def fetch_gpt2(name):
    """Path of GPT-2's weights in torch.hub's cache, downloaded on the first call."""
    path = os.path.join(torch.hub.get_dir(), "checkpoints", f"{name}.safetensors")
    advice = (f"Download it elsewhere and pass its path instead of '{name}' (if that is a folder here: ./{name}), "
              f"or put it at {path}; offline: python train.py --init scratch --data stdlib")
    return fetch(GPT2_URL.format(name), path, advice, GPT2_SHA256[name])


def read_weights(path):
    """A folder, a single file or the index of a sharded one -> (tensors by name, metadata).

    The metadata is what a checkpoint of ours holds beside its tensors, or Hugging Face's config.json under that name.
    """
    if os.path.isdir(path):
        names = [n + end for n in ("model.safetensors", "pytorch_model.bin") for end in ("", ".index.json")]
        files = [os.path.join(path, n) for n in names if os.path.exists(os.path.join(path, n))]
        if not files:
            raise UserError(f"no weights in the folder {path}\nexpected one of {', '.join(names)}")
        path = files[0]
    if not os.path.exists(path):
        raise UserError(f"no such file or folder: {path}\nexpected a path, or one of {', '.join(GPT2_SHA256)}")
    config = os.path.join(os.path.dirname(path), "config.json")
    meta = {"config.json": read_json(config)} if os.path.exists(config) else {}
    if path.endswith(".safetensors"):
        return read_safetensors(path), meta
    if path.endswith(".index.json"):
        shards = read_json(path).get("weight_map")
        if not isinstance(shards, dict) or not shards:
            raise UserError(f"{path} names no shards\nexpected a weight_map from tensors to files")
        tensors = {}
        for shard in sorted(set(shards.values())):
            tensors.update(read_weights(os.path.join(os.path.dirname(path), shard))[0])
        return tensors, meta
    with explained(f"{path} is truncated, or holds more than tensors and plain values",
                   "download or save it again", *BAD_PICKLE):
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    if isinstance(tensors, dict) and {"config", "model"} <= tensors.keys():
        tensors, meta = tensors.pop("model"), tensors
        if not isinstance(meta["config"], dict) or not REQUIRED <= meta["config"].keys():
            raise UserError(f"{path} is the checkpoint of another program\nexpected one of ours, or a state dict")
    if not isinstance(tensors, dict) or not all(torch.is_tensor(t) for t in tensors.values()):
        raise UserError(f"{path} holds no tensors by name\nexpected a state dict or a checkpoint of ours")
    return tensors, meta


def read_safetensors(path):
    """The format: header length (8 bytes, little-endian), header (JSON), then the raw data of all tensors."""
    with explained(f"{path} is truncated, or no safetensors file that can be read here", "download or save it again",
                   OSError, ValueError, KeyError, AttributeError, TypeError, RuntimeError):
        with open(path, "rb") as file:
            length, tensors = int.from_bytes(file.read(8), "little"), {}
            if length > os.path.getsize(path):
                raise ValueError(f"its header would be {length} bytes long")
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            for name, entry in header.items():
                if entry["dtype"] not in DTYPES:
                    raise ValueError(f"{name} has the unsupported type {entry['dtype']}")
                begin, end = entry["data_offsets"]
                file.seek(8 + length + begin)
                raw = bytearray(file.read(end - begin))    # a copy that may be written to
                tensors[name] = torch.frombuffer(raw, dtype=DTYPES[entry["dtype"]]).view(entry["shape"])
    return tensors


def from_gpt2_layout(tensors, hf, path, n_head=None):
    """Hugging Face's GPT-2 -> our tensors (no prefix, no masks, no second head, Linear weights) and GPTConfig's fields.

    hf: its config.json, {} without one. n_head replaces its number of heads; without both a head has size 64.
    """
    wanted = {"activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True,
              "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False}
    for key, value in wanted.items():
        if hf.get(key, value) != value:
            raise UserError(f"{path}: config.json has {key}={hf[key]}\nexpected GPT-2's {key}={value}")
    tensors = {name.removeprefix("transformer."): t for name, t in tensors.items()}
    tensors = {name: t for name, t in tensors.items() if not re.search(r"\.attn\.(masked_)?bias$", name)}
    for name in ("wte.weight", "wpe.weight"):
        if name not in tensors or tensors[name].ndim != 2:
            raise UserError(f"{path} does not fit this GPT: {name} is missing or no matrix\nexpected GPT-2's tensors")
    head = tensors.pop("lm_head.weight", tensors["wte.weight"])
    if not torch.equal(head, tensors["wte.weight"]):
        raise UserError(f"{path} has an output head of its own\nexpected GPT-2's: lm_head.weight = wte.weight")
    for name, t in tensors.items():
        if t.ndim == 2 and name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):    # stored (in, out)
            tensors[name] = t.t().contiguous()
    (V, C), T = tensors["wte.weight"].shape, tensors["wpe.weight"].shape[0]
    layers = [int(name.split(".")[1]) for name in tensors if re.match(r"h\.\d+\.", name)]
    n_head = n_head or hf.get("n_head") or (C // 64 if C % 64 == 0 else None)
    if n_head is None:
        raise UserError(f"{path}: the number of heads is unknown (width {C}, no config.json)\n"
                        "put the model's config.json beside it, or pass n_head")
    n_layer = max(1 + max(layers, default=-1), hf.get("n_layer", 0))    # a layer that is not there gets named
    return tensors, dict(block_size=T, vocab_size=V, n_layer=n_layer, n_head=n_head, n_embd=C)


def make_config(Config, fields, overrides, path):
    """The config of a model with these fields, of which overrides replace some. Positions can only get fewer."""
    wanted = fields | overrides
    unknown = wanted.keys() - Config.__dataclass_fields__.keys()
    if unknown:
        raise UserError(f"{path}: {Config.__name__} has no field {', '.join(sorted(unknown))}\n"
                        f"it has {', '.join(Config.__dataclass_fields__)}")
    config = Config(**wanted)
    if config.block_size > fields["block_size"]:
        raise UserError(f"{path} reads at most {fields['block_size']} positions, not {config.block_size}\n"
                        "pass a smaller --block-size")
    return config


def fill(model, tensors, path):
    """Put the tensors into a model that has only shapes so far. What does not fit is named."""
    kind = type(model).__name__
    expected = {name: tuple(p.shape) for name, p in model.state_dict().items()}
    found = {name: tuple(t.shape) for name, t in tensors.items()}
    problems = [f"{name} is missing" if name not in found else
                f"{name} is not a {kind} tensor" if name not in expected else
                f"{name} has shape {found[name]} instead of {expected[name]}"
                for name in {**expected, **found} if found.get(name) != expected.get(name)]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise UserError(f"{path} does not fit this {kind}: {'; '.join(problems[:3])}{more}\nexpected {model.config}")
    model.load_state_dict(tensors, assign=True)


def save_checkpoint(model, path, **extra):
    """Write {"config", "model", **model.notes, **extra} to path, all at once or not at all.

    extra: tensors and plain values only, so that `torch.load(path, weights_only=True)` reads it.
    """
    config = dataclasses.asdict(model.config)
    save({**model.notes, **extra, "config": config, "model": model.state_dict()}, path)


def save(content, path):
    """torch.save, all at once or not at all."""
    failures = OSError, RuntimeError    # RuntimeError: PyTorch, on a full disk
    with (explained(f"cannot write {path}", "make room on this disk, or write elsewhere", *failures),
          replacing(path) as temporary):
        torch.save(content, temporary)
