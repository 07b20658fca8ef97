"""Custom gradients in JAX."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import get_opaque_trace_state

from keras_rq.backend import pallas
from keras_rq.backend.in_graph import call_in_graph as call_in_graph
from keras_rq.backend.in_graph import make_known as make_known
from keras_rq.backend.rule import Forward, GradientRule


def with_gradient(rule: GradientRule, x: Any) -> Any:
    """Applies `rule` to `x`, keeping no more than `x` and the rule's statistics."""

    @jax.custom_vjp
    def apply(x: Any) -> Any:
        return pallas.forward(rule, x)[0]

    def forward(x: Any) -> tuple[Any, Any]:
        y, statistics = pallas.forward(rule, x)
        return y, (x, statistics)

    def backward(saved: Any, upstream: Any) -> tuple[Any]:
        x, statistics = saved
        return (pallas.backward(rule, x, statistics, upstream),)

    apply.defvjp(forward, backward)
    return apply(x)


def product_with_gradient(
    rule: GradientRule,
    x: Any,
    kernel: Any,
    product: Callable[[Any, Any], Any],
    otherwise: Forward | None = None,
) -> Any:
    """`product(rule(x), kernel)`, linear in both: keeps `x` and not the output of the rule.

    The forward pass is `otherwise`, where there is one.
    """
    constants = () if otherwise is None else otherwise.constants

    @jax.custom_vjp
    def apply(x: Any, kernel: Any, *constants: Any) -> Any:
        if otherwise is not None:
            return otherwise(x, *constants)
        return product(pallas.forward(rule, x)[0], kernel)

    def forward(x: Any, kernel: Any, *constants: Any) -> tuple[Any, Any]:
        y, statistics = pallas.forward(rule, x)
        made = product(y, kernel) if otherwise is None else otherwise(x, *constants)
        return made, (x, kernel, statistics)

    def backward(saved: Any, upstream: Any) -> tuple[Any, ...]:
        x, kernel, statistics = saved
        (to_y,) = jax.linear_transpose(lambda y: product(y, kernel), x)(upstream)
        to_x, y = pallas.backward_and_again(rule, x, statistics, to_y)
        (to_kernel,) = jax.linear_transpose(lambda k: product(y, k), kernel)(upstream)
        return (to_x, to_kernel, *(None for _ in constants))

    apply.defvjp(forward, backward)
    return apply(x, kernel, *constants)


def where_traced() -> Any:
    """Equal at two places whose tensors may be used for each other; None: nowhere else."""
    return get_opaque_trace_state()


def float32_matmul(x: Any, y: Any) -> Any:
    """A matrix product whose float32 operands keep all their digits."""
    return jax.numpy.matmul(x, y, precision=jax.lax.Precision.HIGHEST)
