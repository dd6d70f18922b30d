"""The flags of all subcommands are the same, wherever they apply, and none can be abbreviated."""

import argparse
import importlib
import json

import pytest
from helpers.launching import ROOT

from seqlen_curriculum import cli
from seqlen_curriculum.cli import evaluate, inspect
from seqlen_curriculum.cli.flags import Parser

MODULES = sorted(cli.COMMANDS)
# Their output is a log, a JSON schema, a script, a configuration file, and the path of one.
WITHOUT_JSON = {"train", "schema", "completion", "configs show", "configs copy"}
REQUIRED = {"train": ["--save", "x"], "tune": ["--save", "x"]}
CONFIG = str(ROOT / "configs" / "tiny_cpu.json")


def parsers():
    """(words of the command, parser) of every subcommand, and of each kind of benchmark."""
    for name in MODULES:
        parser = importlib.import_module(f"seqlen_curriculum.cli.{name}").parser()
        children = [action.choices for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
        for choices in children:
            yield from (([name, child], choices[child]) for child in choices)
        if not children:
            yield [name], parser


PARSERS = {" ".join(words): parser for words, parser in parsers()}
ON_RUNS = [name for name, parser in PARSERS.items() if "--set" in parser.flags()]


def test_the_commands_on_a_run():
    measured = {f"benchmark {kind}" for kind in ("throughput", "trainer", "data", "pieces", "documents", "loop")}
    expected = {"plan", "train", "tune", "inspect", *measured}
    assert set(ON_RUNS) == expected
    assert {name for name, parser in PARSERS.items() if "--config" in parser.flags()} == expected


@pytest.mark.parametrize("name", [name for name in ON_RUNS if name != "inspect"])
def test_the_file_is_positional_or_a_flag(name):
    parser, rest = PARSERS[name], REQUIRED.get(name, [])
    for words in (
        ["run.json", *rest],
        [*rest, "run.json"],
        ["--config", "run.json", *rest],
        ["--config=run.json", *rest],
    ):
        args = parser.parse_args([*words, "--set", "training.seed=7", "--set", "model.dropout=0"])
        assert args.config == "run.json"
        assert args.set == ["training.seed=7", "model.dropout=0"]


def test_inspect_takes_a_file_for_a_run_and_else_corpora(tmp_path):
    (tmp_path / "run").mkdir()
    for words, mode in (
        (["run.json"], "--config"),
        (["run.json", "--step", "3"], "--step"),
        (["--config", "run.json"], "--config"),
        ([str(tmp_path / "run")], "--config"),
        (["corpus/a"], "PREFIX"),
        (["corpus/a", "corpus/b"], "PREFIX"),
    ):
        args = inspect.parser().parse_args(words)
        assert inspect.mode(args) == mode
        assert (args.config is None) == (mode == "PREFIX")
    (tmp_path / "run.bin").touch()  # a corpus beside a folder of the same name
    assert inspect.mode(inspect.parser().parse_args([str(tmp_path / "run")])) == "PREFIX"


@pytest.mark.parametrize("name", PARSERS)
def test_json_has_no_value(name):
    actions = PARSERS[name]._option_string_actions
    if name in WITHOUT_JSON:
        assert "--json" not in actions
    else:
        assert actions["--json"].nargs == 0


@pytest.mark.parametrize("name", PARSERS)
def test_no_flag_is_abbreviated(name, capsys):
    parser = PARSERS[name]
    assert isinstance(parser, Parser)
    for flag in parser.flags() - {"-h"}:
        if flag[:-1] in parser.flags():
            continue
        with pytest.raises(SystemExit) as end:
            parser.parse_args([flag[:-1]])
        assert end.value.code == 2
        assert f"error: {flag[:-1]}: no such flag; did you mean " in capsys.readouterr().err


@pytest.mark.parametrize("name", PARSERS)
def test_every_flag_is_explained(name):
    assert [action.dest for action in PARSERS[name]._actions if not action.help] == []


def test_what_is_written_is_named_by_out():
    outputs = {name for name, parser in PARSERS.items() if "--out" in parser.flags()}
    assert outputs >= {"prepare", "merge", "report", "evaluate", "export", "benchmark throughput", "benchmark data"}
    for name in ("prepare", "merge"):
        words = {"prepare": [], "merge": ["a"]}[name]
        for flag in ("--out", "--output-prefix"):
            assert PARSERS[name].parse_args([*words, flag, "corpus/x"]).out == "corpus/x"


def test_commands_that_write_a_file_can_replace_it():
    writing = {name for name, parser in PARSERS.items() if {"--out", "--png"} & parser.flags()}
    assert {name for name, parser in PARSERS.items() if "--overwrite" in parser.flags()} == writing - {"export"}


def test_lm_evals_names_are_accepted():
    parser = evaluate.parser()
    ours = parser.parse_args(["x", "--harness", "lambada", "piqa", "--shots", "2"])
    theirs = parser.parse_args(["x", "--tasks", "lambada,piqa", "--num_fewshot", "2"])
    assert ours.shots == theirs.shots == 2
    assert evaluate.task_names(theirs.harness) == ours.harness == ["lambada", "piqa"]
    assert evaluate.task_names(["lambada,piqa", "arc_easy"]) == ["lambada", "piqa", "arc_easy"]


def test_plan_prints_one_object(capsys):
    cli.main(["plan", "--config", CONFIG, "--json", "--set", "training.train_tokens=500000"])
    assert json.loads(capsys.readouterr().out)["steps"] > 0


def test_a_corpus_as_json(tmp_path, capsys):
    (tmp_path / "text.txt").write_text("It was the best of times. " * 40)
    for name in ("a", "b"):
        words = [
            "prepare",
            "--input",
            str(tmp_path / "text.txt"),
            "--train-vocab",
            "257",
            "--out",
            str(tmp_path / name),
        ]
        cli.main([*words, "--json"])
        corpus = json.loads(capsys.readouterr().out)
        assert (corpus["prefix"], corpus["already"], corpus["documents"]) == (str(tmp_path / name), False, 1)
    cli.main(["merge", str(tmp_path / "a"), str(tmp_path / "b"), "--out", str(tmp_path / "c"), "--json"])
    assert json.loads(capsys.readouterr().out)["documents"] == 2
