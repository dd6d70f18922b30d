"""Print a script for Tab completion of the subcommands, flags and file names of slw.

Example:
  slw completion bash > ~/.local/share/bash-completion/completions/slw
  slw completion zsh > ~/.zfunc/_slw
  slw completion tcsh > ~/.slw.tcsh

Create the folder first, and open a new shell afterwards. bash needs the package bash-completion. zsh needs two lines in
~/.zshrc: fpath+=~/.zfunc, then autoload -U compinit && compinit. tcsh needs the line source ~/.slw.tcsh in ~/.tcshrc.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from seqlen_curriculum.cli.flags import Parser

INSTALLED = {
    "bash": "{name} completion bash > ~/.local/share/bash-completion/completions/{name}",
    "zsh": "{name} completion zsh > ~/.zfunc/_{name}, with fpath+=~/.zfunc before compinit in ~/.zshrc",
    "tcsh": "{name} completion tcsh > ~/.{name}.tcsh, with source ~/.{name}.tcsh in ~/.tcshrc",
}
_FILES = {"bash": "_shtab_compgen_files", "zsh": "_files", "tcsh": "f"}
"""The completion of file names in each shell, as in ``shtab.FILE``."""
_FILE_METAVARS = ("FILE", "FOLDER", "PATH", "PREFIX", "RUN", "CHECKPOINT", ".json", ".bpe")


def parser() -> Parser:
    flags = Parser(prog="slw completion", description=__doc__)
    flags.add_argument("shell", choices=list(INSTALLED), help="the shell to print the script for")
    return flags


def main(argv: Sequence[str] | None = None) -> None:
    args = parser().parse_args(argv)

    import shtab

    name = "seqlen-curriculum" if Path(sys.argv[0]).name == "seqlen-curriculum" else "slw"  # the name that was typed
    first, _, rest = shtab.complete(whole_parser(name), args.shell).partition("\n")
    print(first, f"# To install: {INSTALLED[args.shell].format(name=name)}", rest, sep="\n")  # zsh reads the first line


def whole_parser(name: str) -> Parser:
    """Return one parser of all subcommands, with completion of file names for flags that take files."""
    from seqlen_curriculum.cli import COMMANDS

    whole = Parser(prog=name, description="Sequence Length Warmup for GPT pre-training with DeepSpeed.")
    whole.add_argument("--version", action="store_true", help="print the version")
    commands = whole.add_subparsers()
    for command, about in COMMANDS.items():
        own = importlib.import_module(f"{__package__}.{command}").parser()
        commands.add_parser(command, parents=[own], add_help=False, help=about.summary, description=about.summary)
    for action in _actions(whole):
        if any(word in str(action.metavar) for word in _FILE_METAVARS):
            action.complete = _FILES  # type: ignore[attr-defined]
    return whole


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for child in action.choices.values():
                yield from _actions(child)
