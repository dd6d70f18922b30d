"""The part of ``slw evaluate`` that measures the loss by position in the row."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from seqlen_curriculum.cli.common import short_names
from seqlen_curriculum.errors import ConfigError
from seqlen_curriculum.run_folder import CHECKPOINT_PREFIX, RUN_INFO

if TYPE_CHECKING:
    from seqlen_curriculum.evaluation.by_position import ValidationRows

__all__ = ["draw", "measure_all"]


def measure_all(args: argparse.Namespace, show: Callable[..., None]) -> dict[str, Any]:
    """Measure the loss by position of all checkpoints. Return the losses, ``dtype``, ``seqlen``, ``rows`` and ``ranks``.

    Everything is checked before the first weights are read. ``show`` is called with lines for a terminal as soon as they are
    known.
    """
    import torch  # takes seconds, so only after --help

    from seqlen_curriculum.evaluation.by_position import bins, mean_loss, measure
    from seqlen_curriculum.evaluation.distributed import join
    from seqlen_curriculum.models.pretrained import load_model
    from seqlen_curriculum.run_folder.model_folder import model_folder

    # Steps of several runs are named with their run, although they may differ without it.
    runs = {path.resolve().parent for path in map(Path, args.checkpoints) if path.name.startswith(CHECKPOINT_PREFIX)}
    names = short_names("CHECKPOINT", list(map(str, args.checkpoints)), parts=2 if len(runs) > 1 else 1)
    folders = {name: model_folder(Path(path)) for name, path in names.items()}
    valid = open_rows(args, {name: Path(path) for name, path in names.items()}, folders)
    ranks = join(args.device)

    on_ranks = f", {ranks.world} ranks" if ranks.world > 1 else ""
    show(f"{args.dtype}, {len(valid.ids):,} validation rows of {valid.seqlen:,} tokens{on_ranks}", "")
    heads = ["all", *(f"{first}-{last}" for first, last in bins(valid.seqlen))]
    width = max(map(len, names))
    show("loss by position (nats/token)", " ".join([" " * width, *(f"{head:>12}" for head in heads)]))
    measured = {}
    for name, folder in folders.items():
        started = time.perf_counter()
        model = load_model(folder, getattr(torch, args.dtype), padding=True).to(ranks.device)
        losses = measure(model, valid, ranks, args.batch_tokens, name)
        mean = mean_loss(losses)
        numbers = [mean, *(each.loss for each in losses.values())]
        show(" ".join([f"{name:{width}}", *(f"{number:12.6f}" for number in numbers)]))
        positions = {each: loss._asdict() for each, loss in losses.items()}
        seconds = time.perf_counter() - started
        measured[name] = {"checkpoint": str(folder), "loss": mean, "positions": positions, "seconds": seconds}
    about = {"dtype": args.dtype, "seqlen": valid.seqlen, "rows": len(valid.ids), "ranks": ranks.world}
    return {**about, "by_position": measured}


def open_rows(args: argparse.Namespace, paths: Mapping[str, Path], folders: Mapping[str, Path]) -> ValidationRows:
    """Return the validation rows of all checkpoints, by name ``paths`` as given and the ``folders`` of their models.

    Raises ConfigError if they are rows of different runs.
    """
    from seqlen_curriculum.config.run import RunConfig
    from seqlen_curriculum.evaluation.by_position import validation_rows

    runs = {name: args.run or str(run_of(path)) for name, path in paths.items()}
    configs = {run: RunConfig.load(run, require=("data", "training")) for run in dict.fromkeys(runs.values())}
    valid = {name: validation_rows(folder, configs[runs[name]], args.rows) for name, folder in folders.items()}
    first = next(iter(valid))
    for name, rows in valid.items():
        if not rows.is_same(valid[first]):
            raise ConfigError(
                f"{first}, {name}: their runs have different validation rows (data, data.seq_length or "
                "training.eval_rows), so their losses can't be compared; give --run RUN to read those of one run"
            )
    return valid[first]


def run_of(checkpoint: Path) -> Path:
    """Return the folder of the run that ``checkpoint`` is in. Raises ConfigError if there is none."""
    for folder in (checkpoint, checkpoint.resolve().parent):
        if (folder / RUN_INFO).is_file():
            return folder
    raise ConfigError(
        f"--run: neither {checkpoint} nor the folder that it is in has a {RUN_INFO}; give the folder or file of the run "
        "whose validation split is read"
    )


def draw(results: Mapping[str, Any], path: Path) -> None:
    """Plot what ``measure_all`` returned, one curve per checkpoint."""
    from seqlen_curriculum.analysis.drawing import draw_by_position

    measured = results["by_position"]
    draw_by_position(
        {
            name: {positions: each["loss"] for positions, each in measured[name]["positions"].items()}
            for name in measured
        },
        path,
    )
