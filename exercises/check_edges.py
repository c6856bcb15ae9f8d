import math

import pytest
import torch

from exercises import same


@pytest.mark.parametrize("bias, share", [(0.0, 1 / 2), (math.log(3), 3 / 4), (-math.log(3), 1 / 4)])
def test_three_positions_by_hand(answer, bias, share):
    q = torch.zeros(1, 1, 3, 4)
    same(answer.expected_edges(q, q, bias), torch.full((1, 1), share), "all scores are 0: each gate has sigmoid(b); a "
         "share of how many edges?")


def test_an_edge_into_the_future_does_not_count(answer):
    q, k = torch.zeros(2, 1, 1, 3, 1)
    q[0, 0, 0, 0], k[0, 0, 1, 0] = 5.0, 1.0    # the first query meets the second key
    same(answer.expected_edges(q, k, 0.0), torch.full((1, 1), 0.5), "no query may read a later key: mask, then add")


def test_against_a_loop(answer):
    q, k = torch.randn(2, 2, 3, 5, 4)
    found = answer.expected_edges(q, k, 0.7)
    for b in range(2):
        for h in range(3):
            p = [1 / (1 + math.exp(-(q[b, h, i] @ k[b, h, j] / 2 + 0.7))) for i in range(5) for j in range(i + 1)]
            assert found[b, h].item() == pytest.approx(sum(p) / 15, abs=1e-5), \
                "15 edges are allowed, scores are divided by sqrt(D) = 2, and b is added after that"


def test_it_can_be_differentiated(answer):
    q, k = torch.randn(2, 1, 1, 4, 2, requires_grad=True).unbind()
    share = answer.expected_edges(q, k, 0.0).sum()
    assert share.requires_grad, "training needs a gradient: no > and no detach on the way"
    gradient, = torch.autograd.grad(share, k)
    assert gradient.abs().sum() > 0, "the keys have no gradient"
