"""The command ``slw``, also installed as ``seqlen-curriculum``: its subcommands, each imported only when it is run."""

from __future__ import annotations

import sys

if sys.version_info < (3, 11):  # noqa: UP036 - scripts and ``python -m`` start with any Python
    sys.exit(
        f"error: Python {sys.version.split()[0]} is too old; the package needs 3.11 or later: install it in an environment "
        "created with python3.11 -m venv .venv"
    )

import importlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

from seqlen_curriculum.cli.common import run, usage_error
from seqlen_curriculum.cli.flags import similar
from seqlen_curriculum.errors import ConfigError
from seqlen_curriculum.extras import missing_package

__all__ = ["COMMANDS", "GROUPS", "Command", "main", "overview", "script"]


class Command(NamedTuple):
    """A subcommand as listed by ``slw --help``."""

    summary: str
    example: str
    ranked: bool = False
    """True if a launcher may start the command once per rank."""


GROUPS = {
    "Set up": {
        "doctor": Command("check this machine and list what is missing", "slw doctor"),
        "configs": Command("list and copy the configurations that come with the package", "slw configs copy tiny_cpu"),
        "schema": Command("print the JSON schema of the configuration file", "slw schema"),
        "completion": Command("print a completion script for bash, zsh or tcsh", "slw completion bash"),
    },
    "Data": {
        "prepare": Command(
            "tokenize text into a corpus", "slw prepare --input texts/ --train-vocab 4096 --out corpus/texts"
        ),
        "merge": Command("merge corpora into one", "slw merge corpus/books corpus/wiki --out corpus/all"),
        "inspect": Command("show what a corpus contains and what a run reads", "slw inspect run.json --step 100"),
    },
    "Training": {
        "plan": Command(
            "show the lengths, tokens, learning rates and compute of a run", "slw plan run.json --png plan.png"
        ),
        "train": Command("train the model of a configuration file", "slw train run.json --save runs/a", ranked=True),
        "tune": Command("find min_difficulty and the length of the ramp", "slw tune run.json --save runs/tuning"),
        "study": Command("compare cases over seeds, each at its best rate", "slw study study.json --save runs/study"),
        "benchmark": Command(
            "measure throughput, data loading and the training loop", "slw benchmark loop run.json", ranked=True
        ),
    },
    "Results": {
        "report": Command("compare runs on a page of plots and tables", "slw report runs/a runs/b --out reports/ab"),
        "evaluate": Command(
            "evaluate a checkpoint zero-shot", "slw evaluate runs/a --task lambada=lambada_test.jsonl", ranked=True
        ),
        "generate": Command("generate text with a checkpoint", 'slw generate runs/a --prompt "def main("'),
        "export": Command("export a checkpoint to a Hugging Face folder", "slw export runs/a --out exported/a"),
    },
}
COMMANDS = {name: command for group in GROUPS.values() for name, command in group.items()}


def main(argv: Sequence[str] | None = None) -> None:
    """Run the subcommand in ``argv`` (default: this process's arguments) and exit with its status."""
    words = list(sys.argv[1:] if argv is None else argv)
    if len(words) > 1 and words[0].startswith(("--local_rank=", "--local-rank=")):
        words[:2] = words[1::-1]  # launchers put this flag before all other arguments
    command = COMMANDS.get(words[0]) if words else None
    run(lambda: _start(words), ranked=command is not None and command.ranked)


def script(name: str) -> None:
    """Run one subcommand with the arguments of this process, as the files in ``scripts/`` do."""
    main([name, *sys.argv[1:]])


def _start(words: Sequence[str]) -> int | None:
    if not words:
        print(overview(), file=sys.stderr)
        return 2
    name, *arguments = words
    if name in ("-h", "--help"):
        print(overview())
        return None
    if name == "--version":
        from seqlen_curriculum import __version__

        print(f"seqlen-curriculum {__version__}")
        return None
    if name not in COMMANDS:
        usage_error(f"{name}: no such command{similar(name, [*COMMANDS, '--help', '--version'])}", "slw --help")
    try:
        command: Callable[[Sequence[str]], int | None] = importlib.import_module(f"{__name__}.{name}").main
        return command(arguments)
    except ModuleNotFoundError as error:
        if message := missing_package(error.name):
            raise ConfigError(message) from error
        raise


def overview() -> str:
    """Return the text of ``slw --help``: all subcommands in groups, each with an example."""
    lines = ["usage: slw COMMAND [FLAGS]", "", "Sequence Length Warmup for GPT pre-training with DeepSpeed."]
    for group, commands in GROUPS.items():
        lines += ["", f"{group}:"]
        for name, command in commands.items():
            lines += [f"  {name:<11} {command.summary}", f"  {'':<11}   {command.example}"]
    return "\n".join(
        [*lines, "", "slw COMMAND --help describes a command and its flags. slw --version prints the version."]
    )
