import pytest
import torch

from toy_addition import addition_data, split


class Sums:
    """Stands in for a trained model: random maps, a set for each sum, but one edge out of the tens slot is open if the
    units carry, except in a share `wrong` of the sums."""

    def __init__(self, layer, head, key, wrong=0.0, upside_down=False):
        self.edge, self.wrong, self.upside_down = (layer, head, key), wrong, upside_down

    def eval(self):
        return self

    def attention_maps(self, idx):
        generator, of_sum = torch.Generator().manual_seed(1), idx[:, [0, 1, 3, 4]] @ torch.tensor([1000, 100, 10, 1])
        maps = (torch.rand(10_000, 2, 3, 9, 9, generator=generator) < 0.3).float()[of_sum].movedim(1, 0)
        is_open = (idx[:, 1] + idx[:, 4] >= 10) ^ self.upside_down
        is_open ^= (torch.rand(10_000, generator=generator) < self.wrong)[of_sum]
        layer, head, key = self.edge
        maps[layer, :, head, 7, key] = is_open * 0.01    # a tiny weight, but not 0
        return maps


@pytest.mark.parametrize("edge", [(0, 0, 1), (1, 2, 6), (1, 0, 7)])
def test_the_edge_is_found(answer, edge):
    idx, (train_rows, held_out) = addition_data()[0], split()
    found = answer.find_carry_edge(Sums(*edge), idx, train_rows, held_out)
    assert found == (edge, 1.0, 0.0), "open is a weight above 0, however small; the tens slot is row 7"


def test_an_edge_that_is_open_without_a_carry_says_as_much(answer):
    idx, (train_rows, held_out) = addition_data()[0], split()
    found = answer.find_carry_edge(Sums(1, 1, 3, upside_down=True), idx, train_rows, held_out)
    assert found == ((1, 1, 3), 0.0, 1.0), "an edge that is open without a carry knows as much: compare |difference|"


def test_shares_are_those_of_the_held_out_sums(answer):
    idx, (train_rows, held_out) = addition_data()[0], split()
    model = Sums(1, 1, 3, wrong=0.2)
    edge, with_carry, without = answer.find_carry_edge(model, idx, train_rows, held_out)
    maps, carry = model.attention_maps(idx[held_out]), idx[held_out, 1] + idx[held_out, 4] >= 10
    is_open = maps[1, :, 1, 7, 3] > 0
    assert edge == (1, 1, 3), "pick on train_rows, over layers, heads and keys"
    assert with_carry == pytest.approx(is_open[carry].float().mean().item()), "the shares are those of held_out"
    assert without == pytest.approx(is_open[~carry].float().mean().item())
