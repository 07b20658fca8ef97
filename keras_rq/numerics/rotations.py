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
_TOGETHER = 4  # lines that a stage adds up: fewer take more passes, more are fused badly by XLA


def check_rotation(rotation: Any) -> str | None:
    """Returns `rotation` or raises a `ValueError` that lists what is accepted."""
    if rotation not in (None, "hadamard"):
        raise ValueError(f"`rotation` must be None or 'hadamard'. Received: rotation={rotation!r}")
    return rotation


def rotation_size(length: int) -> int:
    """Width of the rotated blocks: the largest power of two, up to 128, that divides `length`."""
    return min(LARGEST, length & -length)


def hadamard(
    x: Any,
    axes: tuple[int, ...],
    product: Callable[[Any, Any], Any] | None = None,
    side: int = LARGEST,
) -> Any:
    """Rotates blocks of the contraction axis by the orthonormal, symmetric Hadamard matrix.

    Args:
        x: float tensor of any float dtype.
        axes: contraction axes, as in `Blocks.axes`.
        product: a matrix product in float32 that keeps all digits of its operands. It replaces
            the sums and differences of the fast transform, which take a pass over the tensor
            each; on accelerators the matrix units do it.
        side: of the largest matrix that `product` is given, a power of two; sums and differences
            do what is left of a rotation.

    Returns:
        A float32 tensor shaped like `x`. Applied twice it gives `x` back.
    """
    merged = MergedAxes(tuple(x.shape), tuple(a % len(x.shape) for a in axes))
    size = rotation_size(merged.length)
    if size == 1:
        return ops.cast(x, "float32")
    x, at, done = merged.merge(x), merged.position, 1
    sizes = list(ops.shape(x))
    if product is not None:
        done = min(size, side)
        x = ops.reshape(_by_product(product, x, at, done), sizes)
    x = _by_sums(x, at, done, size) * (1.0 / math.sqrt(size))
    return merged.unmerge(ops.reshape(x, sizes))


def _by_product(product: Callable[[Any, Any], Any], x: Any, at: int, size: int) -> Any:
    # Signs are exact in any dtype, so that a 16-bit tensor need not be widened first.
    matrix = ops.cast(ops.convert_to_tensor(signs(size)), x.dtype)
    sizes = list(ops.shape(x))
    if at == len(sizes) - 1:
        return product(ops.reshape(x, [*sizes[:at], x.shape[at] // size, size]), matrix)
    inner = math.prod(x.shape[at + 1 :]) if None not in x.shape[at + 1 :] else -1
    return product(matrix, ops.reshape(x, [*sizes[:at], x.shape[at] // size, size, inner]))


@functools.cache
def signs(size: int) -> np.ndarray:
    """The Hadamard matrix of a power of two: float32 ones and minus ones, its own transpose."""
    matrix = np.ones((1, 1))
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix.astype(np.float32)


def _by_sums(x: Any, at: int, done: int, size: int) -> Any:
    """The stages of the fast transform from lines of `done` elements to lines of `size`."""
    # In float32: sums of float16 values overflow.
    x, sizes, length = ops.cast(x, "float32"), list(ops.shape(x)), x.shape[at]
    before, after = sizes[:at], sizes[at + 1 :]
    while done < size:
        count = min(_TOGETHER, size // done)
        parts = ops.reshape(x, [*before, length // (count * done), count, done, *after])
        lines = [parts[(slice(None),) * (at + 1) + (slice(i, i + 1),)] for i in range(count)]
        x = ops.concatenate(transformed(lines), axis=at + 1)
        done *= count
    return x


def transformed(lines: list[Any]) -> list[Any]:
    """Sums and differences of some lines, a power of two of them: a small transform."""
    if len(lines) == 1:
        return lines
    half = len(lines) // 2
    pairs = list(zip(transformed(lines[:half]), transformed(lines[half:]), strict=True))
    return [a + b for a, b in pairs] + [a - b for a, b in pairs]
