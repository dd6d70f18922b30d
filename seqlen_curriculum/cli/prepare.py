"""Prepare a training corpus from text: tokenize it into Megatron's .bin/.idx pair.

Rerun an interrupted command to resume it. scripts/merge_corpora.py merges several corpora.

example:
  python scripts/prepare_data.py --stdlib --train-vocab 4096 --output-prefix corpus/stdlib
  python scripts/prepare_data.py --input texts/ wiki.jsonl.zst --vocab-file encoder.json --merge-file vocab.bpe \\
      --output-prefix corpus/wiki
"""

from __future__ import annotations

import argparse
import signal
from collections.abc import Sequence
from pathlib import Path

from seqlen_curriculum.cli.flags import Parser


def parser() -> Parser:
    flags = Parser(prog="slw prepare", description=__doc__)
    text = flags.add_argument_group("text, one or both")
    text.add_argument(
        "--input",
        nargs="+",
        type=Path,
        default=[],
        metavar="PATH",
        help="text files (.txt .text .md .py: one document each), JSON lines (.jsonl .json .ndjson: one document per line), "
        "both also as .gz or .zst, tables (.parquet .arrow: one document per row), and folders of them, also "
        "those of Hugging Face's save_to_disk",
    )
    text.add_argument("--stdlib", action="store_true", help="the .py files of this Python, one document each")
    tokens = flags.add_argument_group("tokenizer, exactly one")
    tokens.add_argument("--vocab-file", type=Path, metavar="encoder.json", help="GPT-2's vocabulary, with --merge-file")
    tokens.add_argument("--merge-file", type=Path, metavar="vocab.bpe", help="GPT-2's merges, with --vocab-file")
    tokens.add_argument(
        "--tokenizer-file", type=Path, metavar="tokenizer.json", help="a tokenizer that has the token <|endoftext|>"
    )
    tokens.add_argument("--train-vocab", type=int, metavar="N", help="train byte-level BPE of N tokens on the input")
    _add_rules(flags.add_argument_group("documents"))
    flags.add_argument("--output-prefix", required=True, metavar="P", help="writes P.bin .idx .tokenizer.json .json")
    flags.add_argument("--workers", type=int, metavar="N", help="processes that encode (default: all cores)")
    flags.add_argument("--overwrite", action="store_true", help="replace outputs of other inputs or settings")
    return flags


def _add_rules(flags: argparse._ArgumentGroup) -> None:
    flags.add_argument(
        "--json-keys",
        "--keys",
        nargs="+",
        default=argparse.SUPPRESS,
        metavar="KEY",
        help="top-level keys (columns) whose texts, joined by newlines, are the document (default: text)",
    )
    flags.add_argument(
        "--append-eod",
        action=argparse.BooleanOptionalAction,
        default=argparse.SUPPRESS,
        help="end each document with <|endoftext|> (default: yes)",
    )
    flags.add_argument(
        "--on-bad-input",
        choices=["stop", "skip"],
        default=argparse.SUPPRESS,
        help="a line that isn't UTF-8 or JSON, has no such key or no string there, or is too long, and what follows a "
        "damaged place of a packed file: stop there, or leave it out and count it (default: stop)",
    )
    flags.add_argument(
        "--on-empty",
        choices=["stop", "skip"],
        default=argparse.SUPPRESS,
        help="documents of white space only: stop there, or leave them out and count them (default: skip)",
    )
    flags.add_argument(
        "--max-line-bytes",
        type=int,
        default=argparse.SUPPRESS,
        metavar="N",
        help="longest line of JSON or row of a table; it bounds memory (default: 16777216)",
    )


def main(argv: Sequence[str] | None = None) -> None:
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: keep what is done
    args = parser().parse_args(argv)

    from seqlen_curriculum.data.preparation.pieces import Rules  # after --help: numpy and tokenizers take a moment
    from seqlen_curriculum.data.preparation.prepare import Request, prepare
    from seqlen_curriculum.data.tokenizer import TokenizerChoice

    choice = TokenizerChoice(args.vocab_file, args.merge_file, args.tokenizer_file, args.train_vocab)
    rules = Rules(**{name: value for name, value in vars(args).items() if name in Rules.__dataclass_fields__})
    workers = {} if args.workers is None else {"workers": args.workers}
    request = Request(
        output_prefix=args.output_prefix,
        tokenizer=choice,
        inputs=args.input,
        stdlib=args.stdlib,
        rules=rules,
        overwrite=args.overwrite,
        **workers,
    )
    print(prepare(request))
