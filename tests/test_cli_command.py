"""The command slw: its overview, version, mistakes, broken pipes, completion, and the scripts that run its subcommands."""

import ast
import importlib
import os
import re
import shlex
import subprocess
import sys

import pytest
from helpers import launchers
from helpers.command import slw
from helpers.launching import ROOT

import seqlen_curriculum
from seqlen_curriculum import cli

SLW = [sys.executable, "-m", "seqlen_curriculum"]
CONFIG = str(ROOT / "configs" / "tiny_cpu.json")
MODULES = sorted(cli.COMMANDS)
SCRIPTS = {"export": "export_hf", "inspect": "inspect_data", "merge": "merge_corpora", "prepare": "prepare_data"}
SCRIPTS |= {
    "train": "train_gpt2",
    **{name: name for name in ("benchmark", "evaluate", "generate", "plan", "report", "tune")},
}


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    """Remove a launcher's variables, and set the width of the help for commands in this process and in others."""
    for name in set(os.environ) - set(launchers.without_launcher()):
        monkeypatch.delenv(name)
    monkeypatch.setenv("COLUMNS", "80")


def parser_of(name):
    return importlib.import_module(f"seqlen_curriculum.cli.{name}").parser()


def examples_of(text):
    """The lines of commands after ``Example:`` that slw runs, those that end in a backslash joined with the next."""
    lines = text.split("Example:\n")[1].split("\n\n")[0].replace("\\\n", " ").splitlines()
    return [line.strip() for line in lines]


# --- help and version


def test_the_overview_lists_every_subcommand_with_its_example():
    text = slw("--help").stdout
    for name, command in cli.COMMANDS.items():
        assert re.search(
            rf"^  {name} +{re.escape(command.summary)}\n +{re.escape(command.example)}$", text, re.MULTILINE
        )
    for group in cli.GROUPS:
        assert f"\n{group}:\n" in text
    assert slw().returncode == 2
    assert slw().stderr == text


@pytest.mark.parametrize("name", MODULES)
def test_every_example_parses(name):
    parser = parser_of(name)
    examples = examples_of(parser.format_help())
    assert examples
    for example in [*examples, cli.COMMANDS[name].example]:
        command = example.rpartition(" | ")[2].partition(" > ")[0]
        words = shlex.split(command.replace("deepspeed --module seqlen_curriculum ", "slw "))
        assert words[:2] == ["slw", name], example
        parser.parse_args(words[2:])


def test_version():
    assert slw("--version").stdout == f"seqlen-curriculum {seqlen_curriculum.__version__}\n"


def test_help_loads_nothing_slow():
    commands = [["--help"], ["--version"], *([name, "--help"] for name in MODULES)]
    code = (
        "import sys\nfrom seqlen_curriculum.cli import main\n"
        f"for arguments in {commands!r}:\n"
        "    try: main(arguments)\n"
        "    except SystemExit: pass\n"
        "    slow = {'torch', 'numpy', 'pydantic', 'deepspeed', 'transformers'} & set(sys.modules)\n"
        "    print('loaded after', *arguments, *slow)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    loaded = [line for line in result.stdout.splitlines() if line.startswith("loaded after")]
    assert loaded == [f"loaded after {' '.join(command)}" for command in commands], result.stderr


# --- mistakes


EMPTY = "the value is empty, as from a shell variable that is not set"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], "trian: no such command; did you mean train? See slw --help"),
        (["eval"], "eval: no such command; did you mean evaluate? See slw --help"),
        (["--versoin"], "--versoin: no such command; did you mean --version? See slw --help"),
        (["xyzzy"], "xyzzy: no such command; see slw --help"),
        ([""], ": no such command; see slw --help"),
        (["plan", CONFIG, "--jsn"], "--jsn: no such flag; did you mean --json? See slw plan --help"),
        (["train", CONFIG, "--sav", "x"], "--sav: no such flag; did you mean --save? See slw train --help"),
        (["train", CONFIG, "--sav=x"], "--sav: no such flag; did you mean --save? See slw train --help"),
        (["train", CONFIG, "--save", ""], f"--save: {EMPTY}; see slw train --help"),
        (["train", CONFIG, "--save="], f"--save: {EMPTY}; see slw train --help"),
        (["plan", ""], f"an argument: {EMPTY}; see slw plan --help"),
        (["train", CONFIG, "-s", "x"], "-s: no such flag; see slw train --help"),
        (["train", CONFIG], "--save: required, but not given; see slw train --help"),
        (["plan", CONFIG, "--config", "a"], "--config: not allowed with FILE; leave one of them out; see slw plan --help"),
        (["train", "--save", "x"], "FILE, --config: one of these is required; see slw train --help"),
        (["plan", CONFIG, CONFIG], f"{CONFIG}: unexpected argument; see slw plan --help"),
        (["plan", CONFIG, "--ranks", "two"], "--ranks: invalid int value: 'two'; see slw plan --help"),
        (["tune", CONFIG, "--dry", "--save", "x"], "--dry: no such flag; did you mean --dry-run? See slw tune --help"),
        (["benchmark", "loop", "--round"], "--round: no such flag; did you mean --rounds? See slw benchmark --help"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_and_status_2(arguments, message):
    result = slw(*arguments)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == f"error: {message}\n"


def test_values_that_look_like_flags_are_values():
    parser = parser_of("generate")
    assert parser.parse_args(["x", "--temperature", "-1"]).temperature == -1
    assert parser.parse_args(["x", "--prompt=--a"]).prompt == ["--a"]
    assert parser.parse_args(["x", "--prompt", "-- a b"]).prompt == ["-- a b"]
    assert parser_of("inspect").parse_args(["--", "--corpus"]).prefix == ["--corpus"]


@pytest.mark.parametrize(("module", "extra"), [("torch", "train"), ("deepspeed", "train"), ("lm_eval", "eval")])
def test_a_missing_package_is_one_line_that_names_its_extra(module, extra):
    code = (
        "import sys\nfrom seqlen_curriculum import cli\n"
        f"plan = type(sys)('plan')\n"
        f"def main(_): raise ModuleNotFoundError('no', name={module!r})\n"
        "plan.main = main\nsys.modules['seqlen_curriculum.cli.plan'] = plan\ncli.main(['plan'])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stderr == f"error: {module} is not installed; pip install 'seqlen-curriculum[{extra}]'\n"


def test_an_old_python_is_one_line():
    for name in (
        "__init__.py",
        "__main__.py",
        "train.py",
        "cli/__init__.py",
    ):  # what is compiled before the line is printed
        ast.parse((ROOT / "seqlen_curriculum" / name).read_text(), feature_version=(3, 8))
    code = "import sys; sys.version_info = (3, 9, 2); sys.version = '3.9.2 (main)'; import seqlen_curriculum.cli"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.startswith("error: Python 3.9.2 is too old; the package needs 3.11 or later")
    assert result.stderr.count("\n") == 1


def test_a_configuration_is_copied_to_a_new_folder(tmp_path):
    result = slw("configs", "copy", "tiny_cpu", "--out", tmp_path / "new/run.json")
    assert (result.returncode, result.stderr) == (0, "")
    assert {path.name for path in (tmp_path / "new").iterdir()} == {"run.json", "run.schema.json"}


# --- broken pipes


PRINTING = [["plan", CONFIG], ["plan", CONFIG, "--json"], ["plan", "--help"], ["--help"], ["completion", "bash"]]


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("command", PRINTING, ids=" ".join)
def test_a_broken_pipe_is_silent(command, unbuffered):
    # The output is written at the end, when the reader has surely gone: its end is closed before the command starts.
    read, write = os.pipe()
    os.close(read)
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    result = subprocess.run([*SLW, *command], stdout=write, stderr=subprocess.PIPE, text=True, env=environment)
    os.close(write)
    assert result.stderr == ""
    # Unbuffered, argparse of Python 3.11.4 and later ignores the error as it prints its help.
    assert result.returncode in ({0, 141} if unbuffered and "--help" in command[1:] else {141})


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_full_disk_is_one_line(unbuffered):
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    with open("/dev/full", "w") as full:
        result = subprocess.run([*SLW, "plan", CONFIG], stdout=full, stderr=subprocess.PIPE, text=True, env=environment)
    assert result.stderr == "error: the output can't be written (No space left on device); free space and rerun\n"
    assert result.returncode == 1


def test_another_broken_pipe_is_no_silent_end():
    code = "from seqlen_curriculum.cli.common import run\ndef main(): raise BrokenPipeError('of a worker')\nrun(main)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 1
    assert "BrokenPipeError: of a worker" in result.stderr


def test_the_first_line_is_read_through_a_pipe():
    pipe = f"set -o pipefail; {shlex.join([*SLW, 'plan', CONFIG])} | head -n 1"
    result = subprocess.run(["bash", "-c", pipe], capture_output=True, text=True)
    assert result.stdout.startswith("steps ")
    assert result.stdout.count("\n") == 1
    assert result.stderr == ""
    assert result.returncode in (0, 141)  # 0 if all was written before head ended


# --- scripts, and completion


@pytest.mark.parametrize(("name", "script"), SCRIPTS.items())
def test_a_script_is_its_subcommand(name, script):
    command = [sys.executable, str(ROOT / "scripts" / f"{script}.py")]
    for arguments in (["--help"], ["--no-such-flag"]):
        ours = subprocess.run([*command, *arguments], capture_output=True, text=True)
        theirs = slw(name, *arguments)
        assert (ours.returncode, ours.stdout, ours.stderr) == (theirs.returncode, theirs.stdout, theirs.stderr)
    assert sorted(f"{each}.py" for each in SCRIPTS.values()) == sorted(
        path.name for path in (ROOT / "scripts").glob("*.py")
    )


def test_completion_in_bash(tmp_path):
    script = tmp_path / "slw.bash"
    script.write_text(slw("completion", "bash").stdout)
    assert "# To install: slw completion bash > ~/.local/share/bash-completion/completions/slw\n" in script.read_text()
    (tmp_path / "run.json").touch()
    for words, completed in (
        (["tra"], "train"),
        (["train", "run.json", "--sav"], "--save"),
        (["train", "run"], "run.json"),
        (["benchmark", "loo"], "loop"),
    ):
        typed = f"COMP_WORDS=(slw {shlex.join(words)}); COMP_CWORD={len(words)}"
        code = f"source {script}; {typed}; _shtab_slw; echo ${{COMPREPLY[@]}}"
        result = subprocess.run(["bash", "-c", code], capture_output=True, text=True, cwd=tmp_path)
        assert (result.stdout.strip(), result.stderr) == (completed, "")


def test_completion_is_of_the_name_that_was_typed(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["/somewhere/bin/seqlen-curriculum"])
    cli.main(["completion", "bash"])
    assert "complete -o bashdefault -F _shtab_seqlen_curriculum seqlen-curriculum\n" in capsys.readouterr().out


@pytest.mark.parametrize("shell", ["zsh", "tcsh"])
def test_completion_of_other_shells(shell):
    result = slw("completion", shell)
    assert (result.returncode, result.stderr) == (0, "")
    assert "# To install: slw completion" in result.stdout
    assert "benchmark" in result.stdout
    assert result.stdout.startswith("#compdef slw\n") == (shell == "zsh")
