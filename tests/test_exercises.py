"""exercises/: every check fails on the stub, because it is a stub, and passes on the project's own functions."""
import re
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parent.parent / "exercises"
CHECKS = sorted(FOLDER.glob("check_*.py"))


def run(*arguments):
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *map(str, arguments)],
                          capture_output=True, text=True, cwd=FOLDER.parent)
    return done.returncode, done.stdout


def test_the_projects_own_functions_are_right_answers():
    code, output = run(*CHECKS, "--reference")
    assert code == 0, output[-3000:]
    assert int(re.search(r"(\d+) passed", output)[1]) >= 5 * 8 - 10


def test_every_check_of_every_stub_fails_for_want_of_an_answer():
    code, output = run(*CHECKS, "--tb=line")
    failed = int(re.search(r"(\d+) failed", output)[1])
    assert code == 1 and "passed" not in output and "error" not in output.splitlines()[-1]
    assert len(re.findall(r":\d+: NotImplementedError$", output, re.MULTILINE)) == failed


def test_every_exercise_is_listed_with_its_check():
    listed = set(re.findall(r"`(\w+)\.py`", (FOLDER / "README.md").read_text()))
    stubs = {path.stem for path in FOLDER.glob("*.py")} - {"conftest"} - {path.stem for path in CHECKS}
    assert listed >= stubs == {path.stem.removeprefix("check_") for path in CHECKS}
    for name in stubs:
        assert "raise NotImplementedError" in (FOLDER / f"{name}.py").read_text()
