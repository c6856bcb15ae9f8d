import math

import pytest
import torch


def test_the_closed_form(answer):
    """With decay 0, log lam is log lam_0 plus rate times the sum of all C."""
    geco = answer.Geco(2.0, lam=0.5, rate=0.1, decay=0.0)
    losses = [2.5, 2.2, 1.7, 2.1, 1.1]
    for ce in losses:
        geco.update(ce)
    lam = 0.5 * math.exp(0.1 * sum(ce - 2 for ce in losses))
    assert geco.lam == pytest.approx(lam), "log lam adds rate * C, and C is CE - tau"


def test_the_average_starts_at_the_first_value(answer):
    geco = answer.Geco(2.0, rate=1.0, decay=0.9)
    geco.update(3.0)
    assert geco.lam == pytest.approx(math.exp(1.0)), "the first Cbar is the first C itself, not a tenth of it"
    geco.update(2.0)
    assert geco.lam == pytest.approx(math.exp(1.0 + 0.9)), "the second Cbar is 0.9 of the first: C is 0 now"


def test_it_rises_above_tau_and_falls_below(answer):
    for ce, sign in ((2.1, 1), (1.9, -1)):
        geco = answer.Geco(2.0)
        geco.update(ce)
        assert (geco.lam - 1) * sign > 0, "above tau lam must rise: the loss weighs more. Below, it must fall"


@pytest.mark.parametrize("ce, end", [(1e3, 1e3), (0.0, 1e-3)])
def test_it_stays_in_its_range_and_comes_back(answer, ce, end):
    geco = answer.Geco(2.0, rate=1.0, decay=0.0, lam_range=(1e-3, 1e3))
    try:
        for _ in range(10_000):
            geco.update(ce)
        lam = geco.lam
    except OverflowError:
        pytest.fail("exp(rate * Cbar) or lam overflows: add rate * Cbar to log lam, and clamp log lam at every update")
    assert lam == pytest.approx(end), "clamp to lam_range"
    geco.update(2 - math.copysign(1, ce - 2))    # one step the other way moves it at once
    assert abs(math.log(geco.lam / end)) == pytest.approx(1), "clamp what is stored (log lam), not only what is read"


def test_the_objective_is_the_lagrangian(answer):
    """Before the first update and after some: lam changes, but the average is no part of the objective."""
    geco = answer.Geco(2.0, lam=3.0, rate=0.5, decay=0.5)
    for lam in (3.0, 3.0 * math.exp(0.5 * 0.4)):
        edges, ce = torch.tensor(0.25, requires_grad=True), torch.tensor(9.0, requires_grad=True)
        loss = geco.objective(edges, ce)
        loss.backward()
        assert loss.item() == pytest.approx(0.25 + lam * 7), "edges + lam (ce - tau), with the ce of this very step"
        assert edges.grad.item() == pytest.approx(1) and ce.grad.item() == pytest.approx(lam), "lam is a plain number"
        geco.update(2.4)


def test_update_returns_the_lam_that_the_step_used(answer):
    geco = answer.Geco(2.0, lam=0.5, rate=0.1, decay=0.0)
    assert geco.update(3.0) == pytest.approx(0.5), "update returns the lam from before it: the step has used that one"
    assert geco.update(2.0) == pytest.approx(0.5 * math.exp(0.1)), "a loss of 3 is 1 above tau: lam grew by exp(rate)"
    assert geco.update(4.0) == pytest.approx(0.5 * math.exp(0.1)), "the loss was tau, and decay is 0: lam did not move"
    assert geco.lam == pytest.approx(0.5 * math.exp(0.3)), "lam is what the last update left, not what it returned"


@pytest.mark.parametrize("ce", [math.nan, math.inf])
def test_a_broken_loss_is_not_swallowed(answer, ce):
    geco = answer.Geco(2.0)
    try:
        geco.update(ce)
    except FloatingPointError:
        geco.update(3.0)
        assert geco.lam == pytest.approx(math.exp(0.002)), "raise before Cbar and lam have changed"
    else:
        pytest.fail("raise FloatingPointError: else lam is nan from now on, or stays as if nothing had happened")
