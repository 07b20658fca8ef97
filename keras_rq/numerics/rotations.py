"""Block Hadamard rotation along the contraction axis.

A rotation of both operands leaves their product unchanged and makes their values look Gaussian,
which is what a uniform grid likes (QuEST, arXiv 2502.05003, section 3).
"""

from __future__ import annotations

import math
from typing import Any

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
    before, after = sizes[:at], sizes[at + 1 :]
    half = 1
    while half < size:
        # Sums and differences, not a matrix product: accelerators round the operands of those.
        pairs = ops.reshape(flat, [*before, merged.length // (2 * half), 2, half, *after])
        first, second = (pairs[(slice(None),) * (at + 1) + (i,)] for i in range(2))
        flat = ops.stack([first + second, first - second], axis=at + 1)
        half *= 2
    return merged.unmerge(ops.reshape(flat, sizes)) * (1.0 / math.sqrt(size))
