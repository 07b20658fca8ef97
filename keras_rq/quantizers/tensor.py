"""A quantized tensor: integer codes and one line per block, and what they take to store."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from keras import ops

from keras_rq import backend
from keras_rq.numerics import packing, rotations
from keras_rq.numerics.blocks import BlockView
from keras_rq.numerics.dequantizers import Line
from keras_rq.numerics.grids import Grid


def rotate(x: Any, axes: tuple[int, ...]) -> Any:
    """The block Hadamard rotation, its own inverse, in the backend's way; the result is float32."""
    return rotations.hadamard(x, axes, backend.float32_matmul, backend.rotation_side())


@dataclass(frozen=True, eq=False)
class QuantizedTensor:
    """Integer codes with a scale and an offset per block; unpacks to `(codes, scale, offset)`.

    Attributes:
        codes: int8, shaped like the tensor. FP4 codes are stored doubled.
        line: scale and offset of every block, float32, split like the view.
        view: which elements share them.
        axes: the contraction axes.
        grid: which codes exist.
        rotated: whether the codes are those of the rotated tensor.
        sparse: whether zeros are stored as a bit mask.
    """

    codes: Any
    line: Line
    view: BlockView
    axes: tuple[int, ...]
    grid: Grid
    rotated: bool = False
    sparse: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.codes.shape)

    @property
    def scale(self) -> Any:
        """float32, with one entry per block in place of the contraction axis."""
        return self.view.statistic(self.line.scale)

    @property
    def offset(self) -> Any:
        """Like `scale`; zeros where the dequantizer is linear."""
        if self.line.offset is None:
            return ops.zeros_like(self.scale)
        return self.view.statistic(self.line.offset)

    def __iter__(self) -> Iterator[Any]:
        return iter((self.codes, self.scale, self.offset))

    def dequantize(self) -> Any:
        """The float32 tensor that the codes stand for."""
        codes = self.view.split(ops.cast(self.codes, "float32"))
        values = self.view.merge(self.line(codes))
        return rotate(values, self.axes) if self.rotated else values

    def packed(self) -> dict[str, np.ndarray]:
        """The arrays that storage needs: packed codes, a mask if sparse, scales and offsets."""
        codes = ops.convert_to_numpy(self.codes).reshape(-1)
        arrays = {"scale": ops.convert_to_numpy(self.line.scale).astype(np.float32)}
        if self.line.offset is not None and self.grid.affine:  # that of a mid-rise grid is known
            arrays["offset"] = ops.convert_to_numpy(self.line.offset).astype(np.float32)
        if self.sparse:
            arrays["mask"] = np.packbits(codes != 0, bitorder="little")
            codes = codes[codes != 0]
        levels = len(self.grid.codes)
        arrays["codes"] = packing.pack_indices(self.grid.to_index(codes), levels)
        return arrays

    @property
    def nbytes(self) -> int:
        """Bytes of all packed arrays together."""
        return sum(array.nbytes for array in self.packed().values())

    @property
    def bits_per_element(self) -> float:
        """Stored bits over elements: codes, mask, scales and offsets."""
        return 8.0 * self.nbytes / int(np.prod(self.shape))

    def __repr__(self) -> str:
        return (
            f"QuantizedTensor(shape={self.shape}, bits={self.grid.bits!r}, "
            f"blocks={tuple(self.scale.shape)}, bits_per_element={self.bits_per_element:.3f})"
        )
