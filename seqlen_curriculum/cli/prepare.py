"""Prepare a training corpus: tokenize text into a .bin/.idx pair in Megatron's format.

Rerun an interrupted command to resume it. slw merge merges several corpora.

Example:
  slw prepare --input texts/ --train-vocab 4096 --out corpus/texts
  slw prepare --input texts/ wiki.jsonl.zst --vocab-file encoder.json --merge-file vocab.bpe --out corpus/wiki
  slw prepare --stdlib --train-vocab 512 --out corpus/stdlib
"""

from __future__ import annotations

import argparse
import json
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from seqlen_curriculum.cli.flags import Parser, add_json

if TYPE_CHECKING:
    from seqlen_curriculum.data.preparation.corpus_record import PreparedCorpus


def parser() -> Parser:
    flags = Parser(prog="slw prepare", description=__doc__)
    text = flags.add_argument_group("text (give one or both)")
    text.add_argument(
        "--input",
        nargs="+",
        type=Path,
        default=[],
        metavar="PATH",
        help="text files (.txt .text .md .py: one document per file), JSON lines (.jsonl .json .ndjson: one document per "
        "line), tables (.parquet .arrow: one document per row), or folders of these. Text and JSON lines may be compressed "
        "(.gz .zst .bz2 .xz). Folders written by save_to_disk of Hugging Face datasets are read too",
    )
    text.add_argument(
        "--stdlib", action="store_true", help="add the source of Python's standard library, one document per file"
    )
    tokens = flags.add_argument_group("tokenizer (give exactly one)")
    tokens.add_argument(
        "--vocab-file", type=Path, metavar="encoder.json", help="GPT-2's vocabulary; needs --merge-file"
    )
    tokens.add_argument("--merge-file", type=Path, metavar="vocab.bpe", help="GPT-2's merges; needs --vocab-file")
    tokens.add_argument(
        "--tokenizer-file",
        type=Path,
        metavar="tokenizer.json",
        help="any tokenizer of Hugging Face: its tokenizer.json, or the folder of a model with it",
    )
    tokens.add_argument(
        "--train-vocab", type=int, metavar="N", help="train a byte-level BPE tokenizer with N tokens on the input"
    )
    _add_rules(flags.add_argument_group("documents"))
    flags.add_argument(
        "--out",
        "--output-prefix",
        required=True,
        metavar="PREFIX",
        help="write PREFIX.bin, .idx, .tokenizer.json and .json",
    )
    flags.add_argument("--workers", type=int, metavar="N", help="tokenizer processes (default: all cores)")
    flags.add_argument(
        "--overwrite", action="store_true", help="replace an existing corpus made from other inputs or settings"
    )
    add_json(flags)
    return flags


def _add_rules(flags: argparse._ArgumentGroup) -> None:
    flags.add_argument(
        "--json-keys",
        "--keys",
        nargs="+",
        default=argparse.SUPPRESS,
        metavar="KEY",
        help="keys of a JSON line (columns of a table) whose texts, joined by newlines, are the document (default: text)",
    )
    flags.add_argument(
        "--append-eod",
        action=argparse.BooleanOptionalAction,
        default=argparse.SUPPRESS,
        help="end each document with the token of --eod-token (default: yes)",
    )
    flags.add_argument(
        "--eod-token",
        default=argparse.SUPPRESS,
        metavar="TOKEN",
        help="token that ends each document (default: the end-of-sequence token that the tokenizer's or the model's files "
        "name, and <|endoftext|> for a trained tokenizer)",
    )
    flags.add_argument(
        "--on-bad-input",
        choices=["stop", "skip"],
        default=argparse.SUPPRESS,
        help="input that can't be used (a line that is not UTF-8 or not JSON, lacks the key, has no string there or is too "
        "long; the rest of a damaged compressed file): stop with an error, or skip and count it (default: stop)",
    )
    flags.add_argument(
        "--on-empty",
        choices=["stop", "skip"],
        default=argparse.SUPPRESS,
        help="documents that contain only white space: stop with an error, or skip and count them (default: skip)",
    )
    flags.add_argument(
        "--max-line-bytes",
        type=int,
        default=argparse.SUPPRESS,
        metavar="N",
        help="longest accepted JSON line or table row, which limits memory use (default: 16777216)",
    )


def main(argv: Sequence[str] | None = None) -> None:
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # like Ctrl-C: keep finished work
    args = parser().parse_args(argv)

    from seqlen_curriculum.data.preparation.pieces import Rules  # after --help: numpy and tokenizers take a moment
    from seqlen_curriculum.data.preparation.prepare import Request, prepare
    from seqlen_curriculum.data.tokenizer import TokenizerChoice

    choice = TokenizerChoice(args.vocab_file, args.merge_file, args.tokenizer_file, args.train_vocab)
    rules = Rules(**{name: value for name, value in vars(args).items() if name in Rules.__dataclass_fields__})
    workers = {} if args.workers is None else {"workers": args.workers}
    request = Request(
        output_prefix=args.out,
        tokenizer=choice,
        inputs=args.input,
        stdlib=args.stdlib,
        rules=rules,
        overwrite=args.overwrite,
        **workers,
    )
    show_corpus(prepare(request), args.json)


def show_corpus(corpus: PreparedCorpus, as_json: bool) -> None:
    """Print the summary of a corpus, or its record with --json."""
    facts = {"prefix": corpus.prefix, "already": corpus.already, **corpus.record}
    print(json.dumps(facts, indent=2) if as_json else corpus)
