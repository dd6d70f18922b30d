"""The documentation: the site builds strictly, needs no network and lists every key; its commands run as written."""

import argparse
import importlib.util
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from helpers.capabilities import lacking
from helpers.launching import limit
from helpers.markdown import ILLUSTRATION, OUTPUT, RUN, SLOW, blocks, calls, matches

from seqlen_curriculum import RunConfig
from seqlen_curriculum.config import DataConfig, ModelConfig, TrainingConfig
from seqlen_curriculum.config.rope import RopeConfig, RopeScaling
from seqlen_curriculum.schedule.batch_size_warmup import BatchSizeWarmup
from seqlen_curriculum.schedule.curriculum_config import CustomCurriculum
from seqlen_curriculum.schedule.schedule_config import (
    AdaptiveSchedule,
    CustomSchedule,
    DiscreteSchedule,
    LinearSchedule,
    MixedSchedule,
    RootSchedule,
)
from seqlen_curriculum.schedule.token_lr import TokenCosineParams, TokenWSDParams

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
READ = [ROOT / "README.md", *PAGES]
"""The files whose code blocks are run or marked."""
SCRIPTS = {
    "prepare_data": "prepare",
    "merge_corpora": "merge",
    "inspect_data": "inspect",
    "train_gpt2": "train",
    "export_hf": "export",
}
"""The scripts that are named differently from their subcommands."""
SECTIONS = {
    "curriculum_learning": CustomCurriculum,
    "fixed_linear": LinearSchedule,
    "fixed_root": RootSchedule,
    "fixed_discrete": DiscreteSchedule,
    "fixed_mixed": MixedSchedule,
    "adaptive": AdaptiveSchedule,
    "custom": CustomSchedule,
    "TokenCosineLR": TokenCosineParams,
    "TokenWSDLR": TokenWSDParams,
    "batch_size_warmup": BatchSizeWarmup,
    "model": ModelConfig,
    "model.rope": RopeConfig,
    "model.rope.scaling": RopeScaling,
    "data": DataConfig,
    "training": TrainingConfig,
}
"""The class that checks the keys of each table."""
COMMAND_LINE = importlib.util.find_spec("seqlen_curriculum.__main__")
needs_command = pytest.mark.skipif(COMMAND_LINE is None, reason="the command slw isn't there")


def name_of(path):
    return str(path.relative_to(ROOT))


# --- the site ---


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    for module in ("mkdocs", "material", "mkdocstrings"):
        pytest.importorskip(module, reason=f"{module} is not installed: pip install 'seqlen-curriculum[docs]'")
    folder = tmp_path_factory.mktemp("site")
    # Without --quiet, under which --strict sees no warnings.
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=limit(300))
    assert result.returncode == 0, result.stdout + result.stderr
    return folder


def test_the_site_builds_strictly_with_all_pages(site):
    built = {path.relative_to(site).with_suffix("") for path in site.rglob("*.html")}
    assert {path.relative_to(DOCS).with_suffix("") for path in PAGES} == built - {Path("404")}


class Loaded(HTMLParser):
    """Collects the addresses that a browser loads with a page: scripts, styles, pictures, frames."""

    def __init__(self):
        super().__init__()
        self.addresses = []

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        is_loaded = tag != "link" or given.get("rel") in ("stylesheet", "icon", "preload", "preconnect")
        if tag != "a" and is_loaded:
            self.addresses += [value for name, value in given.items() if name in ("src", "href", "srcset") and value]


def test_the_site_loads_nothing_from_a_network(site):
    loaded = {}
    for page in site.rglob("*.html"):
        parser = Loaded()
        parser.feed(page.read_text())
        loaded[page] = parser.addresses
    assert all(loaded.values())
    remote = r"(https?:)?//.*"
    assert not [address for addresses in loaded.values() for address in addresses if re.match(remote, address)]
    styles = "".join(path.read_text() for path in site.rglob("*.css"))
    assert not re.search(r"url\(\W*(https?:)?//|@import\W+(https?:)?//", styles)


def test_every_public_name_has_an_entry(site):
    import seqlen_curriculum

    page = (site / "api.html").read_text()
    anchors = set(re.findall(r'id="seqlen_curriculum\.[\w.]*?(\w+)"', page))
    assert set(seqlen_curriculum.__all__) <= anchors


# --- tables ---


@pytest.fixture(scope="module")
def reference():
    spec = importlib.util.spec_from_file_location("reference", DOCS / "reference.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_tables_of_keys_are_those_of_the_schema(reference):
    page = (DOCS / "configuration.md").read_text()
    assert reference.with_tables(page) == page, "run: python docs/reference.py"


def test_every_key_of_a_section_is_in_its_table(reference):
    page = (DOCS / "configuration.md").read_text()
    for name, section in SECTIONS.items():
        (table,) = re.findall(rf"<!-- table: {re.escape(name)} -->(.*?)<!-- end of table -->", page, re.DOTALL)
        documented = re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)
        assert sorted(documented) == sorted(set(section.model_fields) - reference.ELSEWHERE)
        assert documented


def test_every_measured_table_has_its_command():
    page = (DOCS / "experiments.md").read_text()
    sections = [part for part in page.split("\n## ")[1:] if "\n| --- " in part]
    assert len(sections) == 9
    assert [part.splitlines()[0] for part in sections if "```bash" not in part] == []


# --- commands ---


@pytest.mark.parametrize("path", READ, ids=name_of)
def test_every_block_is_run_or_marked_as_an_illustration(path):
    page = path.read_text()
    found = blocks(page)
    assert len(found) * 2 == len(re.findall(r"^ *```", page, re.MULTILINE)), "a block that isn't understood"
    known = {*RUN, SLOW, OUTPUT}
    unmarked = [block.line for block in found if block.mark not in known and not block.mark.startswith(ILLUSTRATION)]
    assert not unmarked, f"blocks at these lines of {path} need a mark, see tests/helpers/markdown.py"


def flags_of(parser):
    """Return the flags of a parser and of all its subparsers."""
    found = set(parser._option_string_actions)
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            found |= set().union(*(flags_of(inner) for inner in action.choices.values()))
    return found


@needs_command
@pytest.mark.parametrize("path", READ, ids=name_of)
def test_commands_have_the_flags_that_pages_give(path):
    from seqlen_curriculum.cli import COMMANDS

    for block in blocks(path.read_text()):
        for name, arguments in calls(block) if block.language == "bash" else ():
            command = SCRIPTS.get(name, name)
            if command in ("--version", "--help"):
                continue
            assert command in COMMANDS, f"{path}, line {block.line}: {name}"
            flags = {word.partition("=")[0] for word in arguments if word.startswith("--")}
            if not flags:
                continue
            parser = importlib.import_module(f"seqlen_curriculum.cli.{command}").parser()
            assert flags <= flags_of(parser) | {"--help"}, f"{path}, line {block.line}: {name}"


def environment(folder):
    """Return the environment of a reader whose PATH has ``slw``, whether or not the package is installed."""
    commands = folder / "bin"
    commands.mkdir()
    for name in ("slw", "seqlen-curriculum"):
        (commands / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" -m seqlen_curriculum "$@"\n')
        (commands / name).chmod(0o755)
    paths = [str(commands), str(Path(sys.executable).parent), os.environ["PATH"]]
    return {**os.environ, "PATH": os.pathsep.join(paths), "PYTHONPATH": str(ROOT)}


def run_block(block, folder, variables):
    """Run one block in ``folder`` and return what it printed."""
    if block.language in ("json", "jsonc"):
        (folder / "block.json").write_text(block.text)
        RunConfig.load(folder / "block.json")
        return ""
    command = {"bash": ["bash", "-euo", "pipefail", "-c"], "python": [sys.executable, "-c"]}[block.language]
    result = subprocess.run(
        [*command, block.text], cwd=folder, env=variables, capture_output=True, text=True, timeout=limit(600)
    )
    # Without a compiler the doctor says so, and its status is 1.
    can_fail = block.text.startswith("slw doctor") and lacking(["compiler"])
    expected = (0, 1) if can_fail else (0,)
    assert result.returncode in expected, f"line {block.line}:\n{block.text}\n{result.stdout}\n{result.stderr}"
    return result.stdout


def run_page(path, folder, slow=False):
    """Run the marked blocks of a page in order: in one empty folder, and in one that has what a clone has."""
    variables = environment(folder)
    places = {"test: run": folder / "empty", "test: run in a clone": folder / "clone"}
    for place in places.values():
        place.mkdir()
    for name in ("configs", "examples", "scripts"):
        (places["test: run in a clone"] / name).symlink_to(ROOT / name)
    places[SLOW] = places["test: run"]
    printed = None
    for block in blocks(path.read_text()):
        if block.mark == OUTPUT:
            if printed is not None:
                assert matches(block.text, printed), f"line {block.line}:\n{block.text}\nis not\n{printed}"
        elif block.mark in places and (slow or block.mark != SLOW):
            printed = run_block(block, places[block.mark], variables)
        else:
            printed = None


def runs(path, marks):
    return any(block.mark in marks for block in blocks(path.read_text()))


@needs_command
@pytest.mark.parametrize("path", [path for path in READ if runs(path, RUN)], ids=name_of)
def test_a_page_does_what_it_says(path, tmp_path):
    run_page(path, tmp_path)


@needs_command
@pytest.mark.slow
@pytest.mark.needs("ports", "memory")
@pytest.mark.parametrize("path", [path for path in READ if runs(path, [SLOW])], ids=name_of)
def test_a_page_that_trains_does_what_it_says(path, tmp_path):
    run_page(path, tmp_path, slow=True)


def test_the_explained_file_is_the_shipped_one(tmp_path):
    (block,) = (block for block in blocks((DOCS / "configuration.md").read_text()) if block.language == "jsonc")
    (tmp_path / "run.json").write_text(block.text)
    explained = RunConfig.load(tmp_path / "run.json", require=("model", "data", "training"))
    shipped = RunConfig.load(ROOT / "configs" / "paper" / "gpt2_117m_bsz512_seqlen1k_slw60k.json")
    assert explained.settings() == shipped.settings()


# --- the helpers of this test ---


def test_blocks_have_their_marks():
    page = "# A\n\n<!-- test: run -->\n```bash\nslw plan a\n```\n\ntext\n\n```text\nb\n```\n"
    assert [(block.line, block.language, block.mark) for block in blocks(page)] == [
        (5, "bash", "test: run"),
        (11, "text", ""),
    ]


@pytest.mark.parametrize(
    ("expected", "printed", "is_match"),
    [
        ("a\nb", "a\nb\n", True),
        ("a\nb", "a\nc\nb\n", False),
        ("a\n...\nb", "a\nc\nd\nb  \n", True),
        ("a\n...\nb", "a\nb", True),
        ("...\nb\n...", "a\nb\nc", True),
        ("...\nb", "a\nb\nc", False),
        ("3 files, ...", "3 files, 20 bytes", True),
    ],
)
def test_outputs_are_compared(expected, printed, is_match):
    assert matches(expected, printed) == is_match


def test_calls_are_found():
    page = (
        "```bash\nA=1 slw plan a.json --at 5 | head   # see slw tune\n"
        "for x in 1; do deepspeed --num_accelerators 1 scripts/train_gpt2.py --config c \\\n  --save d; done\n```\n"
    )
    (block,) = blocks(page)
    assert list(calls(block)) == [
        ("plan", ["a.json", "--at", "5"]),
        ("train_gpt2", ["--config", "c", "--save"]),
    ]
