"""Which elements share statistics: a tensor, a channel, or blocks along the contraction axis.

`Blocks` says it without knowing a shape; `Blocks.view(shape)` binds it to one. A view splits the
contraction axis in place, `(..., length, ...) -> (..., blocks, block, ...)`, so that reductions run
over whole axes and no transpose is needed unless several contraction axes lie apart.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from keras import ops

BlockSize = int | str

_PARTIAL_SUM = 128


def check_block_size(block_size: Any, name: str = "block_size") -> BlockSize:
    """Returns `block_size` or raises a `ValueError` that names the argument `name`."""
    if block_size in ("channel", "tensor"):
        return block_size
    is_integer = isinstance(block_size, (int, np.integer)) and not isinstance(block_size, bool)
    if not is_integer or block_size < 1:
        raise ValueError(
            f"`{name}` must be a positive integer, 'channel' or 'tensor'. "
            f"Received: {name}={block_size!r}"
        )
    return int(block_size)


@dataclass(frozen=True)
class Blocks:
    """Which elements of a tensor share one range and one dequantizer.

    Attributes:
        axes: contraction axes, in the order in which they are contracted; blocks run along them as
            if they were one axis.
        shared: further axes whose elements share statistics (the spatial axes of a convolution).
            Every other axis (batch, token, output channel) has statistics of its own.
        size: elements of the contraction axes in a block; "channel" for all of them, "tensor" for
            one block that holds the whole tensor. The last block is shorter where `size` does not
            divide the length.
    """

    axes: tuple[int, ...] = (-1,)
    shared: tuple[int, ...] = ()
    size: BlockSize = 128

    def view(self, shape: tuple[int | None, ...]) -> BlockView:
        """Binds the blocks to a tensor of `shape` (None where the size is not known).

        Raises:
            ValueError: if an axis lies outside the shape, is named twice, or if blocks must be
                counted along an axis of unknown size.
        """
        rank = len(shape)
        named = (*self.axes, *self.shared)
        if any(not -rank <= a < rank for a in named):
            raise ValueError(f"axis {named} lies outside a tensor of shape {tuple(shape)}.")
        axes = tuple(a % rank for a in self.axes)
        shared = tuple(a % rank for a in self.shared)
        if len({*axes, *shared}) != len(named):
            raise ValueError(f"axis {named} names an axis of shape {tuple(shape)} twice.")
        if self.size == "tensor":
            return BlockView(tuple(shape), tuple(range(rank)))
        whole = BlockView(tuple(shape), tuple(sorted((*axes, *shared))))
        if self.size == "channel":
            return whole
        merged = MergedAxes(tuple(shape), axes)
        if self.size >= merged.length:
            return whole
        return SplitView.create(merged, shared, self.size)

    @property
    def by_channel(self) -> Blocks:
        """The same axes with one block along the whole contraction."""
        return Blocks(self.axes, self.shared, "channel")


@dataclass(frozen=True)
class MergedAxes:
    """Several axes of a tensor seen as one, in the order given; the identity for a single axis."""

    shape: tuple[int | None, ...]
    axes: tuple[int, ...]

    @property
    def length(self) -> int:
        sizes = [self.shape[a] for a in self.axes]
        if None in sizes:
            raise ValueError(
                f"The contraction axes {self.axes} of a tensor of shape {self.shape} must have a "
                "known size. Give the model a fixed size on that axis, or use block_size='channel'."
            )
        return math.prod(sizes)

    @property
    def position(self) -> int:
        """Where the merged axis lies after `merge`."""
        first = self.axes[0]
        return sum(1 for a in range(first) if a not in self.axes)

    @property
    def _order(self) -> list[int]:
        rest = [a for a in range(len(self.shape)) if a not in self.axes]
        return [*rest[: self.position], *self.axes, *rest[self.position :]]

    @property
    def keeps_order(self) -> bool:
        """Whether merging is a reshape: no axis moves."""
        return self._order == sorted(self._order)

    def merge(self, x: Any) -> Any:
        """`(..., a, ..., b, ...) -> (..., a * b, ...)`."""
        if len(self.axes) == 1:
            return x
        if not self.keeps_order:
            x = ops.transpose(x, self._order)
        sizes = list(ops.shape(x))
        at = self.position
        return ops.reshape(x, [*sizes[:at], self.length, *sizes[at + len(self.axes) :]])

    def unmerge(self, x: Any) -> Any:
        """Inverse of `merge`."""
        if len(self.axes) == 1:
            return x
        sizes, at = list(ops.shape(x)), self.position
        x = ops.reshape(x, [*sizes[:at], *(self.shape[a] for a in self.axes), *sizes[at + 1 :]])
        return x if self.keeps_order else ops.transpose(x, list(np.argsort(self._order)))


@dataclass(frozen=True)
class BlockView:
    """A tensor whose blocks are whole axes: reductions with kept dimensions, nothing to reshape.

    Attributes:
        shape: of the tensor that is viewed.
        reduced: axes of the *split* tensor that lie inside a block.
    """

    shape: tuple[int | None, ...]
    reduced: tuple[int, ...]

    @property
    def split_shape(self) -> tuple[int | None, ...] | None:
        """Shape of the split tensor; None if it holds padding."""
        return self.shape

    @property
    def _laid_open(self) -> tuple[int | None, ...]:
        """Shape of the split tensor, padding included."""
        return self.shape

    @property
    def statistic_shape(self) -> tuple[int | None, ...]:
        """Shape of a statistic with one entry per block, reduced axes kept."""
        return tuple(1 if a in self.reduced else n for a, n in enumerate(self._laid_open))

    @property
    def extents(self) -> tuple[int, int, int] | None:
        """`(outer, block, inner)` if the split tensor, so reshaped, has its blocks on one axis.

        None where blocks do not lie on neighbouring axes, hold padding or have an unknown size.
        """
        shape, first, last = self.split_shape, self.reduced[0], self.reduced[-1]
        if shape is None or None in shape or len(self.reduced) != last - first + 1:
            return None
        parts = shape[:first], shape[first : last + 1], shape[last + 1 :]
        outer, block, inner = (math.prod(part) for part in parts)
        return outer, block, inner

    @property
    def keeps_order(self) -> bool:
        """Whether the split tensor has the elements of the tensor in the same row-major order."""
        return True

    @property
    def for_statistics(self) -> BlockView:
        """The view to take statistics with, if it is another one."""
        return self

    def split(self, x: Any) -> Any:
        """The tensor with its blocks laid open; padding is zero."""
        return x

    def merge(self, values: Any) -> Any:
        """Inverse of `split`."""
        return values

    def _or(self, values: Any, absent: float) -> Any:
        """`absent` where the split tensor holds padding, `values` elsewhere."""
        return values

    def present(self, values: Any) -> Any:
        """Zero where the split tensor holds padding, `values` elsewhere."""
        return self._or(values, 0.0)

    def mean(self, values: Any) -> Any:
        return self.mean_of_present(self.present(values))

    def mean_of_present(self, values: Any) -> Any:
        """The mean of values that are zero where the split tensor holds padding."""
        for axis in reversed(self.reduced):
            if values.shape[axis] != 1:
                values = _mean_along(values, axis)
        return values

    def at_once(self, *wanted: tuple[str, Any]) -> tuple[Any, ...]:
        """Statistics, "mean_of_present", "max" or "min" of values each, in one pass if possible."""
        return tuple(getattr(self, name)(values) for name, values in wanted)

    def magnitude(self, values: Any) -> Any:
        """The largest absolute value, of values that are zero in padding."""
        return ops.max(ops.abs(values), axis=self.reduced, keepdims=True)

    def max(self, values: Any) -> Any:
        return ops.max(self._or(values, -np.inf), axis=self.reduced, keepdims=True)

    def min(self, values: Any) -> Any:
        return ops.min(self._or(values, np.inf), axis=self.reduced, keepdims=True)

    def nearest(self, values: Any) -> Any:
        """The nearest whole numbers, halves to even ones."""
        return ops.round(values)

    def pivot(self, values: Any) -> Any:
        """A value of every block's own: statistics of differences from it lose fewer digits."""
        return values[
            tuple(
                slice(0, 1) if axis in self.reduced else slice(None)
                for axis in range(len(values.shape))
            )
        ]

    def statistic(self, values: Any) -> Any:
        """A statistic with one entry per block in place of the contraction axis."""
        return values


@dataclass(frozen=True)
class TileView(BlockView):
    """Whole blocks in a kernel's registers, along one axis that is padded to a power of two.

    Attributes:
        length: elements of a block; what lies beyond on the axis is padding.
    """

    length: int = field(kw_only=True)

    def _or(self, values: Any, absent: float) -> Any:
        (axis,) = self.reduced
        size = self.shape[axis]
        if size == self.length:
            return values
        index = ops.arange(size, dtype="int32")
        shape = [size if a == axis else 1 for a in range(len(self.shape))]
        return ops.where(ops.reshape(index, shape) < self.length, values, absent)

    def mean_of_present(self, values: Any) -> Any:
        total = ops.sum(values, axis=self.reduced, keepdims=True)
        return total * float(np.float32(1.0) / np.float32(self.length))

    def nearest(self, values: Any) -> Any:
        # Pallas has no rounding for GPU kernels. Float32 holds whole numbers alone at 1.5 * 2^23,
        # which, added and subtracted again as a constant, XLA would take for nothing.
        shift = values * 0.0 + 1.5 * 2.0**23
        return (values + shift) - shift

    def pivot(self, values: Any) -> Any:
        return self.mean_of_present(values)  # at hand, where a single element is not


def _mean_along(values: Any, axis: int) -> Any:
    """The mean along one axis, kept, as a mean of means where the axis is long.

    Quantized values are few and repeat, so that the rounding errors of one long sequential sum add
    up instead of cancelling: 2e-5 over the whole image on XLA's CPU backend, 7e-6 along a leading
    axis of 2048 in TensorFlow. Along the last axis sums are vectorized, and short enough.
    """
    length = values.shape[axis]
    is_last = axis == len(values.shape) - 1
    if is_last or length is None or length <= 2 * _PARTIAL_SUM or length % _PARTIAL_SUM:
        return ops.mean(values, axis=axis, keepdims=True)
    sizes = list(ops.shape(values))
    parts = [*sizes[:axis], length // _PARTIAL_SUM, _PARTIAL_SUM, *sizes[axis + 1 :]]
    partial = ops.mean(ops.reshape(values, parts), axis=axis + 1)
    return ops.mean(partial, axis=axis, keepdims=True)


@dataclass(frozen=True)
class SplitView(BlockView):
    """A view whose contraction axis is split into blocks, the last one possibly padded."""

    merged: MergedAxes = field(kw_only=True)
    blocks: int = field(kw_only=True)
    block: int = field(kw_only=True)

    @classmethod
    def create(cls, merged: MergedAxes, shared: tuple[int, ...], size: int) -> SplitView:
        at = merged.position
        # Where a shared axis lies once the contraction axes are merged and split in two.
        kept = [a for a in merged._order if a not in merged.axes]
        moved = [kept.index(a) + (2 if kept.index(a) >= at else 0) for a in shared]
        blocks = -(-merged.length // size)
        reduced = tuple(sorted((at + 1, *moved)))
        return cls(merged.shape, reduced, merged=merged, blocks=blocks, block=size)

    @property
    def _padding(self) -> int:
        return self.blocks * self.block - self.merged.length

    @property
    def split_shape(self) -> tuple[int | None, ...] | None:
        return None if self._padding else self._laid_open

    @property
    def _laid_open(self) -> tuple[int | None, ...]:
        kept = [self.shape[a] for a in self.merged._order if a not in self.merged.axes]
        at = self.merged.position
        return (*kept[:at], self.blocks, self.block, *kept[at:])

    @property
    def keeps_order(self) -> bool:
        return not self._padding and self.merged.keeps_order

    def _on_axes(self, array: np.ndarray) -> np.ndarray:
        """A (blocks, block) array placed so that it broadcasts against the split tensor."""
        rank = len(self.shape) - len(self.merged.axes) + 2
        at = self.merged.position
        return array.reshape([1] * at + list(array.shape) + [1] * (rank - at - 2))

    @property
    def _is_present(self) -> np.ndarray:
        flat = np.arange(self.blocks * self.block) < self.merged.length
        return self._on_axes(flat.reshape(self.blocks, self.block))

    def split(self, x: Any) -> Any:
        x = self.merged.merge(x)
        at = self.merged.position
        if self._padding:
            pads = [[0, 0] for _ in range(len(x.shape))]
            pads[at][1] = self._padding
            x = ops.pad(x, pads)
        sizes = list(ops.shape(x))
        return ops.reshape(x, [*sizes[:at], self.blocks, self.block, *sizes[at + 1 :]])

    def merge(self, values: Any) -> Any:
        at = self.merged.position
        sizes = list(ops.shape(values))
        values = ops.reshape(values, [*sizes[:at], self.blocks * self.block, *sizes[at + 2 :]])
        if self._padding:
            values = values[(slice(None),) * at + (slice(0, self.merged.length),)]
        return self.merged.unmerge(values)

    def _or(self, values: Any, absent: float) -> Any:
        return ops.where(self._is_present, values, absent) if self._padding else values

    def mean_of_present(self, values: Any) -> Any:
        mean = super().mean_of_present(values)
        if not self._padding:
            return mean
        # Padding counted as zeros; the last block has fewer elements than the others.
        lengths = self._is_present.sum(axis=self.merged.position + 1, keepdims=True)
        return ops.multiply(mean, (self.block / lengths).astype(np.float32))

    def statistic(self, values: Any) -> Any:
        return ops.squeeze(values, axis=self.merged.position + 1)
