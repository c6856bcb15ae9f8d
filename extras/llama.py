"""The Llama family (Llama, SmolLM2, OLMo) on the same gates: only what differs from model.py.

    model = load_model(FOLDER, gated=True)      # Hugging Face's folder of such a model, or a checkpoint made from it

RMSNorm (OLMo: LayerNorm without parameters), rotary positions instead of learned ones, several query heads to one
key and value head, SwiGLU, and a head that may be tied. Edges are counted per query head. What has a name in model.py
keeps it (h, attn, ln_1, c_proj, mlp, ln_f, wte), so that train.py and patching.py work unchanged.

Shapes as in model.py, and G key/value heads, M the MLP's hidden width.
"""
import dataclasses
import math
import os
from typing import Optional

import torch
import torch.nn as nn
import torch.nn.functional as F

from extras.lora import merged
from model import GPT, Block, GPTConfig, SelfAttention
from support.files import UserError
from support.weights import GPT2_SHA256, fetch_gpt2, read_weights


@dataclasses.dataclass
class LlamaConfig(GPTConfig):
    n_kv_head: int = 12       # G, each serves n_head / G query heads
    n_hidden: int = 2048      # M
    norm: str = "rms"         # or "layer": OLMo's, without parameters
    norm_eps: float = 1e-5    # of RMSNorm
    rope_theta: float = 10000.0
    rope_scaling: Optional[dict] = None    # Llama 3's
    tied: bool = True         # the output head is the embedding


SIZES = {"n_embd": "hidden_size", "n_head": "num_attention_heads", "block_size": "max_position_embeddings",
         "vocab_size": "vocab_size", "n_layer": "num_hidden_layers", "n_hidden": "intermediate_size",
         "n_kv_head": "num_key_value_heads"}    # and their names in Hugging Face's config.json


def norm(config):
    if config.norm == "rms":
        return nn.RMSNorm(config.n_embd, eps=config.norm_eps)
    return nn.LayerNorm(config.n_embd, eps=1e-5, elementwise_affine=False)


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
    cos, sin = angle.cos(), angle.sin()
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


def project_copies(x, weight):
    """x (B,H,T,C), one for each query head, by the weight (G,D,C) of the head that it shares -> (B,H,T,D)."""
    x = x.unflatten(1, (len(weight), -1))                                            # (B,G,H/G,T,C)
    return torch.einsum("bgstc,gdc->bgstd", x, weight).flatten(1, 2)


class LlamaAttention(SelfAttention):
    def __init__(self, config):
        nn.Module.__init__(self)
        self.config, C = config, config.n_embd
        D = C // config.n_head
        self.q_proj = nn.Linear(C, C, bias=False)
        self.k_proj = nn.Linear(C, config.n_kv_head * D, bias=False)
        self.v_proj = nn.Linear(C, config.n_kv_head * D, bias=False)
        self.c_proj = nn.Linear(C, C, bias=False)
        self.gate_bias = None

    def heads(self, x):
        """x (B,T,C), or (B,H,T,C) with a copy for each query head -> q, k, v, each (B,H,T,D), q and k rotated.

        Several query heads share a head of k and v. From x (B,T,C) they get the same k and v; from copies each gets
        those that its own copy makes.
        """
        D, f = self.config.n_embd // self.config.n_head, rotary_frequencies(self.config, x.device)
        projections = self.q_proj, self.k_proj, self.v_proj
        if x.ndim == 3:
            q, k, v = (p(x).unflatten(2, (-1, D)).transpose(1, 2) for p in projections)
        else:
            q, k, v = (project_copies(x, p.weight.unflatten(0, (-1, D))) for p in projections)
        share = q.shape[1] // k.shape[1]
        return rotate(q, f), rotate(k, f).repeat_interleave(share, 1), v.repeat_interleave(share, 1)

    def score_weights(self):
        """The trained weights that make the scores: q's and k's projections; of an adapter its matrix B."""
        return [p for part in (self.q_proj, self.k_proj) for name, p in part.named_parameters()
                if p.requires_grad and name != "a"]


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
    """GPT's forward pass and attention_maps, around other parts."""
    Config = LlamaConfig

    def __init__(self, config, generator=None):
        nn.Module.__init__(self)
        config = dataclasses.replace(config)    # its own: set_gates changes it
        C, H = config.n_embd, config.n_head
        if min(getattr(config, name) for name in SIZES) < 1 or C % (2 * H) or H % config.n_kv_head:
            raise UserError(f"no Llama has {C} = n_embd, {config.n_head} = n_head, {config.n_kv_head} = n_kv_head\n"
                            "expected n_embd a multiple of 2 n_head, and n_head a multiple of n_kv_head")
        self.config, self.notes, self.recompute = config, {}, False
        self.wte = nn.Embedding(config.vocab_size, C)
        self.h = nn.ModuleList(LlamaBlock(config) for _ in range(config.n_layer))
        self.ln_f = norm(config)
        if not config.tied:
            self.lm_head = nn.Linear(C, config.vocab_size, bias=False)
        for p in self.parameters():
            if p.ndim == 2:
                nn.init.normal_(p, std=0.02, generator=generator)
        self.set_gates(config.gated)

    def embed(self, idx):
        self.check_length(idx)
        return self.wte(idx)                                                         # (B,T,C)

    def unembed(self, x):
        return F.linear(self.ln_f(x), (self.wte if self.config.tied else self.lm_head).weight)

    @staticmethod
    def from_layout(tensors, hf, path, n_head=None):
        """As in GPT. Refuses what is not implemented here, by its name in config.json."""
        rope = (hf.get("rope_parameters") or {}) | (hf.get("rope_scaling") or {})
        given = {key: value for key, value in hf.items() if value is not None}
        hf = {"num_key_value_heads": hf.get("num_attention_heads"), "rms_norm_eps": 1e-6,
              "rope_theta": rope.get("rope_theta", 10000.0), "tie_word_embeddings": False, **given}
        for key, fine, expected in checks(hf):
            if not fine:
                raise UserError(f"{path}: config.json has {key}={hf.get(key)}\n{expected}")
        fields = {ours: hf[theirs] for ours, theirs in (SIZES | OTHERS).items()}
        fields |= {"norm": NORMS[hf["architectures"][0]], "rope_scaling": rope if LLAMA3 <= rope.keys() else None}
        found = {name: t for name, t in tensors.items() if not name.endswith("inv_freq")}    # an old file's constant
        for theirs, ours in NAMES:
            found = {name.replace(theirs, ours): t for name, t in found.items()}
        wte = found.get("wte.weight")
        if fields["tied"] and wte is not None and not torch.equal(found.pop("lm_head.weight", wte), wte):
            raise UserError(f"{path}: its head is not its embedding, though config.json says so\n"
                            "expected lm_head.weight = embed_tokens.weight")
        return found, fields


def load_model(name_or_path, **config_overrides):
    """GPT.from_pretrained for both families, and for what adapters (extras/lora.py) have trained.

    name_or_path: what GPT takes; a folder or file in the layout of Hugging Face's Llama family; a checkpoint of either.
    A tokenizer.json beside Hugging Face's weights is noted, so that extras/tokenizer.py finds it.
    """
    path = fetch_gpt2(name_or_path) if name_or_path in GPT2_SHA256 else os.fspath(name_or_path)
    tensors, meta = read_weights(path)
    hf = meta.get("config.json", {})
    family = hf.get("architectures") or hf.get("model_type") or "gpt2"
    is_gpt = "gpt2" in str(family).lower() and "n_kv_head" not in meta.get("config", {})
    beside = os.path.join(path if os.path.isdir(path) else os.path.dirname(path), "tokenizer.json")
    if "config" not in meta and os.path.exists(beside):
        meta["tokenizer"] = os.path.abspath(beside)
    return (GPT if is_gpt else Llama).from_tensors(merged(tensors), meta, path, **config_overrides)


# ---- Hugging Face's names

NORMS = {"LlamaForCausalLM": "rms", "OlmoForCausalLM": "layer"}
NAMES = (("model.embed_tokens.", "wte."), ("model.layers.", "h."), ("model.norm.", "ln_f."),
         (".input_layernorm.", ".ln_1."), (".post_attention_layernorm.", ".ln_2."),
         (".self_attn.o_proj.", ".attn.c_proj."), (".self_attn.", ".attn."))
OTHERS = {"norm_eps": "rms_norm_eps", "rope_theta": "rope_theta", "tied": "tie_word_embeddings"}
ONLY = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "clip_qkv": None, "partial_rotary_factor": 1}
LLAMA3 = {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}


def checks(hf):
    """Entries of a config.json: (key, is it implemented here?, what is expected)."""
    architecture = (hf.get("architectures") or [None])[0]
    yield "architectures", architecture in NORMS, f"expected GPT-2's layout, or one of {', '.join(NORMS)}"
    for key in SIZES.values():
        yield key, isinstance(hf.get(key), int) and hf[key] >= 1, "expected a number of 1 or more"
    for key in ("rope_theta", "rms_norm_eps"):
        yield key, isinstance(hf[key], (int, float)), "expected a number"
    for key, value in {**ONLY, "head_dim": hf["hidden_size"] // hf["num_attention_heads"]}.items():
        yield key, hf.get(key, value) == value, f"only {key}={value} is implemented here"
    for key in ("rope_scaling", "rope_parameters"):
        rope = hf.get(key, {})
        words = {name for name, x in rope.items() if not isinstance(x, (int, float))}
        wanted = {"default": set(), "llama3": LLAMA3}.get(rope.get("rope_type", rope.get("type", "default")))
        fine = words <= {"type", "rope_type"} and rope.keys() - words - {"rope_theta"} == wanted
        yield key, fine, f"only Llama 3's is implemented here, with {', '.join(sorted(LLAMA3))}"
