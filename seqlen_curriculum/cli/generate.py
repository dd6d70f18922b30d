"""Generate text with a trained model.

Example:
  slw generate runs/a --prompt "def main(" --prompt "import " --max-new-tokens 60
  echo "def main(" | slw generate runs/a/global_step610 --temperature 0
"""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from seqlen_curriculum.cli.common import warn
from seqlen_curriculum.cli.flags import Parser, add_json
from seqlen_curriculum.errors import ConfigError


def parser() -> Parser:
    flags = Parser(prog="slw generate", description=__doc__)
    flags.add_argument(
        "checkpoint",
        type=Path,
        metavar="CHECKPOINT",
        help="a checkpoint, a run's --save folder (its newest complete checkpoint), or a Hugging Face folder",
    )
    flags.add_argument(
        "--prompt", action="append", metavar="TEXT", help="text to continue; may be repeated (default: stdin)"
    )
    flags.add_argument(
        "--tokenizer", type=Path, metavar="PATH", help="tokenizer.json or folder (default: CHECKPOINT's)"
    )
    sampling = flags.add_argument_group("sampling")
    sampling.add_argument(
        "--max-new-tokens", type=int, default=100, metavar="N", help="maximum number of new tokens (default: 100)"
    )
    sampling.add_argument(
        "--temperature",
        type=float,
        default=0.8,
        help="divisor of the logits; 0 selects the most likely token (default: 0.8)",
    )
    sampling.add_argument(
        "--top-p",
        type=float,
        default=1.0,
        help="sample from the most likely tokens with this total probability (default: 1)",
    )
    sampling.add_argument(
        "--top-k", type=int, default=0, help="sample from this many of the most likely tokens (default: 0, all)"
    )
    sampling.add_argument("--samples", type=int, default=1, metavar="N", help="texts per prompt (default: 1)")
    sampling.add_argument(
        "--seed", type=int, default=0, help="random seed; the same seed gives the same texts (default: 0)"
    )
    add_json(flags)
    return flags


def main(argv: Sequence[str] | None = None) -> None:
    args = parser().parse_args(argv)

    from seqlen_curriculum.run_folder.model_folder import model_folder  # after --help: numpy and pydantic take a moment

    model_folder(args.checkpoint)
    prompts = args.prompt if args.prompt is not None else [_stdin()]

    from seqlen_curriculum.models.generation import Sampling, generate  # takes seconds to import

    names = ("max_new_tokens", "temperature", "top_p", "top_k", "samples", "seed")
    sampling = Sampling(**{name: getattr(args, name) for name in names})
    objects: list[dict[str, Any]] = []
    for prompt, samples in zip(prompts, generate(args.checkpoint, prompts, sampling, args.tokenizer), strict=True):
        objects += [{"prompt": prompt, **sample._asdict()} for sample in samples]
        if args.json:
            continue
        for number, sample in enumerate(samples, start=1):
            if len(prompts) * len(samples) > 1:
                print(f"--- sample {number} of {len(samples)} ---")
            print(sample.text, flush=True)
            if sample.full:
                warn([f"the text ends after {sample.new_tokens} new tokens: the model has no more positions"])
    if args.json:
        print(json.dumps({"samples": objects}, indent=2))


def _stdin() -> str:
    if sys.stdin.isatty():
        raise ConfigError("--prompt: not given; give a prompt, or text on stdin")
    assert isinstance(sys.stdin, io.TextIOWrapper)
    sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")  # other bytes as in --prompt
    return sys.stdin.read().removesuffix("\n")
