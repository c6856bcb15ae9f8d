"""gates.py against numpy, closed forms and finite differences; support/blockwise.py against gates.py."""
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from gates import sample_gates, sparse_attention
from support import blockwise
from support.blockwise import blockwise_attention, draw_words, edge_noise
from tests.watch import Watch

ATTENTIONS = [sparse_attention, blockwise_attention]
OPEN = 100.0    # a gate bias at which sigmoid is 1 even in float64's last digits


def qkv(B=2, H=3, T=7, D=4, dtype=torch.float64):
    return [torch.randn(B, H, T, D, dtype=dtype, requires_grad=True) for _ in range(3)]


def sigmoid(x):
    with np.errstate(over="ignore"):    # exp(inf): sigmoid(-inf) = 0
        return 1 / (1 + np.exp(-x))


def by_loops(q, k, v, b, causal, u=None):
    """Section 3 of the paper, one edge at a time, in numpy. b: a number or one for each head. u: the uniform draws of
    the gates, if sampled."""
    q, k, v = (t.detach().numpy() for t in (q, k, v))
    B, H, T, D = q.shape
    b = np.broadcast_to(b, H)
    y, expected, active = np.zeros_like(v), np.zeros((B, H)), np.zeros((B, H))
    for n in range(B):
        for h in range(H):
            edges = 0
            for i in range(T):
                keys = range(i + 1) if causal else range(T)
                s = np.array([q[n, h, i] @ k[n, h, j] / math.sqrt(D) for j in keys])
                weights = np.exp(s) / np.exp(s).sum()
                for j in keys:
                    p = sigmoid(s[j] + b[h])
                    is_open = s[j] + b[h] > 0 if u is None else u[n, h, i, j] > 1 - p
                    y[n, h, i] += is_open * weights[j] * v[n, h, j]
                    expected[n, h] += p
                    active[n, h] += is_open
                    edges += 1
            expected[n, h] /= edges
            active[n, h] /= edges
    return y, expected, active


def draws(attention, B, H, T, seed):
    """The uniform draws (B,H,T,T) of an attention's gates in float64, if its call comes right after this seed."""
    torch.manual_seed(seed)
    if attention is sparse_attention:
        return torch.rand(B, H, T, T, dtype=torch.float64).numpy()
    keys, rows = draw_words(B * H, T, "cpu").numpy().astype(np.int64)
    products = (rows[:, :, None] * keys[:, None, :]).reshape(B, H, T, T)    # exact: 31 + 31 bits
    signed = (products + 2**31) % 2**32 - 2**31                             # in [-2^31, 2^31) by definition of %
    return 0.5 + signed * (1 - 2**-23) / 2**32                              # reference: open if u > 1 - sigmoid(g)


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks so small that short sequences are cut in every way: rows, heads, and what is left over of both."""
    monkeypatch.setattr(blockwise, "ROWS", 4)
    monkeypatch.setattr(blockwise, "CELLS_CPU", 4 * 11 * 2)


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("sample", [True, False])
@pytest.mark.parametrize("b", [0.3, torch.tensor(0.3, dtype=torch.float64),
                               torch.tensor([-1.2, 0.3, 1.5], dtype=torch.float64)])
def test_attention_is_the_definition(attention, causal, sample, b, small_blocks):
    q, k, v = qkv()
    u = draws(attention, 2, 3, 7, seed=1) if sample else None
    torch.manual_seed(1)
    out = attention(q, k, v, b, causal, sample)
    for ours, loops in zip(out, by_loops(q, k, v, b, causal, u)):
        np.testing.assert_allclose(ours.detach().numpy(), loops, atol=1e-12)


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("sample", [True, False])
def test_each_head_is_as_open_as_its_own_bias(attention, sample):
    """Zero scores: the expected share of head h is sigmoid(b_h) for every sequence, and each gate is drawn with it."""
    q, b = torch.zeros(200, 4, 7, 2), torch.tensor([-math.inf, -1.0, 2.0, math.inf])
    _, expected, active = attention(q, q, q, b, True, sample)
    p = torch.sigmoid(b)
    torch.testing.assert_close(expected, p.expand(200, 4))
    error = (p * (1 - p) / (200 * 28)).sqrt()
    assert ((active.mean(0) - (p if sample else (b > 0).float())).abs() <= 4.5 * error * sample).all()


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_expected_edges_by_hand(attention):
    """T = 3, one head of size 1: q = (1, 2, 3), k = (1, 0, -1), b = 0.5 gives six scores one can multiply out."""
    q = torch.tensor([1.0, 2, 3]).view(1, 1, 3, 1)
    k = torch.tensor([1.0, 0, -1]).view(1, 1, 3, 1)
    _, expected, active = attention(q, k, k, 0.5)
    scores = [1, 2, 0, 3, 0, -3]    # s_11, s_21, s_22, s_31, s_32, s_33
    assert expected.item() == pytest.approx(sum(sigmoid(s + 0.5) for s in scores) / 6)
    assert active.item() == pytest.approx(5 / 6)    # only s_33 + b = -2.5 is below 0


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("sample", [True, False])
@pytest.mark.parametrize("causal", [True, False])
def test_all_gates_open_is_softmax_attention(attention, sample, causal):
    q, k, v = qkv()
    weights = torch.randn_like(v)
    y, expected, active = attention(q, k, v, OPEN, causal, sample)
    ours = torch.autograd.grad((y * weights).sum(), (q, k, v))
    dense = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    theirs = torch.autograd.grad((dense * weights).sum(), (q, k, v))
    torch.testing.assert_close(y, dense, atol=1e-6, rtol=0)
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=0)
    assert active.eq(1).all() and expected.sub(1).abs().max() < 1e-12


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("sample", [True, False])
def test_nothing_crosses_the_causal_mask(attention, sample):
    q, k, v = qkv(B=1, H=1)
    for i in range(7):
        torch.manual_seed(i)
        y, _, _ = attention(q, k, v, 5.0, True, sample)    # nearly all open
        grads = torch.autograd.grad(y[0, 0, i].sum(), (q, k, v))
        for grad in grads:
            assert grad[:, :, i + 1:].eq(0).all()
        assert grads[2][:, :, :i + 1].ne(0).any()
        later_k, later_v = k.detach().clone(), v.detach().clone()
        later_k[:, :, i + 1:] += 3
        later_v[:, :, i + 1:] -= 3
        torch.manual_seed(i)
        changed = attention(q, later_k, later_v, 5.0, True, sample)[0]
        assert torch.equal(changed[:, :, :i + 1], y[:, :, :i + 1])
        later_k[:, :, i + 1:] = math.inf    # not even what is no number
        torch.manual_seed(i)
        assert torch.equal(attention(q, later_k, later_v, 5.0, True, sample)[0][:, :, :i + 1], y[:, :, :i + 1])


def outputs_and_gradients(attention, q, k, v, wy, we, b, *options):
    """b: a number, or a tensor whose gradient comes last."""
    y, expected, active = attention(q, k, v, b, *options)
    loss = (y.double() * wy).sum() + (expected.double() * we).sum()
    return [y, expected, active, *torch.autograd.grad(loss, (q, k, v, b) if torch.is_tensor(b) else (q, k, v))]


@pytest.mark.parametrize("T", [1, 3, 4, 11])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("sample", [True, False])
@pytest.mark.parametrize("dtype, digits", [(torch.float64, 1e-10), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("bias, temperature", [(0.4, 1.0), ([0.4, -0.3, 1.1], 1.0), ([0.4, -0.3, 1.1], 0.4)])
def test_blockwise_is_the_definition(T, causal, sample, dtype, digits, bias, temperature, small_blocks, monkeypatch):
    """Values, and gradients of q, k, v and b. Three sequences of three heads: nine, not divisible by the block's two,
    and the gradient of b sums over all three. In float32 an edge at g + n = 0 may fall to either side; none of these
    draws has one. bfloat16: inputs and y are rounded, as under autocast; scores and gates are not."""
    q, k, v = (t.detach().to(dtype).requires_grad_() for t in qkv(B=3, H=3, T=T))
    b = torch.tensor(bias, dtype=torch.promote_types(dtype, torch.float32), requires_grad=True)
    weights = torch.randn(3, 3, T, 4, dtype=torch.float64), torch.randn(3, 3, dtype=torch.float64) * T
    u = torch.from_numpy(draws(blockwise_attention, 3, 3, T, seed=5))
    torch.manual_seed(5)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        ours = outputs_and_gradients(blockwise_attention, q, k, v, *weights, b, causal, sample, temperature)
        monkeypatch.setattr(torch, "rand_like", lambda x: u.to(x.dtype))
        theirs = outputs_and_gradients(sparse_attention, q, k, v, *weights, b, causal, sample, temperature)
    assert T < 11 or 0.1 < ours[2].mean() < 0.95    # open and closed gates are both there
    assert len(ours) == 7 and ours[-1].shape == b.shape
    for x, y in zip(ours, theirs):
        assert x.dtype == y.dtype and x.shape == y.shape
        torch.testing.assert_close(x, y, atol=digits, rtol=digits)


def test_the_gradient_of_b_is_exact_for_bfloat16_inputs():
    """Sure gates: their part of the gradient is far smaller than the softmax's, which adds up to 0 in every row. A
    rounded y would leave a hundredth of the softmax's part in the sum."""
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(4, 2, 256, 64, generator=g).mul(size).bfloat16() for size in (1.7, 1.7, 1))
    wy, we = torch.randn(4, 2, 256, 64, generator=g).bfloat16(), torch.zeros(4, 2)
    found = []
    for attention, dtype in ((blockwise_attention, torch.bfloat16), (sparse_attention, torch.float64)):
        b = torch.full((2,), -3.0, dtype=torch.promote_types(dtype, torch.float32), requires_grad=True)
        inputs = (t.to(dtype).requires_grad_() for t in (q, k, v))
        found.append(outputs_and_gradients(attention, *inputs, wy, we, b)[-1].double())
    torch.testing.assert_close(*found, rtol=1e-3, atol=0)


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_a_bias_without_gradient_changes_nothing_else(attention):
    """A number, and tensors with and without requires_grad: the same results and the same gradients of q, k and v."""
    q, k, v = qkv()
    wanted = outputs_and_gradients(attention, q, k, v, 1.0, 1.0, 0.3)
    for b in (torch.tensor(0.3), torch.full((3,), 0.3, dtype=torch.float64)):
        for trained in (False, True):
            y, expected, active = attention(q, k, v, b.double().requires_grad_(trained))
            gradients = torch.autograd.grad(y.sum() + expected.sum(), (q, k, v))
            for found, number in zip((y, expected, active, *gradients), wanted):
                torch.testing.assert_close(found, number, atol=1e-7, rtol=0)    # 0.3 was rounded to float32


def test_blockwise_gradients_are_finite_differences_where_it_is_smooth(small_blocks):
    """The expected edges are smooth everywhere, y where no gate is near its threshold."""
    q, k, v = qkv(B=2, H=3, T=6, D=2)
    for b in (torch.tensor(0.3, dtype=torch.float64), torch.tensor([-0.5, 0.3, 1.0], dtype=torch.float64)):
        assert torch.autograd.gradcheck(lambda *inputs: blockwise_attention(*inputs[:2], v, inputs[2])[1],
                                        (q, k, b.requires_grad_()))
    assert torch.autograd.gradcheck(lambda q, k, v: blockwise_attention(q, k, v, OPEN)[0], (q, k, v))


@pytest.mark.parametrize("attention, low, high", [(sparse_attention, 15, 16), (blockwise_attention, 3.5, 4)])
def test_memory_grows_linearly_with_length(attention, low, high, monkeypatch):
    """Four times the length: four times the largest tensor in either pass, and four times what is kept for the
    backward pass in all; sixteen times in the definition. (A mask of ROWS x ROWS does not grow.)"""
    monkeypatch.setattr(blockwise, "ROWS", 16)
    monkeypatch.setattr(blockwise, "CELLS_CPU", 1)
    largest, kept = [], []
    for T in (64, 256):
        sizes, elements = [], []
        hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: (sizes.append(t.numel()), t)[1], lambda t: t)
        with hooks, Watch(lambda t: elements.append(t.untyped_storage().nbytes() // t.element_size())):
            y, expected, _ = attention(*qkv(B=1, H=1, T=T, D=8), 0.5, True, True)
            (y.sum() + expected.sum()).backward()
        largest.append(max(elements))
        kept.append(sum(sizes))
    assert low <= largest[1] / largest[0] <= high and low <= kept[1] / kept[0] <= high


def noise(T, seed, head=0):
    torch.manual_seed(seed)
    keys, rows = draw_words(2, T, "cpu")[:, head]
    out = torch.empty(T, T, dtype=torch.int32), torch.empty(T, T, dtype=torch.float64)
    return edge_noise(keys[:, None], rows[None], *out).numpy()


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_every_gate_opens_with_its_own_probability(attention):
    """From outside: one-hot values make y the gated weights, so that the share of draws with y > 0 is P(open)."""
    q, k, _ = (t.detach() for t in qkv(B=1, H=2, T=6, D=3))
    draws = 4000
    many = [t.expand(draws, -1, -1, -1) for t in (q, k, torch.eye(6, dtype=torch.float64).expand(1, 2, 6, 6))]
    is_open = (attention(*many, 0.2, False, True)[0] > 0).double()                    # (draws,H,T,T)
    p = torch.from_numpy(sigmoid((q @ k.mT / math.sqrt(3) + 0.2).numpy()))
    error = (p * (1 - p) / draws).sqrt()
    assert ((is_open.mean(0) - p).abs() < 4.5 * error).all()                          # 72 edges
    pairs = torch.corrcoef(is_open.flatten(1).T)[np.triu_indices(72, 1)]              # 2,556 pairs of edges
    assert pairs.abs().max() < 5 / math.sqrt(draws)


def test_edge_noise_is_uniform():
    """256 equal cells, and every row and column by itself: chi-square and means within 5 standard errors."""
    u = noise(1024, seed=7)
    words = torch.tensor([2**31 - 1, 1 - 2**31], dtype=torch.int32)[:, None, None]    # the ends, in float32
    one, room = torch.ones(2, 1, 1, dtype=torch.int32), torch.empty(2, 1, 1, dtype=torch.int32)
    ends = edge_noise(words, one, room, torch.empty(2, 1, 1)).flatten()
    assert 0 < ends.min() < 1e-6 and 1 - 1e-6 < ends.max() < 1
    counts = np.histogram(u, bins=256, range=(0, 1))[0]
    assert abs(((counts - 4096) ** 2 / 4096).sum() - 255) < 5 * math.sqrt(2 * 255)
    for axis in (0, 1):
        assert abs(u.mean(axis) - 0.5).max() < 5 / math.sqrt(12 * 1024)


@pytest.mark.parametrize("p", [0.5, 0.9, 0.1])
def test_edge_noise_is_independent_between_edges(p):
    """T^2 numbers from 2 T words are not independent for free. A table of independent gates, scaled to variance 1,
    has the largest singular value 2 sqrt(T); shared structure of rows, columns or cells of any shape adds to it.
    Pairs of rows and of columns must be uncorrelated, in sum and each."""
    T, q = 1024, 1 - p
    table = ((noise(T, seed=8) < p) - p) / math.sqrt(p * q)
    assert np.linalg.norm(table, 2) < 1.1 * 2 * math.sqrt(T)
    for side in (table, table.T):
        correlation = side @ side.T / math.sqrt(T)    # (T,T) standard errors
        pairs = correlation[np.triu_indices(T, 1)]
        assert abs((pairs**2).mean() - 1) < 0.05
        assert abs(pairs).max() < 8
    other_head = ((noise(T, seed=8, head=1) < p) - p) / math.sqrt(p * q)
    assert abs((table * other_head).sum()) < 5 * T
    quadruples = np.histogramdd(np.stack([noise(T, seed=9)[i::2, j::2].ravel() for i in (0, 1) for j in (0, 1)]).T,
                                bins=[np.linspace(0, 1, 5)] * 4)[0]               # 2 x 2 cells, 4^4 boxes
    mean = quadruples.mean()
    assert abs(((quadruples - mean) ** 2 / mean).sum() - 255) < 5 * math.sqrt(2 * 255)


def test_gates_are_bits_drawn_with_probability_sigmoid():
    logits = torch.linspace(-4, 4, 9)
    draws = 20_000
    gates = sample_gates(logits.expand(draws, 9), sample=True)
    assert set(gates.unique().tolist()) == {0.0, 1.0}
    p = torch.sigmoid(logits)
    standard_error = (p * (1 - p) / draws).sqrt()
    assert ((gates.mean(0) - p).abs() < 4 * standard_error).all()


def test_without_sampling_a_gate_is_open_above_zero():
    logits = torch.tensor([-math.inf, -1e-3, 0.0, 1e-3, 5.0], requires_grad=True)
    gates = sample_gates(logits, sample=False)
    assert gates.tolist() == [0, 0, 0, 1, 1]
    gates.sum().backward()
    np.testing.assert_allclose(logits.grad, [sigmoid(x) * sigmoid(-x) for x in (-1e9, -1e-3, 0, 1e-3, 5)], rtol=1e-5)


@pytest.mark.parametrize("temperature", [0.2, 1.0, 3.0])
def test_straight_through_gradient_is_its_closed_form_at_the_drawn_noise(temperature):
    logits = torch.randn(50, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(50, dtype=torch.float64)
    torch.manual_seed(3)
    u = torch.rand(50, dtype=torch.float64).numpy()
    torch.manual_seed(3)
    gates = sample_gates(logits, True, temperature)
    (gates * upstream).sum().backward()
    noisy = logits.detach().numpy() + np.log(u) - np.log1p(-u)
    p = sigmoid(noisy / temperature)
    np.testing.assert_allclose(logits.grad, upstream.numpy() * p * (1 - p) / temperature, rtol=1e-10)
    assert gates.tolist() == (noisy > 0).tolist()    # the temperature moves no gate


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("sample", [True, False])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("bias", [0.2, [0.2, -0.7]])
def test_layer_gradients_are_those_of_its_smooth_surrogate(attention, sample, causal, bias):
    """Straight-through means: differentiate as if the gate were A0 + sigmoid(g + n) - sigmoid(g0 + n0), with A0,
    g0, n0 those of the forward pass. That surrogate is smooth, so finite differences can check autograd: for q, k,
    v and b, where b acts on all sequences of the batch."""
    q, k, v = qkv(B=2, H=2, T=5, D=3)
    b = torch.tensor(bias, dtype=torch.float64, requires_grad=True)
    wy, we = np.random.default_rng(0).normal(size=(2, 2, 5, 3)), np.array([[0.7, -2.0], [1.1, 3.0]])
    u = draws(attention, 2, 2, 5, seed=4)
    noise = np.log(u) - np.log1p(-u) if sample else np.zeros((2, 2, 5, 5))
    torch.manual_seed(4)
    y, expected, _ = attention(q, k, v, b, causal, sample)
    (y * torch.from_numpy(wy)).sum().add((expected * torch.from_numpy(we)).sum()).backward()

    allowed = np.tri(5) > 0 if causal else np.ones((5, 5), bool)
    start = [t.detach().numpy().copy() for t in (q, k, v, b)]

    def scores_and_logits(q, k, b):
        s = np.where(allowed, q @ k.swapaxes(2, 3) / math.sqrt(3), -np.inf)
        return s, s + (b[:, None, None] if b.ndim else b)

    g0 = scores_and_logits(start[0], start[1], start[3])[1]

    def surrogate(q, k, v, b):
        s, g = scores_and_logits(q, k, b)
        weights = np.exp(s) / np.exp(s).sum(-1, keepdims=True)
        gates = (g0 + noise > 0) + sigmoid(g + noise) - sigmoid(g0 + noise)
        return (wy * ((gates * weights) @ v)).sum() + (we * sigmoid(g).sum((2, 3))).sum() / allowed.sum()

    eps = 1e-5
    for n, tensor in enumerate((q, k, v, b)):
        for at in np.ndindex(*tensor.shape):
            plus, minus = [t.copy() for t in start], [t.copy() for t in start]
            plus[n][at] += eps
            minus[n][at] -= eps
            slope = (surrogate(*plus) - surrogate(*minus)) / (2 * eps)
            assert tensor.grad[at].item() == pytest.approx(slope, abs=1e-8)
    assert b.grad.abs().min() > 1e-3    # not a test of zeros


@pytest.mark.parametrize("u", [0.0, 1.0])
def test_extreme_draws_stay_finite(monkeypatch, u):
    monkeypatch.setattr(torch, "rand_like", lambda x, **kw: torch.full_like(x, u, **kw))
    logits = torch.tensor([-math.inf, -1e4, -1.0, 0.0, 1.0, 1e4], requires_grad=True)
    gates = sample_gates(logits, sample=True)
    gates.sum().backward()
    assert gates.tolist() == ([0, 0, 0, 0, 0, 1] if u == 0 else [0, 0, 1, 1, 1, 1])
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("sample", [True, False])
def test_huge_scores_are_sure(attention, sample):
    """Scores of about 1e19: the softmax takes the largest, and a gate is open exactly where its score is above 0."""
    q, k, v = ((t * s).detach().requires_grad_() for t, s in zip(qkv(dtype=torch.float32), (1e19, 1.0, 1.0)))
    y, expected, active = attention(q, k, v, 1.0, True, sample)
    (y.sum() + expected.sum()).backward()
    scores = (q @ k.mT).masked_fill(torch.ones(7, 7).triu(1) > 0, -math.inf)
    best = scores.argmax(-1, keepdim=True)
    wanted = torch.where(scores.gather(-1, best) > 0, v.gather(-2, best.expand(-1, -1, -1, 4)), 0)
    torch.testing.assert_close(y, wanted)
    share = (scores > 0).sum((-2, -1)) / 28
    torch.testing.assert_close(active, share)
    torch.testing.assert_close(expected, share)
    for t in (q.grad, k.grad, v.grad):
        assert t.isfinite().all()


def test_values_of_another_size_and_strided_inputs(small_blocks):
    """v may have a head size of its own (attention_maps does that), and model.py passes transposed views."""
    q, k = (torch.randn(2, 9, 3, 4, dtype=torch.float64, requires_grad=True).transpose(1, 2) for _ in range(2))
    v = torch.randn(2, 3, 5, 9, dtype=torch.float64, requires_grad=True).mT
    weights = torch.randn(2, 3, 9, 5, dtype=torch.float64), torch.randn(2, 3, dtype=torch.float64)
    both = [outputs_and_gradients(attention, q, k, v, *weights, 0.4) for attention in ATTENTIONS]
    for a, b in zip(*both):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-10)


def test_the_real_block_size_once():
    """Blocks of queries as they are in use, the last of two rows."""
    T = 2 * blockwise.ROWS + 2
    q, k, v = qkv(B=1, H=1, T=T)
    weights = torch.randn(1, 1, T, 4, dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64)
    for causal in (True, False):
        both = [outputs_and_gradients(attention, q, k, v, *weights, 0.4, causal) for attention in ATTENTIONS]
        for a, b in zip(*both):
            torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("N, T", [(1, 96), (1, 8192), (32, 512), (192, 1024), (3, 100_000)])
def test_an_accelerators_blocks_cover_all_edges_in_few_calls(N, T, causal):
    """On the meta device, which computes nothing. A block holds at most CELLS_GPU edges, but ROWS rows at least."""
    found = [block[:3] for block in blockwise.blocks(torch.empty(N, T, 4, device="meta"), causal)]
    allowed = 0
    for heads, keys, rows in found:
        R, G = rows.stop - rows.start, min(heads.stop, N) - heads.start
        assert keys == slice(0, rows.stop if causal else T)
        assert G * R * T <= blockwise.CELLS_GPU or (R <= blockwise.ROWS and G == 1)
        allowed += G * (sum(range(rows.start + 1, rows.stop + 1)) if causal else R * T)
    assert allowed == N * (T * (T + 1) // 2 if causal else T * T)
    assert len(found) <= 4 * max(1, N * T * T / blockwise.CELLS_GPU)


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_a_gate_is_open_in_evaluation_if_and_only_if_its_logit_is_positive(attention):
    """However little: in float32, sigmoid(1e-9) is 1/2."""
    v = torch.ones(1, 1, 1, 1)
    for score, share in ((1e-9, 1.0), (0.0, 0.0), (-1e-9, 0.0)):
        assert attention(torch.full((1, 1, 1, 1), score), v, v, 0.0)[2].item() == share


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_shapes_that_do_not_fit_are_named(attention):
    q, k, v = qkv()
    for bad in ((q, k[:, :, :5], v), (q, k[:1], v), (q, k, v[:, :, :5]), (q, k, v[:, :2]), (q[0], k[0], v[0]),
                (q[:, :, :0], k[:, :, :0], v[:, :, :0])):
        shapes = ", ".join(str(tuple(t.shape)) for t in bad[:2]) + f" and {tuple(bad[2].shape)}"
        with pytest.raises(ValueError, match=r"expected q and k \(B,H,T,D\)") as caught:
            attention(*bad, 0.5)
        assert str(caught.value).endswith(f"got {shapes}")
    for shape in ((1,), (2,), (7,), (1, 3), (2, 3), (3, 1, 1), (2, 3, 7, 7), (0,)):
        with pytest.raises(ValueError, match=r"gate_bias a number, or a tensor \(\) or \(3,\)") as caught:
            attention(q, k, v, torch.zeros(shape))
        assert str(caught.value).endswith(f"got {shape}")


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("sample", [True, False])
@pytest.mark.parametrize("shape", [None, (), (3,)])
def test_an_infinite_bias_opens_every_allowed_gate(attention, sample, shape):
    b = math.inf if shape is None else torch.full(shape, math.inf, dtype=torch.float64, requires_grad=True)
    y, expected, active, *gradients = outputs_and_gradients(attention, *qkv(), 1.0, 1.0, b, True, sample)
    assert y.isfinite().all() and expected.eq(1).all() and active.eq(1).all()
    assert all(g.isfinite().all() for g in gradients) and (shape is None or gradients[3].abs().max() < 1e-12)


def test_rare_gates_open_as_rarely_as_they_should():
    """logit -9: one in 8,100. A clamp of the uniform draws that is too coarse would never open it, or too often."""
    share = sample_gates(torch.full((4_000_000,), -9.0), sample=True).mean().item()
    p = sigmoid(-9.0)
    assert abs(share - p) < 4 * math.sqrt(p / 4_000_000)


@pytest.mark.parametrize("sample", [True, False])
def test_bfloat16_logits_give_float32_gates(sample):
    assert sample_gates(torch.randn(9, dtype=torch.bfloat16), sample).dtype == torch.float32


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_bfloat16_autocast_keeps_scores_and_gates_in_float32(attention):
    q, k, v = (t.detach().bfloat16() for t in qkv(T=64, D=16))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, expected, active = attention(q, k, v, 0.5)
    exact = sparse_attention(q.double(), k.double(), v.double(), 0.5)
    assert y.dtype == torch.bfloat16 and expected.dtype == torch.float32
    torch.testing.assert_close(y.double(), exact[0], atol=1e-2, rtol=1e-2)          # rounding of the output alone
    torch.testing.assert_close(expected.double(), exact[1], atol=1e-6, rtol=0)     # bfloat16 scores: 1e-3 off
    torch.testing.assert_close(active.double(), exact[2], atol=1e-6, rtol=0)       # one flipped edge: 5e-4
