"""Merge corpora into one, at the speed of the disk.

The result is byte-identical to a corpus prepared from all their texts at once.

Example:
  slw merge corpus/books corpus/wiki --out corpus/all
"""

from __future__ import annotations

from collections.abc import Sequence

from seqlen_curriculum.cli.flags import Parser, add_json
from seqlen_curriculum.cli.prepare import show_corpus


def parser() -> Parser:
    flags = Parser(prog="slw merge", description=__doc__)
    flags.add_argument(
        "prefix", nargs="+", metavar="PREFIX", help="corpora made by slw prepare, in the order to merge them"
    )
    flags.add_argument(
        "--out",
        "--output-prefix",
        required=True,
        metavar="PREFIX",
        help="write PREFIX.bin, .idx, .tokenizer.json and .json",
    )
    flags.add_argument("--overwrite", action="store_true", help="replace an existing corpus made from other inputs")
    add_json(flags)
    return flags


def main(argv: Sequence[str] | None = None) -> None:
    args = parser().parse_args(argv)

    from seqlen_curriculum.data.preparation.merge import merge  # after --help: numpy takes a moment

    show_corpus(merge(args.prefix, args.out, args.overwrite), args.json)
