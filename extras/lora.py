"""Low-rank adapters (Hu et al. 2021, arXiv 2106.09685): train a large model's projections with few parameters.

    add_adapters(model, rank=8)             # W becomes W + B A on every q and k projection; only A and B are trained
    tensors = merged(model.state_dict())    # the same model as an ordinary state dict

The frozen weights can be kept in bfloat16. `from_pretrained` merges by itself, so that every checkpoint of a run with
adapters is an ordinary one to all that read it.
"""
import math

import torch
import torch.nn as nn
from torch.nn.utils import parametrize

QUERY_KEY = ("c_attn", "q_proj", "k_proj")
STORED = ".parametrizations.weight."    # PyTorch's names: W is `original`, A and B are `0.a` and `0.b`


class LowRank(nn.Module):
    """W (out,in) -> W + B A, in W's type. B (rows,rank) starts at 0, A (rank,in) at random; rows below are W's own."""

    def __init__(self, weight, rank, rows, generator=None):
        super().__init__()
        a = torch.randn(rank, weight.shape[1], generator=generator) / math.sqrt(weight.shape[1])
        self.a = nn.Parameter(a.to(weight.device))
        self.b = nn.Parameter(torch.zeros(rows, rank, device=weight.device))

    def forward(self, weight):
        return low_rank_sum(weight, self.a, self.b)


def low_rank_sum(weight, a, b):
    change = nn.functional.pad((b @ a).to(weight.dtype), (0, 0, 0, len(weight) - len(b)))
    return weight + change


def add_adapters(model, rank, everything=False, dtype=torch.float32, generator=None):
    """Freeze the model, store its linear layers in dtype, and put adapters on q and k (or on every linear layer).

    Of GPT-2's c_attn, which makes q, k and v, the rows of q and k get one adapter together. Returns the model.
    """
    model.requires_grad_(False)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head":
            module.to(dtype)
            kind = name.rpartition(".")[2]
            if everything or kind in QUERY_KEY:
                rows = len(module.weight) * 2 // 3 if kind == "c_attn" and not everything else len(module.weight)
                adapter = LowRank(module.weight, rank, rows, generator)
                parametrize.register_parametrization(module, "weight", adapter)
                module.parametrizations.weight.original.requires_grad_(False)
    return model


def merged(tensors):
    """A state dict with adapters -> the same model's without, in float32. An ordinary one stays as it is."""
    plain = {name: t for name, t in tensors.items() if STORED not in name}
    for name in tensors:
        if name.endswith(STORED + "original"):
            at = name.removesuffix("original")
            plain[name.replace(STORED + "original", ".weight")] = low_rank_sum(
                tensors[name].float(), tensors[at + "0.a"].float(), tensors[at + "0.b"].float())
    return plain
