"""train.py as a user runs it: small runs in processes of their own, killed, resumed and spread over ranks."""
import argparse
import contextlib
import copy
import csv
import io
import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import train
from geco import Geco
from model import GPT, GPTConfig
from support import data, report
from support.files import UserError
from support.log import Log, best_row, by_head, share_at
from support.place import Place
from support.weights import save_checkpoint

ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared"
OPEN = ["--gate-bias", "100"]    # every gate open whatever the noise, so that ranks can be compared


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A folder with a text, a model that reads bytes, and a cache; options of a run of a second or two."""
    folder = tmp_path_factory.mktemp("tiny")
    words = "the cat sat on a mat and then it ran to see what was in her old hat".split()
    rng = np.random.default_rng(0)
    documents = (" ".join(rng.choice(words, 60)) for _ in range(200))
    (folder / "text.txt").write_text("\n\n\n".join(documents))
    config = GPTConfig(block_size=16, vocab_size=257, n_layer=2, n_head=2, n_embd=32)
    save_checkpoint(GPT(config, generator=torch.Generator().manual_seed(0)), folder / "init.pt")
    return folder


def options(tiny, out, *more):
    return ["--init", str(tiny / "init.pt"), "--data", str(tiny / "text.txt"), "--out", str(out), "--steps", "20",
            "--batch-size", "8", "--grad-accum", "1", "--lr", "0.003", "--warmup", "5", "--eval-every", "5",
            "--eval-windows", "16", "--device", "cpu", *more]


def start(tiny, *args, launcher=()):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_HOME": str(tiny / "home"), "TMPDIR": str(tiny)}
    script = [] if "-c" in launcher else [ROOT / "train.py"]
    return subprocess.Popen([sys.executable, *map(str, [*launcher, *script, *args])], text=True, cwd=ROOT,
                            env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def finish(process):
    try:
        output, errors = process.communicate(timeout=600)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return process.returncode, output, errors


def go(tiny, *args, **kwargs):
    code, output, errors = finish(start(tiny, *args, **kwargs))
    assert code == 0, errors[-2000:]
    return output


def here(tiny, *args, pictures=False):
    """The same in this process, which is quicker; as there, on one thread."""
    threads, ctrl_c = torch.get_num_threads(), signal.getsignal(signal.SIGINT)
    torch.set_num_threads(1)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["train.py", *map(str, args)])
            patch.setenv("TORCH_HOME", str(tiny / "home"))
            for name in () if pictures else ("draw_curve", "draw_heads", "draw_attention"):
                patch.setattr(report, name, lambda *_, **__: None)
            train.main()
    finally:
        torch.set_num_threads(threads)
        assert signal.getsignal(signal.SIGINT) is ctrl_c


def log(out):
    with open(Path(out, "log.csv"), encoding="utf-8") as file:
        return [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]


def splits(tiny):
    """The training, validation and constraint tokens of tiny's text."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_HOME", str(tiny / "home"))
        return data.load_data(str(tiny / "text.txt"), data.byte_encoding())


@pytest.fixture(scope="session")
def finished(tiny):
    """A whole run, and what it printed."""
    with contextlib.redirect_stdout(io.StringIO()) as output:
        here(tiny, *options(tiny, tiny / "whole", "--tau", "5"), pictures=True)
    return tiny / "whole", output.getvalue()


@pytest.fixture(scope="session")
def every_step(tiny):
    """Runs with open gates that log every step, by what lambda looks at."""
    for constraint in ("sampled", "held-out"):
        here(tiny, *options(tiny, tiny / constraint, *OPEN, "--eval-every", "1", "--tau", "4", "--rate", "0.02"),
             "--constraint", constraint)
    return {constraint: tiny / constraint for constraint in ("sampled", "held-out")}


def test_validation_against_a_loop(tiny):
    model = GPT.from_pretrained(tiny / "init.pt", gated=True, gate_bias=0.0)
    tokens = np.random.default_rng(1).integers(0, 257, 16 * 7 + 1).astype(np.uint16)
    windows, args = data.spread(tokens, 16, 100), argparse.Namespace(batch_size=3)
    ce, active = train.evaluate(model.train(), windows, Place("cpu", "float32"), args)
    model.eval()
    rows = torch.from_numpy(tokens.astype(np.int64))
    with torch.no_grad():
        logits = [model(rows[None, s:s + 16]) for s in range(0, 112, 16)]
    each = [-torch.log_softmax(out.logits[0], -1)[torch.arange(16), rows[s + 1:s + 17]].mean()
            for out, s in zip(logits, range(0, 112, 16))]
    assert ce == pytest.approx(float(sum(each)) / 7, abs=1e-5)
    maps = (model.attention_maps(rows[None, s:s + 16])[:, 0] for s in range(0, 112, 16))
    expected = sum((m > 0).sum((-2, -1)) for m in maps) / (7 * 136)
    torch.testing.assert_close(active, expected.double(), atol=1e-6, rtol=0)


def test_a_run_leaves_what_it_promises(finished):
    out, output = finished
    rows, summary = log(out), json.loads((out / "summary.json").read_text())
    assert [row["step"] for row in rows] == [0, 5, 10, 15, 20] and rows[-1]["tokens"] == 20 * 8 * 16
    assert rows[0]["active"] == pytest.approx(1.0) and rows[-1]["train_ce"] < rows[1]["train_ce"] - 0.5
    for row in rows:
        assert row["active"] == pytest.approx(np.mean([row[f"active_{l}.{h}"] for l in (0, 1) for h in (0, 1)]))
    best = min((row for row in rows if row["val_ce"] <= 5), key=lambda row: (row["active"], row["val_ce"]))
    assert summary["sparse_ce"] == best["val_ce"] and summary["active_share"] == best["active"]
    assert summary["edges_per_token"] == pytest.approx(best["active"] * 2 * 2 * 17 / 2)
    assert f"{best['val_ce']:.4f}" in output and "tau 5.0000, met" in output
    assert summary["constraint_met"] is True
    for name in ("curve.png", "edges_by_head.png", "attention.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    assert GPT.from_pretrained(out / "best.pt").config.gated
    assert not list(out.glob("tmp-*"))


def test_the_report_of_a_run_that_never_met_tau(tiny, finished, tmp_path, capsys):
    shutil.copytree(finished[0], tmp_path / "run")
    base = json.loads((tmp_path / "run" / "base.json").read_text())
    (tmp_path / "run" / "base.json").write_text(json.dumps(base | {"tau": 1.0}))
    here(tiny, "--report", tmp_path / "run")
    summary, rows = json.loads((tmp_path / "run" / "summary.json").read_text()), log(finished[0])
    assert summary["constraint_met"] is False
    assert summary["share_at_untouched_ce"] == share_at(rows, base["ce"]) != share_at(rows, 1.0)
    last = rows[-1]
    assert (summary["step"], summary["sparse_ce"], summary["active_share"]) == (20, last["val_ce"], last["active"])
    assert "tau 1.0000, not met by any evaluation: the last one, step 20 of 20" in capsys.readouterr().out


def test_the_multiplier_follows_the_formula(every_step):
    """(4) and (5) again, from the logged losses alone: tau 4, kappa 0.02, alpha 0.97. The lam of a row is the one
    that its step used."""
    average, lam = None, 0.1
    for row in log(every_step["sampled"])[1:]:
        c = row["train_ce"] - 4
        average = c if average is None else 0.97 * average + 0.03 * c
        assert row["c_bar"] == pytest.approx(average, abs=1e-9) and row["lam"] == pytest.approx(lam, rel=1e-9)
        lam *= math.exp(0.02 * average)


@pytest.mark.parametrize("constraint", ["held-out", "training"])
def test_lambda_sees_the_kept_model_on_other_text(tiny, tmp_path, constraint):
    """The second look comes after the fifth step, whose averaged weights the run leaves: hard gates, on the second
    eight windows of the split. From held-out text's CE is taken by how much the untouched model finds it harder than
    the validation text."""
    out = tmp_path / "run"
    here(tiny, *options(tiny, out, "--tau", "5", "--gate-bias", "0", "--eval-every", "1"),
         "--constraint", constraint, "--steps", "5", "--decay", "0")
    model, untouched = GPT.from_pretrained(out / "last.pt"), GPT.from_pretrained(tiny / "init.pt")
    tokens, val, held_out = splits(tiny)
    idx, targets = data.batch(held_out if constraint == "held-out" else tokens, 16, 8, 8, 0)
    args = argparse.Namespace(batch_size=8)
    easier, harder = (train.evaluate(untouched, data.spread(split, 16, 16), Place("cpu", "float32"), args)[0]
                      for split in (val, held_out))
    shift = harder - easier if constraint == "held-out" else 0
    seen = model(idx, targets).loss.item() - shift
    assert log(out)[-1]["c_bar"] == pytest.approx(seen - 5, abs=1e-6)
    assert abs(shift) > 1e-3 or constraint == "training"


def test_steps_sample_gates_on_the_training_text_on_a_cosine(tiny, tmp_path, monkeypatch):
    """Also after a look, which comes at the steps 0, 4 and 8. A row has the mean CE since the row before, and the
    expected share at the last look."""
    seen, numbers, rates, add, step = [], [], [], train.add_gradient, train.optimizer_step

    def watched(forward, tokens, *rest):
        seen.append((forward.training, tokens))
        numbers.append(add(forward, tokens, *rest))
        return numbers[-1]

    monkeypatch.setattr(train, "add_gradient", watched)
    monkeypatch.setattr(train, "optimizer_step", lambda *args: (rates.append(args[1]), step(*args)))
    here(tiny, *options(tiny, tmp_path / "run", "--tau", "5", "--steps", "12"))
    text = splits(tiny)[0]
    assert len(seen) == 12 and all(mode and np.array_equal(tokens, text) for mode, tokens in seen)
    assert rates == pytest.approx([0.003 * min((n + 1) / 5, 0.55 + 0.45 * math.cos(math.pi * n / 12))
                                   for n in range(12)])
    rows = log(tmp_path / "run")
    assert [row["step"] for row in rows] == [0, 5, 10, 12]
    for row, first, end in zip(rows[1:], (0, 5, 10), (5, 10, 12)):
        assert row["train_ce"] == pytest.approx(np.mean([ce for ce, _, _ in numbers[first:end]]))
        assert row["expected"] == pytest.approx(numbers[(end - 1) // 4 * 4][1])


def gradients(model, tokens, step, geco=None, rank=0, **args):
    """Of one step on windows of 16, and what it counts."""
    place = Place("cpu", "float32")
    place.rank = rank
    args = argparse.Namespace(**{"seed": 0, "batch_size": 2, "grad_accum": 1, "distill": 0} | args)
    model.zero_grad()
    numbers = train.add_gradient(model, tokens, 16, step, place, args, geco, None)
    return [p.grad.clone() for p in model.parameters() if p.requires_grad], numbers


def test_every_draw_is_another(tiny):
    """Text of one letter: all windows are alike, only the gates differ, with each step, rank, seed and micro-batch."""
    model = GPT.from_pretrained(tiny / "init.pt", gated=True, gate_bias=0.0).train()
    changes = {}, {"step": 1}, {"rank": 1}, {"seed": 1}, {"grad_accum": 2}
    found = [gradients(model, np.zeros(200, np.uint16), **{"step": 0} | change)[0] for change in changes]
    assert not any(torch.equal(a[2], b[2]) for a, b in itertools.combinations(found, 2))


def test_micro_batches_have_the_gradient_of_one_batch(tiny):
    """With all gates open: the same four windows at once, in two parts and in four."""
    model = GPT.from_pretrained(tiny / "init.pt", gated=True, gate_bias=100.0).train()
    tokens = np.random.default_rng(0).integers(0, 257, 400).astype(np.uint16)
    one, *others = (gradients(model, tokens, 5, Geco(1.0, lam=0.7), batch_size=4 // n, grad_accum=n, seed=3)
                    for n in (1, 2, 4))
    for found, numbers in others:
        torch.testing.assert_close(found, one[0], atol=1e-6, rtol=1e-4)
        assert numbers == pytest.approx(one[1], abs=1e-5)


@pytest.mark.parametrize("constraint, every", [("sampled", 1), ("training", 4), ("held-out", 4)])
def test_gates_and_geco_are_as_asked(tiny, constraint, every):
    """kappa and alpha are per step, Geco's rate and decay per look."""
    model = GPT.from_pretrained(tiny / "init.pt")
    geco = train.add_gates(model, 4.0, argparse.Namespace(
        temperature=0.4, gate_bias=0.3, gate_bias_lr=0.1, constraint=constraint, lam=0.3, rate=0.02, decay=0.9))
    assert [geco.tau, geco.lam, geco.rate, geco.decay] == pytest.approx([4, 0.3, 0.02 * every, 0.9 ** every])
    assert geco.lam_range == (1e-3, 2.0)
    assert model.config.gated and model.config.temperature == 0.4
    assert all(b.requires_grad and b.tolist() == pytest.approx([0.3, 0.3]) for b in (
        block.attn.gate_bias for block in model.h))


def test_best_pt_is_the_sparsest_that_met_tau(tmp_path):
    """Of the averaged weights, which are marked with their step here."""
    model = GPT(GPTConfig(8, 11, 1, 1, 4, gated=True))
    averaged = train.twin(model)
    kept = Log(str(tmp_path), model, averaged, torch.optim.SGD(model.parameters(), 0.1), Geco(1.0))
    for kept.step, ce, share in ((0, 0.5, 0.1), (1, 0.9, 0.5), (2, 1.1, 0.2), (3, 0.8, 0.4), (4, 0.7, 0.6)):
        averaged.ln_f.bias.data.fill_(kept.step)
        kept.add(0, ce, torch.full((1, 1), share, dtype=torch.float64))
    assert GPT.from_pretrained(tmp_path / "best.pt").ln_f.bias.tolist() == [3.0] * 4


@pytest.mark.parametrize("share, best", [(0.4, [2.0] * 4), (0.6, [1.0] * 4)])
def test_a_run_killed_after_last_pt_gets_the_files_that_follow_from_it(tmp_path, monkeypatch, share, best):
    """best.pt too, if the last evaluation is the best: on a GPU a repeated step need not give the same weights. A file
    of the user's whose name begins alike stays."""
    model = GPT(GPTConfig(8, 11, 1, 1, 4, gated=True))
    kept = Log(str(tmp_path), model, train.twin(model), torch.optim.SGD(model.parameters(), 0.1), Geco(1.0))
    for kept.step, of_step in ((1, 0.5), (2, share)):
        if kept.step == 2:
            monkeypatch.setattr(kept, "write", lambda: None)
        kept.averaged.ln_f.bias.data.fill_(kept.step)
        kept.add(0, 0.9, torch.full((1, 1), of_step, dtype=torch.float64))
    assert [row["step"] for row in log(tmp_path)] == [1]
    for name in ("tmp-1-last.pt", "tmp-notes.txt"):
        (tmp_path / name).touch()
    again = Log(str(tmp_path), model, train.twin(model), torch.optim.SGD(model.parameters(), 0.1), Geco(1.0))
    again.resume()
    again.mend()
    assert [row["step"] for row in log(tmp_path)] == [1, 2]
    assert GPT.from_pretrained(tmp_path / "best.pt").ln_f.bias.tolist() == best
    assert [path.name for path in tmp_path.glob("tmp-*")] == ["tmp-notes.txt"]


def test_the_shares_of_heads_are_where_their_names_say():
    row = {"step": 1, "active_0.0": 1.0, "active_0.1": 2.0, "active_1.0": 3.0, "active_1.1": 4.0}
    assert by_head(row).tolist() == [[1, 2], [3, 4]]


def test_bfloat16_is_computed_in_bfloat16(tiny, tmp_path):
    """In evaluations, looks and steps, all close to float32; and a run of it."""
    model = GPT.from_pretrained(tiny / "init.pt")
    tokens = np.random.default_rng(0).integers(0, 257, 400).astype(np.uint16)
    args = argparse.Namespace(seed=0, batch_size=4, grad_accum=1, distill=0)
    for f in (lambda place: train.evaluate(model, data.spread(tokens, 16, 8), place, args)[0],
              lambda place: train.look(model, tokens, 0, place, args),
              lambda place: train.add_gradient(model, tokens, 16, 0, place, args, None, None)[0]):
        exact, rounded = (f(Place("cpu", dtype)) for dtype in ("float32", "bfloat16"))
        assert rounded != exact and rounded == pytest.approx(exact, abs=0.05)
    before = signal.signal(signal.SIGINT, lambda *_: None)    # another handler than Python's: `here` looks for it
    here(tiny, *options(tiny, tmp_path / "run", "--tau", "5", "--steps", "2", "--dtype", "bfloat16"))
    signal.signal(signal.SIGINT, before)


def test_lambda_answers_every_fourth_step(every_step):
    """Four times as far: kappa is per step. A row's lam is the one that its last look ended."""
    rows = log(every_step["held-out"])[1:]
    lams = [row["lam"] for row in rows]
    assert len(lams) == 20 and all(len(set(lams[n:n + 4])) == 1 for n in range(0, 20, 4)) and len(set(lams)) == 5
    for row, later in zip(rows[::4], rows[4::4]):
        assert later["lam"] == pytest.approx(row["lam"] * math.exp(4 * 0.02 * row["c_bar"]))


def test_the_share_at_a_loss_by_interpolation():
    rows = [{"step": step, "val_ce": ce, "active": active} for step, (ce, active) in enumerate((
        (1.6, 0.01), (1.8, 0.2), (1.6, 0.1), (1.65, 0.04), (1.75, 0.02), (1.69, 0.03)))]    # step 0 is no result
    assert share_at(rows, 1.7) == pytest.approx(0.03 + (0.02 - 0.03) / 6)    # a sixth of the way back up
    assert share_at(rows, 1.67) == pytest.approx(0.04 - 0.2 * 0.02)          # a fifth of the way from 1.65 to 1.75
    assert share_at(rows, 1.6) == 0.1 and share_at(rows, 1.5) is None and share_at(rows[:1], 3) is None


def test_the_best_evaluation_meets_tau_and_comes_after_a_step():
    """Gates that were only switched on are no result of training."""
    rows = [{"step": step, "val_ce": ce, "active": active} for step, ce, active in (
        (0, 1.5, 0.1), (10, 1.9, 0.2), (20, 1.6, 0.3), (30, 1.6, 0.4))]
    assert best_row(rows, 1.7)["step"] == 20 and best_row(rows, 1.55) is None


def test_without_tau_it_is_the_untouched_loss(tiny, capsys):
    here(tiny, *options(tiny, tiny / "notau", "--steps", "1"))
    output = capsys.readouterr().out
    summary = json.loads((tiny / "notau" / "summary.json").read_text())
    assert summary["tau"] == summary["base_ce"] and f"tau {summary['tau']:.4f}" in output


# Sends itself a signal just before the file NAME takes its place for the COUNT-th time.
STOPPER = """
import os, signal, sys
name, count, how = sys.argv[1], int(sys.argv[2]), getattr(signal, sys.argv[3])
replace = os.replace
def stopping(source, target):
    global count
    if os.path.basename(target) == name:
        count -= 1
        if count == 0:
            os.kill(os.getpid(), how)
    replace(source, target)
os.replace, sys.argv = stopping, sys.argv[3:]
import train
train.main()
"""


@pytest.mark.parametrize("name, count, how", [
    ("last.pt", 2, "SIGKILL"), ("log.csv", 3, "SIGKILL"), ("log.csv", 2, "SIGINT")])
def test_stopped_and_resumed_is_as_if_never_stopped(tiny, finished, name, count, how):
    whole, _ = finished
    out = tiny / f"{how}-{name}"
    process = start(tiny, *options(tiny, out, "--tau", "5"), launcher=("-c", STOPPER, name, count, how))
    code, _, errors = finish(process)
    assert code == (1 if how == "SIGINT" else -signal.SIGKILL), errors
    assert how == "SIGKILL" or f"--resume {out} goes on" in errors and "this step ends" in errors
    assert len(log(out)) == (2 if name == "log.csv" else 1)    # a killed one has not written its last row
    here(tiny, "--resume", out)
    assert (out / "log.csv").read_text() == (whole / "log.csv").read_text() and not list(out.glob("tmp-*"))
    ours, theirs = (torch.load(folder / "last.pt", weights_only=True)["model"] for folder in (out, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_stopped_between_two_evaluations_it_goes_on_as_if_never_stopped(tiny, finished, tmp_path, monkeypatch):
    """After the eighth step: losses since the last row, and what lambda's last update saw, are kept too."""
    average = train.average

    def stopping(averaged, model, step):
        average(averaged, model, step)
        if step == 7:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(train, "average", stopping)
    with pytest.raises(SystemExit, match="stopped after step 8: .*goes on"):
        here(tiny, *options(tiny, tmp_path / "run", "--tau", "5"))
    monkeypatch.undo()
    here(tiny, "--resume", tmp_path / "run")
    assert (tmp_path / "run" / "log.csv").read_text() == (finished[0] / "log.csv").read_text()


def test_a_second_ctrl_c_stops_at_once(tiny, tmp_path, monkeypatch):
    def interrupted(*_):
        for _ in range(2):
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(train, "add_gradient", interrupted)
    with pytest.raises(SystemExit, match="^stopped$"):
        here(tiny, *options(tiny, tmp_path / "run", "--tau", "5"))


def test_two_ranks_follow_one_process(tiny, every_step):
    """With one micro-batch each, and with two, after which alone they exchange gradients. Only with one does lambda
    look at as many held-out windows."""
    short = *OPEN, "--eval-every", "1", "--tau", "4", "--rate", "0.02"
    for folder, *more in (("two", "--batch-size", "4"),
                          ("micro", "--batch-size", "2", "--grad-accum", "2", "--constraint", "sampled")):
        go(tiny, *options(tiny, tiny / folder, *short, *more),
           launcher=("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"))
    for constraint, folder in (("held-out", "two"), ("sampled", "micro")):
        one, other = log(every_step[constraint]), log(tiny / folder)
        assert len(one) == len(other) == 21
        for ours, theirs in zip(one[1:], other[1:]):
            assert ours["train_ce"] == pytest.approx(theirs["train_ce"], abs=1e-5)
            assert ours["lam"] == pytest.approx(theirs["lam"], abs=1e-5)
        assert one[-1]["lam"] != one[2]["lam"]


def test_scratch_control_and_report(tiny, capsys, monkeypatch):
    """The offline path, small: a dense phase, the gates, a dense control from the same weights, one table."""
    monkeypatch.chdir(tiny)
    for name in ("scratch", "stdlib"):    # folders of these names do not stand in for what the options mean
        (tiny / name).mkdir()
    scratch = ["--init", "scratch", "--data", "stdlib", "--layers", "1", "--heads", "2", "--width", "16",
               "--block-size", "32", "--batch-size", "4", "--eval-windows", "8", "--eval-every", "10",
               "--device", "cpu"]
    sparse, control = tiny / "sparse", tiny / "control"
    rates, step = [], train.optimizer_step
    monkeypatch.setattr(train, "optimizer_step", lambda *args: (rates.append((args[1], args[3])), step(*args)))
    here(tiny, *scratch, "--dense-steps", "20", "--steps", "10", "--out", sparse)
    assert len(log(sparse / "dense")) == 3
    here(tiny, "--init", sparse / "dense" / "last.pt", "--data", "stdlib", "--dense", "--steps", "10",
         "--eval-windows", "8", "--batch-size", "4", "--grad-accum", "1", "--lr", "0.001",
         "--device", "cpu", "--out", control)
    assert rates[0] == pytest.approx((2e-3 / 100, 1)) and rates[20] == pytest.approx((1e-3 / 100, 5))
    assert len(rates) == 40 and all(of_scores == 1 for _, of_scores in (*rates[:20], *rates[30:]))    # dense
    shutil.copytree(sparse / "dense", tiny / "resumed" / "dense")    # stopped at the end of the dense phase
    here(tiny, *scratch, "--dense-steps", "20", "--steps", "10", "--out", tiny / "resumed")
    assert len(rates) == 50 and (tiny / "resumed" / "log.csv").read_text() == (sparse / "log.csv").read_text()
    assert GPT.from_pretrained(sparse / "dense" / "last.pt").config == GPTConfig(32, 257, 1, 2, 16)
    theirs = json.loads((control / "summary.json").read_text())
    assert theirs["control_ce"] == log(control)[-1]["val_ce"] and "sparse_ce" not in theirs
    before = (sparse / "log.csv").read_text()
    capsys.readouterr()
    here(tiny, "--report", sparse, "--control", control, pictures=True)
    output = capsys.readouterr().out
    assert (sparse / "log.csv").read_text() == before and (sparse / "curve.png").exists()
    assert f"dense control{log(control)[-1]['val_ce']:16.4f}" in output
    args, base = (json.loads((control / name).read_text()) for name in ("args.json", "base.json"))
    other = tiny / "other"
    shared = {"data": "other", "seed": 5, "batch_size": 5, "grad_accum": 5, "processes": 5, "eval_windows": 5,
              "lr": 0.5, "warmup": 5, "weight_decay": 0.5, "dtype": "bfloat16"}
    for change, of_base, message in (({"dense": False}, {}, "not --dense"),
                                     *(({name: value}, {}, f"other {name}\n") for name, value in shared.items()),
                                     ({"lora_rank": 8}, {}, "other lora_rank"),    # of a program with more options
                                     ({}, {"ce": 1.0}, "other untouched model"),
                                     ({}, {"block_size": 8}, "other untouched model")):
        shutil.copytree(control, other, dirs_exist_ok=True)
        (other / "args.json").write_text(json.dumps(args | change))
        (other / "base.json").write_text(json.dumps(base | of_base))
        with pytest.raises(SystemExit) as stopped:
            here(tiny, "--report", sparse, "--control", other)
        assert stopped.value.code == 2 and f"is no control of {sparse}: {message}" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        here(tiny, "--report", control, "--control", other)
    assert "is itself a control" in capsys.readouterr().err
    ours = argparse.Namespace(**json.loads((sparse / "args.json").read_text()) | {"steps": 11})
    (other / "args.json").write_text(json.dumps(args | {"steps": 11}))
    with pytest.raises(UserError, match="stopped at step 10 of 11"):
        report.control_row(ours, other, argparse.Namespace(**base | {"block_size": 8}))
    untouched = log(sparse / "dense")[-1]["val_ce"]
    assert json.loads((sparse / "summary.json").read_text())["base_ce"] == pytest.approx(untouched, abs=1e-6)


@pytest.mark.parametrize("weight, tau, noted", [("inf", (), True), ("inf", ("--tau", "6"), False), ("1", (), False)])
def test_the_untouched_model_is_the_teacher(tiny, tmp_path, capsys, monkeypatch, weight, tau, noted):
    """And a tau that its student does not reach is noted."""
    teachers, add = [], train.add_gradient
    monkeypatch.setattr(train, "add_gradient", lambda *args: (teachers.append(args[-1]), add(*args))[1])
    here(tiny, *options(tiny, tmp_path / "run", "--distill", weight, *tau, "--steps", "1"))
    assert ("hardly gets below its CE" in capsys.readouterr().out) == noted
    (teacher,), untouched, idx = teachers, GPT.from_pretrained(tiny / "init.pt"), torch.arange(16)[None]
    assert not teacher.training and torch.equal(teacher(idx).logits, untouched(idx).logits)


@pytest.mark.parametrize("weight", [0.3, math.inf])
def test_distillation_beside_the_cross_entropy_and_in_its_place(tiny, weight):
    """The gradient is that of edges + lam (CE + weight KL), or of edges + lam KL, with KL written out."""
    model, teacher = (GPT.from_pretrained(tiny / "init.pt") for _ in range(2))
    args = argparse.Namespace(seed=3, batch_size=2, grad_accum=1, distill=weight)
    tokens = np.random.default_rng(0).integers(0, 257, 200).astype(np.uint16)
    model.train().set_gates(True, 1.0)
    with torch.no_grad():
        teacher.wte.weight.mul_(30)    # far from the student
    numbers = train.add_gradient(model, tokens, 16, 2, Place("cpu", "float32"), args, Geco(1.0, lam=0.7), teacher)
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    torch.manual_seed((3 * 10**7 + 2) * 1024)
    idx, targets = data.batch(tokens, 16, 4, 2, 3)
    out, p = model(idx, targets), teacher(idx).logits.softmax(-1)
    kl = (p * (p / out.logits.softmax(-1)).log()).sum(-1).mean()
    assert kl > 0.1    # or a KL that is left out would hardly be seen
    assert numbers == pytest.approx([x.item() for x in (out.loss, out.expected_edges.mean(), out.active_edges.mean())])
    (out.expected_edges.mean() + 0.7 * (kl if weight == math.inf else out.loss + weight * kl)).backward()
    for name, p in model.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(found[name], p.grad, atol=1e-6, rtol=1e-4)


def test_recomputing_activations_changes_nothing(tiny):
    model = GPT.from_pretrained(tiny / "init.pt", gated=True).requires_grad_()    # thresholds too
    idx, gradients, calls = torch.randint(0, 257, (2, 16)), [], []
    model.h[0].ln_1.register_forward_pre_hook(lambda *_: calls.append(model.recompute))
    for model.recompute in (False, True):
        model.train().zero_grad()
        torch.manual_seed(7)
        out = model(idx, idx)
        (out.loss + out.expected_edges.sum()).backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for kept, recomputed in zip(*gradients):
        torch.testing.assert_close(kept, recomputed)
    assert calls == [False, True, True]    # once, then twice


def test_scores_move_at_their_own_rate(tiny, tmp_path):
    """One step from the same weights, --score-lr 1 and 5, --gate-bias-lr 0.01 and 0.1: q and k move 5 times as far,
    thresholds 10 times, all else as far."""
    before, moved = GPT.from_pretrained(tiny / "init.pt"), {}
    for rate, of_thresholds in (("1", "0.01"), ("5", "0.1")):
        here(tiny, *options(tiny, tmp_path / rate, "--tau", "5", "--score-lr", rate, "--gate-bias-lr", of_thresholds),
             "--steps", "1", "--warmup", "1", "--weight-decay", "0.5")
        after = GPT.from_pretrained(tmp_path / rate / "last.pt")
        moved[rate] = {name: t - before.state_dict().get(name, torch.tensor(2.0))
                       for name, t in after.state_dict().items()}
    for name, one in moved["1"].items():
        five, scores = moved["5"][name], torch.zeros(len(one), dtype=torch.bool)
        if "c_attn" in name:
            scores[:64] = True
        assert one.abs().max() > 1e-4
        if "gate_bias" in name:
            assert one.abs().tolist() == pytest.approx([0.01, 0.01], rel=1e-3)    # Adam's first step is its rate
            torch.testing.assert_close(five, 10 * one, rtol=1e-3, atol=2e-6)
            continue
        torch.testing.assert_close(five[scores], 5 * one[scores], rtol=1e-3, atol=2e-6)
        torch.testing.assert_close(five[~scores], one[~scores], rtol=0, atol=0)


def test_many_steps_at_another_rate_are_adamw_with_that_rate(tiny):
    """Against AdamW itself, on q, k and v as tensors of their own, with decay, over steps whose gradients change."""
    torch.manual_seed(3)
    model = GPT.from_pretrained(tiny / "init.pt", gated=True).train()
    for block in model.h:
        block.attn.gate_bias.requires_grad_()
    optimizer = train.adamw(model, argparse.Namespace(weight_decay=0.3, lr=0.01, gate_bias_lr=0.02))
    scores = [p for block in model.h for p in block.attn.score_weights()]
    c_attn, b = model.h[1].attn.c_attn.weight, model.h[1].attn.gate_bias
    parts = [t.detach().clone().requires_grad_() for t in (c_attn[:64], c_attn[64:], b)]
    theirs = torch.optim.AdamW([{"params": parts[:1], "lr": 0.03}, {"params": parts[1:2], "lr": 0.01},
                                {"params": parts[2:], "lr": 0.02, "weight_decay": 0}],
                               betas=(0.9, 0.95), weight_decay=0.3)
    idx = torch.randint(257, (4, 17))
    for _ in range(5):
        out = model(idx[:, :-1], idx[:, 1:])
        (out.loss + out.expected_edges.mean()).backward()
        for part, grad in zip(parts, (c_attn.grad[:64], c_attn.grad[64:], b.grad)):
            part.grad = grad.clone()
        theirs.step()
        train.optimizer_step(optimizer, 0.01, scores, 3.0)
        for part, ours in zip(parts, (c_attn[:64], c_attn[64:], b)):
            torch.testing.assert_close(ours, part, rtol=1e-5, atol=1e-6)


def test_averaged_weights_are_the_mean_of_all_steps_and_later_of_the_last_hundred():
    """Against sums over all steps: equal weights up to the hundredth, then 0.99 for each step of age."""
    model, steps = torch.nn.Linear(3, 2), torch.randn(150, 2, 3)
    kept, free = copy.deepcopy(model), copy.deepcopy(model.bias)
    model.bias.requires_grad_(False)
    for n, step in enumerate(steps):
        model.weight.data, model.bias.data = step.clone(), torch.ones(2)
        train.average(kept, model, n)
        if n < 100:
            torch.testing.assert_close(kept.weight.data, steps[:n + 1].mean(0), rtol=1e-4, atol=1e-5)
    weights = torch.cat([torch.full((100,), 0.01 * 0.99 ** 50), 0.01 * 0.99 ** torch.arange(49.0, -1, -1)])
    torch.testing.assert_close(kept.weight.data, (weights[:, None, None] * steps).sum(0), rtol=1e-4, atol=1e-5)
    assert weights.sum().item() == pytest.approx(1) and torch.equal(kept.bias, free)    # not trained: left alone


def test_a_twin_shares_frozen_matrices_and_nothing_else():
    """A threshold may be frozen now and trained later: it is not shared."""
    model = GPT(GPTConfig(8, 11, 1, 2, 4, gated=True))
    model.wte.weight.requires_grad_(False)
    other = dict(train.twin(model).named_parameters())
    shared = {name for name, p in model.named_parameters() if p.data_ptr() == other[name].data_ptr()}
    assert shared == {"wte.weight"} and not other["h.0.attn.gate_bias"].requires_grad


def test_checkpoints_hold_the_averaged_weights_that_were_evaluated(tiny, finished):
    """And beside them those that train, which are others."""
    saved = torch.load(finished[0] / "last.pt", weights_only=True)
    assert saved["trained"].keys() == saved["model"].keys()
    assert (saved["trained"]["h.0.mlp.c_fc.weight"] - saved["model"]["h.0.mlp.c_fc.weight"]).abs().max() > 1e-3
    kept, windows = GPT.from_pretrained(finished[0] / "last.pt"), data.spread(splits(tiny)[1], 16, 16)
    ce, _ = train.evaluate(kept, windows, Place("cpu", "float32"), argparse.Namespace(batch_size=8))
    assert ce == pytest.approx(log(finished[0])[-1]["val_ce"], abs=1e-6)


def test_a_run_can_be_taken_up_from_another_folder(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tiny)
    here(tiny, *options(tiny, tmp_path / "run", "--tau", "5", "--steps", "1"),
         "--init", "init.pt", "--data", "text.txt")
    args = json.loads((tmp_path / "run" / "args.json").read_text())
    assert (args["init"], args["data"]) == (str(tiny / "init.pt"), str(tiny / "text.txt"))


def test_thresholds_are_trained_unless_their_rate_is_0_and_stay_with_the_model(tiny, tmp_path):
    here(tiny, *options(tiny, tmp_path / "fixed", "--tau", "5", "--gate-bias-lr", "0"))
    fixed = GPT.from_pretrained(tmp_path / "fixed" / "last.pt")
    assert all(block.attn.gate_bias.eq(2).all() for block in fixed.h)
    here(tiny, *options(tiny, tmp_path / "learn", "--tau", "5", "--gate-bias-lr", "0.003"))
    b = torch.stack([block.attn.gate_bias for block in GPT.from_pretrained(tmp_path / "learn" / "last.pt").h])
    assert b.ne(2).all() and b.unique().numel() == 4
    before = (tmp_path / "learn" / "log.csv").read_text()
    saved = torch.load(tmp_path / "learn" / "last.pt", weights_only=True)
    here(tiny, "--resume", tmp_path / "learn")    # the run is over: nothing changes
    assert (tmp_path / "learn" / "log.csv").read_text() == before
    assert {"h.0.attn.gate_bias", "h.1.attn.gate_bias"} <= saved["model"].keys()


def test_another_loader_brings_its_options(tiny, tmp_path, monkeypatch):
    seen = []

    def load(path, **overrides):
        seen.append((Path(path).name, overrides))
        return GPT.from_pretrained(path, **overrides)

    arguments = [*options(tiny, tmp_path / "run", "--tau", "5"), "--steps", "1", "--block-size", "8", "--twice",
                 "--recompute"]
    models = []
    monkeypatch.setenv("TORCH_HOME", str(tiny / "home"))
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, arguments)])
    train.main(load=load, options=[("twice", bool, False, "of the loader")],
               prepare=lambda model, args: (models.append(model),
                                            seen.append((type(model).__name__, args.twice, args.dtype))))
    assert seen[:2] == [("init.pt", {"block_size": 8}), ("GPT", True, "float32")]
    assert json.loads((tmp_path / "run" / "args.json").read_text())["twice"] is True and models[0].recompute


@pytest.mark.parametrize("args, message", [
    (["--tau", "0"], "0 is not between"),
    (["--dense", "--tau", "3"], "--dense is the control"),
    (["--dense", "--gate-bias-lr", "0.1", "--lam", "1"], "leave --gate-bias-lr, --lam out"),
    (["--resume", "nowhere"], "cannot read nowhere"),
    (["--resume", "OTHER"], "is no run of train.py"),
    (["--resume", "ADAPTED"], "--lora-rank, which this program does not know\nresume it with the program"),
    (["--resume", "WHOLE", "--steps", "7"], "goes on with the options of its run"),
    (["--resume", "WHOLE", "--steps", "5000"], "goes on with the options of its run"),    # the default, but given
    (["--compile", "--recompute"], "nearly nothing would be compiled\nleave one of the two out"),
    (["--lora-rank", "8"], "unrecognized arguments: --lora-rank 8"),
    (["--score-lr", "-1"], "-1 is not between"),
    (["--layers", "3"], "error: only --init scratch has --layers"),
    (["--report", "WHOLE", "--steps", "7"], "only --control goes with it"),
    (["--control", "nowhere", "--init", "INIT", "--data", "TEXT", "--out", "OUT"], "for the report of a finished run"),
    (["--init", "BROKEN", "--data", "TEXT", "--out", "OUT", "--device", "cpu"], "validation CE is nan"),
    (["--report", "nowhere"], "cannot read nowhere"),
    (["--init", "nowhere.pt", "--out", "OUT"], "no such file or folder: nowhere.pt"),
    (["--init", "INIT", "--data", "nowhere", "--out", "OUT"], "no such data: nowhere"),
    (["--init", "scratch", "--data", "nowhere.txt", "--out", "OUT"], "no such data: nowhere.txt"),    # not: no network
    (["--init", "INIT", "--data", "TEXT", "--out", "OUT", "--block-size", "17"], "at most 16 positions, not 17"),
    (["--init", "INIT", "--data", "TEXT", "--out", "INIT/x"], "cannot write to"),
    (["--init", "WHOLE/last.pt", "--data", "TEXT", "--out", "WHOLE"], "holds a run already"),
    (["--init", "ODD", "--data", "TEXT", "--out", "OUT"], "no encoding is known for a vocabulary of 13"),
])
def test_mistakes(tiny, finished, tmp_path, monkeypatch, capsys, args, message):
    monkeypatch.setenv("TORCH_HOME", str(tiny / "home"))
    save_checkpoint(GPT(GPTConfig(16, 13, 1, 1, 8)), tmp_path / "odd.pt")
    broken = GPT.from_pretrained(tiny / "init.pt")
    with torch.no_grad():
        broken.ln_f.bias[0] = math.nan
    save_checkpoint(broken, tmp_path / "broken.pt")
    names = {"INIT": tiny / "init.pt", "TEXT": tiny / "text.txt", "WHOLE": finished[0], "ODD": tmp_path / "odd.pt",
             "BROKEN": tmp_path / "broken.pt", "OUT": tmp_path / "out", "OTHER": tmp_path / "other",
             "ADAPTED": tmp_path / "adapted"}
    whole = json.loads((finished[0] / "args.json").read_text())
    for name, content in {"other": {}, "adapted": whole | {"lora_rank": 8, "lora_all": False}}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "args.json").write_text(json.dumps(content))
    args = ["/".join(str(names.get(part, part)) for part in arg.split("/")) if arg[0] != "/" else arg for arg in args]
    monkeypatch.setattr(sys, "argv", ["train.py", *args])
    with pytest.raises(SystemExit) as stop:
        train.main()
    errors = capsys.readouterr().err
    assert stop.value.code == 2 and message in errors
    assert len(errors.partition("error:")[2].strip().splitlines()) <= 3
    assert {path.name for path in (tmp_path / "out").glob("*")} <= {"args.json"}    # nothing half-written


def test_a_step_that_would_break_the_weights_is_not_made(tiny, tmp_path, monkeypatch, capsys):
    norms = iter([1.0] * 7 + [math.inf])
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_",
                        lambda _, most: torch.tensor(next(norms) if most == 1 else math.nan))
    with pytest.raises(SystemExit) as stop:
        here(tiny, *options(tiny, tmp_path / "run", "--tau", "5"))
    assert stop.value.code == 2 and "its gradient inf at step 7\nstart anew" in capsys.readouterr().err
    weights = GPT.from_pretrained(tmp_path / "run" / "last.pt").state_dict()
    assert all(t.isfinite().all() for t in weights.values()) and len(log(tmp_path / "run")) == 2


def test_a_gpu_whose_memory_is_full_is_no_traceback(tiny, tmp_path, monkeypatch, capsys):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB\nmore")

    monkeypatch.setattr(train, "add_gradient", full)
    with pytest.raises(SystemExit) as stop:
        here(tiny, *options(tiny, tmp_path / "run", "--tau", "5"))
    told = capsys.readouterr().err.partition("error: ")[2].splitlines()
    assert stop.value.code == 2 and len(told) == 2 and told[0].endswith("Tried to allocate 2.00 GiB")


def test_another_number_of_processes_is_refused(tiny, finished, tmp_path, capsys):
    shutil.copytree(finished[0], tmp_path / "run")
    args = json.loads((tmp_path / "run" / "args.json").read_text())
    (tmp_path / "run" / "args.json").write_text(json.dumps(args | {"processes": 2}))
    with pytest.raises(SystemExit) as stop:
        here(tiny, "--resume", tmp_path / "run")
    assert stop.value.code == 2 and "was started with 2 processes, not 1" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without cuda")
def test_a_run_of_another_machine_goes_on_where_it_is_told(tiny, finished, tmp_path, capsys):
    shutil.copytree(finished[0], tmp_path / "run")
    args = json.loads((tmp_path / "run" / "args.json").read_text())
    (tmp_path / "run" / "args.json").write_text(json.dumps(args | {"device": "cuda"}))
    with pytest.raises(SystemExit) as stop:
        here(tiny, "--resume", tmp_path / "run")
    assert stop.value.code == 2 and "finds no cuda here\npass --device cpu" in capsys.readouterr().err
    here(tiny, "--resume", tmp_path / "run", "--device", "cpu")
    assert json.loads((tmp_path / "run" / "args.json").read_text())["device"] == "cpu"


def test_recompute_is_refused_where_it_would_draw_other_gates(tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("support.place.pick_device", lambda name: "mps")
    with pytest.raises(SystemExit) as stop:
        here(tiny, *options(tiny, tmp_path / "run", "--tau", "5", "--recompute"))
    assert stop.value.code == 2 and "other gates in the backward pass" in capsys.readouterr().err
    assert not (tmp_path / "run" / "args.json").exists()


def test_a_sparse_model_goes_on_with_its_own_gates(tiny, capsys):
    model = GPT.from_pretrained(tiny / "init.pt", gated=True, gate_bias=0.0)
    for block in model.h:
        block.attn.gate_bias.data = torch.tensor([0.5, -0.5])
    save_checkpoint(model, tiny / "sparse.pt")
    here(tiny, *options(tiny, tiny / "again", "--steps", "1", "--tau", "5", "--gate-bias-lr", "0"),
         "--init", tiny / "sparse.pt")
    base, rows = json.loads((tiny / "again" / "base.json").read_text()), log(tiny / "again")
    assert 0.3 < base["active"] < 1 and rows[0]["active"] == pytest.approx(base["active"])
    _, active = train.evaluate(model, data.spread(splits(tiny)[1], 16, 16), Place("cpu", "float32"),
                               argparse.Namespace(batch_size=8))
    np.testing.assert_allclose(by_head(rows[0]), active, atol=1e-6)
    assert active[0, 1] + 0.2 < active[1, 0]
    again = GPT.from_pretrained(tiny / "again" / "last.pt")
    assert again.config.gate_bias == 0.0
    assert [block.attn.gate_bias.tolist() for block in again.h] == [[0.5, -0.5], [0.5, -0.5]]
    assert "has gates, training goes on from them" in capsys.readouterr().out
    here(tiny, *options(tiny, tiny / "ungated", "--steps", "1", "--dense"), "--init", tiny / "sparse.pt")
    assert "has gates, the control drops them" in capsys.readouterr().out
    assert [row["active"] for row in log(tiny / "ungated")] == [1, 1]


@pytest.mark.skipif(not (SHARED / "text").is_dir(), reason="the texts lie beside the checkout in development only")
def test_real_text_in_gpt2_tokens(tiny, monkeypatch, capsys):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(SHARED / "tiktoken"))
    texts = [text.lstrip("\n") for path in sorted((SHARED / "text").glob("*.txt"))
             for text in path.read_text(encoding="utf-8").split("\n\n\n") if text.strip()]
    encoded = data.gpt2_encoding().encode_ordinary_batch(texts)
    here(tiny, "--init", "scratch", "--data", SHARED / "text", "--layers", "1", "--heads", "1", "--width", "8",
         "--block-size", "32", "--batch-size", "4", "--dense-steps", "4", "--steps", "2", "--eval-windows", "4",
         "--out", tiny / "real", "--device", "cpu", pictures=True)
    assert "3,591,518 training, 123,359 validation and 113,633 constraint tokens" in capsys.readouterr().out
    assert 3_591_518 + 123_359 + 113_633 == sum(len(row) + 1 for row in encoded)
    assert (tiny / "real" / "attention.png").exists()
