"""The attention of gates.py, the same numbers and gradients, without a T x T matrix in memory.

Like FlashAttention (Dao et al. 2022, arXiv 2205.14135) it takes a block of queries at a time, with only the keys they
may read, and computes each block once more in the backward pass. What is kept in between is linear in T: the inputs,
the output, and one random word for every query and key. tests/test_gates.py checks it against the definition.

Shapes: B batch, H heads, T positions, D head size; N = B H; in a block G of the N heads, K keys, R queries. A block's
matrices are (G,K,R), keys before queries: on a CPU many keys times few queries is twice as fast in this order.
"""
import math

import torch
from torch.autograd.function import once_differentiable

from support.shapes import checked_bias

ROWS = 64              # R on a CPU, and the least on an accelerator: more computes more edges that the causal mask
                       # hides, fewer needs more calls
CELLS_CPU = 2**19      # G K R aimed at: what a CPU's cache holds, or, on an accelerator, what keeps its cores busy
CELLS_GPU = 2**23
SCALE = 2**-32 * (1 - 2**-23)    # from all 32-bit integers to the inside of (-1/2, 1/2): float32 rounds 2^31 - 1 up


@torch.compiler.disable    # torch.compile would unroll all blocks of all layers into one graph, for minutes
def blockwise_attention(q, k, v, gate_bias, causal=True, sample=False, temperature=1.0):
    """`gates.sparse_attention`: the same arguments, results, gradients and errors. Sampled gates open with the same
    probability, from other random numbers (`edge_noise`)."""
    b = checked_bias(q, k, v, gate_bias).flatten().expand(q.shape[:2]).flatten()    # (N)
    return Blockwise.apply(q, k, v, b, causal, sample, temperature)


def draw_words(N, T, device):
    """A random odd 32-bit integer for every key and every query, (2,N,T): what is kept of the noise for backward."""
    return torch.randint(-2**31, 2**31, (2, N, T), dtype=torch.int32, device=device).bitwise_or_(1)


def edge_noise(key_words, row_words, product, u):
    """A uniform draw u (G,K,R) from (0, 1) for every edge, written to u: the words' product mod 2^32, scaled.

    key_words (G,K,1), row_words (G,1,R), product (G,K,R): int32. So 2 T words make T^2 draws, and the same ones in
    both passes, in a third of the time of torch.rand on a CPU. Draws in a row or a column are independent. Where two
    rows meet two columns three draws fix the fourth; no statistic in the tests can see it.
    """
    torch.mul(key_words, row_words, out=product)    # int32: modulo 2^32
    return torch.sub(u.new_full((), 0.5), u.copy_(product), alpha=SCALE, out=u)


def rows_at_once(q):
    """R. With few heads a block of ROWS is too small for an accelerator, which then waits for its next call."""
    N, T, _ = q.shape
    return min(T, ROWS if q.device.type == "cpu" else max(ROWS, CELLS_GPU // (N * T)))


def blocks(q, causal):
    """Cut the edges of q (N,T,D) into blocks: slices of heads, keys and rows, and the memory to work in.

    All blocks share that memory: five (G,K,R) tensors like q, and an integer one for the noise.
    """
    (N, T, _), R = q.shape, rows_at_once(q)
    G = min(N, max(1, (CELLS_CPU if q.device.type == "cpu" else CELLS_GPU) // (R * T)))
    memory, product = q.new_empty(5, G * R * T), torch.empty(G * R * T, dtype=torch.int32, device=q.device)
    for n in range(0, N, G):
        for i in range(0, T, R):
            rows = slice(i, min(i + R, T))
            shape = min(G, N - n), rows.stop if causal else T, rows.stop - i
            cells = math.prod(shape)
            yield (slice(n, n + G), slice(0, shape[1]), rows,
                   (*memory[:, :cells].view(5, *shape), product[:cells].view(shape)))


def attend_block(q, k, b, hidden, words, block):
    """(G,K,R) each: softmax p, P(gate is open), the draw u, gates, and one that is free to use."""
    heads, keys, rows, (p, p_open, u, gates, free, product) = block
    scores = torch.bmm(k[heads, keys], q[heads, rows].mT, out=p_open)                # (1), in p_open's memory
    if hidden is not None:    # every row may read all keys before the block's first row
        scores[:, rows].masked_fill_(hidden[:scores.shape[2], :scores.shape[2]], -math.inf)
    torch.softmax(scores, 1, out=p)
    scores.add_(b[heads, None, None])                                                # g
    if words is None:
        torch.gt(scores, 0, out=gates)                                               # (2) without noise
        u.fill_(0.5)                                                                 # logit(1 - u) = 0
        scores.sigmoid_()                                                            # p_open
    else:
        edge_noise(words[0, heads, keys, None], words[1, heads, None, rows], product, u)
        torch.lt(u, scores.sigmoid_(), out=gates)                                    # (2), p_open
    return p, p_open, u, gates, free


def widened(q, k, v):
    """(N,T,D) each, in float32 or wider, q divided by sqrt(D)."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    q, k, v = (t.to(dtype).flatten(0, 1) for t in (q, k, v))
    return q / math.sqrt(q.shape[-1]), k, v


class Blockwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, b, causal, sample, temperature):
        (B, H, T, _), given = q.shape, (q, k, v)
        q, k, v = widened(q, k, v)
        b = b.clamp(max=1e30)                  # finite: -inf + b stays -inf
        words = draw_words(B * H, T, q.device) if sample else None
        hidden = q.new_ones((rows_at_once(q),) * 2, dtype=torch.bool).tril(-1) if causal else None
        y, expected, active = torch.empty_like(v), q.new_zeros(B * H), q.new_zeros(B * H)
        with torch.autocast(q.device.type, enabled=False):
            for block in blocks(q, causal):
                heads, keys, rows, _ = block
                p, p_open, _, gates, _ = attend_block(q, k, b, hidden, words, block)
                expected[heads] += p_open.sum((1, 2))                                # (G)
                active[heads] += gates.sum((1, 2))                                   # (G)
                y[heads, rows] = torch.bmm(p.mul_(gates).mT, v[heads, keys])         # (G,R,D)  (3)
        y = y.unflatten(0, (B, H))
        ctx.save_for_backward(*given, b, y, hidden, words)    # y not yet rounded: db needs rows that sum to 0
        ctx.causal, ctx.sharpness, ctx.edges = causal, 1 / temperature, T * (T + 1) // 2 if causal else T * T
        expected, active = ((t / ctx.edges).view(B, H) for t in (expected, active))
        ctx.mark_non_differentiable(active)
        return y.to(given[2].dtype), expected, active

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dexpected, _):
        """A score s acts in three ways: on the softmax, on its gate (straight-through), and on the expected edges.

            ds = p (dweight (A + soft (1 - soft) / temperature) - mean) + dp_open p_open (1 - p_open)
        where weight = A p, soft = sigmoid((g + n) / temperature), and mean = sum_j weight dweight of the row, from
        softmax's gradient.
        b acts on the last two only, but what the softmax adds to ds sums to 0 in every row: so db is the sum of ds.
        """
        *given, b, y, hidden, words = ctx.saved_tensors
        q, k, v = widened(*given)
        y, dy = (t.to(q.dtype).flatten(0, 1) for t in (y, dy))                       # (N,T,D)
        dp_open = dexpected.reshape(-1, 1, 1) / ctx.edges                            # (N,1,1)
        minus_mean = -(dy * y).sum(-1)[:, None]                                      # (N,1,T)
        dq, dk, dv, db = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v), torch.zeros_like(b)
        with torch.autocast(q.device.type, enabled=False):
            for block in blocks(q, ctx.causal):
                heads, keys, rows, _ = block
                p, p_open, u, gates, free = attend_block(q, k, b, hidden, words, block)
                weights = torch.mul(gates, p, out=free)                              # (G,K,R)
                dv[heads, keys].baddbmm_(weights, dy[heads, rows])
                # soft = sigmoid(g + logit(1 - u)) = x / (x + z), x = p_open (1 - u), z = (1 - p_open) u: no logarithm
                x = torch.addcmul(p_open, p_open, u, value=-1, out=free)
                z = u.addcmul_(u, p_open, value=-1)
                soft = x.div_(z.add_(x))
                if ctx.sharpness != 1:                                               # of (g + n) / temperature
                    rest = torch.sub(1, soft, out=z).pow_(ctx.sharpness)
                    soft = soft.pow_(ctx.sharpness).div_(rest.add_(soft))
                # A + soft (1 - soft) / temperature
                gates.add_(soft, alpha=ctx.sharpness).addcmul_(soft, soft, value=-ctx.sharpness)
                dweights = torch.bmm(v[heads, keys], dy[heads, rows].mT, out=free)
                ds = torch.addcmul(minus_mean[heads, :, rows], gates, dweights, out=gates).mul_(p)
                ds.addcmul_(p_open.addcmul_(p_open, p_open, value=-1), dp_open[heads])
                dq[heads, rows] = torch.bmm(ds.mT, k[heads, keys])
                dk[heads, keys].baddbmm_(ds, q[heads, rows])
                if ctx.needs_input_grad[3]:
                    db[heads] += ds.sum((1, 2))
        dq /= math.sqrt(q.shape[-1])
        dq, dk, dv = (t.unflatten(0, dexpected.shape).to(g.dtype) for t, g in zip((dq, dk, dv), given))
        return dq, dk, dv, db, None, None, None
