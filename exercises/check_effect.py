import pytest
import torch

from exercises import same


def test_two_sentences_with_an_edge_each(answer):
    per_sentence, overall = answer.curves(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    assert per_sentence.tolist() == [0, 1, 1], "each sentence has one edge of its own, so one edge explains each"
    assert overall.tolist() == [0, 0.5, 1], "one ranking for both: the best edge holds half of the mean scores"


def test_signs_cancel_only_in_the_global_mean(answer):
    per_sentence, overall = answer.curves(torch.tensor([[3.0, 1.0], [-3.0, 1.0]]))
    assert per_sentence.tolist() == [0, 0.75, 1], "absolute values first: 3 of 3 + 1 in both sentences"
    assert overall.tolist() == [0, 1, 1], "the mean comes before the absolute value: 3 and -3 cancel"


def test_against_sorting(answer):
    scores = torch.randn(5, 20, dtype=torch.float64)
    per_sentence, overall = answer.curves(scores)

    def curve(row):
        row = sorted((abs(x) for x in row.tolist()), reverse=True)
        return torch.tensor([sum(row[:n]) / sum(row) for n in range(21)], dtype=torch.float64)

    same(per_sentence, sum(map(curve, scores)) / 5, "a curve for each sentence, then the mean of the curves")
    same(overall, curve(scores.mean(0)), "the mean of the scores, then one curve")


@pytest.mark.parametrize("share, n", [(0.5, 1), (0.9, 3), (1.0, 4), (0.0, 0)])
def test_how_many_are_needed(answer, share, n):
    assert answer.needed(torch.tensor([0, 0.5, 0.8, 0.9001, 1.0]), share) == n, "the first n with curve[n] >= share"


def test_a_curve_may_come_down_again(answer):
    """As that of kept heads in exercise 10 may."""
    assert answer.needed(torch.tensor([0, 0.95, 0.5, 1]), 0.9) == 1, \
        "the first n that reaches the share, not the number of entries below it"


def test_never_is_none(answer):
    assert answer.needed(torch.tensor([0, 0.5]), 0.9) is None, "the curve never gets there: None, not its length"
