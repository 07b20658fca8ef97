"""The products that layers compute, as descriptions: which axes contract, and how to run them.

A layer quantizes both operands block by block along the contraction and hands them to its product.
Training runs `apply` on the dequantized operands; reports and lowering read the fields.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from keras import ops

from keras_rq import backend
from keras_rq.numerics.blocks import Blocks
from keras_rq.numerics.rotations import rotation_size
from keras_rq.quantizers import Quantizer

Shape = tuple[int | None, ...]


@dataclass(frozen=True)
class Product:
    """What an input is multiplied with, and along which axes.

    Attributes:
        input_axes: contraction axes of the input, as in `Blocks.axes`.
        input_shared: axes of the input that share statistics with them.
        kernel_axes: contraction axes of the kernel, in the same order.
        kernel_shared: axes of the kernel that share statistics with them.
    """

    input_axes: tuple[int, ...]
    input_shared: tuple[int, ...]
    kernel_axes: tuple[int, ...]
    kernel_shared: tuple[int, ...]

    is_convolution = False
    is_matmul = False  # whether it is a product of two matrices, but for the order of axes
    can_block = True  # whether integer block sizes make sense for the contraction

    def input_blocks(self, quantizer: Quantizer) -> Blocks:
        """Which elements of the input share statistics."""
        return self._blocks(quantizer.input_blocks, self.input_axes, self.input_shared)

    def kernel_blocks(self, quantizer: Quantizer) -> Blocks:
        """Which elements of the kernel share statistics."""
        return self._blocks(quantizer.blocks, self.kernel_axes, self.kernel_shared)

    def _blocks(
        self, of: Callable[..., Blocks], axes: tuple[int, ...], shared: tuple[int, ...]
    ) -> Blocks:
        blocks = of(axes, shared, convolution=self.is_convolution)
        return blocks if self.can_block or blocks.size == "tensor" else blocks.by_channel

    def apply(self, x: Any, kernel: Any) -> Any:
        """The product of two float operands."""
        raise NotImplementedError

    def columns(self, axis: int, rank: int, kernel_shape: Shape) -> Shape | None:
        """The shape in which a vector along an axis of the output broadcasts against the kernel.

        Args:
            axis: of the output.
            rank: of the output.
            kernel_shape: of the kernel.

        Returns:
            The shape; None where that axis is not one of the kernel alone.
        """
        return None

    def shares_rotation(self, kernel_shape: Shape) -> bool:
        """Whether operands that are both rotated have the product of the operands as they were."""
        return bool(self.input_axes)  # the same axes of the same sizes, in the same order

    def restore_zeros(self, x: Any, quantized: Any) -> Any:
        """What of a quantized first operand `x` enters the product."""
        return quantized

    def positions(self, input_shape: Shape, output_shape: Shape) -> int | None:
        """How often each kernel element is used per sample; None if that is unknown."""
        return None if output_shape is None else _count(output_shape[1:-1])

    def multiplications(self, x_shape: Shape, y_shape: Shape) -> int | None:
        """Of two activations, per sample; None if a size is unknown."""
        raise NotImplementedError


@dataclass(frozen=True)
class MatMul(Product):
    """`(..., K) x (K, N)`."""

    input_axes: tuple[int, ...] = (-1,)
    input_shared: tuple[int, ...] = ()
    kernel_axes: tuple[int, ...] = (0,)
    kernel_shared: tuple[int, ...] = ()

    is_matmul = True

    def apply(self, x: Any, kernel: Any) -> Any:
        return ops.matmul(x, kernel)

    def columns(self, axis: int, rank: int, kernel_shape: Shape) -> Shape | None:
        return _only(kernel_shape, (1,)) if axis % rank == rank - 1 else None

    def kernel_as_matrix(self, kernel: Any) -> Any:
        """The kernel as `(K, N)`."""
        return kernel

    def input_as_matrix(self, x: Any, kernel_shape: Shape) -> tuple[Any, Callable[[Any], Any]]:
        """The input as `(..., K)`, and what makes the layer's output of the product `(..., N)`."""
        return x, lambda product: product

    def multiplications(self, x_shape: Shape, y_shape: Shape) -> int | None:
        lead = max(x_shape[:-2], y_shape[:-2], key=len)  # the other one is broadcast
        return _count([*lead[1:], *x_shape[-2:], *y_shape[-1:]])


@dataclass(frozen=True)
class Einsum(Product):
    """A product of an input and a kernel in Einstein notation."""

    equation: str = ""

    @classmethod
    def create(cls, equation: str, input_rank: int) -> Einsum:
        """Finds the axes: a letter of both operands that the output lacks is contracted."""
        operands, output = equation.replace(" ", "").split("->")
        x, kernel = operands.split(",")
        x = _expand_ellipsis(x, input_rank)
        contracted = [letter for letter in kernel if letter in x and letter not in output]
        return cls(
            tuple(x.index(letter) for letter in contracted),
            (),
            tuple(kernel.index(letter) for letter in contracted),
            (),
            equation,
        )

    def apply(self, x: Any, kernel: Any) -> Any:
        return ops.einsum(self.equation, x, kernel)

    def columns(self, axis: int, rank: int, kernel_shape: Shape) -> Shape | None:
        operands, output = self.equation.replace(" ", "").split("->")
        x, kernel = operands.split(",")
        letter = _expand_ellipsis(output, rank)[axis]
        is_alone = letter in kernel and letter not in x
        return _only(kernel_shape, (kernel.index(letter),)) if is_alone else None

    @property
    def is_matmul(self) -> bool:
        """Whether every letter is either contracted or of the output and one operand alone."""
        x, kernel, output = self._labels(0)
        contracted = {kernel[a] for a in self.kernel_axes}
        free_x, free_kernel = set(x) - contracted, set(kernel) - contracted
        return not free_x & free_kernel and free_x | free_kernel == set(output)

    def kernel_as_matrix(self, kernel: Any) -> Any:
        """The kernel as `(K, N)`, only where `is_matmul`.

        Contracted letters are merged in their order in the kernel, as blocks run.
        """
        free = [a for a in range(len(kernel.shape)) if a not in self.kernel_axes]
        length = math.prod(kernel.shape[a] for a in self.kernel_axes)
        if isinstance(kernel, np.ndarray):
            return kernel.transpose((*self.kernel_axes, *free)).reshape(length, -1)
        return ops.reshape(ops.transpose(kernel, (*self.kernel_axes, *free)), (length, -1))

    def input_as_matrix(self, x: Any, kernel_shape: Shape) -> tuple[Any, Callable[[Any], Any]]:
        """The input as `(..., K)`, and what makes the equation's output of the product `(..., N)`.

        Only where `is_matmul`.
        """
        labels_x, labels_kernel, output = self._labels(len(x.shape))
        contracted = [labels_kernel[a] for a in self.kernel_axes]
        free_x = [letter for letter in labels_x if letter not in contracted]
        free_kernel = [letter for letter in labels_kernel if letter not in contracted]
        x = ops.transpose(x, [labels_x.index(letter) for letter in (*free_x, *contracted)])
        lead = tuple(ops.shape(x))[: len(free_x)]
        columns = tuple(kernel_shape[labels_kernel.index(letter)] for letter in free_kernel)
        order = [(*free_x, *free_kernel).index(letter) for letter in output]

        def restore(product: Any) -> Any:
            return ops.transpose(ops.reshape(product, (*lead, *columns)), order)

        length = math.prod(kernel_shape[a] for a in self.kernel_axes)
        return ops.reshape(x, (*lead, length)), restore

    def multiplications(self, x_shape: Shape, y_shape: Shape) -> int | None:
        x, y, _ = self._labels(len(x_shape))
        sizes = dict(zip(x, x_shape, strict=True)) | dict(zip(y, y_shape, strict=True))
        return _count([size for letter, size in sizes.items() if letter != x[0]])

    def _labels(self, input_rank: int) -> tuple[str, str, str]:
        operands, output = self.equation.replace(" ", "").split("->")
        x, kernel = operands.split(",")
        expanded = _expand_ellipsis(x, input_rank)
        fill = "".join(letter for letter in expanded if letter not in x)
        return expanded, kernel, output.replace("...", fill)

    def positions(self, input_shape: Shape, output_shape: Shape) -> int | None:
        # Of the input: a layer may leave sizes of its output open, as attention does.
        x, kernel, _ = self._labels(len(input_shape))
        if len(x) != len(input_shape):
            return None  # the product is not of the layer's input
        sizes = dict(zip(x, input_shape, strict=True))
        return _count([sizes[letter] for letter in x[1:] if letter not in kernel])


def _expand_ellipsis(labels: str, rank: int) -> str:
    if "..." not in labels:
        return labels
    missing = max(rank - (len(labels) - 3), 0)
    return labels.replace("...", "".join(chr(ord("α") + i) for i in range(missing)))


@dataclass(frozen=True)
class Spatial(Product):
    """Common to convolutions: the geometry. The input comes padded; no border is added."""

    strides: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    data_format: str = "channels_last"

    is_convolution = True

    def columns(self, axis: int, rank: int, kernel_shape: Shape) -> Shape | None:
        channels = rank - 1 if self.data_format == "channels_last" else 1
        return _only(kernel_shape, self._output_axes) if axis % rank == channels else None

    @property
    def _output_axes(self) -> tuple[int, ...]:
        """Axes of the kernel that make the channels of the output."""
        return (len(self.strides) + 1,)

    def positions(self, input_shape: Shape, output_shape: Shape) -> int | None:
        return self._pixels(output_shape)

    def _pixels(self, shape: Shape) -> int | None:
        return _count(shape[1:-1] if self.data_format == "channels_last" else shape[2:])

    @staticmethod
    def input_layout(rank: int, data_format: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The channel axis, and the spatial axes that share statistics with it."""
        if data_format == "channels_last":
            return (rank + 1,), tuple(range(1, rank + 1))
        return (1,), tuple(range(2, rank + 2))


@dataclass(frozen=True)
class Convolution(Spatial):
    """Kernel (spatial..., input channels / groups, filters)."""

    groups: int = 1

    @classmethod
    def create(
        cls,
        rank: int,
        strides: tuple[int, ...],
        dilation: tuple[int, ...],
        data_format: str,
        groups: int = 1,
    ) -> Convolution:
        axes, shared = cls.input_layout(rank, data_format)
        geometry = (tuple(strides), tuple(dilation), data_format)
        return cls(axes, shared, (rank,), tuple(range(rank)), *geometry, groups)

    def shares_rotation(self, kernel_shape: Shape) -> bool:
        channels = kernel_shape[self.kernel_axes[0]]  # of one group; the input is rotated whole
        return rotation_size(channels) == rotation_size(channels * self.groups)

    def apply(self, x: Any, kernel: Any) -> Any:
        return backend.convolve(x, kernel, self.strides, self.dilation, self.data_format)


@dataclass(frozen=True)
class Depthwise(Spatial):
    """Kernel (spatial..., channels, multiplier): the contraction runs over the spatial axes."""

    can_block = False

    @classmethod
    def create(
        cls,
        rank: int,
        strides: tuple[int, ...],
        dilation: tuple[int, ...],
        data_format: str,
    ) -> Depthwise:
        axes, shared = cls.input_layout(rank, data_format)
        return cls(
            axes, shared, tuple(range(rank)), (), tuple(strides), tuple(dilation), data_format
        )

    @property
    def _output_axes(self) -> tuple[int, ...]:
        return len(self.strides), len(self.strides) + 1

    def shares_rotation(self, kernel_shape: Shape) -> bool:
        return False  # the kernel is rotated along space, the input along channels

    def apply(self, x: Any, kernel: Any) -> Any:
        return ops.depthwise_conv(
            x,
            kernel,
            strides=self.strides,
            padding="valid",
            data_format=self.data_format,
            dilation_rate=self.dilation,
        )


@dataclass(frozen=True)
class TransposedConvolution(Spatial):
    """Kernel (spatial..., filters, input channels); padding crops the output, not the input."""

    padding: str = "valid"
    output_padding: Any = None

    @classmethod
    def create(
        cls,
        rank: int,
        strides: tuple[int, ...],
        dilation: tuple[int, ...],
        data_format: str,
        padding: str,
        output_padding: Any,
    ) -> TransposedConvolution:
        axes, shared = cls.input_layout(rank, data_format)
        geometry = (tuple(strides), tuple(dilation), data_format, padding, output_padding)
        return cls(axes, shared, (rank + 1,), tuple(range(rank)), *geometry)

    @property
    def _output_axes(self) -> tuple[int, ...]:
        return (len(self.strides),)

    def apply(self, x: Any, kernel: Any) -> Any:
        return ops.conv_transpose(
            x,
            kernel,
            strides=list(self.strides),
            padding=self.padding,
            output_padding=self.output_padding,
            data_format=self.data_format,
            dilation_rate=self.dilation,
        )

    def positions(self, input_shape: Shape, output_shape: Shape) -> int | None:
        return self._pixels(input_shape)  # every input element meets the whole kernel


@dataclass(frozen=True)
class Lookup(Product):
    """Rows of a table: nothing is multiplied; blocks run along each row."""

    input_axes: tuple[int, ...] = ()
    input_shared: tuple[int, ...] = ()
    kernel_axes: tuple[int, ...] = (-1,)
    kernel_shared: tuple[int, ...] = ()

    def apply(self, x: Any, kernel: Any) -> Any:
        return ops.take(kernel, x, axis=0)

    def positions(self, input_shape: Shape, output_shape: Shape) -> int | None:
        return 0


@dataclass(frozen=True)
class ReversedLookup(Product):
    """`(..., K) x (N, K)`: every row of a table is multiplied; blocks run along each row."""

    input_axes: tuple[int, ...] = (-1,)
    input_shared: tuple[int, ...] = ()
    kernel_axes: tuple[int, ...] = (-1,)
    kernel_shared: tuple[int, ...] = ()

    is_matmul = True

    def shares_rotation(self, kernel_shape: Shape) -> bool:
        return False  # the rows are looked up as well, and would have to be rotated back

    def apply(self, x: Any, kernel: Any) -> Any:
        return ops.matmul(x, ops.transpose(kernel))

    def kernel_as_matrix(self, kernel: Any) -> Any:
        """The kernel as `(K, N)`."""
        return kernel.T if isinstance(kernel, np.ndarray) else ops.transpose(kernel)

    def input_as_matrix(self, x: Any, kernel_shape: Shape) -> tuple[Any, Callable[[Any], Any]]:
        """The input as `(..., K)`, and what makes the layer's output of the product `(..., N)`."""
        return x, lambda product: product

    def positions(self, input_shape: Shape, output_shape: Shape) -> int | None:
        return _count(input_shape[1:])  # of indices: as often as rows are looked up


@dataclass(frozen=True)
class KernelOnly(Product):
    """A kernel that a layer multiplies by means of its own; the other operand stays in float."""

    input_axes: tuple[int, ...] = ()
    input_shared: tuple[int, ...] = ()
    kernel_axes: tuple[int, ...] = (0,)
    kernel_shared: tuple[int, ...] = ()

    @classmethod
    def create(cls, axes: Any) -> KernelOnly:
        """Takes the contracted axes of the kernel: an int or several."""
        axes = (axes,) if isinstance(axes, int) else tuple(axes)
        if not axes or not all(type(axis) is int for axis in axes):
            raise ValueError("axes must be whole numbers")
        return cls(kernel_axes=axes)


@dataclass(frozen=True)
class OfUnknownLength(Product):
    """A product along an axis whose length may be unknown, such as that of keys.

    There is one block along that axis, and nothing is rotated: that needs no length.

    Attributes:
        product: the product.
        keep_zeros: zeros of the first operand are zeros still when it is quantized: a masked key
            has no weight, whatever the quantizer makes of the smallest one.
    """

    product: Product
    keep_zeros: bool = False

    can_block = False

    @classmethod
    def create(cls, product: Product, keep_zeros: bool = False) -> OfUnknownLength:
        """Takes the axes of the product."""
        axes = (product.input_axes, product.input_shared)
        return cls(*axes, product.kernel_axes, product.kernel_shared, product, keep_zeros)

    def apply(self, x: Any, kernel: Any) -> Any:
        return self.product.apply(x, kernel)

    def shares_rotation(self, kernel_shape: Shape) -> bool:
        return False

    def restore_zeros(self, x: Any, quantized: Any) -> Any:
        return ops.where(x == 0, ops.zeros_like(x), quantized) if self.keep_zeros else quantized

    def multiplications(self, x_shape: Shape, y_shape: Shape) -> int | None:
        return self.product.multiplications(x_shape, y_shape)


def _only(shape: Shape, axes: tuple[int, ...]) -> Shape:
    """A shape with all axes but some of size 1."""
    return tuple(size if axis in axes else 1 for axis, size in enumerate(shape))


def _count(sizes: Sequence[int | None]) -> int | None:
    return None if None in sizes else math.prod(sizes)
