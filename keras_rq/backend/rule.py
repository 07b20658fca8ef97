"""A function of one tensor with a gradient of its own, as every backend runs it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol


class GradientRule(Protocol):
    """A forward function and its vector-Jacobian product, written once in keras.ops.

    A backend keeps `x` and the statistics between the two passes and nothing else, so what the
    backward pass needs of the size of `x` it computes again.
    """

    def forward(self, x: Any) -> tuple[Any, Sequence[Any]]:
        """Returns the output, shaped like `x`, and a sequence of small tensors."""

    def backward(self, x: Any, statistics: Sequence[Any], upstream: Any) -> Any:
        """Returns the gradient to `x`, in its dtype, from the gradient to the output."""
