"""Export a checkpoint as a complete Hugging Face folder: weights without padding, tokenizer, model card with curves.

Example:
  python scripts/export_hf.py runs/tiny --out exported/tiny
  python scripts/export_hf.py runs/tiny/global_step610 --out exported/tiny-bf16 --dtype bfloat16
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from seqlen_curriculum.cli.flags import Parser
from seqlen_curriculum.files import new_folder, writable_folder
from seqlen_curriculum.run_folder.model_folder import model_folder


def parser() -> Parser:
    flags = Parser(prog="slw export", description=__doc__)
    flags.add_argument(
        "source",
        type=Path,
        metavar="RUN_OR_CHECKPOINT",
        help="a run's --save folder (its newest complete checkpoint), a checkpoint, or a Hugging Face folder",
    )
    flags.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="a new folder; nothing is overwritten")
    flags.add_argument(
        "--dtype", choices=["float32", "bfloat16", "float16"], help="type of the weights (default: as saved)"
    )
    flags.add_argument(
        "--tokenizer",
        type=Path,
        metavar="PATH",
        help="a tokenizer.json, or a folder with one or with GPT-2's encoder.json and vocab.bpe (default: the checkpoint's)",
    )
    return flags


def main(argv: Sequence[str] | None = None) -> None:
    args = parser().parse_args(argv)
    new_folder("--out", args.out)
    model_folder(args.source)
    writable_folder("--out", args.out.resolve().parent)

    from seqlen_curriculum.export.huggingface import export  # takes seconds to import

    source = export(args.source, args.out, args.dtype, args.tokenizer)
    print(f"{source} is exported to {args.out}")
