"""What a quantized layer becomes in a LiteRT graph: integer products and float corrections.

Activations are encoded by the very code that trains (`Quantizer.encode`). With integer codes `Q`,
`x~ = s_x Q_x + b_x` and `w~ = s_w Q_w + b_w`, Theorem 1 is used in the form

    x~ w~ = s_x (s_w Q_x Q_w + r b_w) + b_x c,    r = sum(Q_x),  c = s_w sum(Q_w) + n b_w

where the integer kernel multiplies by `s_w` itself and returns `r` as one more output channel, and
`c` is a constant. With blocks along the contraction the products of the blocks are summed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from keras import ops

from keras_rq.export._litert_graph import IntegerGraph
from keras_rq.layers.base import QuantizedLayer
from keras_rq.layers.products import (
    Convolution,
    Depthwise,
    Einsum,
    Lookup,
    MatMul,
    Product,
    Spatial,
)
from keras_rq.numerics import rotations
from keras_rq.numerics.blocks import Blocks, BlockView
from keras_rq.quantizers import Quantizer
from keras_rq.quantizers.tensor import QuantizedTensor


@dataclass(frozen=True)
class Lowered:
    """How one product of a layer runs in an exported file.

    Attributes:
        path: of the layer, and the name of the kernel.
        kernel: "integer" or "float".
        reason: why it runs in float, where it does.
    """

    path: str
    kernel: str
    reason: str | None = None


class _Codes(NamedTuple):
    """Encoded activations: integers as float32, and one line per block on the last axis."""

    codes: Any
    scale: Any
    offset: Any
    view: BlockView


# An integer product: codes, weight codes, scale per output channel -> float.
_Kernel = Callable[[Any, np.ndarray, np.ndarray], Any]


class Lowering:
    """Computes the products of one quantized layer while a TensorFlow function is traced."""

    def __init__(self, graph: IntegerGraph, layer: QuantizedLayer, log: list[Lowered]) -> None:
        self.graph, self.layer, self.log = graph, layer, log

    def __call__(self, name: str, product: Product, x: Any) -> Any:
        """Stands in for the product of `x` and the kernel called `name`."""
        label = f"{self.layer.path}/{name}"
        reason = self._reason_for_float(product)
        self.log.append(Lowered(label, "float" if reason else "integer", reason))
        kernel = ops.convert_to_numpy(self.layer.float32_kernel(name))
        if isinstance(product, Depthwise) and self._codes_on_both_sides(product):
            return self._spatial(product, x, kernel, label, self._depthwise)
        if reason is not None:
            return self._in_float(product, x, kernel, label)
        if isinstance(product, Convolution):
            return self._spatial(product, x, kernel, label, self._convolution)
        if isinstance(product, Einsum):
            x, kernel, restore = product.as_matmul(x, ops.convert_to_tensor(kernel))
            return restore(self._matmul(x, ops.convert_to_numpy(kernel), label))
        return self._matmul(x, kernel, label)

    def _reason_for_float(self, product: Product) -> str | None:
        q = self.layer.quantization
        if isinstance(product, Lookup):
            return "a lookup multiplies nothing"
        if q.weights is None or q.activations is None:
            return "only one of its two operands is quantized"
        if q.weights.rotation != q.activations.rotation:
            return "its operands are not rotated alike"
        if isinstance(product, MatMul) or (isinstance(product, Einsum) and product.is_matmul):
            return None
        if isinstance(product, Einsum):
            return f"the einsum {product.equation!r} is no plain matrix product"
        if isinstance(product, Depthwise):
            return "LiteRT has no exact integer kernel for depthwise convolutions"
        if not isinstance(product, Convolution) or len(product.strides) > 2:
            return "LiteRT has no integer kernel for this kind of convolution"
        return None if self.layer.groups == 1 else "LiteRT has no kernel for grouped convolutions"

    # Integer products.

    def _matmul(self, x: Any, kernel: np.ndarray, label: str) -> Any:
        """`(..., K) x (K, N)`."""
        weights = self.layer.quantization.weights
        activations = self.layer.quantization.activations
        bits = _nominal(weights.bits)
        return self._sum_of_products(
            self._encode(x, activations.blocks((-1,))),
            weights.quantize(kernel, weights.blocks((0,))),
            lambda codes, weight, scale: self.graph.matmul(codes, weight, scale, bits, label),
        )

    def _spatial(
        self, product: Spatial, x: Any, kernel: np.ndarray, label: str, run: Callable[..., Any]
    ) -> Any:
        """Calls `run` on `(batch, height, width, channels)`; one dimension is a row of two."""
        rank, last = len(product.strides), product.data_format == "channels_last"
        x = x if last else ops.moveaxis(x, 1, -1)
        strides, dilation = product.strides, product.dilation
        if rank == 1:
            x, kernel = ops.expand_dims(x, 1), kernel[None]
            strides, dilation = (1, *strides), (1, *dilation)
        geometry = {"strides": strides, "dilation": dilation, "name": label}
        y = run(x, kernel, geometry)
        y = ops.squeeze(y, 1) if rank == 1 else y
        return y if last else ops.moveaxis(y, -1, 1)

    def _convolution(self, x: Any, kernel: np.ndarray, geometry: dict[str, Any]) -> Any:
        weights = self.layer.quantization.weights
        activations = self.layer.quantization.activations
        bits = _nominal(weights.bits)
        return self._sum_of_products(
            self._encode(x, activations.blocks((3,), (1, 2), convolution=True)),
            weights.quantize(kernel, weights.blocks((2,), (0, 1), convolution=True)),
            lambda codes, weight, scale: self.graph.conv2d(codes, weight, scale, bits, **geometry),
        )

    def _codes_on_both_sides(self, product: Depthwise) -> bool:
        q = self.layer.quantization
        quantized = q.weights is not None and q.activations is not None
        return quantized and not (q.weights.rotation or q.activations.rotation)

    def _depthwise(self, x: Any, kernel: np.ndarray, geometry: dict[str, Any]) -> Any:
        """Float arithmetic on integer codes, which is exact: see `IntegerGraph`."""
        weights = self.layer.quantization.weights
        activations = self.layer.quantization.activations
        bits = _nominal(weights.bits)
        codes, s_x, b_x, _ = self._encode(x, Blocks((3,), (1, 2), _whole(activations)))
        w = weights.quantize(kernel, Blocks((0, 1), (), _whole(weights)))
        weight, s_w, b_w = (ops.convert_to_numpy(part) for part in w)
        channels = weight.shape[-2] * weight.shape[-1]
        s_w, b_w = (np.broadcast_to(a, (1, 1, *weight.shape[2:])).reshape(-1) for a in (s_w, b_w))
        y = self.graph.depthwise_conv2d(codes, weight, s_w, bits, **geometry)
        if np.any(b_w):
            geometry = {**geometry, "name": geometry["name"] + "/sums"}
            ones = np.ones(1, np.float32)
            y = y + b_w * self.graph.depthwise_conv2d(
                codes, np.ones_like(weight), ones, bits, **geometry
            )
        y = s_x * y
        if b_x is None:
            return y
        sums = weight.sum(axis=(0, 1), dtype=np.int64).reshape(channels) * s_w.astype(np.float64)
        return y + b_x * (sums + weight.shape[0] * weight.shape[1] * b_w).astype(np.float32)

    def _sum_of_products(self, x: _Codes, w: QuantizedTensor, kernel: _Kernel) -> Any:
        codes_w, scale_w, offset_w = (ops.convert_to_numpy(part) for part in w)
        length, columns = codes_w.shape[-2:]
        total = None
        for start, stop in _pieces(x.view, w.view, length):
            part = codes_w[..., start:stop, :]
            s_w, b_w = (
                np.broadcast_to(_of_block(stat, w.view, start).reshape(-1), columns)
                for stat in (scale_w, offset_w)
            )
            s_x, b_x = (
                None if stat is None else _of_block(ops.expand_dims(stat, -1), x.view, start)
                for stat in (x.scale, x.offset)
            )
            whole = stop - start == length
            codes = x.codes if whole else x.codes[..., start:stop]
            term = _corrected(codes, part, (s_x, b_x), (s_w, b_w), kernel)
            total = term if total is None else total + term
        return total

    def _encode(self, x: Any, blocks: Blocks) -> _Codes:
        quantizer = self.layer.quantization.activations
        x = ops.cast(x, "float32")
        if quantizer.rotation is not None:
            x = rotations.hadamard(x, blocks.axes)
        view = blocks.view(tuple(x.shape))
        encoding = quantizer.encode(x, view, blocks)
        codes, (scale, offset) = view.merge(encoding.codes), encoding.line
        multiplier = quantizer.grid.code_multiplier
        if multiplier != 1:
            codes, scale = codes * float(multiplier), scale * (1.0 / multiplier)
        offset = None if offset is None else view.statistic(offset)
        return _Codes(codes, view.statistic(scale), offset, view)

    # Float products on quantized operands.

    def _in_float(self, product: Product, x: Any, kernel: np.ndarray, label: str) -> Any:
        """The product as it is trained, with the kernel stored as integers in the file."""
        q = self.layer.quantization
        if q.activations is not None and product.input_axes:
            x = q.activations.fake_quantize(x, product.input_blocks(q.activations))
        if q.weights is None:
            return product.apply(x, ops.convert_to_tensor(kernel))
        blocks = product.kernel_blocks(q.weights)
        tensor = q.weights.quantize(kernel, blocks)
        values = self._stored_as_integers(tensor, _nominal(q.weights.bits), label)
        if tensor.rotated:
            values = rotations.hadamard(values, blocks.axes)
        return product.apply(x, values)

    def _stored_as_integers(self, tensor: QuantizedTensor, bits: float, label: str) -> Any:
        """A float constant that the file holds as integer codes."""
        codes, (scale, offset), view = ops.convert_to_numpy(tensor.codes), tensor.line, tensor.view
        scale = ops.convert_to_numpy(scale)
        varying = [a for a, size in enumerate(scale.shape) if size > 1]
        if len(varying) <= 1 and len(scale.shape) == codes.ndim:
            axis = varying[0] if varying else codes.ndim - 1
            flat = None if offset is None else ops.convert_to_numpy(offset).reshape(-1)
            return self.graph.constant(codes, scale.reshape(-1), flat, bits, axis, label)
        ones = np.ones(1, np.float32)
        unpacked = self.graph.constant(codes, ones, None, bits, codes.ndim - 1, label)
        return view.merge(tensor.line(view.split(unpacked)))


def _whole(quantizer: Quantizer) -> str:
    return "tensor" if quantizer.block_size == "tensor" else "channel"


def _corrected(
    codes: Any,
    weight: np.ndarray,
    line_x: tuple[Any, Any],
    line_w: tuple[np.ndarray, np.ndarray],
    kernel: _Kernel,
) -> Any:
    """One block: the integer product and its two rank-1 corrections (module docstring)."""
    (s_x, b_x), (s_w, b_w) = line_x, line_w
    if np.any(b_w):
        # One more output channel sums the codes that each output sees.
        summing = np.concatenate([weight, np.ones_like(weight[..., :1])], axis=-1)
        products = kernel(codes, summing, np.append(s_w, np.float32(1)))
        sums = products[..., -1:]
        y = s_x * (products[..., :-1] + sums * b_w)
    else:
        y = s_x * kernel(codes, weight, s_w)
    if b_x is None:
        return y
    axes = tuple(range(weight.ndim - 1))
    count = weight[..., 0].size
    column_sums = weight.sum(axis=axes, dtype=np.int64) * s_w.astype(np.float64) + count * b_w
    return y + b_x * column_sums.astype(np.float32)


def _pieces(x: BlockView, w: BlockView, length: int) -> Iterator[tuple[int, int]]:
    """Ranges of the contraction axis within which neither operand changes its block."""
    sizes = {min(getattr(view, "block", length), length) for view in (x, w)}
    starts = sorted({start for size in sizes for start in range(0, length, size)})
    return zip(starts, [*starts[1:], length], strict=True)


def _of_block(statistic: Any, view: BlockView, start: int) -> Any:
    """The statistic, with its blocks on the axis before the last, of the block at `start`."""
    if statistic.shape[-2] == 1:
        return statistic[..., 0, :]
    return statistic[..., start // view.block, :]


def _nominal(bits: int | float | str) -> float:
    return 4 if bits == "fp4" else bits
