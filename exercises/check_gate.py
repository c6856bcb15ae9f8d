import math

import pytest
import torch

from exercises import same


def test_without_noise_a_gate_is_open_where_its_logit_is_positive(answer):
    gates = answer.sample_gates(torch.tensor([-2.0, -0.1, 0.0, 0.1, 3.0, -math.inf]), sample=False)
    assert gates.tolist() == [0, 0, 0, 1, 1, 0], \
        "a gate is a bit, 0 or 1, and without noise it is 1 exactly where its logit is above 0. If it is 0.99999994: " \
        "in which order do you add and subtract?"


def test_gates_are_bits_and_open_with_probability_sigmoid(answer):
    logits = torch.tensor([-2.0, 0.0, 1.5, -6.0])
    gates = answer.sample_gates(logits.expand(20_000, 4), sample=True)
    assert set(gates.unique().tolist()) == {0.0, 1.0}, \
        "forward must be a bit: is it the sigmoid? If it is 0.99999994: in which order do you add and subtract?"
    assert gates[:, 3].any(), "a gate at -6 opens in one draw of 400: keep u from 0 and 1, but not so far from them"
    p = torch.sigmoid(logits)
    assert ((gates.mean(0) - p).abs() < 4 * (p * (1 - p) / 20_000).sqrt()).all(), \
        "the noise must be logistic, log(u / (1 - u)), added to the logit before the comparison with 0"


def test_the_gradient_is_that_of_the_noisy_sigmoid(answer):
    logits = torch.linspace(-3, 3, 7, dtype=torch.float64, requires_grad=True)
    torch.manual_seed(5)
    u = torch.rand_like(logits)
    torch.manual_seed(5)
    gates = answer.sample_gates(logits, sample=True)
    assert gates.requires_grad, "the bit has no gradient: how can the sigmoid lend it one? See the questions of gate.py"
    gates.sum().backward()
    noisy = (logits + torch.log(u / (1 - u))).detach()
    soft = torch.sigmoid(noisy)
    same(logits.grad, soft * (1 - soft), "the gradient is that of sigmoid(g + n), not of sigmoid(g), with the n that "
         "made the bit: one torch.rand_like(g) for both")
    assert torch.equal(gates > 0.5, noisy > 0), "one draw for both: the bit is g + n > 0, n that of the gradient"


def test_without_noise_the_gradient_is_that_of_the_sigmoid(answer):
    logits = torch.linspace(-3, 3, 7, dtype=torch.float64, requires_grad=True)
    gates = answer.sample_gates(logits, sample=False)
    assert gates.requires_grad, "no noise, and still a gradient: that of sigmoid(logits)"
    gates.sum().backward()
    soft = torch.sigmoid(logits)
    same(logits.grad, (soft * (1 - soft)).detach(), "the value is hard, the gradient soft: detach one, add the other")


@pytest.mark.parametrize("u", [0.0, 1.0])
def test_extreme_draws_do_no_harm(answer, monkeypatch, u):
    monkeypatch.setattr(torch, "rand_like", lambda x, **_: torch.full_like(x, u))
    logits = torch.tensor([-1.0, 2.0, -math.inf, math.inf], requires_grad=True)
    gates = answer.sample_gates(logits, sample=True)
    assert gates.requires_grad, "the bit has no gradient"
    gates.sum().backward()
    assert gates[2] == 0 and gates[3] == 1 and gates.isfinite().all() and logits.grad.isfinite().all(), \
        f"u = {u} makes log(u / (1 - u)) infinite, and inf - inf is nan: keep u away from 0 and 1 (in float32 " \
        "1 - 1e-8 is 1)"
