"""README.md against the project: the lines of code it shows, its file list, its pictures, the options it names."""
import re
import runpy
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
EXERCISES = (ROOT / "exercises" / "README.md").read_text(encoding="utf-8")


def section(title):
    return README.partition(f"\n## {title}")[2].partition("\n## ")[0]


def test_nothing_is_left_open():
    assert "@@" not in README + EXERCISES


def test_the_lines_of_the_method_are_in_the_code():
    shown = re.findall(r"\| `([^`]+)` \(`(\w+\.py)`\) \|", section("The method"))
    assert len(shown) == 8
    for line, file in shown:
        assert line in (ROOT / file).read_text(encoding="utf-8"), line


def test_the_file_list_is_complete_and_its_lines_are_counted():
    listed = {path: int(lines) for path, lines in re.findall(r"\| `([\w/]+\.py)` \| (\d+) \|", section("Files"))}
    there = {path.relative_to(ROOT).as_posix() for folder in ("", "support", "extras")
             for path in (ROOT / folder).glob("*.py") if path.name != "__init__.py"}
    assert listed.keys() == there
    for path, lines in listed.items():    # a README need not follow every line
        assert lines == pytest.approx((ROOT / path).read_text(encoding="utf-8").count("\n"), rel=0.05, abs=3), path


def test_the_pictures_are_there_and_none_is_left_over():
    shown = set(re.findall(r"\]\((assets/[^)]+)\)", README))
    assert shown == {path.relative_to(ROOT).as_posix() for path in (ROOT / "assets").iterdir()}


@pytest.mark.parametrize("command", sorted(set(re.findall(r"python (\w+\.py|-m extras\.\w+)", README + EXERCISES))))
def test_the_options_are_options(command, monkeypatch, capsys):
    """Every --option that README names in a command is one of that command."""
    used = set()
    for line in re.findall(rf"python {command}((?:\\\n|[^\n`#|])*)", README + EXERCISES):
        used |= set(re.findall(r"--[a-z-]+", line.partition("&&")[0]))
    monkeypatch.setattr("sys.argv", [command, "--help"])
    with pytest.raises(SystemExit) as stopped:
        if command.startswith("-m"):
            sys.modules.pop(command.removeprefix("-m "), None)
            runpy.run_module(command.removeprefix("-m "), run_name="__main__")
        else:
            runpy.run_path(str(ROOT / command), run_name="__main__")
    assert stopped.value.code == 0
    assert used <= set(re.findall(r"--[a-z-]+", capsys.readouterr().out)), used
