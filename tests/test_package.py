"""The package as it is installed: its files, its metadata, and the commands that need no torch."""

import json
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from email import message_from_bytes

import pytest
import yaml
from helpers.launching import ROOT
from packaging.requirements import Requirement

from seqlen_curriculum import __version__
from seqlen_curriculum.cli import COMMANDS
from seqlen_curriculum.extras import EXTRAS

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
WITHOUT_EXTRAS = """
import sys
from importlib.machinery import PathFinder

REFUSED = "torch deepspeed transformers tokenizers scipy lm_eval datasets pyarrow tensorboard wandb".split()

class Without(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in REFUSED else super().find_spec(name, path, target)

    @classmethod
    def find_distributions(cls, context):
        return () if context.name in REFUSED else super().find_distributions(context)

sys.meta_path[sys.meta_path.index(PathFinder)] = Without
"""
"""Code after which these packages are missing, as in an installation without extras."""


def python(code, *arguments, **options):
    return subprocess.run([sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, **options)


def slw(*arguments, **options):
    """Run a command as in an installation without extras."""
    return python(WITHOUT_EXTRAS + "from seqlen_curriculum.cli import main; main()", *arguments, **options)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A folder with the sdist, made from a copy of the repository, and the wheel, made from the sdist alone."""
    folder = tmp_path_factory.mktemp("built")
    source = folder / "source"
    ignored = shutil.ignore_patterns(
        ".*", "build", "dist", "*.egg-info", "__pycache__", "corpus", "runs", "site", "shared"
    )
    shutil.copytree(ROOT, source, ignore=ignored)
    build = "import sys; from setuptools import build_meta; print(getattr(build_meta, sys.argv[1])(sys.argv[2]))"

    def make(what, cwd):
        result = python(build, f"build_{what}", folder, cwd=cwd)
        assert result.returncode == 0, result.stderr
        return folder / result.stdout.splitlines()[-1]

    sdist = make("sdist", source)
    with tarfile.open(sdist) as archive:
        # Python 3.11.4 and later have the filter, and 3.12 warns without it.
        archive.extractall(folder / "unpacked", **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    wheel = make("wheel", folder / "unpacked" / sdist.name.removesuffix(".tar.gz"))
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "installed")
    return folder


@pytest.fixture(scope="module")
def metadata(built):
    (path,) = built.glob("installed/*.dist-info/METADATA")
    return message_from_bytes(path.read_bytes())


def files(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_the_wheel_has_the_package_its_configurations_and_examples_and_nothing_else(built):
    (info,) = built.glob("installed/*.dist-info")
    found = {name for name in files(built / "installed") if not name.startswith(info.name)}
    kinds = ("*.py", "py.typed", "*.json", "templates/*")
    expected = {f"seqlen_curriculum/{path.relative_to(ROOT / 'seqlen_curriculum').as_posix()}"
                for kind in kinds for path in (ROOT / "seqlen_curriculum").rglob(kind)}  # fmt: skip
    for beside, kind in (("configs", "*.json"), ("examples", "*.py"), ("examples", "*.json")):
        expected |= {f"seqlen_curriculum/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / beside).rglob(kind)}
    assert found == expected
    assert {"seqlen_curriculum/configs/tiny_cpu.json", "seqlen_curriculum/examples/own_loop.py"} < found
    assert (info / "licenses" / "LICENSE").read_text() == (ROOT / "LICENSE").read_text()


def test_the_sdist_has_what_the_tests_need(built):
    (source,) = (built / "unpacked").iterdir()
    assert {"CHANGELOG.md", "CITATION.cff", "constraints.txt", "scripts/install.sh", "tests/conftest.py"} < files(
        source
    )


def test_the_metadata(built, metadata):
    assert metadata["Version"] == __version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Author"] == "seqlen-curriculum contributors"
    assert metadata["Requires-Python"] == ">=3.11"
    assert metadata.get_all("Provides-Extra") == [*EXTRAS, "docs", "dev"]
    core = [Requirement(line).name for line in metadata.get_all("Requires-Dist") if "extra ==" not in line]
    assert core == sorted(core)
    assert {"numpy", "pydantic", "matplotlib"} < set(core)
    assert not set(core) & {"torch", "deepspeed", "transformers", "tokenizers", "scipy"}
    (entry_points,) = built.glob("installed/*.dist-info/entry_points.txt")
    assert set(re.findall(r"(\S+) = (\S+)", entry_points.read_text())) == {
        ("slw", "seqlen_curriculum.cli:main"),
        ("seqlen-curriculum", "seqlen_curriculum.cli:main"),
    }


@pytest.mark.parametrize(
    ("module", "command"),
    [("twine", ["check", "--strict"]), ("check_wheel_contents", [])],
    ids=["twine", "check-wheel-contents"],
)
def test_the_checks_of_package_indexes_are_clean(built, module, command):
    pytest.importorskip(module)
    distributions = [*built.glob("*.whl"), *(built.glob("*.tar.gz") if command else ())]
    result = subprocess.run([sys.executable, "-m", module, *command, *distributions], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def test_the_installed_package_finds_its_configurations(built, tmp_path):
    environment = {"PYTHONPATH": str(built / "installed"), "PATH": "/nowhere"}
    code = "from seqlen_curriculum.cli import main; main()"
    result = python(code, "configs", "copy", "tiny_cpu", cwd=tmp_path, env=environment)
    assert (result.returncode, result.stdout) == (0, "tiny_cpu.json\n"), result.stderr
    assert files(tmp_path) == {"tiny_cpu.json", "run.schema.json"}
    result = python(code, "plan", "tiny_cpu.json", cwd=tmp_path, env=environment)
    assert result.returncode == 0, result.stderr


def test_every_requirement_is_pinned_inside_its_range():
    pins = [Requirement(line) for line in (ROOT / "constraints.txt").read_text().splitlines()[1:]]
    pinned = {normal(pin.name): next(iter(pin.specifier)).version for pin in pins}
    listed = [PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()]
    requirements = [Requirement(line) for lines in listed for line in lines]
    wanted = [found for found in requirements if found.name not in ("seqlen-curriculum", "setuptools")]
    assert len(wanted) > 20
    assert [str(found) for found in wanted if pinned.get(normal(found.name)) not in found.specifier] == []


def normal(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def test_the_map_of_modules_to_extras_is_that_of_the_package():
    for extra, modules in EXTRAS.items():
        names = {Requirement(line).name for line in PROJECT["optional-dependencies"][extra]}
        # datasets requires pyarrow
        assert {normal(module) for module in modules} - {"pyarrow"} == names - {"seqlen-curriculum"}


@pytest.fixture(scope="module")
def run_file(tmp_path_factory, tiny_run):
    path = tmp_path_factory.mktemp("core") / "run.json"
    path.write_text(json.dumps(tiny_run))
    return path


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("core") / "run"
    folder.mkdir()
    step = {"seqlen": 8, "rows": 4, "lr": 0.1, "grad_norm": 1.0, "seconds": 1.0}
    losses = [(4.0, 3.0), (3.0, 1.0), (3.9, 7.0), (2.0, 2.0), (2.5, 1.5)]
    records = [
        {"step": number, "consumed_tokens": 32 * number, "loss": loss, "variance_norm": variance, **step}
        for number, (loss, variance) in enumerate(losses, 1)
    ]
    (folder / "runlog.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def test_planning_needs_no_extra(run_file, tmp_path):
    result = slw("plan", run_file, "--ranks", "2", "--png", tmp_path / "plan.png")
    assert result.returncode == 0, result.stderr
    assert "steps             46" in result.stdout
    assert (tmp_path / "plan.png").exists()


def test_reports_need_no_extra(run_folder, tmp_path):
    result = slw("report", run_folder, "--out", tmp_path / "report")
    assert result.returncode == 0, result.stderr
    assert "Pearson's r" in result.stdout
    assert (tmp_path / "report" / "report.html").exists()


def test_inspection_shows_ids_where_tokenizers_is_missing(run_file, corpus):
    result = slw("inspect", "--config", run_file, "--step", "2")
    assert result.returncode == 0, result.stderr
    assert "    ids '" in result.stdout
    assert "tokenizers is not installed; pip install 'seqlen-curriculum[train]'" in result.stdout
    assert slw("inspect", corpus).returncode == 0


@pytest.mark.parametrize("arguments", [["configs", "list"], ["configs", "show", "tiny_cpu"], ["--version"]])
def test_other_commands_need_no_extra(arguments):
    result = slw(*arguments)
    assert result.returncode == 0, result.stderr
    assert result.stdout


def test_schedules_need_no_extra():
    code = """
from seqlen_curriculum import CurriculumScheduler, RunConfig, Timeline
schedule = {"total_curriculum_step": 10, "difficulty_step": 8}
scheduler = CurriculumScheduler({"curriculum_type": "seqlen", "min_difficulty": 8, "max_difficulty": 64,
                                 "schedule_type": "fixed_linear", "schedule_config": schedule})
print(scheduler.get_difficulty(1), scheduler.get_difficulty(10))
"""
    result = python(WITHOUT_EXTRAS + code)
    assert (result.returncode, result.stdout) == (0, "8 64\n"), result.stderr


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_help_needs_no_extra(name):
    result = slw(name, "--help")
    assert result.returncode == 0, result.stderr
    assert f"usage: slw {name}" in result.stdout


@pytest.mark.parametrize(
    ("command", "module"),
    [
        (["train", "{run_file}", "--save", "{folder}/run"], "deepspeed"),
        (["tune", "{run_file}", "--save", "{folder}/tuning", "--warmup-steps", "5"], "deepspeed"),
        (["benchmark", "loop", "{run_file}", "--rounds", "2"], "deepspeed"),
        (["prepare", "--stdlib", "--train-vocab", "512", "--out", "{folder}/corpus"], "tokenizers"),
        (["evaluate", "{folder}", "--task", "lambada=test.jsonl"], "torch"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else value,
)
def test_a_missing_extra_is_one_line_with_what_to_type(run_file, tmp_path, command, module):
    words = [word.format(run_file=run_file, folder=tmp_path) for word in command]
    result = slw(*words)
    assert result.returncode == 1
    assert re.fullmatch(r"error: (\w+) is not installed; pip install 'seqlen-curriculum\[train\]'\n", result.stderr)
    assert module in result.stderr


@pytest.mark.parametrize("name", ["initialize", "pretrain", "TokenCosineLR", "set_batch_sequence_length"])
def test_a_name_of_the_package_names_its_extra(name):
    result = python(WITHOUT_EXTRAS + f"import seqlen_curriculum; seqlen_curriculum.{name}")
    last = result.stderr.splitlines()[-1]
    assert re.fullmatch(
        rf"ImportError: seqlen_curriculum\.{name}: \w+ is not installed; pip install 'seqlen-curriculum\[train\]'", last
    )


def test_the_citation():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["title"] == PROJECT["name"]
    assert citation["license"] == PROJECT["license"]
    assert citation["authors"] == PROJECT["authors"]
    paper = citation["preferred-citation"]
    assert [author["family-names"] for author in paper["authors"]] == ["Li", "Zhang", "He"]
    assert paper["identifiers"][0]["value"] == "arXiv:2108.06084"
