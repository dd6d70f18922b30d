"""The effect of a run's evaluations on later steps. It is part of a checkpoint, so a resumed run behaves the same."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from seqlen_curriculum.fields import Count, Section
from seqlen_curriculum.run_folder.ratios import perplexity_ratio

__all__ = ["Evaluations"]


class Evaluations(Section):
    """A summary of the evaluations up to a step."""

    least_loss: Annotated[float, Field(ge=0)] | None = None
    """The lowest validation loss in nats per token, None before the first evaluation."""
    held: list[Count] = Field(default_factory=list)
    """Steps after whose evaluation an ``adaptive`` schedule paused the ramp for an interval."""

    def ratio(self, loss: float) -> float:
        """Return the perplexity of an evaluation with this ``loss`` over the best so far; 0 for the first evaluation."""
        # Losses of 3.0, then 3.2: exp(0.2), so the perplexity is 1.22 times the best so far.
        return perplexity_ratio(loss, self.least_loss) if self.least_loss is not None else 0.0

    def then(self, loss: float, held: int | None = None) -> Evaluations:
        """Return the summary with one more evaluation; ``held`` is its step if the ramp pauses after it, else None."""
        least = loss if self.least_loss is None else min(loss, self.least_loss)
        return Evaluations(least_loss=least, held=self.held if held is None else [*self.held, held])
