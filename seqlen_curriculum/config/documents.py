"""Check for settings that contradict ``data.attention`` ``document``, from the configuration alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from seqlen_curriculum.config.run import RunConfig

__all__ = ["document_problems"]

_KEY = 'data.attention: "document"'


def document_problems(config: RunConfig) -> Iterator[str]:
    """Yield one line per setting that contradicts attention and positions which stop at document ends."""
    if not config.stops_at_documents:
        return
    if config.decomposed:
        yield f'{_KEY} has no effect with data.order "decomposed", whose rows are parts of one document each; remove it'
    if config.training and config.training.objective == "masked":
        yield f'{_KEY} needs causal attention, which training.objective "masked" doesn\'t have; set it to "row"'
    if config.training and config.training.compile:
        yield (
            f"training.compile: true doesn't work with {_KEY}, whose shapes differ in each micro-batch; set compile to "
            "false"
        )
    for name, degree in config.keys.degrees.items():
        if degree > 1 and name != "tensor_parallel.autotp_size":
            yield (
                f"{name}: {degree} doesn't work with {_KEY}, which needs whole rows and all layers on a rank; set it to 1 "
                "(ZeRO 0 to 3 and tensor parallel work)"
            )
