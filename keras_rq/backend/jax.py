"""Custom gradients in JAX."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import get_opaque_trace_state

from keras_rq.backend import pallas
from keras_rq.backend.common import as_it_is_now as as_it_is_now
from keras_rq.backend.common import call_in_graph as call_in_graph
from keras_rq.backend.common import forget_traces as forget_traces
from keras_rq.backend.common import make_known as make_known
from keras_rq.backend.common import unpadded
from keras_rq.backend.rule import Forward, GradientRule
from keras_rq.numerics.parts import NEUTRAL
from keras_rq.numerics.rotations import LARGEST


def _arranged(rule: GradientRule) -> GradientRule:
    on_cpu = jax.default_backend() == "cpu" and not pallas.on_gpu()
    return rule.in_parts if on_cpu else rule


def with_gradient(rule: GradientRule, x: Any) -> Any:
    """Applies `rule` to `x`, keeping no more than `x` and the rule's statistics."""
    rule = _arranged(rule)

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
    rule = _arranged(rule)
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


def integer_codes(rule: GradientRule, x: Any) -> tuple[Any, Any, Any]:
    """What `rule.integer_codes(x)` returns, on a GPU by one kernel."""
    return pallas.integer_codes(rule, x)


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of arrays, as one program: else XLA compiles every operation of every shape."""
    return jax.jit(function)


def eagerly() -> Any:
    """A scope in which layers compute at once what they are called on, loops included."""
    return jax.disable_jit()


def where_traced() -> Any:
    """Equal at two places whose tensors may be used for each other; None: nowhere else."""
    return get_opaque_trace_state()


_COMBINE = {"sum": jax.lax.add, "max": jax.lax.max, "min": jax.lax.min}


def reduce_at_once(arrays: Sequence[Any], ways: Sequence[str], axis: int) -> Sequence[Any]:
    """Reduces float32 arrays of one shape along an axis, each by its way: "sum", "max" or "min"."""

    def combine(first: Sequence[Any], second: Sequence[Any]) -> list[Any]:
        return [_COMBINE[way](*pair) for way, *pair in zip(ways, first, second, strict=True)]

    if len(arrays) == 1:
        return [_chained(*arrays, *ways, axis)]
    starts = [jnp.asarray(NEUTRAL[way], "float32") for way in ways]
    return jax.lax.reduce(tuple(arrays), tuple(starts), combine, (axis,))


def _chained(array: Any, way: str, axis: int) -> Any:
    """A reduction along a short axis, element after element in registers."""
    before = (slice(None),) * axis
    made = functools.reduce(_COMBINE[way], [array[(*before, i)] for i in range(array.shape[axis])])
    # Changes nothing, but keeps the compiler from taking the chain apart for its own reduction.
    return jnp.where(jnp.isnan(made), jnp.nan, made)


def float32_matmul(x: Any, y: Any) -> Any:
    """A matrix product in float32 that keeps all digits of its operands, of one float dtype."""
    # Matrix units add up products of 16-bit numbers in float32 anyway.
    precision = jax.lax.Precision.HIGHEST if x.dtype.itemsize > 2 else None
    if x.ndim < y.ndim and jax.default_backend() == "cpu":
        # Else XLA's CPU backend multiplies all matrices as one, with a transpose before and after.
        x = jnp.broadcast_to(x, (*y.shape[:-2], *x.shape))
    return jnp.matmul(x, y, precision=precision, preferred_element_type="float32")


def rotation_side() -> int:
    """Of the largest matrix that rotations multiply by; additions do what is left of them."""
    # XLA's CPU backend takes half the time for 32 columns and two stages of additions.
    return 32 if jax.default_backend() == "cpu" else LARGEST


def convolve(
    x: Any, kernel: Any, strides: Sequence[int], dilation: Sequence[int], data_format: str
) -> Any:
    """A convolution without padding; groups follow from the channels, as in `keras.ops.conv`."""
    if jax.default_backend() != "cpu":
        return unpadded(x, kernel, strides, dilation, data_format)
    # XLA's CPU backend hands a convolution without any padding to a kernel that is up to six times
    # slower (jaxlib 0.10.2): one more row of outputs, cut off again, avoids it.
    channels, rank = (1 if data_format == "channels_first" else -1), len(strides)
    made = jax.lax.conv_general_dilated(
        x,
        kernel,
        strides,
        [(0, strides[0]), *[(0, 0)] * (rank - 1)],
        rhs_dilation=dilation,
        dimension_numbers=_dimension_numbers(rank, data_format),
        feature_group_count=x.shape[channels] // kernel.shape[-2],
    )
    axis = 2 if data_format == "channels_first" else 1
    return jax.lax.slice_in_dim(made, 0, made.shape[axis] - 1, axis=axis)


def _dimension_numbers(rank: int, data_format: str) -> jax.lax.ConvDimensionNumbers:
    last, space = rank + 1, tuple(range(rank))
    image = (0, last, *range(1, last)) if data_format == "channels_last" else tuple(range(rank + 2))
    return jax.lax.ConvDimensionNumbers(image, (last, rank, *space), image)
