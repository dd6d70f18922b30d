"""The output head of a language model, which computes the loss without holding the logits of a micro-batch.

Shapes: ``H`` hidden size, ``V`` vocabulary.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from seqlen_curriculum.models.cross_entropy import mean_cross_entropy

__all__ = ["LossHead"]


class LossHead(nn.Module):
    """The head. Its forward is the only place, outside the embedding that may share it, that uses its weight.

    ZeRO-3 requires this, because it gathers a module's parameters only during the forward of that module.
    """

    bias: nn.Parameter | None

    def __init__(
        self, weight: nn.Parameter, bias: nn.Parameter | None = None, scale: float = 1.0, cap: float | None = None
    ) -> None:
        super().__init__()
        self.weight = weight  # (V, H)
        self.register_parameter("bias", bias)  # (V)
        self.scale, self.cap = scale, cap
        self.compiled = False

    def forward(self, hidden: Tensor, targets: Tensor | None = None) -> Tensor:
        """Return the mean cross entropy of ``targets`` (...) given ``hidden`` (..., H), or, without targets, the product.

        The product (..., V) is that of a linear layer: transformers' model itself scales and caps it. The loss is that of
        the logits ``cap * tanh(scale * product / cap)``, or ``scale * product`` without a cap.
        """
        if targets is None:
            return F.linear(hidden, self.weight, self.bias)
        bias: Tensor | None = self.bias
        if self.scale != 1:  # of H numbers per token instead of V
            hidden, bias = hidden * self.scale, None if bias is None else bias * self.scale
        return mean_cross_entropy(
            hidden.flatten(0, -2), self.weight, targets.flatten(), self.compiled, bias=bias, cap=self.cap
        )
