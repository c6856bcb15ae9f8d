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


def test_objective_is_the_lagrangian():
    """In value and in its gradients, whatever the average is by then."""
    geco = Geco(tau=1.0, lam=2.0, rate=0.1, decay=0.5)
    for lam in (2.0, 2.0 * math.exp(0.1 * 2.0)):    # before the first update, and after C = 2
        edges, ce = torch.tensor(0.25, requires_grad=True), torch.tensor(1.5, requires_grad=True)
        loss = geco.objective(edges, ce)
        loss.backward()
        assert loss.item() == pytest.approx(0.25 + lam * 0.5)
        assert edges.grad.item() == 1.0 and ce.grad.item() == pytest.approx(lam)
        assert geco.objective(0.25, 0.5) == pytest.approx(0.25 - lam * 0.5)
        geco.update(3.0)


def test_update_returns_the_lambda_that_the_step_used():
    """The multiplier of the objective that was backpropagated just before, not the one that comes next."""
    geco = Geco(tau=1.0, lam=0.7, rate=0.3, decay=0.5)
    used, slopes = [], []
    for n in range(6):
        ce = torch.tensor(2.0 - 0.4 * n, requires_grad=True)
        geco.objective(torch.tensor(0.0), ce).backward()
        slopes.append(ce.grad.item())
        used.append(geco.update(ce.item()))
    assert used[0] == pytest.approx(0.7) and used == pytest.approx(slopes)
    assert len(set(used)) == 6 and geco.lam not in used
    assert all(isinstance(lam, float) for lam in used)


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


def test_reaches_a_known_constrained_optimum():
    geco = Geco(tau=1.0, rate=0.02, decay=0.5)
    point, _ = nearest_point(geco, 4000)
    assert point.tolist() == pytest.approx([2.4, 3.2], abs=1e-3)
    assert geco.lam == pytest.approx(4.0, abs=1e-2)


def test_the_defaults_do_not_swing():
    """Up to the ceiling while the loss is far off, down again, and once past 4 within 2 % of it."""
    _, lams = nearest_point(Geco(tau=1.0), 3000)
    past = next(n for n, lam in enumerate(lams) if max(lams[:n + 1]) > 9 and lam < 4)
    assert past < 2500 and all(abs(lam - 4) < 0.08 for lam in lams[past:])


def test_state_round_trip_is_plain_numbers_and_goes_on_alike():
    geco = Geco(tau=1.0, lam=0.5)
    for ce in (2.0, 1.5):
        geco.update(torch.tensor(ce))
    state = geco.state_dict()
    assert all(type(value) in (int, float) for value in state.values()) and state["steps"] == 2
    other = Geco(tau=1.0)    # starts elsewhere
    other.load_state_dict(state)
    assert other.lam == geco.lam
    assert geco.update(1.2) == other.update(1.2)
    assert other.lam == geco.lam and other.state_dict() == geco.state_dict()


@pytest.mark.parametrize("ce", [math.nan, math.inf, torch.tensor(math.nan)])
def test_a_loss_that_is_no_number_says_at_which_update(ce):
    geco = Geco(tau=1.0)
    geco.update(1.0)
    before = geco.state_dict()
    with pytest.raises(FloatingPointError, match="at update 1"):
        geco.update(ce)
    assert geco.state_dict() == before


@pytest.mark.parametrize("bad, message", [
    (dict(tau=0.0), "tau must be above 0"),
    (dict(tau=-1.0), "tau must be above 0"),
    (dict(tau=math.nan), "tau must be above 0"),
    (dict(tau=math.inf), "tau must be above 0 nats and finite"),
    (dict(tau=1.0, lam_range=(1e-3, math.inf)), "lam must lie in its range"),
    (dict(tau=1.0, rate=math.inf), "rate must be above 0 and finite"),
    (dict(tau=1.0, lam=0.0), "lam must lie in its range"),
    (dict(tau=1.0, lam=5.0, lam_range=(0.1, 1.0)), "lam must lie in its range"),
    (dict(tau=1.0, rate=0.0), "rate must be above 0"),
    (dict(tau=1.0, decay=1.0), "decay must lie in"),
    (dict(tau=1.0, decay=-0.1), "decay must lie in"),
])
def test_impossible_constants_are_refused(bad, message):
    with pytest.raises(ValueError, match=message):
        Geco(**bad)
