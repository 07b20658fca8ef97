"""Random signs without a random state: they are drawn from the tensors at hand.

A quantizer is a pure function of its operands: a generator's state would be updated inside the call
of a layer, which rematerialisation under JAX does not survive. Here the bits of an element, its
place and the bits of a key that changes from step to step (a parameter in training) go through an
integer hash. The signs are the same on every backend, in a recomputed forward pass and in a resumed
run.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from keras import ops

# Odd constants that spread neighbouring integers: the golden ratio for places, and those of the
# 32-bit finalizer "lowbias32" (C. Wellons, https://nullprogram.com/blog/2018/07/31/).
_PLACE = 0x9E3779B9
_FIRST, _SECOND = 0x7FEB352D, 0x846CA68B


def random_halves(values: Any, key: Any) -> Any:
    """-1/2 or 1/2 for every element, as if drawn at random.

    Args:
        values: float32 tensor of rank 1 or more.
        key: float32 tensor that broadcasts to it.

    Returns:
        float32, shaped like `values`.

    Example:

    >>> import numpy as np
    >>> halves = random_halves(np.zeros(6, "float32"), np.float32(0.5))
    >>> [float(v) for v in halves]
    [0.5, -0.5, 0.5, -0.5, -0.5, 0.5]
    """
    values = ops.stop_gradient(ops.convert_to_tensor(values, dtype="float32"))
    key = ops.stop_gradient(ops.convert_to_tensor(key, dtype="float32"))
    mixed = ops.bitwise_xor(_places(values), _mixed(ops.view(key, dtype="int32")))
    mixed = _mixed(ops.bitwise_xor(ops.view(values, dtype="int32"), _mixed(mixed)))
    return ops.where(mixed < 0, -0.5, 0.5)


def _places(values: Any) -> Any:
    """An integer for every place: in row-major order where all sizes are known."""
    rank, total, stride = len(values.shape), None, 1
    sizes = ops.shape(values)
    for axis in reversed(range(rank)):
        along = ops.arange(sizes[axis], dtype="int32") * (np.int32(1) * stride)
        along = ops.reshape(along, [-1 if a == axis else 1 for a in range(rank)])
        total = along if total is None else total + along
        stride = stride * sizes[axis]
    return total * _int32(_PLACE)


def _mixed(bits: Any) -> Any:
    """The finalizer: every bit of the result depends on every bit of an int32."""
    bits = ops.bitwise_xor(bits, _shifted(bits, 16)) * _int32(_FIRST)
    bits = ops.bitwise_xor(bits, _shifted(bits, 15)) * _int32(_SECOND)
    return ops.bitwise_xor(bits, _shifted(bits, 16))


def _shifted(bits: Any, by: int) -> Any:
    """A logical shift to the right: zeros come in, not the sign."""
    return ops.bitwise_and(
        ops.bitwise_right_shift(bits, np.int32(by)), np.int32(2 ** (32 - by) - 1)
    )


def _int32(value: int) -> np.int32:
    return np.uint32(value).astype(np.int32)
