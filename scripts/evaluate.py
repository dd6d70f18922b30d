"""Evaluate a checkpoint zero-shot: WikiText-103 and LAMBADA by Megatron's recipe, GPT-3's tasks by lm-evaluation-harness.

Example:
  python scripts/evaluate.py runs/slw60k --task wikitext103=wiki.test.tokens --task lambada=lambada_test.jsonl
  python scripts/evaluate.py runs/gpt3 --harness gpt3 --include-path tasks
  deepspeed scripts/evaluate.py runs/gpt3 --task lambada=lambada_test.jsonl --harness lambada triviaqa --include-path tasks

CHECKPOINT is a run's folder (its newest complete checkpoint), a global_step<N> folder of it, or any folder that Hugging
Face loads as a causal language model. On several ranks every window and item is scored once.
"""

import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from seqlen_curriculum.cli import run
from seqlen_curriculum.errors import ConfigError
from seqlen_curriculum.files import writable_folder


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="what to evaluate")
    tasks = parser.add_argument_group("tasks")
    tasks.add_argument(
        "--task",
        action="append",
        default=[],
        metavar="NAME=PATH",
        help="wikitext103=PATH (.tokens): perplexity, a token's and adjusted to words, which is comparable between "
        "vocabularies; lambada=PATH (JSON lines of {'text': ...}): is the last word the model's first choice",
    )
    tasks.add_argument("--limit", type=int, metavar="N", help="only the first N windows or items of each, for a try")
    tasks.add_argument(
        "--overlap",
        type=int,
        metavar="N",
        help="tokens from one window of wikitext103 to the next; smaller gives each target more context (default: 32)",
    )
    harness = parser.add_argument_group("lm-evaluation-harness (pip install 'seqlen-curriculum[eval]')")
    harness.add_argument(
        "--harness",
        nargs="+",
        default=[],
        metavar="NAME",
        help="gpt3: the paper's eleven tasks (hellaswag lambada triviaqa webqs winogrande piqa arc_challenge arc_easy "
        "anli_r1 anli_r2 anli_r3); or some of them, or any other task of lm-eval by its name",
    )
    harness.add_argument(
        "--include-path",
        type=Path,
        metavar="FOLDER",
        help="task files (.yaml) that come before lm-eval's own; such a file may name local data, so nothing is fetched",
    )
    harness.add_argument("--shots", type=int, default=0, metavar="N", help="examples before each question (default: 0)")
    model = parser.add_argument_group("model")
    model.add_argument(
        "--tokenizer",
        type=Path,
        metavar="PATH",
        help="tokenizer.json, or the folder of GPT-2's encoder.json and vocab.bpe",
    )
    model.add_argument(
        "--seq-length", type=int, metavar="N", help="tokens read at once (default: the model's positions)"
    )
    model.add_argument(
        "--dtype", choices=["float32", "float16", "bfloat16"], default="float32", help="default: float32"
    )
    model.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda where there is one")
    model.add_argument(
        "--batch-tokens", type=int, default=8192, metavar="N", help="tokens a batch reads (default: 8192)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text, at the end")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="write that object; a launcher's own lines are on the output, not in it",
    )
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)  # given by the launcher
    return parser.parse_args()


def main() -> None:
    args = parse()
    check(args)
    first = os.environ.get("RANK", "0") == "0"  # set by the launcher
    results = measure(args, print_lines if first and not args.json else lambda *_: None)
    if first and args.json:
        print(json.dumps(results, indent=2))
    if first and args.out:
        write(args.out, results)


def check(args: argparse.Namespace) -> None:
    """Refuse flags that can't be meant. Raises ConfigError."""
    if not args.task and not args.harness:
        raise ConfigError("--task, --harness: neither is given; name what to evaluate, as --task wikitext103=PATH")
    for flag, given in (("--include-path", args.include_path), ("--shots", args.shots)):
        if given and not args.harness:
            raise ConfigError(f"{flag} {given}: goes with --harness alone; leave it out")
    if args.overlap is not None and not any(one.startswith("wikitext103=") for one in args.task):
        raise ConfigError(f"--overlap {args.overlap}: goes with --task wikitext103=PATH alone; leave it out")
    if args.shots < 0:
        raise ConfigError(f"--shots {args.shots}: give 0 or more")
    if args.batch_tokens < 1:
        raise ConfigError(f"--batch-tokens {args.batch_tokens}: give 1 or more")
    if args.out and args.out.is_dir():
        raise ConfigError(f"--out {args.out}: is a folder; name a file in it")
    if args.out:
        writable_folder("--out", args.out.resolve().parent)


def print_lines(*lines: str) -> None:
    print(*lines, sep="\n", flush=True)


def measure(args: argparse.Namespace, tell: Callable[..., None]) -> dict[str, Any]:
    """All numbers of all tasks, and what they were measured on; everything is read and checked before the weights.

    ``tell`` is called with lines for a terminal as soon as there are any.
    """
    import torch  # seconds: after --help

    from seqlen_curriculum.evaluation import evaluate
    from seqlen_curriculum.evaluation import lm_eval_tasks as harness
    from seqlen_curriculum.evaluation.distributed import join
    from seqlen_curriculum.evaluation.task import OVERLAP, Limits
    from seqlen_curriculum.files import read_json
    from seqlen_curriculum.models.pretrained import load_model, load_tokenizer, model_folder

    tasks = evaluate.read_tasks(args.task)
    folder = model_folder(args.checkpoint)
    seqlen = evaluate.window(read_json(folder / "config.json"), args.seq_length)
    limits = Limits(seqlen, min(OVERLAP, seqlen) if args.overlap is None else args.overlap, args.limit)
    limits.check()
    tokenizer = load_tokenizer(folder, args.tokenizer)
    prepared = {name: task(tokenizer, limits) for name, task in tasks.items()}
    questions = harness.read_harness_tasks(args.harness, args.include_path, args.shots) if args.harness else {}
    ranks = join(args.device)
    model = load_model(folder, getattr(torch, args.dtype)).to(ranks.device)

    ranked = f", {ranks.world} ranks" if ranks.world > 1 else ""
    tell(f"{folder}: {args.dtype}, {limits.seqlen:,} tokens at once{ranked}")
    found = {}
    for name, numbers in evaluate.evaluate(model, prepared, ranks, args.batch_tokens):
        found[name] = numbers
        tell("", evaluate.describe(name, numbers))
    if questions:
        tell("", harness.describe_head(args.shots))
    answers = {}
    scores = harness.evaluate_harness(model, tokenizer, questions, limits, ranks, args.batch_tokens, args.shots)
    for name, numbers in scores:
        answers[name] = numbers
        tell(harness.describe_task(name, numbers))
    for line in harness.describe_end(answers):
        tell(line)
    about = {"checkpoint": str(folder), "dtype": args.dtype, "seqlen": limits.seqlen, "ranks": ranks.world}
    return {**about, "tasks": found, "harness": answers}


def write(path: Path, results: dict[str, Any]) -> None:
    """The numbers as one JSON object, all of it or nothing. Raises ConfigError."""
    from seqlen_curriculum.files import replace_text

    try:
        replace_text(path, json.dumps(results, indent=2))
    except OSError as error:
        raise ConfigError(f"--out {path}: can't be written ({error.strerror}); choose another file") from error


if __name__ == "__main__":
    run(main)
