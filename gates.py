"""Sparse attention: softmax attention with one binary gate per edge (section 3 of the paper).

An edge (i, j) lets query position i read key position j. Its gate is drawn from the attention score
itself, so the layer has no parameters of its own and a pretrained checkpoint loads as it is. A closed
gate is an exact zero: nothing flows along that edge.

    s_ij = q_i . k_j / sqrt(D)                    the ordinary attention score                    (1)
    A_ij ~ Bernoulli(sigmoid(s_ij + b))           the gate; b, a constant, decides how open it starts (2)
    y_i  = sum_j A_ij softmax_j(s_i) v_j          softmax over all allowed keys, not renormalised (3)

`reference_sparse_attention` is this definition, line by line; the tests trust it. `sparse_attention` computes
the same block by block, without a T x T matrix in memory, and is what model.py calls.
Shapes: B batch, H heads, T positions, D head size; N = B H; in a block G of the N heads, K keys, R queries.
"""
import math

import torch
from torch.autograd.function import once_differentiable

ROWS = 64              # R: with more, more edges are computed that the causal mask hides; with fewer, calls take over
CELLS_CPU = 2**19      # G K R aimed at: what a CPU's cache holds, or, on an accelerator, what keeps its cores busy
CELLS_GPU = 2**23
U_MIN = 2**-24         # keeps u inside (0, 1), where logit(u) is finite; torch's float32 draws are multiples of it


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
    """What model.py calls: arguments, results and gradients of `reference_sparse_attention`, memory linear in T.

    Like FlashAttention (Dao et al. 2022, arXiv 2205.14135) it never keeps a T x T matrix: a block of queries at
    a time, only the keys they may read, and each block once more in the backward pass. Gates open with the same
    probability as the reference's, from other random numbers (`edge_noise`). gate_bias is a plain number.
    """
    if q.shape != k.shape or q.shape[:3] != v.shape[:3] or 0 in q.shape:
        raise ValueError("expected q and k (B,H,T,D) and v (B,H,T,any), none empty, got "
                         f"{tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}")
    return SparseAttention.apply(q, k, v, gate_bias, causal, sample)


def draw_words(N, T, device):
    """A random odd 32-bit integer for every key and every query, (2,N,T): what is kept of the noise for backward."""
    return torch.randint(-2**31, 2**31, (2, N, T), dtype=torch.int32, device=device).bitwise_or_(1)


def edge_noise(key_words, row_words, product, u):
    """A uniform draw u (G,K,R) from (0, 1) for every edge, written to u: the words' product mod 2^32, scaled.

    key_words (G,K,1), row_words (G,1,R), product (G,K,R): int32. So 2 T words make T^2 draws, and the same ones in
    both passes, in a third of the time of torch.rand on a CPU. Along a row or a column they are independent; of a
    2 x 2 of edges three draws determine the fourth, in a way that no statistic of gates in the tests can see.
    """
    torch.mul(key_words, row_words, out=product)    # int32: modulo 2^32
    return u.copy_(product).mul_(-(1 - 2 * U_MIN) * 2**-32).add_(0.5)


def blocks(q, causal):
    """Cut the edges of q (N,T,D) into blocks: slices of heads, keys and rows, and six (G,K,R) tensors to work in.

    All blocks share this memory. The last of the six is an integer one, for the noise. Keys come before queries:
    the products of short queries with many keys are twice as fast in this order on a CPU.
    """
    N, T, _ = q.shape
    R = min(ROWS, T)
    G = min(N, max(1, (CELLS_CPU if q.device.type == "cpu" else CELLS_GPU) // (R * T)))
    memory, product = q.new_empty(5, G * R * T), torch.empty(G * R * T, dtype=torch.int32, device=q.device)
    for n in range(0, N, G):
        for i in range(0, T, R):
            rows = slice(i, min(i + R, T))
            shape = min(G, N - n), rows.stop if causal else T, rows.stop - i
            cells = math.prod(shape)
            yield (slice(n, n + G), slice(0, shape[1]), rows,
                   (*memory[:, :cells].view(5, *shape), product[:cells].view(shape)))


def attend_block(q, k, gate_bias, hidden, words, block):
    """(G,K,R) each: softmax p, P(gate is open), the draw u, gates, and one that is free to use."""
    heads, keys, rows, (p, p_open, u, gates, free, product) = block
    scores = torch.bmm(k[heads, keys], q[heads, rows].mT, out=p_open)                # (1)
    if hidden is not None:    # every row may read all keys before the block's first row
        scores[:, rows].masked_fill_(hidden[:scores.shape[2], :scores.shape[2]], -math.inf)
    torch.softmax(scores, 1, out=p)
    scores.add_(min(gate_bias, 1e30))                                                # finite: -inf stays -inf
    if words is None:
        torch.gt(scores, 0, out=gates)                                               # (2) without noise
        u.fill_(0.5)                                                                 # logit(1 - u) = 0
        scores.sigmoid_()
    else:
        edge_noise(words[0, heads, keys, None], words[1, heads, None, rows], product, u)
        torch.lt(u, scores.sigmoid_(), out=gates)                                    # (2)
    return p, p_open, u, gates, free


def widened(q, k, v):
    """(N,T,D) each, in float32 or wider, q divided by sqrt(D)."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    q, k, v = (t.to(dtype).flatten(0, 1) for t in (q, k, v))
    return q / math.sqrt(q.shape[-1]), k, v


class SparseAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, gate_bias, causal, sample):
        (B, H, T, _), given = q.shape, (q, k, v)
        q, k, v = widened(q, k, v)
        words = draw_words(B * H, T, q.device) if sample else None
        hidden = q.new_ones((min(ROWS, T),) * 2, dtype=torch.bool).tril(-1) if causal else None
        y, expected, active = torch.empty_like(v), q.new_zeros(B * H), q.new_zeros(B * H)
        with torch.autocast(q.device.type, enabled=False):
            for block in blocks(q, causal):
                heads, keys, rows, _ = block
                p, p_open, _, gates, _ = attend_block(q, k, gate_bias, hidden, words, block)
                expected[heads] += p_open.sum((1, 2))                                # (G)
                active[heads] += gates.sum((1, 2))                                   # (G)
                y[heads, rows] = torch.bmm(p.mul_(gates).mT, v[heads, keys])         # (G,R,D)  (3)
        y = y.unflatten(0, (B, H)).to(given[2].dtype)
        ctx.save_for_backward(*given, y, hidden, words)    # nothing that is not there anyway
        ctx.gate_bias, ctx.causal, ctx.edges = gate_bias, causal, T * (T + 1) // 2 if causal else T * T
        expected, active = ((t / ctx.edges).view(B, H) for t in (expected, active))
        ctx.mark_non_differentiable(active)
        return y, expected, active

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dexpected, _):
        """A score acts in three ways: on the softmax, on its gate (straight-through), and on the expected edges."""
        *given, y, hidden, words = ctx.saved_tensors
        q, k, v = widened(*given)
        y, dy = (t.to(q.dtype).flatten(0, 1) for t in (y, dy))                       # (N,T,D)
        dp_open = dexpected.reshape(-1, 1, 1) / ctx.edges                            # (N,1,1)
        mean = (dy * y).sum(-1)[:, None]       # (N,1,T) sum_j p A dweights, which softmax's gradient subtracts
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        with torch.autocast(q.device.type, enabled=False):
            for block in blocks(q, ctx.causal):
                heads, keys, rows, _ = block
                p, p_open, u, gates, free = attend_block(q, k, ctx.gate_bias, hidden, words, block)
                weights = gates.mul_(p)                                              # (G,K,R) A p
                dv[heads, keys].baddbmm_(weights, dy[heads, rows])
                dweights = torch.bmm(v[heads, keys], dy[heads, rows].mT, out=free)   # (G,K,R)
                ds = weights.mul_(dweights).addcmul_(p, mean[heads, :, rows], value=-1)           # softmax
                dgates = dweights.mul_(p)
                # sigmoid(g + logit(1 - u)) = a / (a + b), where a = p_open (1 - u), b = (1 - p_open) u: no logarithm
                a = torch.addcmul(p_open, p_open, u, value=-1, out=p)
                b = u.addcmul_(u, p_open, value=-1)
                soft = a.div_(b.add_(a))
                ds.addcmul_(soft.addcmul_(soft, soft, value=-1), dgates)                          # gate
                ds.addcmul_(p_open.addcmul_(p_open, p_open, value=-1), dp_open[heads])            # expected edges
                dq[heads, rows] = torch.bmm(ds.mT, k[heads, keys])
                dk[heads, keys].baddbmm_(ds, q[heads, rows])
        dq /= math.sqrt(q.shape[-1])
        return *(t.unflatten(0, dexpected.shape).to(g.dtype) for t, g in zip((dq, dk, dv), given)), None, None, None
