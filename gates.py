"""Sparse attention: softmax attention with one binary gate per edge (section 3 of the paper).

An edge (i, j) lets query position i read key position j. Its gate is drawn from the attention score
itself, so the layer has no parameters of its own and a pretrained checkpoint loads as it is. A closed
gate is an exact zero: nothing flows along that edge.

    s_ij = q_i . k_j / sqrt(D)                    the ordinary attention score                    (1)
    A_ij ~ Bernoulli(sigmoid(s_ij + b))           the gate; b, a constant, decides how open it starts (2)
    y_i  = sum_j A_ij softmax_j(s_i) v_j          softmax over all allowed keys, not renormalised (3)

`reference_sparse_attention` is this definition, line by line; the tests trust it.
Shapes: B batch, H heads, T positions, D head size.
"""
import math

import torch

U_MIN = 2**-24    # keeps u inside (0, 1), where logit(u) is finite; torch's float32 draws are multiples of it


def sample_gates(logits, sample):
    """Binary gates with a straight-through gradient (the binary Gumbel-softmax trick, temperature 1).

    logits: gate logits g, any shape; -inf is a gate that is always closed. sample: draw the gates (True,
    training) or take the deterministic A = [g > 0] (False, evaluation).
    Returns exact 0s and 1s, shaped like logits, whose gradient is that of sigmoid(g + n) where the noise
    n = logit(u), u ~ U(0, 1), is 0 without sampling. P(g + n > 0) = sigmoid(g): the Bernoulli draw of (2).

    Like dropout, the draw takes torch's global generator. Data order and initial weights have generators of
    their own here, so `torch.manual_seed` just before training is the seed of the gates.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if sample:
        logits = logits + torch.logit(torch.rand_like(logits), eps=U_MIN)
    soft = torch.sigmoid(logits)
    hard = (logits > 0).to(soft.dtype)
    return hard + (soft - soft.detach())  # the bracket is exactly 0: value of hard, gradient of soft


def reference_sparse_attention(q, k, v, gate_bias, causal=True, sample=False):
    """The definition. Plain, slow, and with several T x T matrices in memory.

    q, k, v (B,H,T,D); gate_bias: b in (2), in units of the score; causal: allow only keys j <= i;
    sample: see `sample_gates`. Scores and gates are float32 (or wider), also under autocast.
    Returns
      y         (B,H,T,D)  attention output (3), in v's dtype
      expected  (B,H)      sum of sigmoid(g) over allowed edges / their number: what training penalises
      active    (B,H)      share of allowed edges whose gate is open in this very pass: what is reported
    """
    T, D = q.shape[-2:]
    dtype = torch.promote_types(q.dtype, torch.float32)
    allowed = torch.ones(T, T, dtype=torch.bool, device=q.device)                    # (T,T)
    if causal:
        allowed = allowed.tril()
    with torch.autocast(q.device.type, enabled=False):
        scores = q.to(dtype) @ k.to(dtype).transpose(-2, -1) / math.sqrt(D)          # (B,H,T,T)  (1)
        scores = scores.masked_fill(~allowed, -math.inf)
        gate_logits = (scores + gate_bias).masked_fill(~allowed, -math.inf)          # closed, even for b = inf
        gates = sample_gates(gate_logits, sample)                                    # (B,H,T,T)  (2)
        y = (gates * torch.softmax(scores, dim=-1)) @ v.to(dtype)                    # (B,H,T,D)  (3)
        expected = torch.sigmoid(gate_logits).sum((-2, -1)) / allowed.sum()          # (B,H)
        active = gates.detach().sum((-2, -1)) / allowed.sum()                        # (B,H)
    return y.to(v.dtype), expected, active


def sparse_attention(q, k, v, gate_bias, causal=True, sample=False):
    """What model.py calls: same arguments and results as `reference_sparse_attention`."""
    return reference_sparse_attention(q, k, v, gate_bias, causal, sample)
