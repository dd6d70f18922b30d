"""What of a run's evaluations decides about the steps to come: state, which its checkpoints hold."""

from __future__ import annotations

import math
from typing import Annotated

from pydantic import Field

from seqlen_curriculum.fields import Count, Section

__all__ = ["Evaluations"]


class Evaluations(Section):
    """Those up to a step."""

    least_loss: Annotated[float, Field(ge=0)] | None = None
    """The least validation loss in nats, None before the first."""
    held: list[Count] = Field(default_factory=list)
    """Steps after whose evaluation the lengths of an ``adaptive`` schedule stood still for an interval."""

    def ratio(self, loss: float) -> float:
        """The perplexity of one more, of this ``loss``, over the best before it; 0 if there is none."""
        return math.exp(min(loss - self.least_loss, 700)) if self.least_loss is not None else 0.0

    def then(self, loss: float, held: int | None = None) -> Evaluations:
        """With one more; ``held`` is its step where the lengths stand still after it."""
        least = loss if self.least_loss is None else min(loss, self.least_loss)
        return Evaluations(least_loss=least, held=[*self.held, *([] if held is None else [held])])
