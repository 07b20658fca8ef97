"""Block Hadamard rotation along the contraction axis.

A rotation of both operands leaves their product unchanged and makes their values look Gaussian,
which is what a uniform grid likes (QuEST, arXiv 2502.05003, section 3).
"""

from __future__ import annotations

import functools
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


def hadamard(x: Any, axes: tuple[int, ...]) -> Any:
    """Rotates blocks of the contraction axis by the orthonormal, symmetric Hadamard matrix.

    Args:
        x: float tensor.
        axes: contraction axes, as in `Blocks.axes`.

    Returns:
        A tensor shaped like `x`. Applied twice it gives `x` back.
    """
    merged = MergedAxes(tuple(x.shape), tuple(a % len(x.shape) for a in axes))
    size = rotation_size(merged.length)
    if size == 1:
        return x
    flat = merged.merge(x)
    at, sizes = merged.position, list(ops.shape(flat))
    blocks = ops.reshape(flat, [*sizes[:at], merged.length // size, size, *sizes[at + 1 :]])
    matrix = ops.cast(_matrix(size), x.dtype)
    rotated = ops.tensordot(blocks, matrix, axes=[[at + 1], [0]])
    if at + 2 < len(blocks.shape):
        rotated = ops.moveaxis(rotated, -1, at + 1)
    return merged.unmerge(ops.reshape(rotated, sizes))


@functools.cache
def _matrix(size: int) -> np.ndarray:
    matrix = np.ones((1, 1))
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return (matrix / np.sqrt(size)).astype(np.float32)
