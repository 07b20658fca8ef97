"""Custom gradients in JAX."""

from __future__ import annotations

from typing import Any

import jax

from keras_rq.backend.rule import GradientRule


def with_gradient(rule: GradientRule, x: Any) -> Any:
    """Applies `rule` to `x`; see `keras_rq.backend.rule`."""

    @jax.custom_vjp
    def apply(x: Any) -> Any:
        return rule.forward(x)[0]

    def forward(x: Any) -> tuple[Any, Any]:
        y, statistics = rule.forward(x)
        return y, (x, statistics)

    def backward(saved: Any, upstream: Any) -> tuple[Any]:
        x, statistics = saved
        return (rule.backward(x, statistics, upstream),)

    apply.defvjp(forward, backward)
    return apply(x)
