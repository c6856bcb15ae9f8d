"""exercises/open/: the answers' own arithmetic, against a second way."""
import itertools
import math
import sys

import numpy as np
import pytest
import torch

import toy_addition as toy
from exercises.open import estimator, reward
from model import GPT


def test_the_exact_gradient_is_the_slope_of_the_expected_loss():
    """Finite differences of a sum over all settings of the gates, one setting and one edge at a time."""
    g, loss = estimator.random_layer(3)

    def expected_loss(g):
        total = 0.0
        for gates in itertools.product([0.0, 1.0], repeat=10):
            p = [1 / (1 + math.exp(-x if a else x)) for a, x in zip(gates, g)]
            total += math.prod(p) * loss(torch.tensor([gates], dtype=torch.float64)).item()
        return total

    exact = estimator.exact_gradient(g, loss).tolist()
    for n in (0, 4, 9):
        up, down = (g.tolist()[:n] + [g[n].item() + step] + g.tolist()[n + 1:] for step in (1e-5, -1e-5))
        assert exact[n] == pytest.approx((expected_loss(up) - expected_loss(down)) / 2e-5, abs=1e-8)


def test_the_loss_of_the_tiny_layer_by_loops():
    g, loss = estimator.random_layer(1)
    generator = torch.Generator().manual_seed(1)
    s, v, target = (torch.randn(4, n, generator=generator, dtype=torch.float64).numpy() for n in (4, 8, 8))
    gates, by_hand = np.random.default_rng(0).integers(0, 2, 10), 0.0
    edges = [(i, j) for i in range(4) for j in range(i + 1)]
    for i in range(4):
        y = sum(a * np.exp(s[i, j]) * v[j] for a, (row, j) in zip(gates, edges) if row == i)
        by_hand += ((y / np.exp(s[i, :i + 1]).sum() - target[i]) ** 2).sum()
    assert loss(torch.tensor(gates[None], dtype=torch.float64)).item() == pytest.approx(by_hand)
    assert g.tolist() == pytest.approx([s[edge] for edge in edges])


def test_a_lower_temperature_trades_bias_for_noise(tmp_path, monkeypatch, capsys):
    """Seen over five layers: bias 0.04, 0.12, 0.30, 0.60, noise 3.6, 1.9, 0.8, 0.3. The temperature of 1 points the
    right way even with a single draw."""
    monkeypatch.setattr(sys, "argv", ["estimator", "--layers", "2", "--batches", "32", "--out", str(tmp_path)])
    estimator.main()
    printed = capsys.readouterr().out.splitlines()
    rows = [line.split("|")[1:-1] for line in printed if line.startswith(("| 0", "| 1", "| 3"))]
    bias, noise, one, many = ([float(row[n].split()[0]) for row in rows] for n in (1, 2, 3, 4))
    assert len(rows) == 4 and bias == sorted(bias) and noise == sorted(noise, reverse=True)
    assert one[2] > 0.5 and min(many) > 0.9 and (tmp_path / "estimator.png").stat().st_size > 10_000


@pytest.fixture
def policy():
    """A model with random weights, 40 questions, and what it finds the likeliest answers: these count as right."""
    gpt = GPT(toy.toy_config(gated=True, gate_bias=0.0), torch.Generator().manual_seed(2)).double()
    with torch.no_grad():
        for p in gpt.parameters():
            p.mul_(6)
    idx, targets = (rows[::250] for rows in toy.addition_data())
    return gpt, idx, torch.where(targets == -1, -1, gpt.eval()(idx).logits.argmax(-1))


def test_the_exact_reward_is_the_probability_of_a_right_answer(policy):
    gpt, idx, targets = policy
    by_hand = 0.0
    for row, wanted in zip(gpt.eval()(idx).logits.detach().numpy(), targets.numpy()):
        by_hand += math.prod(np.exp(row[t, wanted[t]]) / np.exp(row[t]).sum() for t in (6, 7, 8)) / 40
    found = reward.rewarded(gpt, 8).eval()(idx, targets)    # in evaluation exact, also of a model that draws
    assert 1 - found.loss.item() == pytest.approx(by_hand, abs=1e-6) and 0.1 < by_hand < 0.9


def test_drawn_answers_have_the_gradient_of_the_exact_reward(policy):
    """With very many draws. The gates are shut off: they would draw other numbers."""
    gpt, idx, targets = policy
    gpt.set_gates(False)
    slopes, losses = [], []
    for draws in (0, 20_000):
        model = reward.rewarded(gpt, draws).train()
        torch.manual_seed(0)
        loss = model(idx, targets).loss
        loss.backward()
        losses.append(loss.item())
        slopes.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert losses[1] == pytest.approx(losses[0], abs=2e-3)
    assert torch.cosine_similarity(*slopes, 0) > 0.97 and slopes[1].norm() == pytest.approx(slopes[0].norm(), rel=0.1)
