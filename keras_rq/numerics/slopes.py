"""A value with a gradient that is known in closed form."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from keras import ops
from keras.src.backend.common import global_state

_FORWARD_ONLY = "keras_rq_forward_only"


@contextmanager
def forward_only() -> Iterator[None]:
    """A scope whose caller asks for no gradients: values are the same, and slopes are not made.

    Compiled programs drop slopes that nobody uses. Operations that run one by one take most of
    their time for them.
    """
    before = global_state.get_global_attribute(_FORWARD_ONLY)
    global_state.set_global_attribute(_FORWARD_ONLY, True)
    try:
        yield
    finally:
        global_state.set_global_attribute(_FORWARD_ONLY, before)


def is_forward_only() -> bool:
    """Whether a scope of `forward_only` is around."""
    return bool(global_state.get_global_attribute(_FORWARD_ONLY))


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
