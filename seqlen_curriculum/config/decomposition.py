"""Check for settings that contradict ``data.order`` ``decomposed``, from the configuration alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from seqlen_curriculum.config.run import RunConfig

__all__ = ["decomposition_problems"]


def decomposition_problems(config: RunConfig) -> Iterator[str]:
    """Yield one line per setting that contradicts rows that are whole pieces and steps of equal tokens."""
    if config.decomposed is None:
        return
    if config.batch_size_warmup:
        yield (
            'batch_size_warmup: doesn\'t work together with data.order "decomposed", whose steps all have the same '
            "number of tokens; remove one of them"
        )
    if config.training and config.training.seqlen_bucket:
        yield (
            f'training.seqlen_bucket: {config.training.seqlen_bucket} doesn\'t work together with data.order "decomposed", '
            "whose lengths are powers of two; remove it"
        )
    if config.training and config.training.objective == "masked":
        yield (
            'training.objective: "masked" doesn\'t work together with data.order "decomposed"; set one of them to its '
            "default"
        )
    if config.curriculum is not None:
        yield from _schedule_problems(config)


def _schedule_problems(config: RunConfig) -> Iterator[str]:
    curriculum, data = config.curriculum, config.decomposed
    assert curriculum is not None
    assert data is not None
    if curriculum.method != "truncate":
        yield (
            f'curriculum_learning.method: "{curriculum.method}" doesn\'t work together with data.order "decomposed", which '
            'reads pieces of the step\'s length and shortens nothing; set it to "truncate"'
        )
    if curriculum.batch_growth:
        yield (
            'curriculum_learning.batch_growth: true doesn\'t work together with data.order "decomposed", whose steps all '
            "have the same number of tokens; remove it"
        )
    if data.bucket_curriculum is not None:
        yield (
            f'data.bucket_curriculum: "{data.bucket_curriculum}" and curriculum_learning both set the length of a step; '
            "remove one of them"
        )
    for name in ("min_difficulty", "max_difficulty"):
        length = getattr(curriculum, name)
        if length <= data.seq_length and length not in data.piece_lengths:
            lengths = ", ".join(map(str, data.piece_lengths))
            yield (
                f'curriculum_learning.{name}: {length} is not the length of a piece of data.order "decomposed"; give one of '
                f"{lengths}, or change data.min_piece_tokens"
            )
