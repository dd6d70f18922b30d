"""Batches of changing shape in DeepSpeed's pipeline engine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

__all__ = ["follow_shapes"]


def follow_shapes(engine: Any, before_step: Callable[[Any], None]) -> None:
    """Make ``train_batch`` and ``eval_batch`` of a pipeline ``engine`` support changing rows and lengths.

    Stages exchange the shape of their activations only once, so a batch of another shape would be received incorrectly or
    block. This makes them exchange it for each batch, a few numbers per stage. DeepSpeed up to 0.19.7 did the same when its
    curriculum changed the length. ``before_step(engine)`` is called before each training batch.
    """
    train_batch, eval_batch = engine.train_batch, engine.eval_batch

    def train(*args: Any, **kwargs: Any) -> Any:
        before_step(engine)
        engine.reset_activation_shape()
        return train_batch(*args, **kwargs)

    def evaluate(*args: Any, **kwargs: Any) -> Any:
        engine.reset_activation_shape()
        return eval_batch(*args, **kwargs)

    engine.train_batch, engine.eval_batch = train, evaluate
