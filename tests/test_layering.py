"""Imports point one way, planning loads neither torch nor DeepSpeed, and files are short."""

import ast
import functools
import importlib
import json
import multiprocessing
import subprocess
import sys
from pathlib import Path

import pytest

import seqlen_curriculum

PACKAGE = Path(seqlen_curriculum.__file__).parent
ROOMS = """
errors extras shipped < strict_json < fields files launchers < schedule < run_folder < config
< analysis batch data planning < models < evaluation export training < integrations tuning < study < cli < train __main__
"""
# A room imports from those before it and from itself, not from its neighbours.
LEVEL = {room: level for level, rooms in enumerate(ROOMS.split("<")) for room in rooms.split()}
MOST_LINES = 300
HEAVY = {"torch", "deepspeed", "transformers"}


@functools.cache
def imports(path):
    """Return (module, whether it runs on import of the file) of every import statement."""
    tree = ast.parse(path.read_text())
    hidden = {
        child
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) or (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test))
        for child in ast.walk(node)
    }
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, node not in hidden) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.append((node.module, node not in hidden))
    return found


def modules():
    return [path for path in sorted(PACKAGE.rglob("*.py")) if path != PACKAGE / "__init__.py"]


def unit(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_one_way(path):
    for module, _ in imports(path):
        if module.startswith("seqlen_curriculum."):
            other = module.split(".")[1]
            assert LEVEL[other] <= LEVEL[unit(path)], f"{path.name} imports {module}, a higher layer"
            assert other == unit(path) or LEVEL[other] < LEVEL[unit(path)], (
                f"{path.name} imports its neighbour {module}"
            )


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_heavy_imports_stay_where_they_belong(path):
    for module, at_import in imports(path):
        root = module.split(".")[0]
        no_deepspeed = {"torch", "transformers"}
        allowed = {
            "training": HEAVY,
            "models": no_deepspeed,
            "evaluation": no_deepspeed,
            "batch": {"torch"},
            "integrations": no_deepspeed,
            "export": {"torch"},
        }.get(unit(path), set())
        if path.name == "deepspeed_legacy.py":
            allowed = {"deepspeed"}
        assert not (at_import and root in HEAVY - allowed), f"{path.name} imports {module}"


def test_files_are_short():
    lengths = {str(path.relative_to(PACKAGE)): len(path.read_text().splitlines()) for path in PACKAGE.rglob("*.py")}
    assert {name: lines for name, lines in lengths.items() if lines > MOST_LINES} == {}


@pytest.mark.parametrize("statement", ["import seqlen_curriculum", "from seqlen_curriculum import RunConfig, Timeline"])
def test_planning_loads_no_torch(statement):
    code = f"{statement}; import sys, json; print(json.dumps(sorted(set(sys.modules) & {HEAVY!r})))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(result.stdout) == []


def import_without_deepspeed():
    for name in [name for name in sys.modules if name.startswith(("deepspeed", "seqlen_curriculum"))]:
        del sys.modules[name]
    sys.modules["deepspeed"] = None
    importlib.import_module("seqlen_curriculum.integrations.transformers")


@pytest.mark.filterwarnings("ignore:.* is multi-threaded, use of fork:DeprecationWarning")
def test_trainers_of_others_need_no_deepspeed():
    pytest.importorskip("accelerate")
    # Among the other tests, torch and transformers are already imported. Importing them again takes seconds.
    process = multiprocessing.get_context("fork").Process(target=import_without_deepspeed)
    process.start()
    process.join()
    assert process.exitcode == 0


def test_public_names_are_exact():
    assert sorted(seqlen_curriculum.__all__) == seqlen_curriculum.__all__
    for name in seqlen_curriculum.__all__:
        assert getattr(seqlen_curriculum, name).__module__.startswith("seqlen_curriculum.")
    assert set(seqlen_curriculum.__all__) <= set(dir(seqlen_curriculum))
    with pytest.raises(AttributeError, match="nothing"):
        _ = seqlen_curriculum.nothing
