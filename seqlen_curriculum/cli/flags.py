"""The flags that subcommands share, and how mistakes in flags are reported."""

from __future__ import annotations

import argparse
import itertools
import re
import sys
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

from seqlen_curriculum.cli.common import usage_error

__all__ = ["Parser", "add_json", "add_launcher_flags", "add_overwrite", "add_run_file", "add_set", "similar"]


_MESSAGES = {
    r"^argument (.+?): not allowed with argument (.+)": r"\1: not allowed with \2; leave one of them out",
    r"^one of the arguments (.+) is required": r"\1: one of these is required",
    r"^the following arguments are required: (.+)": r"\1: required, but not given",
    r"^unrecognized arguments: (.+)": r"\1: unexpected argument",
    r"^argument ": "",
}
"""The messages of argparse, and what is printed instead."""


class Parser(argparse.ArgumentParser):
    """The flags of a subcommand. ``--help`` keeps the line breaks of the description.

    A mistake prints one line and exits with status 2. Flags can't be abbreviated: ``--deepspeed`` is a separate flag, not
    short for ``--deepspeed_config``.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"allow_abbrev": False, "formatter_class": argparse.RawDescriptionHelpFormatter, **options})

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        words = list(sys.argv[1:] if args is None else args)
        self._refuse_empty_values(words)
        self._refuse_unknown_flags(words)  # before argparse reports that the misspelt flag is required
        return super().parse_known_args(words, namespace)

    def error(self, message: str) -> NoReturn:
        """Print argparse's message with the flag first, as in all other errors, and exit."""
        for pattern, plain in _MESSAGES.items():
            message = re.sub(pattern, plain, message)
        names, colon, text = message.partition(": ")
        names = re.sub(r"/--[\w-]+", "", names)  # aliases
        usage_error(f"{re.sub(',? --', ', --', names)}{colon}{text}", f"{self.prog} --help")

    def flags(self) -> set[str]:
        """Return all flags of this parser and of its subparsers."""
        found = set(self._option_string_actions)
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                found |= {flag for parser in action.choices.values() for flag in parser._option_string_actions}
        return found

    def _refuse_empty_values(self, words: Sequence[str]) -> None:
        """Refuse ``--save "$RUN"`` with an unset variable: an empty path is the current folder."""
        for before, word in itertools.pairwise(["", *words]):
            flag = word[:-1] if word.startswith("--") and word.endswith("=") else before if before[:2] == "--" else ""
            if word in ("", f"{flag}=") and flag != "--prompt":
                self.error(f"{flag or 'an argument'}: the value is empty, as from a shell variable that is not set")

    def _refuse_unknown_flags(self, words: Sequence[str]) -> None:
        flags = self.flags()
        for word in itertools.takewhile(lambda word: word != "--", words):
            name = word.partition("=")[0]
            is_value = " " in word or word[1:2] in ("", ".") or word[1:2].isdigit()  # "-", "-0.5", "-1"
            if word.startswith("-") and not is_value and name not in flags:
                self.error(f"{name}: no such flag{similar(name, flags)}")


def similar(name: str, valid: Iterable[str]) -> str:
    """Return ``"; did you mean x?"`` for valid names that start with or resemble ``name``, else an empty string."""
    import difflib  # needed only after a mistake

    names = sorted(valid)
    close = [other for other in names if other.startswith(name)] or difflib.get_close_matches(name, names, n=1)
    return f"; did you mean {' or '.join(close)}?" if close and name else ""


def add_run_file(
    parser: argparse.ArgumentParser, *aliases: str, required: bool = True
) -> argparse._MutuallyExclusiveGroup:
    """Add FILE, as a positional argument or ``--config``, and ``--set``. Return the group of the first two."""
    group = parser.add_mutually_exclusive_group(required=required)
    group.add_argument(
        "config", nargs="?", default=argparse.SUPPRESS, metavar="FILE", help="the run's configuration file"
    )
    group.add_argument("--config", *aliases, metavar="FILE", help="the configuration file, given as a flag")
    add_set(parser)
    return group


def add_set(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override a value of the file, for example training.seed=7; may be repeated",
    )


def add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")


def add_overwrite(parser: argparse.ArgumentParser, *outputs: str) -> None:
    """Add --overwrite for the files that the flags ``outputs`` name. Without it ``output_file`` refuses existing ones."""
    parser.add_argument(
        "--overwrite", action="store_true", help=f"replace the file of {' or '.join(outputs)} if it exists"
    )


def add_launcher_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that launchers pass, and those that scripts for DeepSpeed usually accept."""
    parser.add_argument("--deepspeed", action="store_true", help="accepted for compatibility; it has no effect")
    parser.add_argument("--local_rank", "--local-rank", type=int, default=0, help=argparse.SUPPRESS)
