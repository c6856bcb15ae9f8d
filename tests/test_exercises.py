"""exercises/: every check fails on the stub, because it is a stub, and passes on the project's own functions."""
import math
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import gates
import toy_addition as toy
from exercises import check_constraint, tour
from geco import Geco
from model import GPT
from support.weights import save_checkpoint

FOLDER = Path(__file__).parent.parent / "exercises"
CHECKS = sorted(FOLDER.glob("check_*.py"))


def run(*arguments):
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *map(str, arguments)],
                          capture_output=True, text=True, cwd=FOLDER.parent)
    return done.returncode, done.stdout


def test_the_projects_own_functions_are_right_answers():
    code, output = run(*CHECKS, "--reference")
    assert code == 0, output[-3000:]
    assert int(re.search(r"(\d+) passed", output)[1]) >= 56


def test_every_check_of_every_stub_fails_for_want_of_an_answer():
    code, output = run(*CHECKS, "--tb=line")
    failed = int(re.search(r"(\d+) failed", output)[1])
    assert code == 1 and "passed" not in output and "error" not in output.splitlines()[-1]
    assert len(re.findall(r":\d+: NotImplementedError$", output, re.MULTILINE)) == failed


def test_every_exercise_is_listed_with_its_check():
    listed = set(re.findall(r"`(\w+)\.py`", (FOLDER / "README.md").read_text()))
    stubs = {path.stem for path in FOLDER.glob("*.py")} - {"conftest", "__init__", "tour", *(c.stem for c in CHECKS)}
    assert listed >= stubs == {path.stem.removeprefix("check_") for path in CHECKS}
    for name in stubs:
        assert "raise NotImplementedError" in (FOLDER / f"{name}.py").read_text()


def test_the_tour_walks_through_a_trained_toy(tmp_path, monkeypatch, capsys):
    """Its numbers for one row against the plain definition, and a line of code at every step."""
    monkeypatch.setattr(sys, "argv", ["tour", "--run", str(tmp_path)])
    with pytest.raises(SystemExit) as stopped:
        tour.main()
    assert stopped.value.code == 2 and "run python toy_addition.py first" in capsys.readouterr().err
    for name, gated in (("dense", False), ("sparse", True)):
        model = GPT(toy.toy_config(gated=gated, gate_bias=0.0), generator=torch.Generator().manual_seed(3))
        save_checkpoint(model, tmp_path / f"{name}.pt", layout="reversed")
    (tmp_path / "log.csv").write_text("step,seen,lam,active\n250,0.5,1.5,30\n500,0.25,3,20\n")
    tour.main()
    printed = capsys.readouterr().out
    model, idx = GPT.from_pretrained(tmp_path / "sparse.pt"), toy.addition_data()[0][[3628]]
    q, k, v = model.h[0].attn.heads(model.h[0].ln_1(model.embed(idx)))
    y, expected, active = gates.sparse_attention(q, k, v, 0.0)
    begins = ", ".join(f"{x:.3f}" for x in y[0, 0, 7, :3])
    assert f"from these weights y begins {begins}; gates.py says {begins}" in printed
    assert f"{active.item():.1%} are open; expected were {expected.item():.1%}" in printed
    quoted = re.findall(r"^    (\w+\.py):(\d+)    (.+)$", printed, re.M)
    assert len(quoted) == 11 and (tmp_path / "tour.png").read_bytes().startswith(b"\x89PNG")
    for file, number, line in quoted:
        assert (FOLDER.parent / file).read_text().splitlines()[int(number) - 1].strip() == line


# ---- wrong answers to exercise 4, with one mistake each

class NewLam(Geco):
    def update(self, ce):
        super().update(ce)
        return self.lam


class AveragedValue(Geco):
    def objective(self, edges, ce):
        return edges + self.lam * (ce - ce.detach() + self.average)


class NoTau(Geco):
    def objective(self, edges, ce):
        return edges + self.lam * ce


class AverageFromZero(Geco):
    def update(self, ce):
        self.steps += 1
        return super().update(ce)


class WoundUp(Geco):
    @property
    def lam(self):    # in its range, but log_lam is not
        low, high = self.lam_range
        return math.exp(min(max(self.log_lam, math.log(low)), math.log(high)))

    def update(self, ce):
        used, before = self.lam, self.log_lam
        super().update(ce)
        self.log_lam = before + self.rate * self.average
        return used


class UpsideDown(Geco):
    def update(self, ce):
        return super().update(2 * self.tau - ce)


class Swallowing(Geco):
    def update(self, ce):
        return super().update(ce) if math.isfinite(ce) else self.lam


def unmet(answer):
    """The checks of exercise 4 that an answer does not pass."""
    names = []
    for name, check in vars(check_constraint).items():
        if name.startswith("test_"):
            marks = getattr(check, "pytestmark", [])
            for values in marks[0].args[1] if marks else [()]:
                try:
                    check(SimpleNamespace(Geco=answer), *(values if isinstance(values, tuple) else (values,)))
                except (AssertionError, pytest.fail.Exception):
                    names.append(name)
    return set(names)


@pytest.mark.parametrize("wrong, check", [
    (NewLam, "test_update_returns_the_lam_that_the_step_used"), (AveragedValue, "test_the_objective_is_the_lagrangian"),
    (NoTau, "test_the_objective_is_the_lagrangian"), (AverageFromZero, "test_the_average_starts_at_the_first_value"),
    (WoundUp, "test_it_stays_in_its_range_and_comes_back"), (UpsideDown, "test_it_rises_above_tau_and_falls_below"),
    (Swallowing, "test_a_broken_loss_is_not_swallowed")])
def test_wrong_answers_to_the_constraint_are_caught(wrong, check):
    assert check in unmet(wrong)


def test_a_right_answer_to_the_constraint_meets_every_check():
    assert unmet(Geco) == set()
