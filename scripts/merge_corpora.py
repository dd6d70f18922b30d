"""Merge finished corpora into the one that preparing all their texts at once gives, at the speed of the disk.

example:
  python scripts/merge_corpora.py corpus/books corpus/wiki --output-prefix corpus/all
"""

from __future__ import annotations

import argparse

from seqlen_curriculum.cli import Parser, run
from seqlen_curriculum.data.preparation.merge import merge


def parser() -> argparse.ArgumentParser:
    flags = Parser(description=__doc__)
    flags.add_argument("prefix", nargs="+", metavar="PREFIX", help="corpora that prepare_data.py made, in this order")
    flags.add_argument("--output-prefix", required=True, metavar="P", help="writes P.bin .idx .tokenizer.json .json")
    flags.add_argument("--overwrite", action="store_true", help="replace outputs of other corpora")
    return flags


def main() -> None:
    args = parser().parse_args()
    print(merge(args.prefix, args.output_prefix, args.overwrite))


if __name__ == "__main__":
    run(main)
