"""Who may import whom: down the floors, never up, never in a circle, and no package but those of requirements.txt."""
import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FLOORS = [["support"], ["gates", "geco"], ["model"], ["toy_addition", "train", "patching"], ["extras"],
          ["exercises", "tests"]]
FLOOR = {room: n for n, rooms in enumerate(FLOORS) for room in rooms}
PACKAGES = {"torch", "numpy", "tiktoken", "matplotlib", "tqdm", "pytest"}


def python_files(root):
    """Every .py file of the project by its dotted name: those at the top, and all of a folder that begins with any."""
    rooms = [folder for folder in root.iterdir() if folder.is_dir() and any(folder.glob("*.py"))]
    paths = sorted([*root.glob("*.py"), *(path for room in rooms for path in room.rglob("*.py"))])
    return {".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): path for path in paths}


def imported(tree):
    """What import statements name, wherever they stand: `from a import b` gives a.b, be it a file or a name inside."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"line {node.lineno}: a relative import, which this test does not follow"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def room(name):
    return name.partition(".")[0]


FILES = {name: set(imported(ast.parse(path.read_text(encoding="utf-8")))) for name, path in python_files(ROOT).items()}


def file_of(target):
    """The project's file that an import names, "" for a package's."""
    while target and target not in FILES:
        target = target.rpartition(".")[0]
    return target


ARROWS = {name: {file_of(target) for target in targets} - {""} for name, targets in FILES.items()}


def test_imports_run_down_and_never_in_a_circle():
    assert {room(name) for name in FILES} == set(FLOOR)
    for name, target in (("model", "support.blockwise"), ("support.blockwise", "support.shapes"), ("train", "geco"),
                         ("tests.test_gates", "gates"), ("extras.llama", "model")):
        assert target in ARROWS[name]    # or nothing is out of order only because nobody looked
    up = [(name, target) for name in ARROWS for target in ARROWS[name] if FLOOR[room(target)] > FLOOR[room(name)]]
    assert not up
    graphlib.TopologicalSorter(ARROWS).prepare()    # a CycleError names the circle


@pytest.mark.parametrize("name", FILES)
def test_a_file_imports_no_other_package_and_does_not_touch_the_path(name):
    packages = {room(target) for target in FILES[name]} - set(sys.stdlib_module_names) - set(FLOOR)
    assert packages <= PACKAGES
    code = ast.walk(ast.parse(python_files(ROOT)[name].read_text(encoding="utf-8")))
    assert "sys.path" not in {ast.unparse(node) for node in code if isinstance(node, ast.Attribute)} | FILES[name]


def test_the_packages_are_those_of_the_requirements():
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    assert {line.partition("==")[0].strip() for line in lines if line.strip() and not line.startswith("#")} == PACKAGES


def test_pictures_leave_pyplot_alone():
    """A notebook that imports the toy keeps its own way of showing pictures."""
    code = "import toy_addition, train, extras.figures, sys; print('matplotlib.pyplot' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.split() == ["False"], done.stderr[-2000:]


def test_patching_is_a_library():
    """It loads no pictures, no vocabulary and no task. A fresh process: here others have loaded them."""
    code = "import patching, sys; print(*{'matplotlib', 'tiktoken', 'toy_addition', 'train'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == []
