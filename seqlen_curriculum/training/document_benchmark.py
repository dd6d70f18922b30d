"""CPU time per token of a run's model on whole rows, with attention that stops at document ends, and on document pieces."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from seqlen_curriculum.config.run import RunConfig
from seqlen_curriculum.data.document_use import document_use
from seqlen_curriculum.data.from_config import with_buckets
from seqlen_curriculum.training.loop_benchmark import build_trainer
from seqlen_curriculum.training.start import choose_attention, join_ranks

__all__ = ["measure_documents"]


def measure_documents(config: RunConfig, folder: Path, steps: int, rounds: int) -> dict[str, Any]:
    """Train the first steps of three runs at full length with the same model and tokens per step, ``steps`` at a time.

    ``row`` and ``document`` are the values of ``data.attention``, on the same samples. ``decomposed`` reads pieces of
    documents instead; it is left out if ``data.seq_length`` is not a power of two. Reading data is included; evaluations and
    checkpoints are not. Needs one rank, and the model, data and training sections. Raises ConfigError, DataError.

    Returns ``parts_per_row`` of the first source, ``step_tokens, steps``, and ``ways``: for each of the three its CPU
    seconds and seconds per million tokens, and ``throughput`` and ``cpu_throughput``, its tokens per second and per CPU
    second relative to ``row``. All are sums over ``rounds``, each of which trains all three, after one as a warmup.
    """
    join_ranks(config.deepspeed)
    choose_attention(config.shortening.seq_length)
    configs = _ways(config)
    (folder / "log").mkdir()
    trainers = {name: build_trainer(with_buckets(way).for_ranks(1), folder / "log") for name, way in configs.items()}
    cpu, wall = dict.fromkeys(trainers, 0.0), dict.fromkeys(trainers, 0.0)
    for turn in tqdm(range(rounds + 1), unit="round", disable=None):
        names = list(trainers)[:: 1 if turn % 2 else -1]
        for name in names:
            started = time.process_time(), time.perf_counter()
            for step in range(turn * steps + 1, (turn + 1) * steps + 1):
                trainers[name].step(step, False)
            if turn:  # the first is a warmup
                cpu[name] += time.process_time() - started[0]
                wall[name] += time.perf_counter() - started[1]
    for trainer in trainers.values():
        trainer.close()
    step_tokens = config.global_batch * config.shortening.seq_length
    millions = rounds * steps * step_tokens / 1e6
    return {
        "parts_per_row": document_use(configs["document"])["documents"][0]["parts_per_row"],
        "step_tokens": step_tokens,
        "steps": rounds * steps,
        "ways": {
            name: {
                "cpu_seconds": cpu[name] / millions,
                "seconds": wall[name] / millions,
                "cpu_throughput": cpu["row"] / cpu[name],
                "throughput": wall["row"] / wall[name],
            }
            for name in trainers
        },
    }


def _ways(config: RunConfig) -> dict[str, RunConfig]:
    """Return the configuration of each run."""
    assert config.data is not None
    length, data = config.data.seq_length, config.data
    packed = {"order": "packed", "min_piece_tokens": None, "bucket_curriculum": None}
    packed |= {"bucket_cycles": None, "bucket_odds": None}
    sections = {
        "row": data.model_copy(update={**packed, "attention": "row"}),
        "document": data.model_copy(update={**packed, "attention": "document"}),
    }
    if length & (length - 1) == 0:
        sections["decomposed"] = data.model_copy(
            update={"order": "decomposed", "attention": "row", "leftovers": "drop"}
        )
    return {
        name: replace(config, curriculum=None, batch_size_warmup=None, data=section)
        for name, section in sections.items()
    }
