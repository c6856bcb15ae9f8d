import pytest
import torch
import torch.nn.functional as F

from exercises import same


def qkv(dtype=torch.float64):
    return torch.randn(3, 2, 3, 6, 4, dtype=dtype).unbind()


@pytest.mark.parametrize("causal", [True, False])
def test_with_every_gate_open_it_is_softmax_attention(answer, causal):
    q, k, v = qkv()
    y, expected, active = answer.sparse_attention(q, k, v, 100.0, causal, sample=True)
    same(y, F.scaled_dot_product_attention(q, k, v, is_causal=causal), "b = 100 opens every allowed gate, so y "
         "must be ordinary softmax attention: over which keys, along which axis?")
    assert (active == 1).all() and expected.min() > 0.999, "both are shares of the allowed edges: " \
        "21 with a causal mask, 36 without"


def test_with_every_gate_shut_it_is_nothing(answer):
    y, expected, active = answer.sparse_attention(*qkv(), -100.0)
    assert (y == 0).all() and (active == 0).all() and expected.max() < 1e-6, \
        "no open gate, no output: an exact 0, with no softmax over the open keys (0 / 0)"


def test_a_weight_is_the_softmax_or_an_exact_zero(answer):
    q, k, _ = qkv()
    v = torch.eye(6, dtype=torch.float64).expand(2, 3, 6, 6)    # one-hot values: y is the weights
    weights, _, active = answer.sparse_attention(q, k, v, 0.2)
    dense = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    is_open = (q @ k.mT / 2 + 0.2 > 0) & torch.ones(6, 6, dtype=torch.bool).tril()
    same(weights, dense * is_open, "the softmax runs over all allowed keys, the gate multiplies: not renormalised")
    same(active.double(), is_open.sum((-2, -1)).double() / 21, "21 of the 36 edges are allowed")
    assert 0 < active.mean() < 1, "with b = 0.2 some of these gates are open and some are shut"


def test_one_draw_makes_output_share_and_gradient(answer):
    q, k, _ = qkv()
    v = torch.eye(6, dtype=torch.float64).expand(2, 3, 6, 6)
    b = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
    weights, expected, active = answer.sparse_attention(q, k, v, b, sample=True)
    dense = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    same(weights.detach(), dense * (weights != 0), "a drawn gate is a bit too: the softmax's weight, or an exact 0")
    same(active.detach().double(), (weights != 0).sum((-2, -1)).double() / 21, "active counts the gates that y uses")
    p = torch.sigmoid(q @ k.mT / 2 + b.detach()).tril()
    same(expected.detach(), p.sum((-2, -1)) / 21, "expected is the sum of sigmoid(s + b), whatever was drawn")
    for what, value in (("y", weights.sum()), ("expected", expected.sum())):    # the softmax does not see a shift by b
        assert value.requires_grad, f"{what} has no gradient: nothing could be trained"
        gradient, = torch.autograd.grad(value, b, retain_graph=True, allow_unused=True)
        assert gradient is not None and gradient.abs() > 1e-6, f"{what} must have a gradient through the gates"


def test_a_score_has_a_gradient_through_its_gate_and_through_the_softmax(answer):
    q, k, v = (t.requires_grad_() for t in qkv())
    y, expected, _ = answer.sparse_attention(q, k, v, 0.2)
    allowed = torch.ones(6, 6, dtype=torch.bool).tril()
    scores = (q @ k.mT / 2).masked_fill(~allowed, -torch.inf)
    soft = torch.sigmoid(scores + 0.2)
    bits = (scores + 0.2 > 0) + soft - soft.detach()    # a bit with the gradient of its probability
    for what, ours, rule in (("y", y, bits * scores.softmax(-1) @ v), ("expected", expected, soft.sum((-2, -1)) / 21)):
        assert ours.requires_grad, f"{what} has no gradient: is something detached?"
        weight = torch.randn_like(rule)
        for x, name in ((q, "q"), (k, "k"), (v, "v")):
            found, right = (torch.autograd.grad(t, x, weight, retain_graph=True, allow_unused=True)[0]
                            for t in (ours, rule))
            if right is not None:
                assert found is not None, f"{what} has no gradient with respect to {name}"
                same(found, right, f"the gradient of {what} with respect to {name}: a score acts on y through its gate "
                     "and the softmax, on expected through its gate alone; is something detached?")


def test_the_future_is_never_read(answer):
    q, k, v = qkv()
    y = answer.sparse_attention(q, k, v, 5.0)[0]
    for i in range(5):
        later_k, later_v = k.clone(), v.clone()
        later_k[:, :, i + 1:], later_v[:, :, i + 1:] = 9.0, -9.0
        changed = answer.sparse_attention(q, later_k, later_v, 5.0)[0]
        assert torch.equal(changed[:, :, :i + 1], y[:, :, :i + 1]), f"keys after {i} changed what came before"


def test_draws_differ_and_their_mean_is_expected(answer):
    q, k, v = (t[:1, :1].expand(4000, -1, -1, -1) for t in qkv())
    _, expected, active = answer.sparse_attention(q, k, v, 0.0, sample=True)
    assert active.std() > 0, "with sample=True each call draws its gates"
    assert abs(active.mean() - expected.mean()) < 0.01, "the mean over draws is the expected share, the sum of sigmoids"
