import pytest
import torch


@pytest.fixture
def example():
    """A sparse pattern (H,T,T), values and gradients (H,T,D)."""
    pattern = torch.rand(2, 5, 5, dtype=torch.float64).tril() * (torch.rand(2, 5, 5) < 0.6)
    return pattern, *torch.randn(2, 2, 5, 3, dtype=torch.float64)


def test_edge_by_edge(answer, example):
    pattern, v, gradient = example
    c = answer.carried(*example)
    for h, i, j in torch.cartesian_prod(*map(torch.arange, (2, 5, 5))).tolist():
        expected = pattern[h, i, j] * sum(gradient[h, i, d] * v[h, j, d] for d in range(3))
        assert c[h, i, j].item() == pytest.approx(expected.item()), \
            f"head {h}, query {i}, key {j}: the gradient is the query's, the value is the key's"


def test_the_parts_add_up_to_the_change(answer, example):
    """y is linear in z here, so that the sum is exact."""
    pattern, v, gradient = example
    y = (gradient * (pattern @ v)).sum()
    assert answer.carried(*example).sum().item() == pytest.approx(y.item()), "all edges together are the whole effect"
    without = pattern.clone()
    without[1, :, 2] = 0
    change = y - (gradient * (without @ v)).sum()
    assert answer.carried(*example)[1, :, 2].sum().item() == pytest.approx(change.item()), \
        "closing key 2 of head 1 to all queries must change y by what this column carries"


def test_a_closed_gate_carries_nothing(answer, example):
    pattern = example[0]
    assert answer.carried(*example)[pattern == 0].eq(0).all(), "where the pattern is 0 nothing flows"


def test_the_strongest_pair(answer):
    pattern, v = torch.ones(2, 3, 3), torch.tensor([[[1.0], [3.0], [0.0]], [[2.0], [0.0], [-1.0]]])
    gradient = torch.tensor([[[1.0], [-1.0], [0.5]], [[-1.0], [-1.0], [-1.0]]])
    assert tuple(answer.strongest_key(pattern, v, gradient)) == (1, 0), \
        "add up over queries first: key 1 of head 0 carries 3, -3 and 1.5, together 1.5; key 0 of head 1 carries " \
        "-6, and |-6| is the most"
