"""exercises/: every check fails on the stub, because it is a stub, and passes on the project's own functions."""
import math
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from exercises import check_constraint
from geco import Geco

FOLDER = Path(__file__).parent.parent / "exercises"
CHECKS = sorted(FOLDER.glob("check_*.py"))


def run(*arguments):
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *map(str, arguments)],
                          capture_output=True, text=True, cwd=FOLDER.parent)
    return done.returncode, done.stdout


def test_the_projects_own_functions_are_right_answers():
    code, output = run(*CHECKS, "--reference")
    assert code == 0, output[-3000:]
    assert int(re.search(r"(\d+) passed", output)[1]) >= 45


def test_every_check_of_every_stub_fails_for_want_of_an_answer():
    code, output = run(*CHECKS, "--tb=line")
    failed = int(re.search(r"(\d+) failed", output)[1])
    assert code == 1 and "passed" not in output and "error" not in output.splitlines()[-1]
    assert len(re.findall(r":\d+: NotImplementedError$", output, re.MULTILINE)) == failed


def test_every_exercise_is_listed_with_its_check():
    listed = set(re.findall(r"`(\w+)\.py`", (FOLDER / "README.md").read_text()))
    stubs = {path.stem for path in FOLDER.glob("*.py")} - {"conftest", "__init__"} - {path.stem for path in CHECKS}
    assert listed >= stubs == {path.stem.removeprefix("check_") for path in CHECKS}
    for name in stubs:
        assert "raise NotImplementedError" in (FOLDER / f"{name}.py").read_text()


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
