"""toy_addition.py: the data by exhaustive check, determinism, a training that becomes sparse, and the command line."""
import copy
import json
import math
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

import toy_addition as toy
from geco import Geco
from model import GPT
from support.figures import draw_film
from support.files import UserError, make_folder

ROOT = Path(toy.__file__).parent


@pytest.mark.parametrize("layout", toy.SLOTS)
def test_every_sum_is_there_once_and_right(layout):
    idx, targets = toy.addition_data(layout)
    seen = set()
    for tokens, answer in zip(idx.tolist(), targets.tolist()):
        text = "".join(toy.ALPHABET[t] for t in tokens)
        question, slots = text[:6], text[6:]
        assert set(slots) == {"?"} and answer[:6] == [-1] * 6
        digits = "".join(toy.ALPHABET[t] for t in answer[6:])
        value = int(digits[::-1]) if layout == "reversed" else int(digits)
        a, b = question.rstrip("=").split("+")
        assert len(a) == len(b) == 2 and int(a) + int(b) == value
        seen.add(question)
    assert len(seen) == len(idx) == 10_000


def test_the_examples_of_figure_1():
    assert toy.as_text(36, 28, "paper") == ("36+28=?????", "00064")
    assert toy.as_text(36, 28, "reversed") == ("36+28=???", "460")
    carries = [(a % 10 + b % 10 > 9) + (a + b > 99) for a, b in toy.EXAMPLES.values()]
    assert carries == [0, 1, 2]


def test_the_split_is_fixed_and_disjoint():
    train, held_out = toy.split()
    assert len(train) == 8000 and len(held_out) == 2000
    assert sorted(torch.cat((train, held_out)).tolist()) == list(range(10_000))
    torch.manual_seed(99)
    assert torch.equal(toy.split()[0], train)


@pytest.mark.parametrize("layout, edges", [("reversed", 2 * 45), ("paper", 2 * 121)])
def test_allowed_edges_by_counting(layout, edges):
    config = toy.toy_config(layout, gated=True, gate_bias=1e4)
    assert toy.allowed_edges(config) == edges
    idx, _ = toy.addition_data(layout)
    maps = GPT(config).eval().attention_maps(idx[:2])
    assert (maps > 0).sum((0, 2, 3, 4)).tolist() == [edges, edges]


def ten_losses(seed, gated, monkeypatch):
    """Of the first ten training steps, evaluations left out."""
    losses, forward = [], GPT.forward

    def watched(model, *args):
        out = forward(model, *args)
        if model.training:
            losses.append(out.loss.item())
        return out

    idx, targets = toy.addition_data()
    model = GPT(toy.toy_config(gated=gated), generator=torch.Generator().manual_seed(seed))
    torch.rand(seed + 7)    # what others drew before must not matter
    monkeypatch.setattr(GPT, "forward", watched)
    if gated:
        toy.train_sparse(model, idx, targets, 10, Geco(tau=0.02), seed)
    else:
        toy.train_dense(model, idx, targets, 10, seed)
    monkeypatch.undo()
    return losses


@pytest.mark.parametrize("gated", [False, True])
def test_same_seed_same_first_ten_losses(gated, monkeypatch, one_thread):
    first = ten_losses(0, gated, monkeypatch)
    assert len(first) == 10 and ten_losses(0, gated, monkeypatch) == first
    assert ten_losses(1, gated, monkeypatch) != first
    assert first[0] == pytest.approx(math.log(13), abs=0.1)    # all 13 characters equally likely


def test_evaluate_counts_sums_and_edges():
    """Against a loop over single sums of an untrained model; half of the sums get its own answer as target."""
    idx, targets = toy.addition_data()
    idx, targets = idx[::500], targets[::500].clone()
    model = GPT(toy.toy_config(gated=True, gate_bias=0.3)).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 2:
                p.mul_(10)
        targets[::2, 6:] = model(idx[::2]).logits.argmax(-1)[:, 6:]
    right = [all(p == t for p, t in zip(model(i[None]).logits[0].argmax(-1).tolist(), ts.tolist()) if t >= 0)
             for i, ts in zip(idx, targets)]
    edges = [(model.attention_maps(i[None]) > 0).sum().item() for i in idx]
    found = toy.evaluate(model, idx, targets)
    assert found["accuracy"] == pytest.approx(sum(right) / 20) and 10 <= sum(right) < 20
    assert found["active"] == pytest.approx(sum(edges) / 20)
    model.eval()
    assert found["hard_ce"] == pytest.approx(model(idx, targets).loss.item())
    expected = [model(i[None]).expected_edges.mean().item() * 90 for i in idx]
    assert found["eval_expected"] == pytest.approx(sum(expected) / 20)
    assert abs(found["eval_expected"] - found["active"]) > 0.1


@pytest.mark.parametrize("hard_ce, accuracy, kept", [
    (0.01, 1.0, True), (0.0151, 1.0, False), (0.015, 1.0, True), (0.01, 0.9999, False), (math.nan, 1.0, False)])
def test_few_wrong_sums_are_not_outweighed_by_many_sure_ones(hard_ce, accuracy, kept):
    assert toy.meets_constraint({"hard_ce": hard_ce, "accuracy": accuracy}, 0.015) == kept


def by_hand(model, idx, targets, steps, tau, rate, decay, lam_range, history, seed=0):
    """The sparse phase written out, on plain tensors: AdamW, the averaged weights, (4) and (5). -> the rows of its
    history, and the last average. What the constraint saw is computed anew, but lam follows history's, since a last
    digit in it would flip a gate in time."""
    order, look = (torch.Generator().manual_seed(seed) for _ in range(2))
    torch.manual_seed(seed)
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    first, second = ({name: torch.zeros_like(p) for name, p in params.items()} for _ in range(2))
    average, log_lam, c_bar, rows = None, 0.0, None, []
    for t in range(1, steps + 1):
        lr = 1e-3 * min(t / 100, 0.55 + 0.45 * math.cos(math.pi * (t - 1) / steps))
        batch = torch.randint(len(idx), (32,), generator=order)
        out = model.train()(idx[batch], targets[batch])
        share, lam = out.expected_edges.mean(), math.exp(log_lam)
        gradients = torch.autograd.grad(share + lam * out.loss, list(params.values()))
        with torch.no_grad():
            for (name, p), g in zip(params.items(), gradients):
                first[name] = 0.9 * first[name] + 0.1 * g
                second[name] = 0.95 * second[name] + 0.05 * g * g
                p *= 1 - lr * (3.0 if name.endswith("c_attn.weight") else 0.01)
                p -= lr * (first[name] / (1 - 0.9**t)) / ((second[name] / (1 - 0.95**t)).sqrt() + 1e-8)
        if t % 10 == 0 or t == steps:
            now = {name: p.detach().clone() for name, p in params.items()}
            average = {name: 0.9 * average[name] + 0.1 * now[name] for name in now} if average else now
            kept = copy.deepcopy(model).eval()
            kept.load_state_dict(model.state_dict() | average)
            batch = torch.randint(len(idx), (512,), generator=look)
            with torch.no_grad():
                seen = kept(idx[batch], targets[batch]).loss.item()
            c = history[len(rows)]["seen"] - tau
            c_bar = c if c_bar is None else decay * c_bar + (1 - decay) * c
            log_lam = min(max(log_lam + rate * c_bar, math.log(lam_range[0])), math.log(lam_range[1]))
            rows.append({"step": t, "ce": out.loss.item(), "seen": seen, "lam": lam, "c_bar": c_bar,
                         "expected": share.item() * toy.allowed_edges(model.config)})
    return rows, average


def test_the_sparse_phase_against_a_loop_by_hand():
    """In float64, where 45 steps cannot drift apart. So this pins what the constraint looks at: the averaged weights,
    with hard gates, each tenth step and at the last."""
    idx, targets = toy.addition_data()
    start = GPT(toy.toy_config(gated=True, gate_bias=0.0), generator=torch.Generator().manual_seed(3)).double()
    tau, rate, decay, lam_range = 2.36, 6.0, 0.6, (0.7, 10.0)    # the CE passes tau, so lam moves both ways
    model, other = copy.deepcopy(start), copy.deepcopy(start)
    history = toy.train_sparse(model.eval(), idx, targets, 45, Geco(tau, 1.0, rate, decay, lam_range))
    rows, average = by_hand(other, idx, targets, 45, tau, rate, decay, lam_range, history)
    assert [row["step"] for row in history] == [10, 20, 30, 40, 45]
    for ours, theirs in zip(history, rows, strict=True):
        assert {name: ours[name] for name in theirs} == pytest.approx(theirs, rel=1e-6)
    for name, p in average.items():
        torch.testing.assert_close(model.get_parameter(name).detach(), p, rtol=1e-6, atol=1e-9)
    lams = [row["lam"] for row in rows]
    assert lams[0] < max(lams) > lams[-1]
    found = toy.evaluate(model, idx, targets)
    assert {name: history[-1][name] for name in found} == pytest.approx(found)


@pytest.mark.parametrize("phase", ["dense", "sparse"])
def test_a_broken_loss_says_when_and_what_to_do(phase):
    idx, targets = toy.addition_data()
    model = GPT(toy.toy_config(gated=phase == "sparse"))
    with torch.no_grad():
        model.wte.weight[3] = math.nan
    with pytest.raises(FloatingPointError, match=f"is nan at {phase} step 1\n.*another --seed"):
        if phase == "dense":
            toy.train_dense(model, idx, targets, 5)
        else:
            toy.train_sparse(model, idx, targets, 5, toy.toy_geco(0.01))


def test_the_dense_phase_goes_on_until_every_sum_is_right(monkeypatch):
    """For five evaluations in a row, from step 1,500 on: four are too few. The model is a stand-in without attention.
    """
    idx, targets = toy.addition_data()
    found = iter([1.0, 1.0, 1.0, 1.0, 0.9999] + 5 * [1.0])
    monkeypatch.setattr(toy, "evaluate", lambda *_: {"accuracy": next(found)})
    monkeypatch.setattr(GPT, "forward", lambda model, *_: types.SimpleNamespace(loss=model.wte.weight.square().mean()))
    history = toy.train_dense(GPT(toy.toy_config()), idx, targets, 10_000)
    assert len(history) == 2500 and [row["step"] for row in history if "accuracy" in row] == list(range(250, 2501, 250))


def test_the_dense_phase_leaves_the_average_of_its_weights(monkeypatch):
    """After steps 10, 20 and 25, by hand from the weights that each step left, with a decay of 4 on q, k and v and a
    rate that rises over 100 steps."""
    idx, targets = toy.addition_data()
    model, seen = GPT(toy.toy_config(), generator=torch.Generator().manual_seed(3)).double(), []
    descend = toy.descend

    def watched(objective, ce, optimizer, lr, where):
        descend(objective, ce, optimizer, lr, where)
        decayed = {id(p) for group in optimizer.param_groups for p in group["params"] if group["weight_decay"] == 4}
        assert decayed == {id(block.attn.c_attn.weight) for block in model.h}
        assert lr == pytest.approx(2e-3 * (len(seen) + 1) / 100)
        seen.append(model.h[0].mlp.c_fc.weight.detach().clone())

    monkeypatch.setattr(toy, "descend", watched)
    toy.train_dense(model, idx, targets, 25)
    assert len(seen) == 25
    torch.testing.assert_close(model.h[0].mlp.c_fc.weight.detach(),
                               0.9 * (0.9 * seen[9] + 0.1 * seen[19]) + 0.1 * seen[24])


@pytest.mark.parametrize("layout, tens", [("reversed", 7), ("paper", 9)])
@pytest.mark.parametrize("inverted", [False, True])
def test_the_carry_edge_is_found_and_counted(inverted, layout, tens):
    """A stand-in model with a known pattern: in layer 1 the tens slot reads position 6 iff there is a carry
    (or iff there is none: an edge that is absent says as much)."""
    idx, _ = toy.addition_data(layout)

    class Known(GPT):
        def attention_maps(self, idx):
            maps = torch.zeros(2, len(idx), 2, idx.shape[1], idx.shape[1])
            maps[0, :, :, tens, 0] = 0.5                                       # always there: tells nothing
            maps[1, :, 0, tens, 6] = ((idx[:, 1] + idx[:, 4] >= 10) != inverted).float()
            return maps

    train_rows, held_out = toy.split()
    model = Known(toy.toy_config(layout, gated=True))
    edge, with_carry, without = toy.find_carry_edge(model, idx, train_rows, held_out)
    assert (edge, with_carry, without) == ((1, 0, 6), float(not inverted), float(inverted))


def test_the_sparsest_average_that_is_right_is_kept(monkeypatch):
    """Four evaluations: right with 8 edges, right with 5, not right with 2, right with 6."""
    idx, targets = toy.addition_data()
    found = iter([(1.0, 8.0), (1.0, 5.0), (0.9, 2.0), (1.0, 6.0)])

    def evaluate(model, rows, _):
        if len(rows) < len(idx):    # a look of lambda
            return {"hard_ce": 0.0}
        return dict(zip(("accuracy", "active"), next(found)), hard_ce=0.0)

    monkeypatch.setattr(toy, "evaluate", evaluate)
    monkeypatch.setattr(GPT, "forward", lambda model, *_: types.SimpleNamespace(
        loss=model.wte.weight.square().mean(), expected_edges=model.wpe.weight.square().mean()[None]))
    model, seen = GPT(toy.toy_config(gated=True)), []
    toy.train_sparse(model, idx, targets, 1000, toy.toy_geco(0.01),
                     watch=lambda averaged: seen.append(averaged.wte.weight.detach().clone()))
    assert len(seen) == 4 and not torch.equal(seen[1], seen[3]) and torch.equal(model.wte.weight, seen[1])


def test_held_out_sums_are_not_trained_on(tmp_path, monkeypatch):
    """And the run trains as its options say, and tells whether its constraint was met."""
    seen, phases = [], []
    for name in ("train_dense", "train_sparse"):
        phase = getattr(toy, name)
        monkeypatch.setattr(toy, name, lambda model, idx, *more, phase=phase, **options: (
            seen.append(idx), phases.append((model, more)), phase(model, idx, *more, **options))[2])
    for name in ("draw_attention", "draw_training"):
        monkeypatch.setattr(toy, name, lambda *_: None)
    for met in (True, False):
        monkeypatch.setattr(toy, "meets_constraint", lambda *_: met)
        assert toy.run(types.SimpleNamespace(out=str(tmp_path), layout="reversed", seed=7, tau=0.5, gate_bias=1.5,
                                             rate=0.2, dense_steps=2, steps=3, no_gif=True)) is met
    held_out = set(map(tuple, toy.addition_data()[0][toy.split()[1]].tolist()))
    assert len(seen) == 4 and not any(held_out & set(map(tuple, rows.tolist())) for rows in seen)
    (_, (_, *of_dense)), (model, (_, *of_sparse)) = phases[:2]
    assert of_dense == [2, 7] and of_sparse[::2] == [3, 7] and model.h[1].attn.gate_bias.tolist() == [1.5]
    geco = of_sparse[1]
    assert (geco.tau, geco.rate, geco.decay, geco.lam_range) == (0.5, pytest.approx(0.4), 0.6, (0.5, 10.0))


def test_the_slots_are_named_in_their_order():
    """The least significant digit comes first in one layout, last in the other."""
    assert toy.places("reversed") == ["units", "tens", "hundreds"]
    assert toy.places("paper") == ["ten thousands", "thousands", "hundreds", "tens", "units"]


def test_training_closes_most_edges_of_a_task_whose_edges_are_known():
    """Each slot copies one digit: three edges of 90 would do. By hand, seeds 0 to 19: 3.0 to 4.3 edges, one
    9.0; every copy right, CE at most 0.0028."""
    idx, targets = toy.addition_data()
    targets = targets.clone()
    targets[:, 6:] = idx[:, [0, 1, 4]]
    model = GPT(toy.toy_config(), generator=torch.Generator().manual_seed(0))
    toy.train_dense(model, idx, targets, 250)
    model.set_gates(True, 0.0)
    history = toy.train_sparse(model, idx, targets, 500, toy.toy_geco(0.01))
    found = toy.evaluate(model, idx, targets)
    assert found["hard_ce"] < 0.1 and found["active"] < 45
    assert [row["step"] for row in history if "active" in row] == [250, 500]
    evaluations = [row for row in history if "active" in row and toy.meets_constraint(row, 0.01)]
    kept = min(evaluations or history[-1:], key=lambda row: row["active"])
    assert found == pytest.approx({name: kept[name] for name in found})


def command(*arguments):
    line = [sys.executable, ROOT / "toy_addition.py", *arguments]
    done = subprocess.run(line, capture_output=True, text=True, cwd=ROOT)
    return done.returncode, done.stdout, done.stderr


def test_the_command_writes_what_it_promises(tmp_path):
    out = tmp_path / "new" / "folder"
    code, stdout, stderr = command("--dense-steps", "20", "--steps", "20", "--seed", "3", "--out", str(out),
                                   "--layout", "paper")
    assert code == 1, stderr
    assert "242" in stdout and "the constraint is NOT met: on the training sums CE is " in stdout.splitlines()[-2]
    summary = json.loads((out / "summary.json").read_text())
    assert {"seed", "dense_accuracy", "sparse_accuracy", "active_edges_per_example", "allowed_edges", "active_share",
            "carry_edge_with_carry", "carry_edge_without_carry", "tau", "seconds"} <= set(summary)
    assert summary["seed"] == 3 and summary["allowed_edges"] == 242
    sparse = GPT.from_pretrained(out / "sparse.pt")
    assert sparse.config == toy.toy_config("paper", gated=True, gate_bias=0.0)
    idx, targets = toy.addition_data("paper")
    found = toy.evaluate(sparse, idx[toy.split()[1]], targets[toy.split()[1]])
    assert found["active"] == pytest.approx(summary["active_edges_per_example"], rel=1e-6)
    assert not GPT.from_pretrained(out / "dense.pt").config.gated
    for picture, begins in (("addition.png", b"\x89PNG"), ("training.png", b"\x89PNG"), ("addition.gif", b"GIF89a")):
        assert (out / picture).read_bytes().startswith(begins)


def test_the_film_has_a_frame_for_each_evaluation(tmp_path):
    """Counted in the file: a frame begins with a graphic control extension. The last stays four times as long, which
    some versions of the writer store as four more frames."""
    idx, targets = (t[::20] for t in toy.addition_data())
    model, frames, seen = GPT(toy.toy_config(gated=True, gate_bias=0.0)), [], []

    def watch(averaged):
        frames.append(averaged.attention_maps(idx[181][None])[:, 0])
        seen.append(toy.evaluate(averaged, idx, targets)["active"])

    history = toy.train_sparse(model, idx, targets, 255, toy.toy_geco(0.01), watch=watch)
    rows = [row for row in history if "active" in row]
    assert [row["step"] for row in rows] == [250, 255] and seen == [row["active"] for row in rows]
    draw_film(rows, frames, ["q"] * 9, "36+28=???", True, 0.01, "36 + 28", tmp_path / "film.gif")
    film = (tmp_path / "film.gif").read_bytes()
    assert film.startswith(b"GIF89a") and len(film) < 200_000
    assert len(re.findall(rb"\x21\xf9\x04.{4}\x00\x2c", film, re.DOTALL)) in (2, 6)
    assert [path.name for path in tmp_path.iterdir()] == ["film.gif"]


@pytest.mark.parametrize("arguments, message", [
    (["--tau", "0"], "argument --tau: 0 is not between 1e-06 and 10"),
    (["--tau", "nan"], "argument --tau: nan is not between"),
    (["--tau", "much"], "argument --tau: invalid float value: 'much'"),
    (["--seed", "-1"], "argument --seed: -1 is not between 0 and"),
    (["--seed", "99999999999999999999"], "argument --seed: 99999999999999999999 is not between 0 and"),
    (["--steps", "1.5"], "argument --steps: invalid int value: '1.5'"),
    (["--gate-bias", "-1"], "argument --gate-bias: -1 is not between 0"),
    (["--layout", "upside-down"], "invalid choice: 'upside-down'"),
    (["--taus", "1"], "unrecognized arguments: --taus 1"),
    (["--out", str(ROOT / "model.py" / "x")], "cannot write to"),
])
def test_a_users_mistake_gets_three_lines_and_exit_code_2(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["toy_addition.py", *arguments])
    with pytest.raises(SystemExit) as stopped:
        toy.main()
    stdout, stderr = capsys.readouterr()
    assert stopped.value.code == 2 and message in stderr and stdout == ""
    assert len(stderr.splitlines()) <= 3


def test_an_unwritable_folder_is_refused(tmp_path, monkeypatch):
    def refuse(**kw):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    with pytest.raises(UserError, match="(?s)cannot write to .*Permission denied.*another folder"):
        make_folder(tmp_path)
