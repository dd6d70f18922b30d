"""Generate text with a trained model.

Example:
  python scripts/generate.py runs/tiny --prompt "def main(" --prompt "import " --max-new-tokens 60
  echo "def main(" | python scripts/generate.py runs/tiny/global_step610 --temperature 0
"""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence
from pathlib import Path

from seqlen_curriculum.cli.common import warn
from seqlen_curriculum.cli.flags import Parser
from seqlen_curriculum.errors import ConfigError
from seqlen_curriculum.run_folder.model_folder import model_folder


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
        "--max-new-tokens", type=int, default=100, metavar="N", help="most tokens to add (default: 100)"
    )
    sampling.add_argument(
        "--temperature",
        type=float,
        default=0.8,
        help="divides the logits; 0 takes the most likely token (default: 0.8)",
    )
    sampling.add_argument(
        "--top-p",
        type=float,
        default=1.0,
        help="draw from the likeliest tokens with this total probability (default: 1)",
    )
    sampling.add_argument("--top-k", type=int, default=0, help="draw from this many likeliest tokens (default: 0, all)")
    sampling.add_argument("--samples", type=int, default=1, metavar="N", help="texts for each prompt (default: 1)")
    sampling.add_argument("--seed", type=int, default=0, help="the same seed gives the same texts (default: 0)")
    return flags


def main(argv: Sequence[str] | None = None) -> None:
    args = parser().parse_args(argv)
    model_folder(args.checkpoint)
    prompts = args.prompt if args.prompt is not None else [_stdin()]

    from seqlen_curriculum.models.generation import Sampling, generate  # takes seconds to import

    names = ("max_new_tokens", "temperature", "top_p", "top_k", "samples", "seed")
    sampling = Sampling(**{name: getattr(args, name) for name in names})
    for samples in generate(args.checkpoint, prompts, sampling, args.tokenizer):
        for number, sample in enumerate(samples, start=1):
            if len(prompts) * len(samples) > 1:
                print(f"--- sample {number} of {len(samples)} ---")
            print(sample.text, flush=True)
            if sample.full:
                warn([f"the text ends after {sample.new_tokens} new tokens: the model has no further positions"])


def _stdin() -> str:
    if sys.stdin.isatty():
        raise ConfigError("--prompt: not given; give it, or text on stdin")
    assert isinstance(sys.stdin, io.TextIOWrapper)
    sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")  # other bytes as in --prompt
    return sys.stdin.read().removesuffix("\n")
