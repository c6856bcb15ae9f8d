"""toy_addition.py: the data by exhaustive check, determinism, a training that becomes sparse, and the command line."""
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import toy_addition as toy
from geco import Geco
from model import GPT
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
    assert toy.encode(36, 28, "paper") == ("36+28=?????", "00064")
    assert toy.encode(36, 28, "reversed") == ("36+28=???", "460")
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


def ten_losses(seed, gated):
    idx, targets = toy.addition_data()
    model = GPT(toy.toy_config(gated=gated), generator=torch.Generator().manual_seed(seed))
    torch.rand(seed + 7)    # what others drew before must not matter
    history = toy.train(model, idx, targets, 10, 1e-3, seed, Geco(tau=0.02) if gated else None)
    return [row["ce"] for row in history]


@pytest.mark.parametrize("gated", [False, True])
def test_same_seed_same_first_ten_losses(gated):
    first = ten_losses(0, gated)
    assert ten_losses(0, gated) == first
    assert ten_losses(1, gated) != first
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
    found, wrong = toy.evaluate(model, idx, targets)
    assert wrong.tolist() == [not r for r in right]
    assert found["accuracy"] == pytest.approx(sum(right) / 20) and 10 <= sum(right) < 20
    assert found["active"] == pytest.approx(sum(edges) / 20)
    model.eval()
    assert found["hard_ce"] == pytest.approx(model(idx, targets).loss.item())


@pytest.mark.parametrize("hard_ce, accuracy, kept", [
    (0.01, 1.0, True), (0.0151, 1.0, False), (0.01, 0.9991, True), (0.01, 0.9989, False), (math.nan, 1.0, False)])
def test_few_wrong_sums_are_not_outweighed_by_many_sure_ones(hard_ce, accuracy, kept):
    assert toy.meets_constraint({"hard_ce": hard_ce, "accuracy": accuracy}, 0.015) == kept


def test_training_samples_gates_whatever_mode_the_model_was_in():
    idx, targets = toy.addition_data()
    active = []
    for mode in (True, False):
        model = GPT(toy.toy_config(gated=True, gate_bias=0.0), generator=torch.Generator().manual_seed(0))
        history = toy.train(model.train(mode), idx, targets, 3, 1e-3, geco=toy.toy_geco(0.1), eval_every=3)
        active.append([row["expected"] for row in history])
    assert active[0] == active[1]


def test_a_broken_loss_says_when_and_what_to_do():
    idx, targets = toy.addition_data()
    model = GPT(toy.toy_config())
    with torch.no_grad():
        model.wte.weight[3] = math.nan
    with pytest.raises(FloatingPointError, match="is nan at dense step 1\n.*another --seed"):
        toy.train(model, idx, targets, 5, 1e-3)


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


def test_a_minute_of_training_becomes_sparse():
    """Dense until it adds, then gates under GECO: far fewer edges, and still right on sums never seen."""
    idx, targets = toy.addition_data()
    train_rows, held_out = toy.split()
    dense = GPT(toy.toy_config(), generator=torch.Generator().manual_seed(0))
    toy.train(dense, idx[train_rows], targets[train_rows], 1200, 3e-3, batch_size=128)
    assert toy.evaluate(dense, idx[held_out], targets[held_out])[0]["accuracy"] > 0.95
    sparse = GPT(toy.toy_config()).train()
    sparse.load_state_dict(dense.state_dict())
    sparse.set_gates(True)
    start = toy.evaluate(sparse, idx[held_out], targets[held_out])[0]["active"]
    history = toy.train(sparse, idx[train_rows], targets[train_rows], 1000, 1e-3, eval_every=100,
                        geco=toy.toy_geco(0.05))
    found = toy.evaluate(sparse, idx[held_out], targets[held_out])[0]
    assert found["active"] < 0.4 * 90 < start and found["accuracy"] > 0.99
    again = toy.evaluate(sparse, idx[train_rows], targets[train_rows])[0]
    assert again["active"] == pytest.approx(min(row["active"] for row in history
                                                if "active" in row and toy.meets_constraint(row, 0.05)))


def command(*arguments):
    line = [sys.executable, ROOT / "toy_addition.py", *arguments]
    done = subprocess.run(line, capture_output=True, text=True, cwd=ROOT)
    return done.returncode, done.stdout, done.stderr


def test_the_command_writes_what_it_promises(tmp_path):
    out = tmp_path / "new" / "folder"
    code, stdout, stderr = command("--dense-steps", "20", "--steps", "20", "--seed", "3", "--out", str(out),
                                   "--layout", "paper")
    assert code == 0, stderr
    assert "no evaluation met CE <= 0.03" in stdout and "242" in stdout
    summary = json.loads((out / "summary.json").read_text())
    assert {"seed", "dense_accuracy", "sparse_accuracy", "active_edges_per_example", "allowed_edges", "active_share",
            "carry_edge_with_carry", "carry_edge_without_carry", "tau", "seconds"} <= set(summary)
    assert summary["seed"] == 3 and summary["allowed_edges"] == 242
    sparse = GPT.from_pretrained(out / "sparse.pt")
    assert sparse.config == toy.toy_config("paper", gated=True, gate_bias=2.0)
    idx, targets = toy.addition_data("paper")
    found = toy.evaluate(sparse, idx[toy.split()[1]], targets[toy.split()[1]])[0]
    assert found["active"] == pytest.approx(summary["active_edges_per_example"], rel=1e-6)
    assert not GPT.from_pretrained(out / "dense.pt").config.gated
    for picture in ("addition.png", "training.png"):
        assert (out / picture).read_bytes().startswith(b"\x89PNG")


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
