"""Prepare a training corpus from text: tokenize it into Megatron's .bin/.idx pair.

example:
  python scripts/prepare_data.py --stdlib --train-vocab 4096 --output-prefix corpus/stdlib
  python scripts/prepare_data.py --input texts/ wiki.jsonl.gz --vocab-file encoder.json --merge-file vocab.bpe \\
      --output-prefix corpus/wiki
"""

from __future__ import annotations

import argparse
from pathlib import Path

from seqlen_curriculum.cli import run
from seqlen_curriculum.data.prepare import Request, prepare
from seqlen_curriculum.data.tokenizer import TokenizerChoice


def parser() -> argparse.ArgumentParser:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    text = flags.add_argument_group("text, one or both")
    text.add_argument(
        "--input",
        nargs="+",
        type=Path,
        default=[],
        metavar="PATH",
        help="text files (.txt .text .md .py: a document each), JSON lines (.jsonl .json .ndjson: a document a line), "
        "either as .gz, and folders of them",
    )
    text.add_argument("--stdlib", action="store_true", help="this Python's own .py files, a document each")
    text.add_argument("--json-keys", nargs="+", default=["text"], metavar="KEY", help="text in a line (default: text)")
    tokens = flags.add_argument_group("tokenizer, exactly one")
    tokens.add_argument("--vocab-file", type=Path, metavar="encoder.json", help="GPT-2's vocabulary, with --merge-file")
    tokens.add_argument("--merge-file", type=Path, metavar="vocab.bpe", help="GPT-2's merges, with --vocab-file")
    tokens.add_argument("--tokenizer-file", type=Path, metavar="tokenizer.json", help="one that has <|endoftext|>")
    tokens.add_argument("--train-vocab", type=int, metavar="N", help="train byte-level BPE of N tokens on this text")
    flags.add_argument("--output-prefix", required=True, metavar="P", help="writes P.bin .idx .tokenizer.json .json")
    flags.add_argument("--workers", type=int, metavar="N", help="processes that encode (default: all cores)")
    flags.add_argument("--overwrite", action="store_true", help="replace outputs of other inputs or settings")
    return flags


def main() -> None:
    args = parser().parse_args()
    choice = TokenizerChoice(args.vocab_file, args.merge_file, args.tokenizer_file, args.train_vocab)
    workers = {} if args.workers is None else {"workers": args.workers}
    request = Request(
        output_prefix=args.output_prefix,
        tokenizer=choice,
        inputs=args.input,
        stdlib=args.stdlib,
        json_keys=args.json_keys,
        overwrite=args.overwrite,
        **workers,
    )
    print(prepare(request))


if __name__ == "__main__":
    run(main)
