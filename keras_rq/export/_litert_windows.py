"""What the kernel of a convolution sees, gathered with slices that XNNPACK runs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from keras_rq.export.interpreter import require

_MAX_CONCAT = 5  # as many tensors as XNNPACK concatenates at a time


class Window:
    """Which pixels a convolution with VALID padding sees."""

    def __init__(
        self,
        shape: tuple[int, ...],
        weight_shape: tuple[int, ...],
        strides: int | tuple[int, int],
        dilation: int | tuple[int, int],
        name: str,
    ):
        if len(shape) != 4 or shape[3] != weight_shape[2]:
            raise ValueError(
                f"`codes` of {name!r} must have the shape (batch, height, width, "
                f"{weight_shape[2]}), for a weight of shape {weight_shape}. Received: {shape}."
            )
        self.kernel = weight_shape[:2]
        self.strides = _pair(strides, "strides", name)
        self.dilation = _pair(dilation, "dilation", name)
        reach = [d * (k - 1) + 1 for k, d in zip(self.kernel, self.dilation, strict=True)]
        if reach[0] > shape[1] or reach[1] > shape[2]:
            raise ValueError(
                f"The kernel of {name!r} reaches over {tuple(reach)} pixels, but `codes` has "
                f"only {shape[1:3]}. Pad `codes` first: padding is always VALID here."
            )
        height = (shape[1] - reach[0]) // self.strides[0] + 1
        self.output_shape = (shape[0], height, (shape[2] - reach[1]) // self.strides[1] + 1)

    def columns(self, codes: Any) -> list[Any]:
        """Returns, as parts to be put side by side, the pixels that each kernel position meets.

        Gathers along the width first and then along the height, so a 3x3 kernel takes 3 + 3
        slices, not 9.
        """
        tf = require("tensorflow")
        starts = [range(0, k * d, d) for k, d in zip(self.kernel, self.dilation, strict=True)]
        _, height, width = self.output_shape
        across = _strided_slices(codes, 2, starts[1], width, self.strides[1])
        down = _strided_slices(concat(across), 1, starts[0], height, self.strides[0])
        return [tf.reshape(part, (-1, part.shape[-1])) for part in down]


def _strided_slices(
    tensor: Any, axis: int, starts: Sequence[int], count: int, stride: int
) -> list[Any]:
    """Returns `tensor[start : start + count * stride : stride]` along `axis`, for each start.

    XNNPACK has no strided slice, and one left to TFLite splits the delegated region in two. It
    does have reshapes and plain slices: with the axis split into (blocks, stride), one residue
    is a plain slice.
    """
    tf = require("tensorflow")
    shape = tensor.shape.as_list()
    blocks = max(starts) // stride + count
    tensor = resize(tensor, axis, blocks * stride)
    before, after = math.prod(shape[:axis]), math.prod(shape[axis + 1 :])
    target = (*shape[:axis], count, *shape[axis + 1 :])
    grid = tf.reshape(tensor, (before, blocks, stride, after))
    return [
        tf.reshape(
            tf.slice(grid, (0, start // stride, start % stride, 0), (before, count, 1, after)),
            target,
        )
        for start in starts
    ]


def resize(tensor: Any, axis: int, size: int) -> Any:
    """Cuts an axis to `size`, or fills it up with zeros that no kernel position meets."""
    tf = require("tensorflow")
    shape = tensor.shape.as_list()
    if shape[axis] > size:
        shape[axis] = size
        return tf.slice(tensor, (0,) * len(shape), shape)
    if shape[axis] < size:
        return tf.pad(tensor, [(0, size - n if i == axis else 0) for i, n in enumerate(shape)])
    return tensor


def concat(parts: Sequence[Any]) -> Any:
    """Joins along the last axis. XNNPACK concatenates at most five tensors at a time."""
    tf = require("tensorflow")
    parts = list(parts)
    while len(parts) > _MAX_CONCAT:
        parts[-_MAX_CONCAT:] = [tf.concat(parts[-_MAX_CONCAT:], axis=-1)]
    return tf.concat(parts, axis=-1) if len(parts) > 1 else parts[0]


def _pair(value: int | tuple[int, int], what: str, name: str) -> tuple[int, int]:
    pair = (value, value) if isinstance(value, int) else tuple(value)
    if len(pair) != 2 or min(pair) < 1:
        raise ValueError(
            f"`{what}` of {name!r} must be a positive integer or a pair of them. Received: {value}."
        )
    return pair
