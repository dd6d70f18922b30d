"""``TokenRate`` as a torch learning rate scheduler that DeepSpeed accepts."""

from __future__ import annotations

from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from seqlen_curriculum.schedule.token_lr import TokenRate

__all__ = ["TokenCosineLR", "TokenLR"]


class TokenLR(LRScheduler):
    """Learning rate scheduler that sets each group's rate to ``rate(step)`` times its own ``lr`` over ``rate.max_lr``.

    ``last_epoch`` counts completed optimizer steps, so the current rate is that of step ``last_epoch + 1``. The counter is
    the only state. Everything else is derived from the configuration.
    """

    def __init__(self, optimizer: Optimizer, rate: TokenRate, last_epoch: int = -1) -> None:
        self.rate = rate
        self._latest: tuple[tuple[TokenRate, int], float] | None = None
        super().__init__(optimizer, last_epoch)

    def get_lr(self) -> list[float | Any]:
        """Return the rate of each parameter group for the next step."""
        # A rate takes 80 us and is read twice: at the end of the previous step, and at the start of its own.
        asked = self.rate, self.last_epoch + 1
        if self._latest is None or self._latest[0] != asked:
            self._latest = asked, self.rate(self.last_epoch + 1)
        rate = self._latest[1]
        return [rate * (base / self.rate.max_lr) for base in self.base_lrs]

    def seek(self, step: int) -> None:
        """Set the rates of ``step`` (1-based), from any earlier or later step."""
        self.last_epoch = step - 1
        self._last_lr = self.get_lr()
        for group, rate in zip(self.optimizer.param_groups, self._last_lr, strict=True):
            group["lr"] = rate

    def step(self, epoch: int | None = None) -> None:  # noqa: ARG002 - torch's signature
        """Set the rate of the next step. DeepSpeed calls this after each applied optimizer step."""
        self.seek(self.last_epoch + 2)

    def state_dict(self) -> dict[str, Any]:
        """Return ``{"last_epoch": completed steps}``."""
        return {"last_epoch": self.last_epoch}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume after ``last_epoch`` completed steps."""
        self.seek(state_dict["last_epoch"] + 1)


TokenCosineLR = TokenLR
"""``TokenLR``, for scripts that import it by the name of one of its shapes."""
