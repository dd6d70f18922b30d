"""Export a checkpoint as a Hugging Face folder: weights without vocabulary padding, tokenizer, model card with plots.

Example:
  slw export runs/a --out exported/a
  slw export runs/a/global_step610 --out exported/a-bf16 --dtype bfloat16
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from seqlen_curriculum.cli.flags import Parser, add_json
from seqlen_curriculum.files import new_folder, writable_folder


def parser() -> Parser:
    flags = Parser(prog="slw export", description=__doc__)
    flags.add_argument(
        "source",
        type=Path,
        metavar="RUN_OR_CHECKPOINT",
        help="a run's --save folder (its newest complete checkpoint is used), a checkpoint, or a Hugging Face folder",
    )
    flags.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="FOLDER",
        help="the folder to create; an existing one is never overwritten",
    )
    flags.add_argument(
        "--dtype", choices=["float32", "bfloat16", "float16"], help="data type of the weights (default: as saved)"
    )
    flags.add_argument(
        "--tokenizer",
        type=Path,
        metavar="PATH",
        help="tokenizer.json, or a folder with it or with GPT-2's encoder.json and vocab.bpe (default: the checkpoint's)",
    )
    add_json(flags)
    return flags


def main(argv: Sequence[str] | None = None) -> None:
    args = parser().parse_args(argv)

    from seqlen_curriculum.run_folder.model_folder import model_folder  # after --help: numpy and pydantic take a moment

    new_folder("--out", args.out)
    model_folder(args.source)
    writable_folder("--out", args.out.resolve().parent)

    from seqlen_curriculum.export.huggingface import export  # takes seconds to import

    source = export(args.source, args.out, args.dtype, args.tokenizer)
    facts = {"checkpoint": str(source), "out": str(args.out)}
    print(json.dumps(facts, indent=2) if args.json else f"exported {source} to {args.out}")
