"""NumPy has no gradients: forward only."""

from __future__ import annotations

from typing import Any

from keras_rq.backend.rule import GradientRule


def with_gradient(rule: GradientRule, x: Any) -> Any:
    """Applies the forward half of `rule` to `x`; see `keras_rq.backend.rule`."""
    return rule.forward(x)[0]
