"""Block Hadamard rotation along the contraction axis.

A rotation of both operands leaves their product unchanged and makes their values look Gaussian,
which is what a uniform grid likes (QuEST, arXiv 2502.05003, section 3).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
from keras import ops

from keras_rq.numerics.blocks import MergedAxes

LARGEST = 128


def check_rotation(rotation: Any) -> str | None:
    """Returns `rotation` or raises a `ValueError` that lists what is accepted."""
    if rotation not in (None, "hadamard"):
        raise ValueError(f"`rotation` must be None or 'hadamard'. Received: rotation={rotation!r}")
    return rotation


def rotation_size(length: int) -> int:
    """Width of the rotated blocks: the largest power of two, up to 128, that divides `length`."""
    return min(LARGEST, length & -length)


def hadamard(
    x: Any, axes: tuple[int, ...], product: Callable[[Any, Any], Any] | None = None
) -> Any:
    """Rotates blocks of the contraction axis by the orthonormal, symmetric Hadamard matrix.

    Args:
        x: float tensor of any float dtype.
        axes: contraction axes, as in `Blocks.axes`.
        product: a matrix product in float32 that keeps all digits of its operands. It replaces
            the sums and differences of the fast transform, which take a pass over the tensor
            each: twice as fast on CPUs, and on accelerators the matrix units do it.

    Returns:
        A float32 tensor shaped like `x`. Applied twice it gives `x` back.
    """
    merged = MergedAxes(tuple(x.shape), tuple(a % len(x.shape) for a in axes))
    size = rotation_size(merged.length)
    if size == 1:
        return ops.cast(x, "float32")
    flat = merged.merge(x)
    sizes = list(ops.shape(flat))
    rotate = _by_sums if product is None else functools.partial(_by_product, product)
    return merged.unmerge(ops.reshape(rotate(flat, merged.position, size), sizes))


def _by_product(product: Callable[[Any, Any], Any], x: Any, at: int, size: int) -> Any:
    # Signs are exact in any dtype, so that a 16-bit tensor need not be widened first.
    matrix = ops.cast(ops.convert_to_tensor(signs(size)), x.dtype)
    sizes = list(ops.shape(x))
    if at == len(sizes) - 1:
        made = product(ops.reshape(x, [*sizes[:at], x.shape[at] // size, size]), matrix)
    else:
        inner = math.prod(x.shape[at + 1 :]) if None not in x.shape[at + 1 :] else -1
        made = product(matrix, ops.reshape(x, [*sizes[:at], x.shape[at] // size, size, inner]))
    return made * (1.0 / math.sqrt(size))


@functools.cache
def signs(size: int) -> np.ndarray:
    """The Hadamard matrix of a power of two: float32 ones and minus ones, its own transpose."""
    matrix = np.ones((1, 1))
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix.astype(np.float32)


def _by_sums(x: Any, at: int, size: int) -> Any:
    # In float32: sums of float16 values overflow.
    x, sizes, length = ops.cast(x, "float32"), list(ops.shape(x)), x.shape[at]
    before, after = sizes[:at], sizes[at + 1 :]
    half = 1
    while half < size:
        pairs = ops.reshape(x, [*before, length // (2 * half), 2, half, *after])
        first, second = (pairs[(slice(None),) * (at + 1) + (i,)] for i in range(2))
        x = ops.stack([first + second, first - second], axis=at + 1)
        half *= 2
    return x * (1.0 / math.sqrt(size))
