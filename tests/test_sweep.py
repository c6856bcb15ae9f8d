"""extras/sweep.py: every run differs in one option, and the table holds what their summaries say."""
import json
import threading
import time
from pathlib import Path

import pytest

from extras import sweep
from support.files import UserError


def test_runs_differ_in_one_option_and_share_the_default(tmp_path):
    for name, (base, option, values) in sweep.SWEEPS.items():
        found = sweep.commands(name, 2, tmp_path)
        runs = [run for of_value in found.values() for run in of_value]
        assert len(runs) == 2 * len(values) == len({folder for _, folder in runs})
        for value, of_value in found.items():
            for seed, (line, _) in enumerate(of_value):
                rest = line.removeprefix(base).removesuffix(f" --seed {seed}")
                assert rest in ("", f" {option} {value}") and (rest == "") == (f"[{value}]" in values)
    bias, tau = ({run for of_value in sweep.commands(name, 2, tmp_path).values() for run in of_value}
                 for name in ("bias", "tau"))
    assert {line for line, _ in bias & tau} == {f"{sweep.TOY} --seed 0", f"{sweep.TOY} --seed 1"}


def test_the_bracketed_values_are_the_defaults(monkeypatch):
    """What a sweep leaves out must be what the command does without it."""
    import toy_addition
    from support.options import defaults
    seen = []
    monkeypatch.setattr(toy_addition, "run", lambda args: seen.append(args) or True)
    monkeypatch.setattr("sys.argv", sweep.TOY.split())
    toy_addition.main()
    own = {sweep.TOY: vars(seen[0]), sweep.SMALL_GPT: defaults("scratch")}
    for base, option, values in sweep.SWEEPS.values():
        value = next(v for v in values if v.startswith("["))
        default = own[base][option[2:].replace("-", "_")]
        assert value == "[untouched]" and default is None or default == type(default)(value.strip("[]"))


def test_a_small_sweep(tmp_path, monkeypatch, capsys):
    """Two values of the bias with the real program; a second call makes no run again."""
    toy = f"{sweep.TOY} --steps 2 --dense-steps 2"
    monkeypatch.setattr(sweep, "TOY", toy)
    monkeypatch.setattr(sweep, "SWEEPS", {"bias": (toy, "--gate-bias", ("[0]", "2"))})
    monkeypatch.setattr("sys.argv", ["sweep.py", "bias", "--seeds", "1", "--at-once", "2", "--out", str(tmp_path)])
    sweep.main()
    printed = capsys.readouterr().out
    summaries = {}
    for path in tmp_path.glob("*/summary.json"):
        found = json.loads(path.read_text())
        summaries.setdefault(found["gate_bias"], []).append(found)
    assert {b: {found["seed"] for found in s} for b, s in summaries.items()} == {0.0: {0}, 2.0: {0}}
    assert "--no-gif" in toy and not list(tmp_path.glob("*/addition.gif"))
    assert "0.25 (0.20 to 0.30)" == sweep.mean_and_range([0.2, 0.3], ".2f")
    assert "20.0" == sweep.mean_and_range([0.2], ".1f", 100)
    rows = [line.strip("| ").split(" | ") for line in printed.splitlines() if line.startswith("|")][2:]
    for value, share, loss, at_equal_loss, right, met in rows:
        found, = summaries[float(value)]
        assert (share, loss) == (f"{100 * found['active_share']:.2f}", f"{found['sparse_ce']:.4f}")
        assert right == f"{100 * found['sparse_accuracy']:.2f}"
        assert met == "0 of 1" and at_equal_loss == "-"
    assert len(rows) == 2 and (tmp_path / "sweep.png").stat().st_size > 10_000
    monkeypatch.setattr(sweep.subprocess, "run", None)    # a second call finds every run there
    sweep.main()
    assert capsys.readouterr().out == printed


def test_dense_phases_are_made_once_a_seed(tmp_path, monkeypatch):
    """Only the runs of the first value make one; each of the others gets that of its seed."""
    def run(line, folder):
        made.append(line)
        (Path(folder) / "dense").mkdir(parents=True)
        (Path(folder) / "dense" / "last.pt").write_text(line)

    made = []
    monkeypatch.setattr(sweep, "one_run", run)
    found = sweep.commands("constraint", 2, tmp_path)
    sweep.share_dense("constraint", found, 1)
    assert made == [line for line, _ in found["held-out"]]
    for of_value in found.values():
        for (_, folder), line in zip(of_value, made, strict=True):
            assert (Path(folder) / "dense" / "last.pt").read_text() == line


def test_a_run_that_was_begun_goes_on(tmp_path, monkeypatch):
    """With --resume, if it is one of train.py that has written its options; else from the start."""
    words = []

    def run(command, **_):
        words.append(command[1:])
        (tmp_path / "run" / "summary.json").write_text("{}")

    monkeypatch.setattr(sweep.subprocess, "run", run)
    for begun in (False, True):
        (tmp_path / "run").mkdir(exist_ok=True)
        if begun:
            (tmp_path / "run" / "args.json").write_text("{}")
        sweep.one_run("train.py --tau 2", str(tmp_path / "run"))
        (tmp_path / "run" / "summary.json").unlink()
    folder = str(tmp_path / "run")
    assert words == [["train.py", "--tau", "2", "--out", folder], ["train.py", "--resume", folder]]


def test_after_a_failure_no_further_run_starts(monkeypatch):
    """Two at a time: the first run lasts until the second has failed."""
    begun, first, failing = [], threading.Event(), threading.Event()

    def run(line, _):
        begun.append(line)
        if line == "second":
            first.wait(10)
            failing.set()
            raise UserError("the second failed")
        first.set()
        failing.wait(10)
        time.sleep(0.2)

    monkeypatch.setattr(sweep, "one_run", run)
    with pytest.raises(UserError, match="the second failed"):
        sweep.run_all([(line, "") for line in ("first", "second", "third", "fourth")], 2)
    assert sorted(begun) == ["first", "second"]


def test_a_run_that_fails_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sweep, "SWEEPS", {"bias": ("toy_addition.py", "--gate-bias", ("-1", "[2]"))})
    monkeypatch.setattr("sys.argv", ["sweep.py", "bias", "--seeds", "1", "--at-once", "1", "--out", str(tmp_path)])
    monkeypatch.setattr(sweep, "commands", lambda *_: {"-1": [("toy_addition.py --gate-bias=-1",
                                                               str(tmp_path / "run"))]})
    with pytest.raises(SystemExit) as stopped:
        sweep.main()
    assert stopped.value.code == 2
    assert "python toy_addition.py --gate-bias=-1 failed\nread " in capsys.readouterr().err
    assert "is not between 0 and 100.0" in (tmp_path / "run.txt").read_text()
