"""Merge finished corpora into the one that preparing all their texts at once gives, at the speed of the disk.

example:
  python scripts/merge_corpora.py corpus/books corpus/wiki --output-prefix corpus/all
"""

from __future__ import annotations

from collections.abc import Sequence

from seqlen_curriculum.cli.flags import Parser


def parser() -> Parser:
    flags = Parser(prog="slw merge", description=__doc__)
    flags.add_argument("prefix", nargs="+", metavar="PREFIX", help="corpora that prepare_data.py made, in this order")
    flags.add_argument("--output-prefix", required=True, metavar="P", help="writes P.bin .idx .tokenizer.json .json")
    flags.add_argument("--overwrite", action="store_true", help="replace outputs of other corpora")
    return flags


def main(argv: Sequence[str] | None = None) -> None:
    args = parser().parse_args(argv)

    from seqlen_curriculum.data.preparation.merge import merge  # after --help: numpy takes a moment

    print(merge(args.prefix, args.output_prefix, args.overwrite))
