"""geco.py against its closed form, and on a problem whose constrained optimum is known."""
import math

import pytest
import torch

from geco import Geco


def test_lambda_after_n_steps_is_its_closed_form():
    """CE constant from the start: Cbar = CE - tau, so lam_n = lam_0 exp(rate n (CE - tau))."""
    geco = Geco(tau=3.3, lam=2.0, rate=0.02, decay=0.9)
    for _ in range(50):
        geco.update(3.5)
    assert geco.average == pytest.approx(0.2)
    assert geco.lam == pytest.approx(2.0 * math.exp(0.02 * 50 * 0.2))


def test_lambda_for_a_changing_loss_is_the_published_recursion():
    losses = [4.0, 3.1, 3.9, 3.0, 2.5, 3.3]
    geco = Geco(tau=3.3, rate=0.1, decay=0.8)
    lam, average = 1.0, None
    for ce in losses:
        c = ce - 3.3
        average = c if average is None else 0.8 * average + 0.2 * c
        lam *= math.exp(0.1 * average)
        geco.update(ce)
        assert geco.lam == pytest.approx(lam) and geco.average == pytest.approx(average)


def test_up_above_tau_and_down_below():
    geco = Geco(tau=1.0)
    geco.update(1.2)
    above = geco.lam
    assert above > 1
    for _ in range(200):
        geco.update(0.5)
    assert geco.lam < above


def test_lambda_stays_in_its_range_and_comes_back_at_once():
    geco = Geco(tau=1.0, rate=1.0, decay=0.0, lam_range=(0.1, 10.0))
    for _ in range(100):
        geco.update(1e6)
    assert geco.lam == pytest.approx(10.0)
    geco.update(0.5)
    assert geco.lam == pytest.approx(10.0 * math.exp(-0.5))    # nothing was wound up beyond the range
    for _ in range(100):
        geco.update(0.0)
    assert geco.lam == pytest.approx(0.1)
    for ce, gain in ((1e3, 5.0), (0.0, 50.0)):
        geco = Geco(tau=1.0, rate=1.0, lam_range=(0.1, 3.0), gain=gain)
        geco.update(ce)
        assert 0.1 <= geco.lam <= 3.0


def test_gain_multiplies_lambda_and_zero_is_pure_geco():
    pure, proportional = Geco(tau=1.0, rate=0.1), Geco(tau=1.0, rate=0.1, gain=2.0)
    for ce in (1.5, 1.2, 0.7):
        pure.update(ce)
        proportional.update(ce)
        assert proportional.lam == pytest.approx(pure.lam * math.exp(2.0 * pure.average))


def test_objective_has_the_value_of_the_average_and_the_gradient_of_the_loss():
    geco = Geco(tau=1.0, lam=2.0, decay=0.5)
    assert geco.objective(torch.tensor(0.25), torch.tensor(1.5)).item() == 0.25 + 2.0 * 0.5    # no average yet
    geco.update(3.0)
    lam = geco.lam
    edges, ce = torch.tensor(0.25, requires_grad=True), torch.tensor(1.5, requires_grad=True)
    loss = geco.objective(edges, ce)
    loss.backward()
    assert loss.item() == pytest.approx(0.25 + lam * 2.0)    # Cbar = 3 - 1, though CE - tau is 0.5
    assert edges.grad.item() == 1.0 and ce.grad.item() == pytest.approx(lam)


def nearest_point(geco, steps):
    """Seek the point nearest to the origin within distance 1 of (3, 4): (2.4, 3.2), where the multiplier is 4.
    Returns the point and the multiplier after every step."""
    point, lams = torch.zeros(2, requires_grad=True), []
    optimizer = torch.optim.SGD([point], lr=0.02)
    for _ in range(steps):
        edges, ce = point.square().sum(), (point - torch.tensor([3.0, 4.0])).square().sum()
        optimizer.zero_grad()
        geco.objective(edges, ce).div(1 + geco.lam).backward()
        optimizer.step()
        geco.update(ce.item())
        lams.append(geco.lam)
    return point, lams


@pytest.mark.parametrize("gain", [0.0, 1.0])
def test_reaches_a_known_constrained_optimum(gain):
    geco = Geco(tau=1.0, rate=0.02, decay=0.5, gain=gain)
    point, _ = nearest_point(geco, 4000)
    assert point.tolist() == pytest.approx([2.4, 3.2], abs=1e-3)
    assert geco.lam == pytest.approx(4.0, abs=1e-2)


def test_the_defaults_do_not_swing():
    """Up to the ceiling while the loss is far off, down again, and once past 4 within 2 % of it."""
    _, lams = nearest_point(Geco(tau=1.0), 3000)
    past = next(n for n, lam in enumerate(lams) if max(lams[:n + 1]) > 9 and lam < 4)
    assert past < 2500 and all(abs(lam - 4) < 0.08 for lam in lams[past:])


def test_state_round_trip_is_plain_numbers_and_goes_on_alike():
    geco = Geco(tau=1.0, gain=0.5)
    for ce in (2.0, 1.5):
        geco.update(ce)
    state = geco.state_dict()
    assert all(isinstance(value, (int, float)) for value in state.values())
    other = Geco(tau=1.0, gain=0.5)
    other.load_state_dict(state)
    for g in (geco, other):
        g.update(1.2)
    assert other.lam == geco.lam and other.state_dict() == geco.state_dict()


@pytest.mark.parametrize("ce", [math.nan, math.inf, torch.tensor(math.nan)])
def test_a_loss_that_is_no_number_says_at_which_step(ce):
    geco = Geco(tau=1.0)
    geco.update(1.0)
    before = geco.state_dict()
    with pytest.raises(FloatingPointError, match="at step 1"):
        geco.update(ce)
    assert geco.state_dict() == before


@pytest.mark.parametrize("bad, message", [
    (dict(tau=0.0), "tau must be above 0"),
    (dict(tau=-1.0), "tau must be above 0"),
    (dict(tau=math.nan), "tau must be above 0"),
    (dict(tau=math.inf), "tau must be above 0 nats and finite"),
    (dict(tau=1.0, lam_range=(1e-3, math.inf)), "lam must lie in its range"),
    (dict(tau=1.0, gain=math.inf), "both finite"),
    (dict(tau=1.0, lam=0.0), "lam must lie in its range"),
    (dict(tau=1.0, lam=5.0, lam_range=(0.1, 1.0)), "lam must lie in its range"),
    (dict(tau=1.0, rate=0.0), "rate must be above 0"),
    (dict(tau=1.0, decay=1.0), "decay must lie in"),
    (dict(tau=1.0, gain=-1.0), "gain not below 0"),
])
def test_impossible_constants_are_refused(bad, message):
    with pytest.raises(ValueError, match=message):
        Geco(**bad)
