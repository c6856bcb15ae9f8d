from types import SimpleNamespace

import pytest
import torch

from toy_addition import addition_data, split


class Sums:
    """Stands in for a trained model: random maps, a set for each sum, but one edge out of the tens slot is open if the
    units carry, except in a share `wrong` of the sums."""

    def __init__(self, layer, head, key, wrong=0.0, upside_down=False):
        self.edge, self.upside_down = (layer, head, key), upside_down
        self.config = SimpleNamespace(n_layer=2, n_head=3, block_size=9)
        generator = torch.Generator().manual_seed(1)
        self.maps = torch.rand(10_000, 2, 3, 9, 9, generator=generator) < 0.3
        self.errs = torch.rand(10_000, generator=generator) < wrong

    def eval(self):
        return self

    def attention_maps(self, idx):
        of_sum = idx[:, [0, 1, 3, 4]] @ torch.tensor([1000, 100, 10, 1])
        maps = self.maps[of_sum].float().movedim(1, 0)
        is_open = (idx[:, 1] + idx[:, 4] >= 10) ^ self.upside_down ^ self.errs[of_sum]
        layer, head, key = self.edge
        maps[layer, :, head, 7, key] = is_open * 1e-6    # a tiny weight, but not 0
        return maps


class TwoEdges(Sums):
    """One edge tells the carry in all training sums, and errs in a fifth of the held-out ones; the other does the
    opposite."""

    def __init__(self, right_in_training, right_elsewhere, train_rows):
        super().__init__(*right_in_training)
        self.other = right_elsewhere
        self.in_training = torch.zeros(10_000, dtype=torch.bool)
        self.in_training[train_rows] = True

    def attention_maps(self, idx):
        maps, of_sum = super().attention_maps(idx), idx[:, [0, 1, 3, 4]] @ torch.tensor([1000, 100, 10, 1])
        carry, seen = idx[:, 1] + idx[:, 4] >= 10, self.in_training[of_sum]
        errs = (torch.rand(10_000, generator=torch.Generator().manual_seed(2)) < 0.2)[of_sum]
        for (layer, head, key), wrong in ((self.edge, errs & ~seen), (self.other, errs & seen)):
            maps[layer, :, head, 7, key] = (carry ^ wrong).float()
        return maps


SHARES = "the edge is right, its shares are not: a carry is a sum of units from 10 on, and a share is one of the " \
    "held-out sums with (without) a carry"


@pytest.mark.parametrize("edge", [(0, 0, 1), (1, 2, 6), (1, 0, 7)])
def test_the_edge_is_found(answer, edge):
    idx, (train_rows, held_out) = addition_data()[0], split()
    found, *shares = answer.find_carry_edge(Sums(*edge), idx, train_rows, held_out)
    assert found == edge, \
        "open is a weight above 0, however small; the tens slot is row T - 2; over layers, heads and keys"
    assert shares == [1.0, 0.0], SHARES


def test_an_edge_that_is_open_without_a_carry_says_as_much(answer):
    idx, (train_rows, held_out) = addition_data()[0], split()
    edge, *shares = answer.find_carry_edge(Sums(1, 1, 3, upside_down=True), idx, train_rows, held_out)
    assert edge == (1, 1, 3), "an edge that is open without a carry knows as much: compare |difference|"
    assert shares == [0.0, 1.0], SHARES


def test_it_is_picked_on_one_set_and_reported_on_the_other(answer):
    idx, (train_rows, held_out) = addition_data()[0], split()
    model = TwoEdges((1, 1, 3), (0, 2, 5), train_rows)
    edge, with_carry, without = answer.find_carry_edge(model, idx, train_rows, held_out)
    assert edge == (1, 1, 3), "pick on train_rows alone: on what it was picked for, an edge looks better than it is"
    assert with_carry - without < 0.8, "the shares are those of held_out"


def test_shares_are_those_of_the_held_out_sums(answer):
    """The sums come in any order: a row's number says nothing about its digits."""
    idx, (train_rows, held_out) = addition_data()[0][torch.randperm(10_000)], split()
    model = Sums(1, 1, 3, wrong=0.2)
    edge, with_carry, without = answer.find_carry_edge(model, idx, train_rows, held_out)
    maps, carry = model.attention_maps(idx[held_out]), idx[held_out, 1] + idx[held_out, 4] >= 10
    is_open = maps[1, :, 1, 7, 3] > 0
    assert edge == (1, 1, 3), "pick on train_rows, over layers, heads and keys"
    assert with_carry == pytest.approx(is_open[carry].float().mean().item()), "the shares are those of held_out"
    assert without == pytest.approx(is_open[~carry].float().mean().item()), "the third result: sums without a carry"
