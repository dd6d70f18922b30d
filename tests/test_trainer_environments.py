"""scripts/test_trainers.sh, with commands in place of uv and Python that record their arguments; nothing is installed."""

import os
import re
import shutil
import subprocess

import pytest
from helpers.launching import ROOT

ENVIRONMENTS = ROOT / "tests" / "environments"
NAMES = sorted(path.stem for path in ENVIRONMENTS.glob("*.txt") if ".overrides" not in path.name)
MARKER = "pytestmark = pytest.mark.trainers"
PYTHON = '#!/bin/bash\necho "pytest $*" >> "$LOG"\n[[ "$*" != *test_failing.py* ]]\n'
UV = """#!/bin/bash
echo "uv $*" >> "$LOG"
if [ "$1" = venv ]; then mkdir -p "${@: -1}/bin" && cp "$LOG.python" "${@: -1}/bin/python"; fi
if [ "$1" = pip ]; then [ ! -e "$LOG.offline" ]; fi
"""


@pytest.fixture
def script(tmp_path):
    """Return a function that runs the script in a repository with the trainers failing and working."""
    environments = tmp_path / "tests" / "environments"
    environments.mkdir(parents=True)
    (tmp_path / "scripts").mkdir()
    for name in ("scripts/test_trainers.sh", "pyproject.toml", "setup.py", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path / name)
    for name in ("failing", "working"):
        (environments / f"{name}.txt").write_text(f"{name}==1\n")
    (environments / "working.overrides.txt").write_text("torch==2\n")
    (tmp_path / "log.python").write_text(PYTHON)
    (tmp_path / "uv").write_text(UV)
    for name in ("log.python", "uv"):
        (tmp_path / name).chmod(0o755)

    def run(*arguments):
        log = tmp_path / "log"
        log.write_text("")
        environment = {**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "LOG": str(log)}
        command = ["bash", str(tmp_path / "scripts" / "test_trainers.sh"), *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        return done, log.read_text().splitlines()

    return run


def installs(log):
    return [line for line in log if line.startswith("uv pip install")]


def test_an_environment_is_made_once_and_again_when_its_requirements_change(script, tmp_path):
    done, log = script("working", "--", "-k", "resume")
    assert done.returncode == 0, done.stderr
    assert log[-1].endswith("-m trainers tests/test_working.py -k resume")
    (install,) = installs(log)
    assert "--requirement tests/environments/working.txt --override tests/environments/working.overrides.txt" in install
    assert re.search(r" hypothesis==\S+ psutil==\S+ pytest==\S+ --editable \.$", install)
    assert installs(script("working")[1]) == []
    (tmp_path / "tests" / "environments" / "working.overrides.txt").write_text("torch==3\n")
    assert len(installs(script("working")[1])) == 1


def test_a_failed_install_is_repeated(script, tmp_path):
    (tmp_path / "log.offline").touch()
    done, log = script("working")
    assert done.returncode != 0
    assert not any(line.startswith("pytest") for line in log)
    (tmp_path / "log.offline").unlink()
    done, log = script("working")
    assert done.returncode == 0, done.stderr
    assert len(installs(log)) == 1


def test_all_trainers_are_tested_and_the_failed_ones_are_listed(script):
    done, log = script()
    assert done.returncode == 1
    assert [line.split()[-1] for line in log if line.startswith("pytest")] == [
        "tests/test_failing.py",
        "tests/test_working.py",
    ]
    assert done.stderr == "error: failed: failing\n"


@pytest.mark.parametrize("name", ["wrking", "working.overrides"])
def test_an_unknown_trainer_is_an_error_that_lists_the_valid_ones(script, name):
    done, log = script("working", name)
    assert (done.returncode, log) == (1, [])
    assert done.stderr.count("\n") == 1
    assert name in done.stderr
    assert done.stderr.endswith("valid are: failing working\n")


def test_help_is_the_comment_of_the_script(script):
    done, log = script("--help")
    assert (done.returncode, log) == (0, [])
    assert "usage: bash scripts/test_trainers.sh [NAME...] [-- PYTEST_ARGUMENT...]" in done.stdout
    assert "set -e" not in done.stdout


@pytest.mark.parametrize("path", sorted(ENVIRONMENTS.glob("*.txt")), ids=lambda path: path.name)
def test_requirements_are_exact(path):
    lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
    assert lines
    for line in lines:
        pinned = r"[A-Za-z0-9._-]+(\[[a-z,]+\])?==[A-Za-z0-9.]+"
        left_out = path.name.endswith(".overrides.txt") and line.endswith('; python_version < "3"')
        assert left_out or re.fullmatch(pinned, line), line


def test_every_environment_has_tests_with_the_marker_and_the_reverse():
    marked = [path for path in (ROOT / "tests").glob("test_*.py") if MARKER in path.read_text().splitlines()]
    assert sorted(path.stem.removeprefix("test_") for path in marked) == NAMES
