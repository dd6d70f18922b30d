"""Evaluate a checkpoint zero-shot: WikiText-103 and LAMBADA as in Megatron, GPT-3's tasks with lm-evaluation-harness.

Example:
  slw evaluate runs/slw60k --task wikitext103=wiki.test.tokens --task lambada=lambada_test.jsonl
  slw evaluate runs/gpt3 --harness gpt3 --include-path tasks
  deepspeed --module seqlen_curriculum evaluate runs/gpt3 --task lambada=lambada_test.jsonl --harness lambada triviaqa \\
      --include-path tasks
  slw evaluate runs/baseline runs/slw60k --by-position --png positions.png

CHECKPOINT is a run's folder (its newest complete checkpoint is used), a global_step<N> folder of it, or any folder that
Hugging Face loads as a causal language model. Under a launcher, the windows, items and rows are split over the ranks.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from seqlen_curriculum.cli import by_position
from seqlen_curriculum.cli.flags import Parser, add_json, add_launcher_flags, add_overwrite
from seqlen_curriculum.errors import ConfigError
from seqlen_curriculum.files import output_file, picture_path
from seqlen_curriculum.launchers import global_rank

TASK_FLAGS = ("--task", "--harness", "--limit", "--overlap", "--include-path", "--shots", "--tokenizer", "--seq-length")
POSITION_FLAGS = ("--run", "--rows", "--png")


def parser() -> Parser:
    flags = Parser(prog="slw evaluate", description=__doc__)
    flags.add_argument(
        "checkpoints",
        nargs="+",
        type=Path,
        metavar="CHECKPOINT",
        help="the checkpoint to evaluate; several only with --by-position",
    )
    tasks = flags.add_argument_group("tasks")
    tasks.add_argument(
        "--task",
        action="append",
        default=[],
        metavar="NAME=PATH",
        help="wikitext103=PATH (a .tokens file) measures perplexity per token, and per word to compare vocabularies; "
        "lambada=PATH (JSON lines of {'text': ...}) measures the accuracy of the last word; may be repeated",
    )
    tasks.add_argument("--limit", type=int, metavar="N", help="read only the first N windows or items of each task")
    tasks.add_argument(
        "--overlap",
        type=int,
        metavar="N",
        help="stride of the windows of wikitext103 in tokens; a smaller one gives each target more context (default: 32)",
    )
    harness = flags.add_argument_group("lm-evaluation-harness (pip install 'seqlen-curriculum[eval]')")
    harness.add_argument(
        "--harness",
        "--tasks",
        nargs="+",
        default=[],
        metavar="NAME",
        help="tasks of lm-eval, separated by spaces or commas, or gpt3 for the paper's eleven (hellaswag lambada triviaqa "
        "webqs winogrande piqa arc_challenge arc_easy anli_r1 anli_r2 anli_r3)",
    )
    harness.add_argument(
        "--include-path",
        type=Path,
        metavar="FOLDER",
        help="folder of task files (.yaml) that replace lm-eval's own of the same name, for example to read local data",
    )
    harness.add_argument(
        "--shots", "--num_fewshot", type=int, default=0, metavar="N", help="examples before each question (default: 0)"
    )
    positions = flags.add_argument_group("loss by position")
    positions.add_argument(
        "--by-position",
        action="store_true",
        help="instead of tasks, measure the loss of tokens 1-8, 9-64, 65-512 and so on of full-length validation rows",
    )
    positions.add_argument(
        "--run",
        metavar="RUN",
        help="folder or file of the run whose validation split is read (default: the run that the checkpoint is in)",
    )
    positions.add_argument(
        "--rows",
        type=int,
        metavar="N",
        help="rows, evenly over the split (default: training.eval_rows of the run, those that training evaluates)",
    )
    positions.add_argument(
        "--png",
        type=Path,
        metavar="PATH",
        help="plot the losses to a .png, .pdf or .svg file, one curve per checkpoint",
    )
    model = flags.add_argument_group("model")
    model.add_argument(
        "--tokenizer",
        type=Path,
        metavar="PATH",
        help="tokenizer.json, or the folder of GPT-2's encoder.json and vocab.bpe",
    )
    model.add_argument("--seq-length", type=int, metavar="N", help="tokens per window (default: the model's positions)")
    model.add_argument(
        "--dtype",
        choices=["float32", "float16", "bfloat16"],
        default="float32",
        help="data type of the weights (default: float32)",
    )
    model.add_argument("--device", choices=["cpu", "cuda"], help="device (default: cuda if available, else cpu)")
    model.add_argument("--batch-tokens", type=int, default=8192, metavar="N", help="tokens per batch (default: 8192)")
    add_json(flags)
    flags.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="write the JSON object of --json to a file, without the lines that launchers print",
    )
    add_overwrite(flags, "--out", "--png")
    add_launcher_flags(flags)
    return flags


def main(argv: Sequence[str] | None = None) -> None:
    args = parser().parse_args(argv)
    args.harness = task_names(args.harness)
    check(args)
    is_first_rank = global_rank() == 0
    show = print_lines if is_first_rank and not args.json else lambda *_: None
    results = by_position.measure_all(args, show) if args.by_position else measure(args, show)
    if is_first_rank and args.json:
        print(json.dumps(results, indent=2))
    if is_first_rank and args.out:
        write(args.out, results)
    if is_first_rank and args.png:
        by_position.draw(results, args.png)


def task_names(words: Sequence[str]) -> list[str]:
    """Return the names in ``words``, each of which may hold several separated by commas, as in lm-eval's --tasks."""
    return [name for word in words for name in word.split(",") if name]


def check(args: argparse.Namespace) -> None:
    """Raise ConfigError for flags that don't go together and for an --out that can't be written."""
    if args.by_position:
        refuse(args, TASK_FLAGS, "not used with --by-position")
    else:
        refuse(args, POSITION_FLAGS, "only used with --by-position")
        if not args.task and not args.harness:
            raise ConfigError("--task, --harness: neither is given; give a task, for example --task wikitext103=PATH")
        if len(args.checkpoints) > 1:
            given = len(args.checkpoints)
            raise ConfigError(f"CHECKPOINT: {given} are given, and tasks are scored on one; give one, or --by-position")
    if not args.harness:
        refuse(args, ("--include-path", "--shots"), "only used with --harness")
    if not any(task.startswith("wikitext103=") for task in args.task):
        refuse(args, ("--overlap",), "only used with --task wikitext103=PATH")
    if args.shots < 0:
        raise ConfigError(f"--shots: {args.shots} is not valid; give 0 or more")
    if args.batch_tokens < 1:
        raise ConfigError(f"--batch-tokens: {args.batch_tokens} is not valid; give 1 or more")
    if args.rows is not None and args.rows < 1:
        raise ConfigError(f"--rows: {args.rows} is not valid; give 1 or more")
    if args.out:
        output_file("--out", args.out, args.overwrite)
    if args.png:
        picture_path("--png", args.png, args.overwrite)


def refuse(args: argparse.Namespace, flags: Sequence[str], reason: str) -> None:
    """Raise ConfigError for the first of ``flags`` whose value is not its default."""
    defaults = parser()
    for flag in flags:
        name = flag.strip("-").replace("-", "_")
        value = getattr(args, name)
        if value != defaults.get_default(name):
            given = " ".join(map(str, value)) if isinstance(value, list) else value
            raise ConfigError(f"{flag} {given}: {reason}; leave it out")


def print_lines(*lines: str) -> None:
    print(*lines, sep="\n", flush=True)


def measure(args: argparse.Namespace, show: Callable[..., None]) -> dict[str, Any]:
    """Evaluate all tasks. Return their numbers, the checkpoint, ``dtype``, ``seqlen`` and ``ranks``.

    Tasks and tokenizer are read and checked before the weights. ``show`` is called with lines for a terminal as soon as
    they are known.
    """
    import torch  # takes seconds, so only after --help

    from seqlen_curriculum.evaluation import evaluate
    from seqlen_curriculum.evaluation import lm_eval_tasks as harness
    from seqlen_curriculum.evaluation.distributed import join
    from seqlen_curriculum.evaluation.task import Limits
    from seqlen_curriculum.files import read_json
    from seqlen_curriculum.models.pretrained import load_model
    from seqlen_curriculum.models.pretrained_tokenizer import load_tokenizer
    from seqlen_curriculum.run_folder.model_folder import model_folder, refuse_encoder

    tasks = evaluate.read_tasks(args.task)
    folder = model_folder(args.checkpoints[0])
    refuse_encoder(
        folder, "these tasks score next tokens; see valid_loss in its run log, or give a causal language model"
    )
    seqlen = evaluate.evaluation_seqlen(read_json(folder / "config.json"), args.seq_length)
    limits = Limits(seqlen=seqlen, overlap=args.overlap, limit=args.limit)
    tokenizer = load_tokenizer(folder, args.tokenizer)
    tokenized = {name: task(tokenizer, limits) for name, task in tasks.items()}
    harness_tasks = harness.read_harness_tasks(args.harness, args.include_path, args.shots) if args.harness else {}
    ranks = join(args.device)
    model = load_model(folder, getattr(torch, args.dtype)).to(ranks.device)

    on_ranks = f", {ranks.world} ranks" if ranks.world > 1 else ""
    show(f"{folder}: {args.dtype}, {limits.seqlen:,} tokens per window{on_ranks}")
    task_numbers = {}
    for name, numbers in evaluate.evaluate(model, tokenized, ranks, args.batch_tokens):
        task_numbers[name] = numbers
        show("", evaluate.describe(name, numbers))
    if harness_tasks:
        show("", harness.describe_head(args.shots))
    harness_numbers = {}
    for name, numbers in harness.evaluate_harness(
        model, tokenizer, harness_tasks, limits, ranks, args.batch_tokens, args.shots
    ):
        harness_numbers[name] = numbers
        show(harness.describe_task(name, numbers))
    for line in harness.describe_end(harness_numbers):
        show(line)
    about = {"checkpoint": str(folder), "dtype": args.dtype, "seqlen": limits.seqlen, "ranks": ranks.world}
    return {**about, "tasks": task_numbers, "harness": harness_numbers}


def write(path: Path, results: dict[str, Any]) -> None:
    """Write the numbers atomically as one JSON object. Raises ConfigError."""
    from seqlen_curriculum.files import replace_text

    try:
        replace_text(path, json.dumps(results, indent=2))
    except OSError as error:
        raise ConfigError(f"--out {path}: can't be written ({error.strerror}); choose another file") from error
