"""exercises/open/: the answers' own arithmetic, against a second way."""
import itertools
import math
import shlex
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import toy_addition as toy
from exercises.open import arms, estimator, far, greater_than, reward, scale
from model import GPT
from support.files import write_csv, write_json


def test_the_exact_gradient_is_the_slope_of_the_expected_loss():
    """Finite differences of a sum over all settings of the gates, one setting and one edge at a time."""
    g, loss = estimator.random_layer(3, "cross-entropy")

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
    generator = torch.Generator().manual_seed(1)
    s, v, target = (torch.randn(4, n, generator=generator, dtype=torch.float64).numpy() for n in (4, 8, 8))
    readout = 2 * torch.randn(8, 8, generator=generator, dtype=torch.float64).numpy()
    gates, by_hand = np.random.default_rng(0).integers(0, 2, 10), {"square": 0.0, "cross-entropy": 0.0}
    edges = [(i, j) for i in range(4) for j in range(i + 1)]
    for i in range(4):
        y = sum(a * np.exp(s[i, j]) * v[j] for a, (row, j) in zip(gates, edges) if row == i)
        y = y / np.exp(s[i, :i + 1]).sum()
        by_hand["square"] += ((y - target[i]) ** 2).sum()
        by_hand["cross-entropy"] += np.log(np.exp(y @ readout).sum()) - (y @ readout)[target[i].argmax()]
    for kind in estimator.LOSSES:
        g, loss = estimator.random_layer(1, kind)
        assert loss(torch.tensor(gates[None], dtype=torch.float64)).item() == pytest.approx(by_hand[kind])
        assert g.tolist() == pytest.approx([s[edge] for edge in edges])


def test_a_lower_temperature_trades_bias_for_noise(tmp_path, monkeypatch, capsys):
    """Seen over five layers: bias 0.04, 0.12, 0.30, 0.60, noise 3.6, 1.9, 0.8, 0.3. The temperature of 1 points the
    right way even with a single draw."""
    monkeypatch.setattr(sys, "argv", ["estimator", "--layers", "2", "--batches", "32", "--out", str(tmp_path)])
    estimator.main()
    printed = capsys.readouterr().out.splitlines()
    rows = [line.split("|")[2:-1] for line in printed if line.startswith("| square")]
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
    found = reward.rewarded(gpt, True).eval()(idx, targets)    # in evaluation exact, also of a model that draws
    assert 1 - found.loss.item() == pytest.approx(by_hand, abs=1e-6) and 0.1 < by_hand < 0.9


def test_drawn_answers_have_the_gradient_of_the_exact_reward(policy, monkeypatch):
    """With the fewest draws, two, each sum shown 5,000 times. Without gates, which would draw too."""
    monkeypatch.setattr(reward, "ANSWERS", 2)
    gpt, idx, targets = policy
    gpt.set_gates(False)
    slopes, losses = [], []
    reward.DRAWS.manual_seed(0)
    for draw, copies in ((False, 1), (True, 5000)):
        model = reward.rewarded(gpt, draw).train()
        loss = model(idx[::8].repeat(copies, 1), targets[::8].repeat(copies, 1)).loss
        loss.backward()
        losses.append(loss.item())
        slopes.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert losses[1] == pytest.approx(losses[0], abs=5e-3)
    exact, drawn = slopes    # along the exact gradient it is as long; uncorrected for the baseline it would be half
    assert torch.cosine_similarity(drawn, exact, 0).item() > 0.9
    assert (drawn @ exact / exact.square().sum()).item() == pytest.approx(1, abs=0.2)


def test_every_drawn_answer_has_gates_of_its_own(policy):
    """Under the same gates eight answers are right or wrong together, and what a gate is worth would cancel."""
    gpt, idx, targets = policy
    torch.manual_seed(0)
    logits = reward.rewarded(gpt, True).train()(idx, targets).logits.unflatten(0, (8, -1))
    assert logits.shape[:2] == (8, len(idx)) and logits.std(0).mean() > 0.01


def test_windows_are_text_or_tosses_or_copies():
    text, rng = np.full(1000, 65, np.uint16), np.random.default_rng(0)
    rows = far.windows(text, 600, ["text", "tosses", 5, 49], rng)
    assert rows.shape == (600, 128) and rows.dtype == np.uint16
    is_text, tosses = (rows == 65).all(1), ((rows == 48) | (rows == 49)).all(1)
    for n, others in ((5, 49), (49, 5)):
        copies = (rows[:, n:] == rows[:, :-n]).all(1) & ~is_text & ~(rows[:, others:] == rows[:, :-others]).all(1)
        assert 100 < copies.sum() < 200 and (rows[copies] >= 33).all() and (rows[copies] < 127).all()
    assert 100 < is_text.sum() < 200 and 100 < tosses.sum() < 200
    assert (rows[tosses] == 49).mean(1).std() > 0.2    # each window has a coin of its own: a fair one's std is 0.04


def test_the_best_guess_of_a_toss_by_counting():
    """The probability of a sequence under a coin of unknown bias is 1 / ((T + 1) C(T, heads))."""
    rows = far.windows(None, 20, ["tosses"], np.random.default_rng(0))
    exact = [math.log((far.T + 1) * math.comb(far.T, int((row == 49).sum()))) for row in rows]
    assert far.best_ce(rows) == pytest.approx(np.mean(exact) / far.T)


def test_a_model_that_copies_is_right_and_one_that_guesses_is_not():
    def reads_back(d):    # foresees the character that stands d places back
        class Model:
            def eval(self):
                return lambda idx: SimpleNamespace(logits=torch.nn.functional.one_hot(idx.roll(d - 1, 1), 257))
        return Model()
    rows = far.windows(None, 50, [13], np.random.default_rng(0))
    assert far.right(reads_back(13), rows, 13) == 1
    assert far.right(reads_back(4), rows, 13) < 0.2


def test_open_edges_by_distance(monkeypatch):
    """One edge in all, 20 places back: of the distances 16 to 31 it is one of all edges there."""
    maps = torch.zeros(1, 2, 1, far.T - 1, far.T - 1)
    maps[0, 1, 0, 50, 30] = 0.5
    found = far.open_by_distance(SimpleNamespace(attention_maps=lambda idx: maps), np.zeros((2, far.T)))
    edges = sum(far.T - 1 - d for d in range(16, 32))
    assert found == pytest.approx([0, 0, 0.5 / edges, 0])


def test_sentences_of_greater_than_have_later_years():
    idx, targets, years = greater_than.sentences()
    assert idx.shape == targets.shape == (12 * 9 * 98, 12) and (targets[:, :-1] == -1).all()
    assert (targets[:, -1] > years).all() and targets[:, -1].max() == 99 and torch.equal(idx[:, 7], years)
    words = [greater_than.WORDS[t] for t in idx[0]]
    assert " ".join(words) == "The war lasted from the year 11 01 to the year 11"


@torch.no_grad()
def test_heads_kept_without_mlps():
    """With no head either, nothing is left of the clean sentence but its embedding at the last position, which is the
    corrupted one's too. Where MLPs write a constant, they make no difference."""
    import patching as P
    model = GPT(greater_than.GPTConfig(12, len(greater_than.WORDS), 2, 2, 16), torch.Generator().manual_seed(0)).eval()
    for p in model.parameters():
        p.mul_(5)
    clean = greater_than.sentences()[0][::500]
    corrupt = clean.clone()
    corrupt[:, 7] = 1
    metric = lambda logits: logits[:, -1, 5] - logits[:, -1, 50]
    order = P.head_scores(model, clean, corrupt, metric).mean(0).flatten().argsort(descending=True)
    both = P.metric_of_kept_heads, greater_than.kept_without_mlps
    live, corrupted = (measure(model, clean, corrupt, metric, order) for measure in both)
    torch.testing.assert_close(corrupted[:, 0], metric(model(corrupt).logits), atol=1e-5, rtol=0)
    torch.testing.assert_close(live[:, -1], metric(model(clean).logits), atol=1e-5, rtol=0)
    assert (live - corrupted)[:, -1].abs().max() > 0.01
    for block in model.h:
        block.mlp.c_proj.weight.zero_()
    torch.testing.assert_close(*(measure(model, clean, corrupt, metric, order) for measure in both), atol=1e-5, rtol=0)


def test_arms_are_compared_at_a_loss_that_all_have_reached(tmp_path, monkeypatch, capsys):
    """The worst run ends at 1.8: that loss the first arm has with 50 and 20 % of the edges; the second with 10 % and,
    a fifth of the way between two evaluations, 18 %. All have been at 1.6: with 50, 20, 20 and 34 %."""
    losses = {("a", 0): ([2.0, 1.6], [0.9, 0.5]), ("a", 1): ([1.7, 1.5], [0.5, 0.2]),
              ("b", 0): ([1.6, 1.8], [0.2, 0.1]), ("b", 1): ([1.9, 1.4], [0.1, 0.5])}
    commands = []

    def run(line, folder):
        commands.append(line)
        found = losses["a" if "-x" in folder else "b", int(folder[-1])]
        write_json(f"{folder}/args.json", {})
        write_json(f"{folder}/base.json", {})
        write_csv(f"{folder}/log.csv", [{"step": n, "val_ce": ce, "active": share}
                                       for n, (ce, share) in enumerate(zip(*found), start=1)])
    monkeypatch.setattr("extras.sweep.one_run", run)
    arms.compare({"a": "train.py --x", "b": "train.py"}, range(2), tmp_path, 1)
    assert commands == ["train.py --x --seed 0", "train.py --x --seed 1", "train.py --seed 0", "train.py --seed 1"]
    printed = capsys.readouterr().out
    assert "| least edges at CE 1.6000, % | least edges at CE 1.8000, % |" in printed
    first = "| a | 1.5500 (1.5000 to 1.6000) |" + 3 * " 35.00 (20.00 to 50.00) |"
    second = ("| b | 1.6000 (1.4000 to 1.8000) | 30.00 (10.00 to 50.00) | 27.00 (20.00 to 34.00) | "
              "14.00 (10.00 to 18.00) |")
    assert first in printed and second in printed


def test_the_arms_are_commands_that_exist(monkeypatch):
    """Every option is known, and those that an arm shares with the other have one value."""
    from exercises.open import lora, start
    from extras.train_llama import OPTIONS as MORE
    from support.options import parser
    seen = {}
    monkeypatch.setattr(lora, "compare", lambda found, *_: seen.update(found))
    lora.run(SimpleNamespace(init="a model", data="stdlib", steps=7, seeds=1, dtype=None, out="x", at_once=1))
    for line in (*start.ARMS.values(), *seen.values()):
        words = shlex.split(line.partition(" --")[2])
        given = vars(parser(more=MORE).parse_args(["--" + words[0], *words[1:]]))
        assert given.get("device") == "cpu" or (
            given["init"].endswith("a model") and given["warmup"] == 20 and given["steps"] == 7)
    assert len(seen) == 5


@pytest.mark.parametrize("E", [1, 2])
def test_parameters_are_counted_as_a_real_model_has_them(E):
    """Without the norms, which the formula leaves out. The adapters are those that extras.lora puts there."""
    from extras.llama import Llama, LlamaConfig
    from extras.lora import add_adapters
    model = Llama(LlamaConfig(16, 40, 3, 4, 24, n_kv_head=2, n_hidden=36, tied=E == 1))
    found = scale.count(3, 24, 4, 2, 36, 40, E, 16, 5)
    matrices = sum(p.numel() for p in model.parameters() if p.ndim == 2)
    assert found["parameters"] == matrices and found["all trained"] == 22 * matrices
    add_adapters(model, 5, False, torch.bfloat16, torch.Generator())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert found["adapters"] == 2 * matrices + 2 * E * 40 * 24 + 20 * trained
    kept = sum(p.numel() * p.element_size() for p in model.parameters() if p.ndim == 2 and not p.requires_grad)
    assert found["adapters"] - 20 * trained == kept    # as extras.lora keeps them
