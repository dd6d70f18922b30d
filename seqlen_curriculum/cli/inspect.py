"""Show what a corpus contains, how a run uses its corpora, or what its ranks read at one step.

Example:
  slw inspect corpus/texts --seq-length 256
  slw inspect corpus/texts --seq-length 256 --decomposed 8
  slw inspect run.json --set data.leftovers=recycle --png data.png
  slw inspect run.json --step 100 --ranks 2 --rows 1

It needs neither torch nor a GPU. Epochs, samples and tokens in the output of --step are counted from 0, as in
samples.rank*.jsonl.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from seqlen_curriculum.cli.common import warn
from seqlen_curriculum.cli.flags import Parser, add_json, add_overwrite, add_set
from seqlen_curriculum.errors import ConfigError
from seqlen_curriculum.files import picture_path

_ALLOWED_MODES = {  # the modes that accept each flag, by the argument that selects the mode
    "seq_length": ["PREFIX"],
    "decomposed": ["PREFIX"],
    "set": ["--config", "--step"],
    "step": ["--step"],
    "ranks": ["--step"],
    "rows": ["--step"],
    "full": ["--step"],
    "png": ["--config"],
}


def parser() -> Parser:
    flags = Parser(prog="slw inspect", description=__doc__)
    flags.add_argument(
        "prefix",
        nargs="*",
        metavar="PREFIX|FILE",
        help="corpora (paths without .bin or .idx), or one run's configuration file",
    )
    flags.add_argument("--seq-length", type=int, metavar="N", help="also count the samples of N tokens")
    flags.add_argument(
        "--decomposed",
        type=int,
        metavar="MIN",
        help='also count the pieces of MIN to --seq-length tokens that data.order "decomposed" cuts documents into',
    )
    flags.add_argument("--config", metavar="FILE", help="the run's configuration file, given as a flag")
    add_set(flags)
    flags.add_argument(
        "--png", type=Path, metavar="PATH", help="plot how the run uses its corpora to a .png, .pdf or .svg file"
    )
    add_overwrite(flags, "--png")
    flags.add_argument("--step", type=int, metavar="STEP", help="show what the ranks read at this step")
    flags.add_argument("--ranks", type=int, metavar="R", help="data-parallel ranks that share the step (default: 1)")
    flags.add_argument("--rows", type=int, metavar="M", help="samples to show per rank (default: 4)")
    flags.add_argument("--full", action="store_true", help="show complete texts, and all spans and rows of a sample")
    add_json(flags)
    return flags


def is_run(path: str) -> bool:
    """Return whether this argument names a run's file or folder, not a corpus."""
    return path.endswith(".json") or (Path(path).is_dir() and not Path(f"{path}.bin").exists())


def mode(args: argparse.Namespace) -> str:
    """Return the mode that the arguments select. Raises ConfigError for flags that don't go together."""
    if len(args.prefix) == 1 and args.config is None and is_run(args.prefix[0]):
        args.config = args.prefix.pop()
    if bool(args.prefix) == (args.config is not None):
        given = f"{args.prefix[0]} and --config {args.config} are both given" if args.prefix else "neither is given"
        raise ConfigError(f"PREFIX, --config: {given}; give the corpora to inspect, or the configuration file of a run")
    selected = "--config" if args.step is None else "--step"
    if args.prefix:
        selected = "PREFIX"
    for name, allowed in _ALLOWED_MODES.items():
        value = getattr(args, name)
        is_given = value not in (None, []) and value is not False  # 0 is a value
        if is_given and selected not in allowed:
            flag = "--" + name.replace("_", "-")
            given = " ".join(value) if isinstance(value, list) else value
            raise ConfigError(f"{flag} {given}: {_condition(selected, allowed)}; leave it out here")
    return selected


def _condition(selected: str, allowed: list[str]) -> str:
    """Return why a flag that the modes ``allowed`` accept is not accepted in the mode ``selected``."""
    if selected == "PREFIX":
        return "only used with the configuration file of a run"
    return "not used with --step" if "--config" in allowed else f"only used with {allowed[0]}"


def corpora(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Return the contents of the corpora, as numbers and as text."""
    from seqlen_curriculum.data.inspection.corpus import corpus_warnings, describe_corpora, inspect_corpora

    facts = inspect_corpora(args.prefix, args.seq_length, args.decomposed)
    warn(corpus_warnings(facts))
    return {"corpora": facts}, describe_corpora(facts)


def whole_run(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Return the contents of the run's corpora and how it uses them, as numbers and as text."""
    from seqlen_curriculum.config.run import RunConfig
    from seqlen_curriculum.data.inspection.corpus import corpus_warnings, describe_corpora, inspect_corpora
    from seqlen_curriculum.data.inspection.token_use import account, describe_account

    png = picture_path("--png", args.png, args.overwrite) if args.png else None
    config = RunConfig.load(args.config, args.set, require=("data",))
    summary = account(config)
    if png and "pieces" in summary:
        raise ConfigError(f'--png {png}: not available with data.order "decomposed", which has one way to use a corpus')
    if png and "ways" not in summary:
        raise ConfigError(f"--png {png}: there are no steps to plot; add training and train_batch_size to the file")
    if png:
        from seqlen_curriculum.analysis.token_use import draw_data_use

        draw_data_use(summary, png)
    facts = inspect_corpora(dict.fromkeys(corpus["prefix"] for split in summary["splits"].values() for corpus in split))
    warn(corpus_warnings(facts, config.model.vocab_size if config.model else None))
    return {"corpora": facts, **summary}, f"{describe_corpora(facts)}\n\n{describe_account(summary)}"


def one_step(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Return the samples that the ranks read at a step, as numbers and as text."""
    from seqlen_curriculum.config.run import RunConfig
    from seqlen_curriculum.data.from_config import open_training_data
    from seqlen_curriculum.data.inspection.step import describe_step, read_step

    config = RunConfig.load(args.config, args.set, require=("data", "training"))
    given = {name: getattr(args, name) for name in ("ranks", "rows") if getattr(args, name) is not None}
    step = read_step(open_training_data(config), args.step, **given, stops_at_documents=config.stops_at_documents)
    return step, describe_step(step, args.full)


def main(argv: Sequence[str] | None = None) -> None:
    args = parser().parse_args(argv)
    inspect = {"PREFIX": corpora, "--config": whole_run, "--step": one_step}[mode(args)]
    numbers, text = inspect(args)
    print(json.dumps(numbers, indent=2) if args.json else text)
