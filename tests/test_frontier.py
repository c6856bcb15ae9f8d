"""extras/frontier.py on folders written by hand."""
import json

import pytest

from extras import frontier
from support.files import UserError, write_csv, write_json

ARGS = {"dense": False, "steps": 20, "seed": 1, "data": "x", "batch_size": 2, "grad_accum": 1, "processes": 1,
        "eval_windows": 3, "lr": 0.1, "warmup": 1, "weight_decay": 0.0, "score_lr": 1.0, "dtype": "float32"}


def a_run(folder, rows, tau=1.7, **changes):
    """rows: (step, val_ce, active)."""
    folder.mkdir()
    write_json(folder / "args.json", {**ARGS, "out": str(folder), **changes})
    write_json(folder / "base.json", {"ce": 1.6, "tau": tau, "block_size": 8, "active": 1.0, "edges_per_token": 9.0})
    write_csv(folder / "log.csv", [{"step": s, "val_ce": ce, "active": active} for s, ce, active in rows])
    return str(folder)


def run(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["frontier", *map(str, arguments)])
    frontier.main()


def test_a_dot_is_the_last_evaluation(tmp_path, monkeypatch, capsys):
    loose = a_run(tmp_path / "loose", [(0, 1.9, 0.6), (10, 1.5, 0.1), (20, 1.7, 0.02)])
    tight = a_run(tmp_path / "tight", [(0, 1.9, 0.6), (20, 1.65, 0.3)], tau=1.65)
    control = a_run(tmp_path / "control", [(0, 1.6, 1.0), (20, 1.45, 1.0)], dense=True)
    run(monkeypatch, loose, tight, "--control", control, "--out", tmp_path / "new" / "out")
    found = json.loads((tmp_path / "new" / "out" / "frontier.json").read_text())["runs"]
    assert [(f["val_ce"], f["active"], f["control_ce"]) for f in found] == [(1.7, 0.02, 1.45), (1.65, 0.3, 1.45)]
    assert found[0]["share_at_untouched_ce"] == pytest.approx(0.06) and found[1]["share_at_untouched_ce"] is None
    printed = capsys.readouterr().out.splitlines()
    assert printed[1].startswith(loose) and "2.000%" in printed[1] and "6.000%" in printed[1]
    assert printed[2].endswith("-") and printed[3] == "least edges at the untouched model's CE: 6.000%"
    assert (tmp_path / "new" / "out" / "frontier.png").read_bytes().startswith(b"\x89PNG")


def test_runs_that_are_none_are_named(tmp_path):
    stopped = a_run(tmp_path / "stopped", [(0, 1.9, 0.6), (10, 1.5, 0.1)])
    dense = a_run(tmp_path / "dense", [(20, 1.5, 1.0)], dense=True)
    for folder, why in ((stopped, "it was stopped"), (dense, "it has no gates")):
        with pytest.raises(UserError, match=f"is no finished sparse run: {why}\nleave it out"):
            frontier.outcome(folder, [])


def test_each_run_has_the_control_of_its_untouched_model_and_its_seed(tmp_path, monkeypatch):
    runs, controls = [], []
    for name, ce, seed in (("one", 1.6, 1), ("other", 1.7, 1), ("of another seed", 1.7, 2)):
        runs.append(a_run(tmp_path / name, [(20, ce, 0.1)], seed=seed))
        controls.append(a_run(tmp_path / f"{name}-dense", [(20, ce - 0.2 * seed, 1.0)], dense=True, seed=seed))
        for folder in runs[-1], controls[-1]:
            facts = {"ce": ce, "tau": ce, "block_size": 8, "active": 1.0, "edges_per_token": 9.0}
            write_json(f"{folder}/base.json", facts)
    run(monkeypatch, *runs, "--control", *reversed(controls), "--out", tmp_path / "out")
    found = json.loads((tmp_path / "out" / "frontier.json").read_text())["runs"]
    assert [f["control_ce"] for f in found] == pytest.approx([1.4, 1.5, 1.3])
    with pytest.raises(UserError, match="one-dense is no control of .*other: other untouched model"):
        frontier.outcome(runs[1], controls[:1])


@pytest.mark.parametrize("control", [False, True])
def test_models_that_differ_share_no_control(tmp_path, monkeypatch, capsys, control):
    one = a_run(tmp_path / "one", [(20, 1.5, 0.1)])
    other = a_run(tmp_path / "other", [(20, 1.5, 0.1)])
    write_json(tmp_path / "other" / "base.json", {"ce": 1.7, "tau": 1.7, "block_size": 8})
    dense = ["--control", a_run(tmp_path / "dense", [(20, 1.45, 1.0)], dense=True)] if control else []
    if not control:    # three seeds of a small GPT, each with its own dense phase
        return run(monkeypatch, one, other, "--out", tmp_path / "out")
    with pytest.raises(SystemExit) as stopped:
        run(monkeypatch, one, other, *dense, "--out", tmp_path / "out")
    assert stopped.value.code == 2 and "other untouched model" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
