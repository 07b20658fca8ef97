"""A value with a gradient that is known in closed form."""

from __future__ import annotations

from typing import Any

from keras import ops


def with_slopes(value: Any, *terms: tuple[Any, Any]) -> Any:
    """`value`, to the last bit, whose gradient to each tensor is what the caller says.

    With `sg` for "no gradient", `sg(value) + sum(sg(slope) * (tensor - sg(tensor)))`: the
    differences are zero and carry the gradient. Automatic differentiation of every backend then
    gives `upstream * slope`, summed to the shape of the tensor.

    Args:
        value: float tensor.
        terms: pairs of a tensor that broadcasts to `value` and the derivative of `value` to it.

    Returns:
        A tensor shaped like `value`.
    """
    value = ops.stop_gradient(value)
    for tensor, slope in terms:
        value = value + ops.stop_gradient(slope) * (tensor - ops.stop_gradient(tensor))
    return value
