import math

import pytest
import torch


def both_open(gates):
    return 1.0 - float(gates[0]) * float(gates[1])


def test_two_edges_that_are_needed(answer):
    g = torch.tensor([4.0, 4.0], dtype=torch.float64)
    p = 1 / (1 + math.exp(-4))
    assert float(answer.hard(both_open, g)) == 0, "both logits are above 0: both hard gates are open, the loss is 0"
    assert float(answer.expected(both_open, g)) == pytest.approx(1 - p * p), \
        "the loss is 1 unless both are open, which has probability p * p. Did you weight every draw?"


def test_a_logit_of_0_is_a_closed_gate(answer):
    g = torch.tensor([0.0, 4.0])
    assert float(answer.hard(both_open, g)) == 1, "a hard gate is open where g > 0, and 0 is not"


def test_against_many_draws(answer):
    g = torch.randn(4, dtype=torch.float64)
    table = torch.rand(2, 2, 2, 2, dtype=torch.float64)    # a loss for each of the 16 draws

    def loss(gates):
        return table[tuple(int(a) for a in gates)]

    draws = (torch.rand(100_000, 4, dtype=torch.float64) < torch.sigmoid(g)).long()
    found = table[tuple(draws.T)]
    assert float(answer.expected(loss, g)) == pytest.approx(found.mean().item(), abs=5 * found.std().item() / 316), \
        "the mean of 100,000 draws is another number: are all 2^n draws counted, each once? The loss is that of bits"
    assert float(answer.hard(loss, g)) == float(table[tuple((g > 0).long())]), "hard: one call of the loss, at [g > 0]"


def test_sure_gates_leave_no_difference(answer):
    g = torch.tensor([60.0, -60.0, 60.0])

    def loss(gates):
        return float(gates[0]) + 2 * float(gates[1]) + 4 * float(gates[2])

    assert float(answer.expected(loss, g)) == pytest.approx(float(answer.hard(loss, g))) == 5, \
        "a gate at 60 is always open, one at -60 never: both losses are 1 + 4"
