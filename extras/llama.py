"""The Llama family (Llama, SmolLM2, OLMo) on the same gates: only what differs from model.py.

    model = GPT.from_pretrained(FOLDER, gated=True)      # finds this file by itself, from FOLDER/config.json

RMSNorm (OLMo: LayerNorm without parameters), rotary positions instead of learned ones, several query heads to one
key and value head, SwiGLU, and a head that may be tied. Edges are counted per query head. What has a name in model.py
keeps it (h, attn, ln_1, c_proj, mlp, ln_f, wte), so that train.py and patching.py work unchanged.

Shapes as in model.py, and G key/value heads, M the MLP's hidden width.
"""
import dataclasses
import math
from typing import Optional

import torch
import torch.nn as nn
import torch.nn.functional as F

from extras.files import UserError
from model import GPT, Block, SelfAttention


@dataclasses.dataclass
class LlamaConfig:
    block_size: int           # most positions
    vocab_size: int
    n_layer: int
    n_head: int
    n_embd: int
    n_kv_head: int            # G, each serves n_head / G query heads
    n_hidden: int             # M
    norm: str = "rms"         # or "layer": OLMo's, without parameters
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: Optional[dict] = None    # Llama 3's
    tied: bool = True         # the output head is the embedding
    causal: bool = True
    gated: bool = False
    gate_bias: float = 2.0


def norm(config):
    if config.norm == "rms":
        return nn.RMSNorm(config.n_embd, eps=config.norm_eps)
    return nn.LayerNorm(config.n_embd, eps=config.norm_eps, elementwise_affine=False)


def rotary_frequencies(config, device=None):
    """Radians per position of each pair of a head's entries, (D/2). Llama 3 slows the slow ones down by `factor`."""
    D = config.n_embd // config.n_head
    f = config.rope_theta ** (-torch.arange(0, D, 2, device=device) / D)
    s = config.rope_scaling
    if s:
        turns = s["original_max_position_embeddings"] * f / (2 * math.pi)    # in the length it was first trained on
        keep = ((turns - s["low_freq_factor"]) / (s["high_freq_factor"] - s["low_freq_factor"])).clamp(0, 1)
        f = keep * f + (1 - keep) * f / s["factor"]
    return f


def rotate(x, frequencies):
    """Turn the pair (x_n, x_{n + D/2}) of the vector at position t by t times its frequency. x (B,H,T,D)."""
    angle = torch.outer(torch.arange(x.shape[2], device=x.device), frequencies)      # (T,D/2), in float32
    a, b = x.chunk(2, dim=-1)                                                        # (B,H,T,D/2) each
    return torch.cat((a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()), dim=-1).to(x.dtype)


class LlamaAttention(SelfAttention):
    def __init__(self, config):
        nn.Module.__init__(self)
        self.config, C = config, config.n_embd
        D = C // config.n_head
        self.q_proj = nn.Linear(C, C, bias=False)
        self.k_proj = nn.Linear(C, config.n_kv_head * D, bias=False)
        self.v_proj = nn.Linear(C, config.n_kv_head * D, bias=False)
        self.c_proj = nn.Linear(C, C, bias=False)

    def heads(self, x):
        """x (B,T,C) -> q, k, v, each (B,H,T,D): rotated, and each key and value head once for every query head."""
        D, share = x.shape[-1] // self.config.n_head, self.config.n_head // self.config.n_kv_head
        q, k, v = (p(x).unflatten(-1, (-1, D)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        f = rotary_frequencies(self.config, x.device)
        return rotate(q, f), rotate(k, f).repeat_interleave(share, 1), v.repeat_interleave(share, 1)


class SwiGLU(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gate_proj = nn.Linear(config.n_embd, config.n_hidden, bias=False)
        self.up_proj = nn.Linear(config.n_embd, config.n_hidden, bias=False)
        self.down_proj = nn.Linear(config.n_hidden, config.n_embd, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class LlamaBlock(Block):
    def __init__(self, config):
        nn.Module.__init__(self)
        self.ln_1, self.attn = norm(config), LlamaAttention(config)
        self.ln_2, self.mlp = norm(config), SwiGLU(config)


class Llama(GPT):
    """GPT's forward pass, attention_maps and generate, around other parts."""
    Config = LlamaConfig

    def __init__(self, config, generator=None):
        nn.Module.__init__(self)
        sizes = [getattr(config, name) for name in ("block_size", "vocab_size", "n_layer", "n_head", "n_embd",
                                                    "n_kv_head", "n_hidden")]
        if min(sizes) < 1 or config.n_embd % (2 * config.n_head) or config.n_head % config.n_kv_head:
            raise UserError(f"no Llama has these sizes: {config}\n"
                            "expected n_embd a multiple of 2 n_head, and n_head one of n_kv_head")
        self.config, self.notes, self.recompute = config, {}, False
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.h = nn.ModuleList(LlamaBlock(config) for _ in range(config.n_layer))
        self.ln_f = norm(config)
        if not config.tied:
            self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        for p in self.parameters():
            if p.ndim == 2:
                nn.init.normal_(p, std=0.02, generator=generator)

    def embed(self, idx):
        self.check_length(idx)
        return self.wte(idx)                                                         # (B,T,C)

    def unembed(self, x):
        return F.linear(self.ln_f(x), (self.wte if self.config.tied else self.lm_head).weight)

    @staticmethod
    def from_layout(tensors, hf, path, n_head=None):
        """As in GPT. Refuses what is not implemented here, by its name in config.json."""
        refuse_unknown(hf, path)
        rope = hf.get("rope_scaling") or hf.get("rope_parameters") or {}
        H, tied = hf["num_attention_heads"], hf.get("tie_word_embeddings", False)
        kind = NORMS[hf["architectures"][0]]
        fields = dict(
            block_size=hf["max_position_embeddings"], vocab_size=hf["vocab_size"], n_layer=hf["num_hidden_layers"],
            n_head=H, n_embd=hf["hidden_size"], n_kv_head=hf.get("num_key_value_heads") or H,
            n_hidden=hf["intermediate_size"], norm=kind,
            norm_eps=hf.get("rms_norm_eps") or 1e-6 if kind == "rms" else 1e-5,
            rope_theta=hf.get("rope_theta") or rope.get("rope_theta") or 10000.0, tied=tied,
            rope_scaling=rope if rope_type(rope) == "llama3" else None)
        found = {}
        for name, t in tensors.items():
            for theirs, ours in NAMES:
                name = name.replace(theirs, ours)
            if not name.endswith("rotary_emb.inv_freq"):    # old checkpoints store this constant
                found[name] = t
        head = found.pop("lm_head.weight", None) if tied else None
        if head is not None and "wte.weight" in found and not torch.equal(head, found["wte.weight"]):
            raise UserError(f"{path}: its head is not its embedding, though config.json says so\n"
                            "expected lm_head.weight = embed_tokens.weight")
        return found, fields


# ---- Hugging Face's names

NORMS = {"LlamaForCausalLM": "rms", "OlmoForCausalLM": "layer"}
NAMES = (("model.embed_tokens.", "wte."), ("model.layers.", "h."), ("model.norm.", "ln_f."),
         (".input_layernorm.", ".ln_1."), (".post_attention_layernorm.", ".ln_2."),
         (".self_attn.o_proj.", ".attn.c_proj."), (".self_attn.", ".attn."))


LLAMA3 = {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}


def rope_type(rope):
    return rope.get("rope_type", rope.get("type", "default"))


def refuse_unknown(hf, path):
    architecture = (hf.get("architectures") or ["no architecture"])[0]
    if architecture not in NORMS:
        raise UserError(f"{path}: config.json names {architecture}\n"
                        f"expected GPT-2's layout, or one of {', '.join(NORMS)}")
    needed = ("hidden_size", "num_attention_heads", "max_position_embeddings", "vocab_size", "num_hidden_layers",
              "intermediate_size")
    for key in needed:
        if not isinstance(hf.get(key), int) or hf[key] < 1:
            raise UserError(f"{path}: config.json has {key}={hf.get(key)}\nexpected a number of 1 or more")
    for key in ("num_key_value_heads", "rope_theta", "rms_norm_eps"):    # these may be left out
        if not isinstance(hf.get(key) or 1, (int, float)):
            raise UserError(f"{path}: config.json has {key}={hf[key]}\nexpected a number")
    only = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "clip_qkv": None,
            "partial_rotary_factor": 1.0, "head_dim": hf["hidden_size"] // hf["num_attention_heads"]}
    for key, value in only.items():
        if hf.get(key) not in (None, value):
            raise UserError(f"{path}: config.json has {key}={hf[key]}\nonly {key}={value} is implemented here")
    for key in ("rope_scaling", "rope_parameters"):
        rope = hf.get(key) or {}
        wanted = {"default": set(), "llama3": LLAMA3}.get(rope_type(rope))
        given = rope.keys() - {"type", "rope_type"}
        if given - {"rope_theta"} != wanted or not all(isinstance(rope[name], (int, float)) for name in given):
            raise UserError(f"{path}: config.json has {key}={rope}\nonly Llama 3's is implemented here, with "
                            f"{', '.join(sorted(LLAMA3))}")
