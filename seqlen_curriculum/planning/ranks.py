"""Plan a run on a number of ranks: micro-batches at every length, and an estimate of the hours. Needs no torch.

The hours are model FLOPs over an assumed speed. A micro-batch with too few tokens to fill a device is assumed to take as
long as one that just fills it. Communication, the optimizer, evaluations and checkpoints are not included.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from seqlen_curriculum.config.cards import peak_flops
from seqlen_curriculum.config.deepspeed import DeepSpeedKeys
from seqlen_curriculum.config.model import ModelConfig
from seqlen_curriculum.config.run import RunConfig
from seqlen_curriculum.fields import Count, Flags
from seqlen_curriculum.schedule.curriculum_config import constant_curriculum
from seqlen_curriculum.schedule.piecewise import IntArray, ceil_div

__all__ = ["RankFlags", "describe_ranks", "fill_tokens", "on_ranks", "rank_warnings"]

MFU = 0.4
"""Assumed model FLOPs utilization at full length."""
DEFAULT_CARD = "NVIDIA H100"
_HOST_SECONDS = 1.8e-3
"""Host time of a block per micro-batch, forward and backward. 12 blocks of GPT-2 117M take 21 to 23 ms on an H200 with up to
4096 tokens, uncompiled."""
_MULTIPROCESSORS, _TILE = 132, 128  # of an H100; rows and columns of the output tile that each computes at a time
_DRIVER = Path("/proc/driver/nvidia/gpus")
_COLUMNS = {
    "seqlen": "seqlen",
    "rows": "rows/rank",
    "tokens": "tokens/rank",
    "micro_batches": "micro-batches",
    "micro_batch_tokens": "tokens of each",
}
"""Keys of a group with values [minimum, maximum], and the headers of their columns."""


class RankFlags(Flags):
    """The machines for which a run is planned."""

    ranks: Count
    """Total number of ranks, one GPU each."""
    gpus_per_node: Count = 8
    """GPUs per node."""
    tflops: Annotated[float, Field(gt=0)] | None = None
    """Model TFLOP/s of a GPU at full length. None: ``MFU`` times the peak of the local GPU."""


class _Shapes(NamedTuple):
    """The steps of a run on one rank, (n,) each: one entry per pair of rows and seqlen."""

    seqlen: IntArray
    steps: IntArray
    rows: IntArray
    tokens: IntArray
    """Target tokens of a rank per step, those of its own parts if ranks share sequences."""
    micro_batches: IntArray
    micro_batch_tokens: IntArray

    @classmethod
    def of(cls, config: RunConfig) -> _Shapes:
        """Return the shapes of a run with a known number of ranks."""
        plan, timeline, parts = config.plan, config.plan.timeline, config.keys.sequence_ranks
        seqlen, samples, steps = timeline.kinds_of_steps()
        rows = samples * plan.shortening.rows_per_sample(seqlen) // plan.data_ranks
        row_tokens = plan.shortening.tokens_per_row(seqlen)
        pairs = zip(rows.tolist(), row_tokens.tolist(), strict=True)
        micro_rows = np.array([plan.micro_batch_rows(*pair) for pair in pairs], np.int64)
        tokens = rows * row_tokens // parts
        return cls(seqlen, steps, rows, tokens, rows // micro_rows, micro_rows * row_tokens // parts)

    def seconds(self, model: ModelConfig, speed: float, least_tokens: int = 0) -> NDArray[np.float64]:
        """Return the total seconds of all steps of each shape, if a rank reaches ``speed`` model FLOP/s.

        A micro-batch with fewer than ``least_tokens`` tokens takes as long as one with ``least_tokens``.
        """
        # 4 rows of 64 tokens are 256 tokens. If 2,816 tokens fill the GPU, they take eleven times as long as at full speed.
        timed = self.steps * self.micro_batches * np.maximum(self.micro_batch_tokens, least_tokens)
        return np.asarray(timed * model.flops_per_token(self.seqlen) / speed, np.float64)


def fill_tokens(hidden_size: int, host_seconds: float, token_seconds: float) -> int:
    """Return the tokens of a micro-batch that keep a GPU busy, if it takes ``token_seconds`` for each: an estimate.

    It is the larger of two limits. The host takes ``host_seconds`` for a micro-batch of any size. And the narrowest products
    of a block have ``hidden_size`` columns and one row per token, which a multiprocessor computes in tiles of 128 x 128; an
    H100 has 132.
    """
    # GPT-2 117M at 396 TFLOP/s and length 1024: 12 * 1.8 ms / (855e6 / 396e12 s) = 10,003 tokens. By tiles 2,816: 768
    # columns are 6 tiles, and 6 * 22 = 132.
    return max(math.ceil(host_seconds / token_seconds), ceil_div(_MULTIPROCESSORS * _TILE * _TILE, hidden_size))


def on_ranks(config: RunConfig, flags: RankFlags) -> dict[str, Any]:
    """Return the plan for ``flags.ranks`` ranks as one JSON-able object. Raises ConfigError if the batch doesn't divide.

    ``config`` is the result of ``for_ranks``.

    - ``ranks, data_ranks, nodes, gpus_per_node``.
    - ``lengths`` [{seqlen, rows, tokens, micro_batches, micro_batch_tokens, steps, token_share, speed, hours}]: one group
      per power of two. The first five are [minimum, maximum] of a data-parallel rank; ``speed`` is relative to full speed.
    - ``fill_tokens``, ``tflops`` of a rank, ``tflops_source``, ``hours``, ``hours_at_full_speed`` (if every micro-batch
      filled its device), ``hours_of_full_length`` (the same tokens without a curriculum). These, and ``hours`` and ``speed``
      of a group, are None without a model section and for a model that is ``uncounted``.
    """
    shapes, least_tokens = _Shapes.of(config), None
    model = None if config.model is None or config.model.uncounted else config.model
    tflops, source = _speed(config.keys, flags.tflops)
    summary = {
        "ranks": flags.ranks,
        "data_ranks": config.data_ranks,
        "nodes": ceil_div(flags.ranks, flags.gpus_per_node),
        "gpus_per_node": flags.gpus_per_node,
        "tflops": tflops if model else None,
        "tflops_source": source if model else None,
    }
    timed = ideal = np.full(len(shapes.seqlen), np.nan)
    hours: dict[str, float | None] = dict.fromkeys(("hours", "hours_at_full_speed", "hours_of_full_length"))
    if model:
        # The speed is that at full length, so it includes the effect of small micro-batches at full length.
        seq_length = config.shortening.seq_length
        full_tokens = config.plan.micro_batch * seq_length // config.keys.sequence_ranks
        # A rank that shares a model with others does a part of the work for the tokens of all of them.
        parts = flags.ranks / (config.data_ranks * config.keys.sequence_ranks)
        token_flops = model.flops_per_token(float(seq_length)) / parts  # of a rank
        host_seconds = _HOST_SECONDS * ceil_div(model.num_layers, config.keys.pipeline_stages)
        fed = full_tokens * token_flops / host_seconds / 1e12
        if flags.tflops is None and fed < tflops:
            tflops, source = fed, f"what the host can feed with {full_tokens:,} tokens at a time; --tflops changes it"
            summary |= {"tflops": tflops, "tflops_source": source}
        least_tokens = min(fill_tokens(model.hidden_size, host_seconds, token_flops / tflops / 1e12), full_tokens)
        speed = tflops * 1e12 * parts
        timed, ideal = shapes.seconds(model, speed, least_tokens), shapes.seconds(model, speed)
        constant = _Shapes.of(replace(config, curriculum=constant_curriculum(seq_length)))
        full_length = constant.seconds(model, speed, least_tokens)
        totals = (float(seconds.sum()) / 3600 for seconds in (timed, ideal, full_length))
        hours = dict(zip(hours, totals, strict=True))
    groups = _groups(shapes, timed, ideal)
    return {**summary, "fill_tokens": least_tokens, **hours, "lengths": groups}


def _groups(shapes: _Shapes, timed: NDArray[np.float64], ideal: NDArray[np.float64]) -> list[dict[str, Any]]:
    """Return the shapes in groups, one per power of two, shortest first."""
    exponents = np.frexp(shapes.seqlen)[1]
    total = int(np.sum(shapes.steps * shapes.tokens))
    groups = []
    for exponent in np.unique(exponents):
        of_group = exponents == exponent
        values = {name: getattr(shapes, name)[of_group] for name in _COLUMNS}
        steps, seconds = shapes.steps[of_group], float(timed[of_group].sum())
        groups.append(
            {
                **{name: [int(value.min()), int(value.max())] for name, value in values.items()},
                "steps": int(steps.sum()),
                "token_share": int(np.sum(steps * values["tokens"])) / total,
                "speed": None if np.isnan(seconds) else float(ideal[of_group].sum()) / seconds,
                "hours": None if np.isnan(seconds) else seconds / 3600,
            }
        )
    return groups


def _speed(keys: DeepSpeedKeys, tflops: float | None) -> tuple[float, str]:
    """Return the assumed TFLOP/s of a GPU, and their source."""
    if tflops is not None:
        return tflops, "--tflops"
    enabled = keys.enabled_precisions
    precision = enabled[0] if enabled and enabled[0] in ("bf16", "fp16") else "bf16" if enabled else "fp32"
    card = _card_present()
    peak = peak_flops(card, precision) if card else None
    if peak is None:
        card, peak = DEFAULT_CARD, peak_flops(DEFAULT_CARD, precision)
        assert peak is not None
        reason = "the default; --tflops changes it"
    else:
        reason = "the GPU of this machine; --tflops changes it"
    return MFU * peak / 1e12, f"{MFU:.0%} of the {peak / 1e12:,.0f} of one {card} in {precision}, {reason}"


def _card_present() -> str | None:
    """Return the driver's name of an NVIDIA GPU of this machine, None without one."""
    for path in sorted(_DRIVER.glob("*/information")):
        for line in path.read_text(errors="replace").splitlines():
            name, _, value = line.partition(":")
            if name == "Model":
                return value.strip()
    return None


def rank_warnings(config: RunConfig, summary: dict[str, Any]) -> list[str]:
    """Return one warning per cause that makes this number of ranks slow; ``summary`` is the result of ``on_ranks``."""
    return [*_spanning(config.keys, summary), *_idle(config, summary)]


def _spanning(keys: DeepSpeedKeys, summary: dict[str, Any]) -> list[str]:
    """Warn about ranks that exchange the activations of every layer over the network."""
    per_node = summary["gpus_per_node"]
    # Such groups are contiguous: groups of 3 start at ranks 0, 3, 6, so on nodes of 8 the group 6, 7, 8 spans two.
    return [
        f"{name}: {degree} neighbouring ranks share each layer, and with --gpus-per-node {per_node} some of "
        f"these groups span nodes, whose network is slower; give a divisor of {per_node}"
        for name, degree in keys.degrees.items()
        if name != "pipeline.stages" and per_node % degree and summary["nodes"] > 1
    ]


def _idle(config: RunConfig, summary: dict[str, Any]) -> list[str]:
    """Warn about micro-batches that don't fill a device, if they cost more than 1 % of the hours."""
    if summary["hours"] is None or summary["hours"] <= 1.01 * summary["hours_at_full_speed"]:
        return []
    fill = summary["fill_tokens"]
    idle = [group for group in summary["lengths"] if group["micro_batch_tokens"][0] < fill]
    lengths = sorted({seqlen for group in idle for seqlen in group["seqlen"]})
    span = f"lengths {lengths[0]} to {lengths[-1]}" if len(lengths) > 1 else f"length {lengths[0]}"
    fewest = min(group["micro_batch_tokens"][0] for group in idle)
    ratio = summary["hours"] / summary["hours_at_full_speed"]
    return [
        f"--ranks {summary['ranks']}: some micro-batches at {span} have too few tokens to fill a device (down to "
        f"{fewest:,}, where about {fill:,} do), so the run takes {ratio:.2f} times as long as at full speed (an "
        f"estimate). Consider {' or '.join(_remedies(config, fill))}"
    ]


def _remedies(config: RunConfig, fill: int) -> Iterator[str]:
    """Yield the settings to change so that micro-batches have ``fill`` tokens."""
    if not config.plan.balanced:
        yield 'training.micro_batch "balanced"'
    if config.plan.timeline.rows(config.plan.timeline.steps) // config.plan.data_ranks > config.plan.micro_batch:
        yield f"train_micro_batch_size_per_gpu above {config.plan.micro_batch}"
    yield "fewer ranks"
    if config.curriculum is None or config.batch_size_warmup is not None:
        return
    if config.shortening.method == "truncate":
        yield 'curriculum_learning.method "segment"'
    longest = config.shortening.used_tokens_per_sample(config.curriculum.max_difficulty)
    floor = min(fill * config.keys.sequence_ranks * config.data_ranks, config.global_batch * longest)
    yield f"curriculum_learning.batch_growth true with min_tokens_per_step {floor}"


def describe_ranks(summary: dict[str, Any]) -> str:
    """Format the result of ``on_ranks`` for a terminal: facts, then a table of lengths."""
    nodes = "one node" if summary["nodes"] == 1 else f"{summary['nodes']:,} nodes of {summary['gpus_per_node']:,}"
    lines = [f"ranks             {summary['ranks']:,} on {nodes}, {summary['data_ranks']:,} data-parallel"]
    if summary["hours"] is not None:
        lines += [
            f"assumed speed     {summary['tflops']:,.0f} TFLOP/s per rank ({summary['tflops_source']})",
            f"estimated hours   {summary['hours']:,.2f}; {summary['hours_of_full_length']:,.2f} for the same tokens at full "
            "length",
        ]
    return "\n".join([*lines, "", *_table(summary["lengths"])])


def _table(groups: Sequence[dict[str, Any]]) -> list[str]:
    has_hours = groups[0]["hours"] is not None
    cells = [[*_COLUMNS.values(), "steps", "of tokens", *(["speed", "hours"] if has_hours else [])]]
    for group in groups:
        spans = [group[name] for name in _COLUMNS]
        row = [f"{low:,}" if low == high else f"{low:,}-{high:,}" for low, high in spans]
        row += [f"{group['steps']:,}", f"{group['token_share']:.1%}"]
        cells.append(row + ([f"{group['speed']:.0%}", f"{group['hours']:,.2f}"] if has_hours else []))
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return ["  ".join(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True)) for row in cells]
