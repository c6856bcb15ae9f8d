"""Low-rank adapters (Hu et al. 2021, arXiv 2106.09685): train a large model's projections with few parameters.

    add_adapters(model, rank=8)             # x W' becomes x W' + s (x A') B' in every q and k; only A, B are trained
    tensors = merged(model.state_dict())    # the same model as an ordinary state dict, with W + s B A

The frozen weights can be kept in bfloat16. extras/llama.py's load_model merges, so that the checkpoints of a run with
adapters are ordinary ones to all that read them through it.
"""
import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from support.files import UserError

QUERY_KEY = ("c_attn", "q_proj", "k_proj")
ALPHA = 16    # s = ALPHA / rank: a step of Adam then moves the output as far at any rank


class Adapted(nn.Module):
    """A frozen linear layer with an adapter on its first `rows` outputs: A (rank,in) at random, B (rows,rank) 0."""

    def __init__(self, linear, rank, rows, generator=None):
        super().__init__()
        self.linear, device, width = linear, linear.weight.device, linear.in_features
        a = torch.randn(rank, width, generator=generator) / math.sqrt(width)
        self.a = nn.Parameter(a.to(device))
        self.b = nn.Parameter(torch.zeros(rows, rank, device=device))

    def forward(self, x):
        y = self.linear(x)
        change = F.linear(F.linear(x, self.a), self.b)                               # (B,T,rows)
        return y + F.pad(ALPHA / len(self.a) * change, (0, y.shape[-1] - len(self.b)))


def add_adapters(model, rank, everything=False, dtype=torch.float32, generator=None):
    """Freeze the model, store its linear layers (not lm_head) in dtype, and put adapters on q and k, or with
    `everything` on all these layers.

    Of GPT-2's c_attn, which makes q, k and v, the rows of q and k get one adapter together. Returns the model.
    """
    if rank > model.config.n_embd:
        raise UserError(f"adapters of rank {rank} are larger than a matrix of width {model.config.n_embd}\n"
                        "pass a lower rank")
    model.requires_grad_(False)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head":
            module.to(dtype)
            parent, _, kind = name.rpartition(".")
            if everything or kind in QUERY_KEY:
                rows = module.out_features
                rows = rows * 2 // 3 if kind == "c_attn" and not everything else rows
                setattr(model.get_submodule(parent), kind, Adapted(module, rank, rows, generator))
    return model


def merged(tensors):
    """A state dict with adapters -> the same model's without. All in float32, where a small change is not rounded."""
    plain = {name: t.float() for name, t in tensors.items()}
    for at in [name.removesuffix(".a") for name in plain if name.endswith(".a")]:
        a, b = plain.pop(f"{at}.a"), plain.pop(f"{at}.b")                            # (rank,in), (rows,rank)
        change = ALPHA / len(a) * b @ a                                              # (rows,in)
        weight = plain.pop(f"{at}.linear.weight")                                    # (out,in)
        plain[f"{at}.weight"] = weight + F.pad(change, (0, 0, 0, len(weight) - len(change)))
        if f"{at}.linear.bias" in plain:
            plain[f"{at}.bias"] = plain.pop(f"{at}.linear.bias")
    return plain
