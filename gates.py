"""Sparse attention: softmax attention with one binary gate per edge (section 3 of the paper).

An edge (i, j) lets query position i read key position j. Its gate is drawn from the attention score itself, so a
pretrained checkpoint loads as it is. A closed gate is an exact zero: nothing flows along that edge.

    s_ij = q_i . k_j / sqrt(D)                the ordinary attention score                                (1)
    g_ij = s_ij + b                           the gate's logit; b decides how open the gates start
    A_ij ~ Bernoulli(sigmoid(g_ij))           the gate; in evaluation A_ij = 1 where g_ij > 0, else 0     (2)
    y_i  = sum_j A_ij softmax_j(s_i) v_j      softmax over all allowed keys, not renormalised             (3)

The numbers of equations are ours, here and in other files. The layer comes from SPARTAN (Lei et al. 2024, arXiv
2411.06890). The paper writes the gate as sigmoid(q . k); its authors' kernel divides by sqrt(D), as we do
(docs/choices.md).
This file is the definition: plain, slow, with several T x T matrices in memory, and trusted by the tests. The model
itself calls support/blockwise.py: the same numbers and gradients for the same gates, in memory linear in T.
Shapes: B batch, H heads, T positions, D head size.
"""
import math

import torch

from support.shapes import checked_bias

U_MIN = 2**-24    # a CPU draws float32 in steps of this: only a draw of 0, whose logit is -inf, is moved


def sample_gates(g, sample, temperature=1.0):
    """Binary gates with a straight-through gradient (the binary Gumbel-softmax trick).

    g: gate logits of any shape; -inf is a gate that is always closed. sample: draw the gates (True, in training) or
    take the deterministic A = [g > 0] (False, in evaluation). temperature: the paper's is 1; it acts on gradients only.
    Returns exact 0s and 1s, shaped like g, in float32 or wider. Their gradient is that of sigmoid((g + n) /
    temperature), where the noise n = logit(u), u ~ U(0, 1), is 0 without sampling. P(g + n > 0) = sigmoid(g): the
    Bernoulli draw of (2).

    Like dropout, the draw takes torch's global generator.
    """
    g = g.to(torch.promote_types(g.dtype, torch.float32))
    if sample:
        g = g + torch.logit(torch.rand_like(g), eps=U_MIN)
    soft = torch.sigmoid(g / temperature)
    hard = (g > 0).to(soft.dtype)
    return hard + (soft - soft.detach())    # the bracket is exactly 0: value of hard, gradient of soft


def sparse_attention(q, k, v, gate_bias, causal=True, sample=False, temperature=1.0):
    """Equations (1) to (3).

    q, k (B,H,T,D), v (B,H,T,any). gate_bias: b in units of the score, a number, or a tensor of shape () or (H), one
    value for each head; a tensor gets a gradient. causal: allow only keys j <= i. sample, temperature: see
    `sample_gates`.
    Returns
      y         (B,H,T,any)  attention output (3), in v's dtype
      expected  (B,H)        sum of sigmoid(g) over allowed edges / their number: what training penalises
      active    (B,H)        share of allowed edges whose gate is open in this very pass
    Scores and gates are float32 or wider, also under autocast. Shapes that do not fit are a ValueError.
    """
    b = checked_bias(q, k, v, gate_bias)                                             # () or (H,1,1)
    T, D = q.shape[-2:]
    dtype = torch.promote_types(q.dtype, torch.float32)
    allowed = torch.ones(T, T, dtype=torch.bool, device=q.device)                    # (T,T)
    if causal:
        allowed = allowed.tril()
    with torch.autocast(q.device.type, enabled=False):
        scores = q.to(dtype) @ k.to(dtype).transpose(-2, -1) / math.sqrt(D)          # (B,H,T,T)  (1)
        scores = scores.masked_fill(~allowed, -math.inf)
        g = (scores + b).masked_fill(~allowed, -math.inf)                            # closed, even for b = inf
        gates = sample_gates(g, sample, temperature)                                 # (B,H,T,T)  (2)
        y = (gates * torch.softmax(scores, dim=-1)) @ v.to(dtype)                    # (B,H,T,any)  (3)
        expected = torch.sigmoid(g).sum((-2, -1)) / allowed.sum()                    # (B,H)
        active = gates.detach().sum((-2, -1)) / allowed.sum()                        # (B,H)
    return y.to(v.dtype), expected, active
