"""GPT-2 in one file, with a binary gate on every attention edge if asked for (config.gated).

Read it from the parts to the whole: config, attention, MLP, block, GPT. GPT-2 exactly: LayerNorm first, learned
positions, biases, tanh-GELU, tied head, and GPT-2's own parameter names, so that pretrained weights load by name
(extras/files.py reads them). Gates behave like dropout: `model.train()` samples them, `model.eval()` takes
A = [g > 0].

    model = GPT.from_pretrained("gpt2", gated=True)      # in eval mode
    out = model(idx)              # out.logits (B,T,V), out.expected_edges (L,H), out.active_edges (L,H)

Shapes: B batch, T positions, C width, H heads, D = C/H head size, L layers, V vocabulary.
"""
import dataclasses
import math
import os
from typing import NamedTuple, Optional

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from extras.files import GPT2_SHA256, UserError, fetch_gpt2, from_gpt2_layout, infer_config, read_weights, replacing
from gates import sparse_attention


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


def allowed_edges(config):
    """Edges of one sequence of block_size tokens, over all layers and heads, with every gate open."""
    T = config.block_size
    return config.n_layer * config.n_head * (T * (T + 1) // 2 if config.causal else T * T)


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


def sum_over_parts(function, logits, others, cells=2**24):
    """function(logits (B T,V), others (B T,...)), which sums over its rows, for `cells` logits at a time.

    With a large vocabulary the logits are the largest tensor there is. No float32 copy of it is ever whole: the
    parts are computed one after the other, and once more in the backward pass.
    """
    logits, others = logits.flatten(0, 1), others.flatten(0, 1)
    rows = max(1, cells // logits.shape[1])
    if rows >= len(logits):
        return function(logits, others)
    return sum(checkpoint(function, *part, use_reentrant=False) for part in zip(logits.split(rows), others.split(rows)))


def cross_entropy(logits, targets, cells=2**24):
    """Mean nats per counted target, in float32. logits (B,T,V), targets (B,T), -1 where a position does not count."""
    def nats(rows, wanted):
        return F.cross_entropy(rows.float(), wanted, ignore_index=-1, reduction="sum")

    return sum_over_parts(nats, logits, targets, cells) / (targets != -1).sum()


class GPT(nn.Module):
    Config = GPTConfig

    def __init__(self, config, generator=None):
        """A model with GPT-2's random initial weights, drawn from `generator` (default: torch's global one)."""
        super().__init__()
        sizes = config.block_size, config.vocab_size, config.n_layer, config.n_head, config.n_embd
        if min(sizes) < 1:
            raise UserError(f"no GPT has these sizes: {config}\nexpected all of them to be at least 1")
        if config.n_embd % config.n_head:
            raise UserError(f"n_embd={config.n_embd} is not a multiple of n_head={config.n_head}")
        self.config = config
        self.notes = {}    # words that a checkpoint keeps beside the weights
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

    def check_length(self, idx):
        if idx.shape[1] > self.config.block_size:
            raise UserError(f"{idx.shape[1]} positions are more than the model's block_size={self.config.block_size}")

    def embed(self, idx):
        """idx (B,T) -> what the first block reads, (B,T,C)."""
        self.check_length(idx)
        return self.wte(idx) + self.wpe.weight[:idx.shape[1]]

    def unembed(self, x):
        """What the last block writes (B,T,C) -> logits (B,T,V)."""
        return F.linear(self.ln_f(x), self.wte.weight)

    def forward(self, idx, targets=None):
        """idx (B,T) tokens; targets (B,T) next tokens, -1 where a position does not count -> Output."""
        x, expected, active = self.embed(idx), [], []                # (B,T,C)
        for block in self.h:
            x, e, a = checkpoint(block, x, use_reentrant=False) if self.recompute and self.training else block(x)
            expected.append(e)
            active.append(a)
        logits = self.unembed(x)                                     # (B,T,V)
        loss = None if targets is None else cross_entropy(logits, targets)
        return Output(logits, loss, torch.stack(expected), torch.stack(active))

    @torch.no_grad()
    def attention_maps(self, idx):
        """Weight of every edge (L,B,H,T,T), A * softmax: an exact 0 where a gate is closed.

        Attention applied to one-hot values returns its own weights, so no second definition is needed. Call
        `model.eval()` first, or the gates are drawn anew.
        """
        maps, x = [], self.embed(idx)                                                # (B,T,C)
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

    @staticmethod
    def from_layout(tensors, hf, path, n_head=None):
        """Hugging Face's tensors and config.json -> ours, and our config's fields."""
        tensors = from_gpt2_layout(tensors, path)
        return tensors, infer_config(tensors, hf, path, n_head)

    @classmethod
    def from_pretrained(cls, name_or_path, **config_overrides):
        """A model with trained weights, on the CPU, in float32, in eval mode.

        name_or_path: gpt2, gpt2-medium, gpt2-large or gpt2-xl (downloaded once); a folder or file in Hugging
        Face's GPT-2 layout (safetensors or pytorch_model.bin, also sharded); or a checkpoint of ours. A folder of the
        Llama family, or a checkpoint made from one, gives the Llama of extras/llama.py.
        config_overrides: fields of GPTConfig, as gated=True; a smaller block_size crops the positions.
        """
        path = fetch_gpt2(name_or_path) if name_or_path in GPT2_SHA256 else os.fspath(name_or_path)
        tensors, meta = read_weights(path)
        hf = meta.get("config.json", {})
        family = (hf.get("architectures") or [hf.get("model_type", "gpt2")])[0]
        if "n_kv_head" in meta.get("config", {}) or "gpt2" not in family.lower():
            from extras.llama import Llama as cls                    # which builds on this file
        if "config" in meta:                                         # a checkpoint of ours
            fields, notes = meta["config"], {key: value for key, value in meta.items() if isinstance(value, str)}
        else:
            tensors, fields = cls.from_layout(tensors, hf, path, config_overrides.get("n_head"))
            tokenizer = os.path.abspath(os.path.join(path if os.path.isdir(path) else os.path.dirname(path),
                                                     "tokenizer.json"))
            notes = {"tokenizer": tokenizer} if os.path.exists(tokenizer) else {}
        known = cls.Config.__dataclass_fields__
        unknown = {**fields, **config_overrides}.keys() - known.keys()
        if unknown:
            raise UserError(f"{path}: {cls.Config.__name__} has no field {', '.join(sorted(unknown))}\n"
                            f"it has {', '.join(known)}")
        config = cls.Config(**{**fields, **config_overrides})
        if config.block_size > fields["block_size"]:
            raise UserError(f"{path} reads at most {fields['block_size']} positions, not {config.block_size}\n"
                            "pass a smaller block_size")
        tensors = {name: t.float() for name, t in tensors.items()}
        if config.block_size < fields["block_size"] and "wpe.weight" in tensors:
            tensors["wpe.weight"] = tensors["wpe.weight"][:config.block_size].clone()
        with torch.device("meta"):                                   # shapes only: no second copy in memory
            model = cls(config)
        expected = {name: tuple(p.shape) for name, p in model.state_dict().items()}
        found = {name: tuple(t.shape) for name, t in tensors.items()}
        problems = [f"{name} is missing" if name not in found else
                    f"{name} is not a {cls.__name__} tensor" if name not in expected else
                    f"{name} has shape {found[name]} instead of {expected[name]}"
                    for name in {**expected, **found} if found.get(name) != expected.get(name)]
        if problems:
            more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
            raise UserError(f"{path} does not fit this {cls.__name__}: {'; '.join(problems[:3])}{more}\n"
                            f"expected {config}")
        model.load_state_dict(tensors, assign=True)
        model.notes = notes
        return model.eval()


def save_checkpoint(model, path, **extra):
    """Write {"config", "model", **model.notes, **extra} to path, all at once or not at all.

    extra: tensors and plain values only, so that `torch.load(path, weights_only=True)` reads it.
    """
    config = dataclasses.asdict(model.config)
    with replacing(path) as temporary:
        torch.save({**model.notes, **extra, "config": config, "model": model.state_dict()}, temporary)


load_checkpoint = GPT.from_pretrained    # a checkpoint of ours is one more layout that it reads
