"""``TokenCosine`` as a torch learning rate scheduler that DeepSpeed accepts."""

from __future__ import annotations

from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from seqlen_curriculum.schedule.token_lr import TokenCosine

__all__ = ["TokenCosineLR"]


class TokenCosineLR(LRScheduler):
    """Sets each group's rate to ``rate(step)``, scaled by the group's own ``lr`` over ``rate.max_lr``, the largest one.

    ``last_epoch`` counts completed optimizer steps, so the rate in force is that of step ``last_epoch + 1``. Its state is
    that one counter; the rest follows from the configuration.
    """

    def __init__(self, optimizer: Optimizer, rate: TokenCosine, last_epoch: int = -1) -> None:
        self.rate = rate
        self._latest: tuple[tuple[TokenCosine, int], float] | None = None
        super().__init__(optimizer, last_epoch)

    def get_lr(self) -> list[float | Any]:
        """The rate of each parameter group for the step that comes next."""
        # A step's rate is asked for at the end of the step before and again as it begins. It takes 80 us.
        asked = self.rate, self.last_epoch + 1
        if self._latest is None or self._latest[0] != asked:
            self._latest = asked, self.rate(self.last_epoch + 1)
        rate = self._latest[1]
        return [rate * (base / self.rate.max_lr) for base in self.base_lrs]

    def seek(self, step: int) -> None:
        """Put the rates of ``step`` (1-based) in force, wherever the scheduler stood before."""
        self.last_epoch = step - 1
        self._last_lr = self.get_lr()
        for group, rate in zip(self.optimizer.param_groups, self._last_lr, strict=True):
            group["lr"] = rate

    def step(self, epoch: int | None = None) -> None:  # noqa: ARG002 - torch's signature
        """Move on to the next step's rate; DeepSpeed calls this after each optimizer step it applied."""
        self.seek(self.last_epoch + 2)

    def state_dict(self) -> dict[str, Any]:
        """``{"last_epoch": completed steps}``."""
        return {"last_epoch": self.last_epoch}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue after ``last_epoch`` completed steps."""
        self.seek(state_dict["last_epoch"] + 1)
