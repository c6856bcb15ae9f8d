"""Losses over a large vocabulary, a part of the logits at a time.

The logits are the largest tensor of a language model's step. Beyond CELLS of them the float32 copy is made in parts:
each is computed by itself, and once more in the backward pass. Shapes: B batch, T positions, V vocabulary.
"""
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

CELLS = 2**25    # logits in a part: 128 MB of float32


def sum_over_parts(function, logits, others):
    """function(logits (n,V), others (n,...)), which sums over its rows, for all rows of (B,T,V) and (B,T,...)."""
    logits, others = logits.flatten(0, 1), others.flatten(0, 1)
    rows = max(1, CELLS // logits.shape[1])
    if rows >= len(logits):
        return function(logits, others)
    return sum(checkpoint(function, *part, use_reentrant=False) for part in zip(logits.split(rows), others.split(rows)))


def cross_entropy(logits, targets):
    """Mean nats per counted target. logits (B,T,V), targets (B,T), -1 where a position does not count."""
    def nats(rows, wanted):
        return F.cross_entropy(rows.float(), wanted, ignore_index=-1, reduction="sum")

    return sum_over_parts(nats, logits, targets) / (targets != -1).sum()


def divergence(logits, wanted):
    """KL(softmax(wanted) || softmax(logits)) in nats per position, a mean over all B T of them; (B,T,V) each."""
    def nats(*parts):
        log_q, log_p = (F.log_softmax(part.float(), dim=-1) for part in parts)
        return F.kl_div(log_q, log_p, log_target=True, reduction="sum")

    return sum_over_parts(nats, logits, wanted) / logits[..., 0].numel()
