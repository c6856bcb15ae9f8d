"""Who may import whom: down the floors, never up, never in a circle, and no package but those of requirements.txt.

The checker reads every file's imports, wherever they stand in it. The last tests show it houses that are out of order.
"""
import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FLOORS = [["support"], ["gates", "geco"], ["model"], ["toy_addition", "train", "patching"], ["extras"],
          ["exercises", "tests"]]
PACKAGES = {"torch", "numpy", "tiktoken", "matplotlib", "tqdm", "pytest"}


def python_files(root):
    """Every .py file of the project by its dotted name: those at the top, and all of a folder that begins with any."""
    rooms = [folder for folder in root.iterdir() if folder.is_dir() and any(folder.glob("*.py"))]
    paths = sorted([*root.glob("*.py"), *(path for room in rooms for path in room.rglob("*.py"))])
    return {".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): path for path in paths}


def imported(name, tree, is_package):
    """What a file's import statements name, dotted: `from a import b` gives a.b, be it a file or a name inside a."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = node.module
            if node.level:    # from . import x: counted from the file's own package
                package = name.split(".") if is_package else name.split(".")[:-1]
                module = ".".join(package[:len(package) - node.level + 1] + [node.module] * bool(node.module))
            yield from (f"{module}.{alias.name}" for alias in node.names)


def touches_the_path(tree):
    """Does the code name sys.path, by whatever name it knows sys?"""
    names = {alias.asname or alias.name for node in ast.walk(tree) if isinstance(node, ast.Import)
             for alias in node.names if alias.name == "sys"}
    return any(isinstance(node, ast.Attribute) and node.attr == "path" and isinstance(node.value, ast.Name)
               and node.value.id in names
               or isinstance(node, ast.ImportFrom) and node.module == "sys" and "path" in [a.name for a in node.names]
               for node in ast.walk(tree))


def read(root):
    """{file: (its syntax tree, all that it imports)}, by dotted names."""
    found = {}
    for name, path in python_files(root).items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        found[name] = tree, set(imported(name, tree, path.name == "__init__.py"))
    return found


def arrows(files):
    """{file: the project's files that it imports}, from what `read` found."""
    def file_of(target):
        while target and target not in files:
            target = target.rpartition(".")[0]
        return target

    return {name: {file_of(target) for target in targets} - {""} for name, (_, targets) in files.items()}


def floor(name):
    """The floor of a file, None if it has none."""
    return next((n for n, rooms in enumerate(FLOORS) if name.partition(".")[0] in rooms), None)


def circle(found):
    """The files from which one comes back to the file one started at."""
    def behind(name):
        seen, todo = set(), list(found[name])
        while todo:
            if (target := todo.pop()) not in seen:
                seen.add(target)
                todo += found[target]
        return seen
    return sorted(name for name in found if name in behind(name))


def disorder(root):
    """A line for everything that is not as it should be."""
    files = read(root)
    found, rooms = arrows(files), {name.partition(".")[0] for name in files}
    lines = [f"{name} has no floor" for name in files if floor(name) is None]
    lines += [f"{name} imports {target}, which is above it" for name in found for target in sorted(found[name])
              if None not in (floor(name), floor(target)) and floor(target) > floor(name)]
    lines += [f"{name} is in a circle" for name in circle(found)]
    for name, (tree, targets) in files.items():
        foreign = {target.partition(".")[0] for target in targets} - PACKAGES - set(sys.stdlib_module_names) - rooms
        lines += [f"{name} imports the package {package}" for package in sorted(foreign)]
        lines += [f"{name} touches sys.path"] * touches_the_path(tree)
    return lines


def test_imports_run_down_and_never_in_a_circle():
    assert disorder(ROOT) == []


def test_the_packages_are_those_of_the_requirements():
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    assert {line.partition("==")[0].strip() for line in lines if line.strip() and not line.startswith("#")} == PACKAGES


def test_every_room_was_read():
    """Nothing is in order only because nobody looked: each room is there, and known arrows were seen."""
    found = arrows(read(ROOT))
    assert {room for rooms in FLOORS for room in rooms} == {name.partition(".")[0] for name in found}
    for name, target in (("model", "support.blockwise"), ("support.blockwise", "support.shapes"), ("train", "geco"),
                         ("toy_addition", "model"), ("tests.test_gates", "gates"), ("extras.llama", "model")):
        assert target in found[name], f"{name} imports {target}"
    assert not [target for name in found if name.startswith("support") for target in found[name]
                if not target.startswith("support")]


def test_patching_is_a_library():
    """It loads no pictures, no vocabulary and no task. A fresh process: here others have loaded them."""
    code = "import patching, sys; print(*{'matplotlib', 'tiktoken', 'toy_addition', 'train'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == []


# ---- the checker itself, on small houses

GOOD = {
    "support/__init__.py": "",
    "support/files.py": '"""Touches no sys.path."""\nimport json, os.path, sys\nimport torch.nn as nn\nsys.argv',
    "support/figures.py": "from matplotlib import pyplot\nfrom support.files import save",
    "gates.py": "import torch\nfrom support import files",
    "model.py": "def build():\n    from gates import gate",
    "train.py": "import model as m, support.files",
    "extras/__init__.py": "",
    "extras/sweep.py": "from . import tasks",
    "extras/tasks.py": "import train",
    "tests/test_sweep.py": "from extras.sweep import sweep\nimport pytest",
}


def build(root, files):
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)
    return root


def test_a_house_in_order(tmp_path):
    root = build(tmp_path, GOOD)
    assert disorder(root) == []
    found = {name: targets for name, targets in arrows(read(root)).items() if targets}
    assert found == {"support.figures": {"support.files"}, "gates": {"support.files"}, "model": {"gates"},
                     "train": {"model", "support.files"}, "extras.sweep": {"extras.tasks"},
                     "extras.tasks": {"train"}, "tests.test_sweep": {"extras.sweep"}}


@pytest.mark.parametrize("changes, wanted", [
    ({"support/files.py": "import gates"},
     ["support.files imports gates, which is above it", "gates is in a circle", "support.files is in a circle"]),
    ({"support/figures.py": "def f():\n    from extras.sweep import x"},
     ["support.figures imports extras.sweep, which is above it"]),
    ({"support/__init__.py": "if True:\n    import model"}, ["support imports model, which is above it"]),
    ({"gates.py": "from extras import tasks"}, ["gates imports extras.tasks, which is above it", *(
        f"{name} is in a circle" for name in ("extras.tasks", "gates", "model", "train"))]),
    ({"geco.py": "import extras"}, ["geco imports extras, which is above it"]),
    ({"extras/new.py": "import tests.test_sweep"}, ["extras.new imports tests.test_sweep, which is above it"]),
    ({"extras/tasks.py": "from .sweep import sweep"}, ["extras.sweep is in a circle", "extras.tasks is in a circle"]),
    ({"support/files.py": "try:\n    import support.figures\nexcept ImportError:\n    pass"},
     ["support.figures is in a circle", "support.files is in a circle"]),
    ({"geco.py": "import geco"}, ["geco is in a circle"]),
    ({"gates.py": "import scipy.stats"}, ["gates imports the package scipy"]),
    ({"tests/test_sweep.py": "class A:\n    from safetensors import torch"},
     ["tests.test_sweep imports the package safetensors"]),
    ({"model.py": "import torchvision"}, ["model imports the package torchvision"]),
    ({"model.py": "import sys\nsys.path.insert(0, '.')"}, ["model touches sys.path"]),
    ({"extras/sweep.py": "import sys as s\nprint(len(s.path))"}, ["extras.sweep touches sys.path"]),
    ({"extras/sweep.py": "def f():\n    from sys import argv, path"}, ["extras.sweep touches sys.path"]),
    ({"setup.py": ""}, ["setup has no floor"]),
    ({"tools/new.py": "", "tools/sub/new.py": ""}, ["tools.new has no floor", "tools.sub.new has no floor"]),
    ({"support/sub/new.py": "import gates"}, ["support.sub.new imports gates, which is above it"]),
])
def test_a_house_out_of_order(tmp_path, changes, wanted):
    assert disorder(build(tmp_path, {**GOOD, **changes})) == wanted
