"""GPT-2 in one file, with a binary gate on every attention edge if asked for (config.gated).

Read it bottom-up: config, attention, MLP, block, GPT; then how weights get in and out of files.
GPT-2 exactly: LayerNorm first, learned positions, biases, tanh-GELU, tied head, and GPT-2's own parameter
names, so that pretrained weights load by name. Gates behave like dropout: `model.train()` samples them,
`model.eval()` takes A = [g > 0].

    model = GPT.from_pretrained("gpt2", gated=True)      # in eval mode
    out = model(idx)              # out.logits (B,T,V), out.expected_edges (L,H), out.active_edges (L,H)

Shapes: B batch, T positions, C width, H heads, D = C/H head size, L layers, V vocabulary.
"""
import argparse
import dataclasses
import http.client
import json
import math
import os
import pickle
import re
import struct
import tempfile
from typing import NamedTuple, Optional

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from gates import sparse_attention


class UserError(ValueError):
    """A mistake that the user can mend: its message says in two lines what is wrong and what to do."""


@dataclasses.dataclass
class GPTConfig:
    block_size: int = 1024    # most positions
    vocab_size: int = 50257
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    causal: bool = True       # False: every position reads every position
    gated: bool = False       # False: ordinary dense attention
    gate_bias: float = 2.0    # b: how far open the gates start, the same in training and evaluation


class Output(NamedTuple):
    logits: torch.Tensor            # (B,T,V)
    loss: Optional[torch.Tensor]    # cross-entropy in nats per counted token, None without targets
    expected_edges: torch.Tensor    # (L,H) sum of sigmoid(g) / allowed edges, differentiable
    active_edges: torch.Tensor      # (L,H) open gates in this pass / allowed edges


class SelfAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)    # q, k and v of all heads
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def heads(self, x):
        """x (B,T,C) -> q, k, v, each (B,H,T,D)."""
        B, T, C = x.shape
        return (t.view(B, T, self.config.n_head, -1).transpose(1, 2) for t in self.c_attn(x).split(C, dim=2))

    def attend(self, q, k, v):
        """Each head's mixture of values (B,H,T,D), and its expected and active share of edges (B,H)."""
        if self.config.gated:
            return sparse_attention(q, k, v, self.config.gate_bias, self.config.causal, sample=self.training)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.config.causal)
        ones = torch.ones(q.shape[:2], device=q.device, dtype=torch.promote_types(q.dtype, torch.float32))
        return y, ones, ones

    def forward(self, x):
        y, expected, active = self.attend(*self.heads(x))            # (B,H,T,D), (B,H), (B,H)
        y = y.transpose(1, 2).reshape(x.shape)                       # (B,T,C), heads side by side
        return self.c_proj(y), expected.mean(0), active.mean(0)      # (B,T,C), (H), (H)


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x):
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))    # GPT-2's form of GELU


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=1e-5)
        self.attn = SelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=1e-5)
        self.mlp = MLP(config)

    def forward(self, x):
        y, expected, active = self.attn(self.ln_1(x))
        x = x + y                                                    # (B,T,C) the residual stream
        return x + self.mlp(self.ln_2(x)), expected, active


def cross_entropy(logits, targets, cells=2**24):
    """Mean nats per counted target, in float32. logits (B,T,V), targets (B,T), -1 where a position does not count.

    With a large vocabulary the logits are the largest tensor there is. No float32 copy of it is made: `cells`
    logits at a time, and once more in the backward pass.
    """
    def nats(logits, targets):
        return F.cross_entropy(logits.float(), targets, ignore_index=-1, reduction="sum")

    logits, targets = logits.flatten(0, 1), targets.flatten()                        # (B T,V), (B T)
    rows = max(1, cells // logits.shape[1])
    if rows >= len(logits):
        return nats(logits, targets) / (targets != -1).sum()
    parts = zip(logits.split(rows), targets.split(rows))
    return sum(checkpoint(nats, *part, use_reentrant=False) for part in parts) / (targets != -1).sum()


class GPT(nn.Module):
    def __init__(self, config, generator=None):
        """A model with GPT-2's random initial weights, drawn from `generator` (default: torch's global one)."""
        super().__init__()
        if config.n_embd % config.n_head:
            raise UserError(f"n_embd={config.n_embd} is not a multiple of n_head={config.n_head}")
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)    # tokens; also the output head (tied)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)    # positions
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, eps=1e-5)
        self.recompute = False    # True: a block's activations are computed again in the backward pass, not kept
        # GPT-2: std 0.02, positions 0.01, and the two layers of a block that write to the residual
        # stream scaled down, so that the stream's variance does not grow with depth.
        for name, p in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(p)
            elif "ln_" not in name:
                std = 0.01 if name == "wpe.weight" else 0.02
                std = std / math.sqrt(2 * config.n_layer) if name.endswith("c_proj.weight") else std
                nn.init.normal_(p, std=std, generator=generator)

    def forward(self, idx, targets=None):
        """idx (B,T) tokens; targets (B,T) next tokens, -1 where a position does not count -> Output."""
        T = idx.shape[1]
        if T > self.config.block_size:
            raise UserError(f"{T} positions are more than the model's block_size={self.config.block_size}")
        x = self.wte(idx) + self.wpe.weight[:T]                      # (B,T,C)
        expected, active = [], []
        for block in self.h:
            x, e, a = checkpoint(block, x, use_reentrant=False) if self.recompute and self.training else block(x)
            expected.append(e)
            active.append(a)
        logits = F.linear(self.ln_f(x), self.wte.weight)             # (B,T,V)
        loss = None if targets is None else cross_entropy(logits, targets)
        return Output(logits, loss, torch.stack(expected), torch.stack(active))

    @torch.no_grad()
    def attention_maps(self, idx):
        """Weight of every edge (L,B,H,T,T), A * softmax: an exact 0 where a gate is closed.

        Attention applied to one-hot values returns its own weights, so no second definition is needed. Call
        `model.eval()` first, or the gates are drawn anew.
        """
        maps, x = [], self.wte(idx) + self.wpe.weight[:idx.shape[1]]                 # (B,T,C)
        for block in self.h:
            q, k, v = block.attn.heads(block.ln_1(x))                                # (B,H,T,D)
            onehot = torch.eye(v.shape[2], dtype=v.dtype, device=v.device).expand(*v.shape[:2], -1, -1)
            maps.append(block.attn.attend(q, k, onehot)[0])                          # (B,H,T,T)
            x = block(x)[0]
        return torch.stack(maps)

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, generator=None):
        """idx (B,T) -> (B, T + max_new_tokens). temperature 0 takes the likeliest token; top_k: only among
        the k likeliest. Call `model.eval()` first, or the gates are sampled as in training."""
        for _ in range(max_new_tokens):
            logits = self(idx[:, -self.config.block_size:]).logits[:, -1].float()    # (B,V)
            if temperature == 0:
                new = logits.argmax(-1, keepdim=True)                # (B,1)
            else:
                if top_k:
                    kth = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
                    logits = logits.masked_fill(logits < kth, -math.inf)
                probs = torch.softmax(logits / temperature, dim=-1)
                new = torch.multinomial(probs, 1, generator=generator)
            idx = torch.cat((idx, new), dim=1)
        return idx

    @classmethod
    def from_pretrained(cls, name_or_path, **config_overrides):
        """A model with trained weights, on the CPU, in float32, in eval mode.

        name_or_path: gpt2, gpt2-medium, gpt2-large or gpt2-xl (downloaded once); a folder or file in Hugging
        Face's GPT-2 layout (safetensors or pytorch_model.bin, also sharded); or a checkpoint of ours.
        config_overrides: fields of GPTConfig, as gated=True; a smaller block_size crops the positions.
        """
        path = download(name_or_path) if name_or_path in GPT2_SHA256 else os.fspath(name_or_path)
        tensors, meta = read_weights(path)
        if "config" in meta:                                         # a checkpoint of ours
            fields = meta["config"]
        else:
            tensors = from_gpt2_layout(tensors, path)
            fields = infer_config(tensors, meta, path, config_overrides.get("n_head"))
        unknown = {**fields, **config_overrides}.keys() - GPTConfig.__dataclass_fields__.keys()
        if unknown:
            raise UserError(f"{path}: GPTConfig has no field {', '.join(sorted(unknown))}\n"
                            f"it has {', '.join(GPTConfig.__dataclass_fields__)}")
        config = GPTConfig(**{**fields, **config_overrides})
        tensors = {name: t.float() for name, t in tensors.items()}
        if config.block_size < fields["block_size"] and "wpe.weight" in tensors:
            tensors["wpe.weight"] = tensors["wpe.weight"][:config.block_size].clone()
        with torch.device("meta"):                                   # shapes only: no second copy in memory
            model = cls(config)
        expected = {name: tuple(p.shape) for name, p in model.state_dict().items()}
        found = {name: tuple(t.shape) for name, t in tensors.items()}
        problems = [f"{name} is missing" if name not in found else
                    f"{name} is not a GPT-2 tensor" if name not in expected else
                    f"{name} has shape {found[name]} instead of {expected[name]}"
                    for name in {**expected, **found} if found.get(name) != expected.get(name)]
        if problems:
            more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
            raise UserError(f"{path} does not fit this GPT: {'; '.join(problems[:3])}{more}\n"
                            f"expected a GPT-2 of {config}")
        model.load_state_dict(tensors, assign=True)
        return model.eval()


# ---- Files. What is read becomes (tensors by name, metadata). The metadata is the rest of a checkpoint of
# ours, or Hugging Face's config.json under the key "config.json".

def save_checkpoint(model, path, **extra):
    """Write {"config", "model", **extra} to path, all at once or not at all.

    extra: tensors and plain values only, so that `torch.load(path, weights_only=True)` reads it.
    """
    temporary = f"{path}.tmp"
    try:
        config = dataclasses.asdict(model.config)
        torch.save({**extra, "config": config, "model": model.state_dict()}, temporary)
        os.replace(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


load_checkpoint = GPT.from_pretrained    # a checkpoint of ours is one more layout that it reads


def make_folder(path):
    """Create the output folder, or say at once, before hours of training, that nothing can be written there."""
    try:
        os.makedirs(path, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        raise UserError(f"cannot write to {path}: {error.strerror}\npass another folder with --out") from error


def between(kind, low, high):
    """A type for argparse: an int or float from low to high."""
    def parse(text):
        value = kind(text)
        if not low <= value <= high:      # nan is not between them either
            raise argparse.ArgumentTypeError(f"{text} is not between {low} and {high}")
        return value
    parse.__name__ = kind.__name__    # argparse names it where the text is no number at all
    return parse


GPT2_URL = "https://huggingface.co/openai-community/{}/resolve/main/model.safetensors"
GPT2_SHA256 = {    # None: not known to us
    "gpt2": "248dfc3911869ec493c76e65bf2fcf7f615828b0254c12b473182f0f81d3a707",
    "gpt2-medium": None, "gpt2-large": None, "gpt2-xl": None,
}


def download(name):
    """Path of GPT-2's weights in torch.hub's cache, fetched on the first call."""
    url, folder = GPT2_URL.format(name), os.path.join(torch.hub.get_dir(), "checkpoints")
    path = os.path.join(folder, f"{name}.safetensors")
    if not os.path.exists(path):
        try:
            os.makedirs(folder, exist_ok=True)
            torch.hub.download_url_to_file(url, path, hash_prefix=GPT2_SHA256[name])
        except (OSError, http.client.HTTPException, RuntimeError) as error:    # RuntimeError: wrong hash
            raise UserError(f"cannot download {url}: {error}\nDownload it elsewhere and pass its path instead "
                            f"of '{name}', or put it at {path}") from error
    return path


BAD_PICKLE = (OSError, RuntimeError, EOFError, pickle.UnpicklingError, LookupError, ValueError, TypeError,
              AttributeError, AssertionError, struct.error)    # all seen from torch.load on damaged files
REQUIRED = {"block_size", "vocab_size", "n_layer", "n_head", "n_embd"}


def first_line(error):
    return str(error).partition("\n")[0][:160]


def read_weights(path):
    """A folder, a single file or the index of a sharded one -> (tensors by name, metadata)."""
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
    if path.endswith(".index.json"):
        tensors = {}
        for shard in sorted(set(read_json(path).get("weight_map", {}).values())):
            tensors.update(read_weights(os.path.join(os.path.dirname(path), shard))[0])
        return tensors, meta
    if path.endswith(".safetensors"):
        return read_safetensors(path), meta
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except BAD_PICKLE as error:
        raise UserError(f"{path} is truncated, or holds more than tensors and plain values\n"
                        f"{type(error).__name__}: {first_line(error)}") from error
    if isinstance(tensors, dict) and {"config", "model"} <= tensors.keys():
        tensors, meta = tensors.pop("model"), tensors
        if not isinstance(meta["config"], dict) or not REQUIRED <= meta["config"].keys():
            raise UserError(f"{path} is the checkpoint of another program\n"
                            "expected one of ours, or a state dict")
    if not isinstance(tensors, dict) or not all(torch.is_tensor(t) for t in tensors.values()):
        raise UserError(f"{path} holds no tensors by name\nexpected a state dict or a checkpoint of ours")
    return tensors, meta


def read_json(path):
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
        if not isinstance(content, dict):
            raise ValueError("expected a JSON object")
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}\n{first_line(error)}") from error
    return content


SAFETENSORS_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16,
                      "BF16": torch.bfloat16, "I64": torch.int64, "U8": torch.uint8, "BOOL": torch.bool}


def read_safetensors(path):
    """The format: header length (8 bytes, little-endian), header (JSON), then the raw data of all tensors."""
    try:
        with open(path, "rb") as file:
            size, length = os.path.getsize(path), int.from_bytes(file.read(8), "little")
            if not 2 <= length <= size - 8:
                raise ValueError(f"its header would be {length} bytes long, the file is {size}")
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            tensors = {}
            for name, entry in header.items():
                begin, end = entry["data_offsets"]
                if 8 + length + end > size:
                    raise ValueError(f"{name} would end at byte {8 + length + end}, the file at {size}")
                dtype = SAFETENSORS_DTYPES.get(entry["dtype"])
                if dtype is None:
                    raise ValueError(f"{name} has the unsupported type {entry['dtype']}")
                file.seek(8 + length + begin)
                raw = bytearray(file.read(end - begin))    # a copy: the file's offsets are not aligned
                tensors[name] = torch.frombuffer(raw, dtype=dtype).view(entry["shape"])
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RuntimeError) as error:
        raise UserError(f"{path} is truncated, or no safetensors file that can be read here\n"
                        f"{first_line(error)}") from error
    return tensors


def from_gpt2_layout(tensors, path):
    """Hugging Face's GPT-2 -> our names and layout: no prefix, no masks, no second head, Linear weights."""
    tensors = {name.removeprefix("transformer."): t for name, t in tensors.items()}
    tensors = {name: t for name, t in tensors.items() if not re.search(r"\.attn\.(masked_)?bias$", name)}
    head = tensors.pop("lm_head.weight", None)
    if head is not None and "wte.weight" in tensors and not torch.equal(head, tensors["wte.weight"]):
        raise UserError(f"{path} has an output head of its own\nexpected GPT-2's: lm_head.weight = wte.weight")
    conv1d = re.compile(r"(c_attn|c_proj|c_fc)\.weight$")    # these are stored (in, out)
    return {name: t.t().contiguous() if conv1d.search(name) and t.ndim == 2 else t
            for name, t in tensors.items()}


def infer_config(tensors, meta, path, n_head=None):
    """GPTConfig's fields from the tensors' shapes; the number of heads from config.json, else D = 64."""
    hf = meta.get("config.json", {})
    wanted = {"activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True,
              "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False}
    for key, value in wanted.items():
        if hf.get(key, value) != value:
            raise UserError(f"{path}: config.json has {key}={hf[key]}\nexpected GPT-2's {key}={value}")
    for name in ("wte.weight", "wpe.weight"):
        if name not in tensors or tensors[name].ndim != 2:
            raise UserError(f"{path} does not fit this GPT: {name} is missing or no matrix\n"
                            "expected GPT-2's tensors")
    (V, C), T = tensors["wte.weight"].shape, tensors["wpe.weight"].shape[0]
    layers = {int(m[1]) for m in (re.match(r"h\.(\d+)\.", name) for name in tensors) if m}
    n_head = n_head or hf.get("n_head") or (C // 64 if C % 64 == 0 else None)
    if n_head is None:
        raise UserError(f"{path}: the number of heads is unknown (width {C}, no config.json)\npass n_head=...")
    n_layer = max(max(layers, default=-1) + 1, hf.get("n_layer", 0))    # a layer that is not there gets named
    return dict(block_size=T, vocab_size=V, n_layer=n_layer, n_head=n_head, n_embd=C)
