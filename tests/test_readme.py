"""The pages against the project: the lines of code they show, the file list, pictures, links, the options they name."""
import re
import runpy
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PATHS = [ROOT / "README.md", *sorted((ROOT / "exercises").glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
PAGES = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in PATHS}
README, TEXT = PAGES["README.md"], "\n".join(PAGES.values())


def section(title):
    return README.partition(f"\n## {title}")[2].partition("\n## ")[0]


def test_nothing_is_left_open():
    assert "@@" not in TEXT


def test_the_readme_is_short():
    assert README.count("\n") <= 200


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
    shown = set(re.findall(r"!\[[^\]]+\]\((?:\.\./)?(assets/[^)]+)\)", TEXT))
    assert shown == {path.relative_to(ROOT).as_posix() for path in (ROOT / "assets").iterdir()
                     if path.name[0] != "."}


def anchors(text):
    """What a heading is called in a link: small letters, spaces become hyphens, other signs go."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\((?!https?:)([^)]+)\)", PAGES[page]):
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target.read_text(encoding="utf-8")), link


COMMANDS = sorted(set(re.findall(r"python (\w+\.py|-m (?:extras|exercises)(?:\.\w+)+)", TEXT)))


@pytest.mark.parametrize("command", COMMANDS)
def test_the_options_are_options(command, monkeypatch, capsys):
    """Every --option that a page names in a command is one of that command."""
    used = set()
    for line in re.findall(rf"python {command}((?:\\\n|[^\n`#|])*)", TEXT):
        used |= set(re.findall(r"--[a-z-]+", line.partition("&&")[0]))
    monkeypatch.setattr("sys.argv", [command, "--help"])
    with pytest.raises(SystemExit) as stopped:
        if command.startswith("-m"):
            monkeypatch.delitem(sys.modules, command.removeprefix("-m "), raising=False)    # until the test ends
            runpy.run_module(command.removeprefix("-m "), run_name="__main__")
        else:
            runpy.run_path(str(ROOT / command), run_name="__main__")
    assert stopped.value.code == 0
    assert used <= set(re.findall(r"--[a-z-]+", capsys.readouterr().out)), used
