"""What a quantized layer becomes in a LiteRT graph: integer products and float corrections.

Activations are encoded by the very code that trains (`Quantizer.encode`). With integer codes `Q`,
`x~ = s_x Q_x + b_x`, `w~ = s_w Q_w + b_w` and the means `q`, `m` of a row's codes and values,

    x~ w~ = s_x (s_w Q_x Q_w - q s_w sum(Q_w)) + m c,    c = s_w sum(Q_w) + n b_w     (Theorem 1)

where the integer kernel multiplies by `s_w` itself and `c` is a constant. The windows of a
convolution have no mean of their own, nor have rows that share statistics or blocks that the other
operand cuts; there one more output channel returns `r = sum(Q_x)`, and

    x~ w~ = s_x (s_w Q_x Q_w + r b_w) + b_x c.

With blocks along the contraction the products of the blocks are summed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import keras
import numpy as np
from keras import ops

from keras_rq.export._litert_graph import IntegerGraph
from keras_rq.export.folding import Fold, multiplied
from keras_rq.export.interpreter import require
from keras_rq.layers.base import QuantizedLayer
from keras_rq.layers.products import (
    Convolution,
    Depthwise,
    Einsum,
    Lookup,
    Product,
    Spatial,
)
from keras_rq.layers.sharing import in_loop
from keras_rq.numerics import rotations
from keras_rq.numerics.blocks import Blocks, BlockView
from keras_rq.numerics.dequantizers import Line
from keras_rq.quantizers import Quantizer


@dataclass(frozen=True)
class Lowered:
    """How one product of a layer runs in an exported file.

    Attributes:
        path: of the layer, and the name of the kernel.
        kernel: "integer" or "float".
        reason: why it runs in float, where it does.
        alone: it can be run, and checked, by itself.
    """

    path: str
    kernel: str
    reason: str | None = None
    alone: bool = True


class Call(NamedTuple):
    """One product that a trace met: whose it is, its input, and how it was lowered."""

    layer: QuantizedLayer
    name: str
    product: Product
    shape: tuple[int, ...]
    dtype: str
    lowered: Lowered
    fold: Fold | None


class _Codes(NamedTuple):
    """Encoded activations: integers as float32, and lines with one block each on the last axis."""

    codes: Any
    line: Line
    view: BlockView


class _Constant(NamedTuple):
    """A quantized kernel in NumPy."""

    codes: np.ndarray
    scale: np.ndarray
    offset: np.ndarray
    line: Line
    view: BlockView
    rotated: bool


class _Master(NamedTuple):
    """A float kernel, and what belongs to it: all in NumPy, all of one shape.

    A kernel is laid out anew for the operator that multiplies it. What its quantizer keeps for it
    goes along, each parameter spread over the elements that share it, and so does the factor of the
    quantized kernel, if there is one (see `keras_rq.export.folding`).
    """

    kernel: np.ndarray
    parameters: dict[str, np.ndarray]
    factor: np.ndarray | None

    def map(self, change: Callable[[np.ndarray], np.ndarray]) -> _Master:
        """All after a change of layout."""
        changed = {name: change(spread) for name, spread in self.parameters.items()}
        factor = None if self.factor is None else change(self.factor)
        return _Master(change(self.kernel), changed, factor)

    @property
    def in_float(self) -> np.ndarray:
        """The kernel that is multiplied where it is not quantized."""
        return self.kernel if self.factor is None else self.kernel * self.factor


def _master(layer: QuantizedLayer, name: str, product: Product, fold: Fold | None) -> _Master:
    with outside_trace():
        kernel = ops.convert_to_numpy(layer.kernel_to_quantize(name))
        given, spread = layer.kernel_parameters(name), {}
        if given:
            view = product.kernel_blocks(layer.quantization.weights).view(kernel.shape)
            like = ops.zeros_like(view.split(ops.convert_to_tensor(kernel)))
            spread = {k: ops.convert_to_numpy(view.merge(like + v)) for k, v in given.items()}
    folded = fold is not None and fold.name == name
    return _Master(kernel, spread, np.broadcast_to(fold.factor, kernel.shape) if folded else None)


def _constant(quantizer: Quantizer, master: _Master, blocks: Blocks) -> _Constant:
    with outside_trace():
        view = blocks.view(master.kernel.shape)
        given = {
            name: view.pivot(view.split(ops.convert_to_tensor(spread)))
            for name, spread in master.parameters.items()
        }
        tensor = quantizer.quantize(master.kernel, blocks, given)
        line = [None if part is None else ops.convert_to_numpy(part) for part in tensor.line]
        codes = ops.convert_to_numpy(tensor.codes)
        tensor = replace(tensor, codes=codes, line=Line(*line))
        if master.factor is not None:
            tensor = multiplied(tensor, master.factor, _nominal(quantizer.bits))
        parts = [ops.convert_to_numpy(part) for part in tensor]
    return _Constant(*parts, tensor.line, tensor.view, tensor.rotated)


# An integer product: codes, weight codes, scale per output channel -> float.
_Kernel = Callable[[Any, np.ndarray, np.ndarray], Any]


class Lowering:
    """Computes the products of one quantized layer while a TensorFlow function is traced."""

    def __init__(
        self, graph: IntegerGraph, layer: QuantizedLayer, calls: list[Call], fold: Fold | None
    ) -> None:
        self.graph, self.layer, self.calls, self.fold = graph, layer, calls, fold
        self.given: dict[str, np.ndarray] = {}  # what the quantizer of the input keeps

    def __call__(self, name: str, product: Product, x: Any) -> Any:
        """Stands in for the product of `x` and the kernel called `name`."""
        label = f"{self.layer.path}/{name}"
        if in_loop():
            return self._in_loop(name, product, x, label)
        reason = self._reason_for_float(product)
        lowered = Lowered(label, "float" if reason else "integer", reason)
        self._note(name, product, x, lowered)
        kernel = _master(self.layer, name, product, self.fold)
        with outside_trace():
            self.given = {
                key: ops.convert_to_numpy(value)
                for key, value in self.layer.input_parameters(name).items()
            }
        if isinstance(product, Depthwise) and self._codes_on_both_sides(product):
            return self._spatial(product, x, kernel, label, self._depthwise)
        if product.is_matmul:
            matmul = self._matmul if reason is None else self._matmul_in_float
            matrix, restore = product.input_as_matrix(x, kernel.kernel.shape)
            return restore(matmul(matrix, kernel.map(product.kernel_as_matrix), label))
        if reason is None:
            return self._spatial(product, x, kernel, label, self._convolution)
        return self._in_float(product, x, kernel, label)

    def _note(self, name: str, product: Product, x: Any, lowered: Lowered) -> None:
        dtype = keras.backend.standardize_dtype(x.dtype)
        shape = tuple(x.shape)
        self.calls.append(Call(self.layer, name, product, shape, dtype, lowered, self.fold))

    def _in_loop(self, name: str, product: Product, x: Any, label: str) -> Any:
        """The product as it is trained, from constants: the markers of integer weights lie outside.

        The body of a loop is traced more than once, for one entry in the report.
        """
        reason = "it lies in a loop over time steps; its weights are stored as float32"
        lowered = Lowered(label, "float", reason, alone=False)
        if all(call.lowered != lowered for call in self.calls):
            self._note(name, product, x, lowered)
        q = self.layer.quantization
        with outside_trace():
            kernel = self.layer.float32_kernel(name)
            if q.weights is not None:
                kernel = q.weights.fake_quantize(kernel, product.kernel_blocks(q.weights))
            kernel = ops.convert_to_numpy(kernel)
        if q.activations is not None and product.input_axes:
            x = q.activations.fake_quantize(x, product.input_blocks(q.activations))
        return product.apply(x, ops.convert_to_tensor(kernel))

    def _reason_for_float(self, product: Product) -> str | None:
        q = self.layer.quantization
        if isinstance(product, Lookup):
            return "a lookup multiplies nothing"
        if q.weights is None or q.activations is None:
            return "only one of its two operands is quantized"
        if q.weights.rotation != q.activations.rotation:
            return "its operands are not rotated alike"
        if product.is_matmul:
            return None
        if isinstance(product, Einsum):
            return f"the einsum {product.equation!r} is no plain matrix product"
        if isinstance(product, Depthwise):
            return "LiteRT has no exact integer kernel for depthwise convolutions"
        if not isinstance(product, Convolution) or len(product.strides) > 2:
            return "LiteRT has no integer kernel for this kind of convolution"
        return None if product.groups == 1 else "LiteRT has no kernel for grouped convolutions"

    # Integer products.

    def _matmul(self, x: Any, kernel: _Master, label: str) -> Any:
        """`(..., K) x (K, N)`."""
        weights = self.layer.quantization.weights
        activations = self.layer.quantization.activations
        bits = _nominal(weights.bits)
        return self._sum_of_products(
            self._encode(x, activations.input_blocks((-1,))),
            _constant(weights, kernel, weights.blocks((0,))),
            lambda codes, weight, scale: self.graph.matmul(codes, weight, scale, bits, label),
        )

    def _spatial(
        self, product: Spatial, x: Any, kernel: _Master, label: str, run: Callable[..., Any]
    ) -> Any:
        """Calls `run` on `(batch, height, width, channels)`; one dimension is a row of two."""
        rank, last = len(product.strides), product.data_format == "channels_last"
        x = x if last else ops.moveaxis(x, 1, -1)
        strides, dilation = product.strides, product.dilation
        if rank == 1:
            x, kernel = ops.expand_dims(x, 1), kernel.map(lambda array: array[None])
            strides, dilation = (1, *strides), (1, *dilation)
        geometry = {"strides": strides, "dilation": dilation, "name": label}
        y = run(x, kernel, geometry)
        y = ops.squeeze(y, 1) if rank == 1 else y
        return y if last else ops.moveaxis(y, -1, 1)

    def _convolution(self, x: Any, kernel: _Master, geometry: dict[str, Any]) -> Any:
        weights = self.layer.quantization.weights
        activations = self.layer.quantization.activations
        bits = _nominal(weights.bits)
        return self._sum_of_products(
            self._encode(x, activations.input_blocks((3,), (1, 2), convolution=True)),
            _constant(weights, kernel, weights.blocks((2,), (0, 1), convolution=True)),
            lambda codes, weight, scale: self.graph.conv2d(codes, weight, scale, bits, **geometry),
        )

    def _codes_on_both_sides(self, product: Depthwise) -> bool:
        q = self.layer.quantization
        quantized = q.weights is not None and q.activations is not None
        return quantized and not (q.weights.rotation or q.activations.rotation)

    def _depthwise(self, x: Any, kernel: _Master, geometry: dict[str, Any]) -> Any:
        """Float arithmetic on integer codes, which is exact: see `IntegerGraph`."""
        weights = self.layer.quantization.weights
        activations = self.layer.quantization.activations
        bits = _nominal(weights.bits)
        blocks = activations.input_blocks((3,), (1, 2), convolution=True)
        codes, line, _ = self._encode(x, _whole(blocks))
        w = _constant(weights, kernel, _whole(weights.blocks((0, 1), convolution=True)))
        weight, s_w, b_w = w.codes, w.scale, w.offset
        channels = weight.shape[-2] * weight.shape[-1]
        s_w, b_w = (np.broadcast_to(a, (1, 1, *weight.shape[2:])).reshape(-1) for a in (s_w, b_w))
        y = self.graph.depthwise_conv2d(codes, weight, s_w, bits, **geometry)
        if np.any(b_w):
            geometry = {**geometry, "name": geometry["name"] + "/sums"}
            ones = np.ones(1, np.float32)
            y = y + b_w * self.graph.depthwise_conv2d(
                codes, np.ones_like(weight), ones, bits, **geometry
            )
        y = line.scale * y
        if line.offset is None:
            return y
        sums = weight.sum(axis=(0, 1), dtype=np.int64).reshape(channels) * s_w.astype(np.float64)
        return y + line.offset * (sums + weight.shape[0] * weight.shape[1] * b_w).astype(np.float32)

    def _sum_of_products(self, x: _Codes, w: _Constant, kernel: _Kernel) -> Any:
        length, columns = w.codes.shape[-2:]
        block = getattr(x.view, "block", length)
        pieces = list(_pieces(x.view, w.view, length))
        parts = _split(x.codes, [stop - start for start, stop in pieces])
        lines = _lines_of_blocks(x.line)
        total = None
        for (start, stop), codes in zip(pieces, parts, strict=True):
            line = lines[start // block if len(lines) > 1 else 0]
            if (start % block, stop) != (0, min(start + block, length)) or _rows_share(line, codes):
                line = Line(line.scale, line.offset)  # its means are not those of these codes
            weight = w.codes[..., start:stop, :]
            line_w = [
                np.broadcast_to(_of_block(stat, w.view, start), columns)
                for stat in (w.scale, w.offset)
            ]
            term = _corrected(codes, line, weight, *line_w, kernel)
            total = term if total is None else total + term
        return total

    def _encode(self, x: Any, blocks: Blocks) -> _Codes:
        quantizer = self.layer.quantization.activations
        x = ops.cast(x, "float32")
        if quantizer.rotation is not None:
            x = rotations.hadamard(x, blocks.axes, self._by_signs)
        view = blocks.view(tuple(x.shape))
        codes, line = quantizer.codes_and_line(x, view, blocks, self.given)
        codes = view.merge(codes)
        multiplier = quantizer.grid.code_multiplier
        if multiplier != 1:
            codes, line = codes * float(multiplier), line.for_multiplied_codes(multiplier)
        return _Codes(codes, Line(*(s if s is None else view.statistic(s) for s in line)), view)

    def _by_signs(self, x: Any, matrix: Any) -> Any:
        """`(..., n) x (n, n)` of the Hadamard matrix, as one FULLY_CONNECTED.

        XNNPACK runs it; the sums and differences of the fast transform, one by one, it does not.
        The file holds the signs once for each length, as INT8, which are unpacked on loading.
        """
        tf, length = require("tensorflow"), x.shape[-1]
        codes, name = rotations.signs(length).astype(np.int8), f"{self.layer.path}/rotation"
        signs = self.graph.constant(codes, np.ones(1, np.float32), None, 8, 0, name)
        return tf.reshape(tf.matmul(tf.reshape(x, (-1, length)), signs, transpose_b=True), x.shape)

    # Float products on quantized operands.

    def _matmul_in_float(self, x: Any, kernel: _Master, label: str) -> Any:
        """`(..., K) x (K, N)`, with the kernel stored as (N, K).

        That makes it a FULLY_CONNECTED. In the other layout the converter makes a BATCH_MATMUL
        and drops a ReLU that follows (TensorFlow 2.21).
        """
        tf, q = require("tensorflow"), self.layer.quantization
        if q.activations is not None:
            x = self._fake_quantize(x, q.activations.input_blocks((-1,)))
        if q.weights is None:
            return ops.matmul(x, ops.convert_to_tensor(kernel.in_float))
        tensor = _constant(q.weights, kernel.map(np.transpose), q.weights.blocks((1,)))
        values = self._stored_as_integers(tensor, _nominal(q.weights.bits), label)
        if tensor.rotated:
            values = rotations.hadamard(values, (1,))
        rows = tf.reshape(x, (-1, kernel.kernel.shape[0]))
        return tf.reshape(tf.matmul(rows, values, transpose_b=True), (*x.shape[:-1], -1))

    def _in_float(self, product: Product, x: Any, kernel: _Master, label: str) -> Any:
        """The product as it is trained, with the kernel stored as integers in the file."""
        q = self.layer.quantization
        if q.activations is not None and product.input_axes:
            blocks = product.input_blocks(q.activations)
            x = self._fake_quantize(x, blocks)
        if q.weights is None:
            return product.apply(x, ops.convert_to_tensor(kernel.in_float))
        blocks = product.kernel_blocks(q.weights)
        tensor = _constant(q.weights, kernel, blocks)
        values = self._stored_as_integers(tensor, _nominal(q.weights.bits), label)
        if tensor.rotated:
            values = rotations.hadamard(values, blocks.axes)
        return product.apply(x, values)

    def _fake_quantize(self, x: Any, blocks: Blocks) -> Any:
        quantizer = self.layer.quantization.activations
        if not self.given:
            return quantizer.fake_quantize(x, blocks)
        # Without what carries the gradient, for which files have no operators.
        x = quantizer.rotate(ops.cast(x, "float32"), blocks)
        view = blocks.view(tuple(x.shape))
        codes, line = quantizer.codes_and_line(x, view, blocks, self.given)
        return quantizer.rotate(view.merge(line(codes)), blocks)

    def _stored_as_integers(self, tensor: _Constant, bits: float, label: str) -> Any:
        """A float constant that the file holds as integer codes."""
        codes, line, view = tensor.codes, tensor.line, tensor.view
        scale, offset = line.scale, line.offset
        varying = [a for a, size in enumerate(scale.shape) if size > 1]
        if len(varying) <= 1 and len(scale.shape) == codes.ndim:
            axis = varying[0] if varying else codes.ndim - 1
            flat = None if offset is None else offset.reshape(-1)
            return self.graph.constant(codes, scale.reshape(-1), flat, bits, axis, label)
        ones = np.ones(1, np.float32)
        unpacked = self.graph.constant(codes, ones, None, bits, codes.ndim - 1, label)
        return view.merge(line(view.split(unpacked)))


def _whole(blocks: Blocks) -> Blocks:
    """Those of a depthwise convolution, which has no blocks within its channels."""
    return blocks if blocks.size == "tensor" else blocks.by_channel


def _corrected(
    codes: Any, line: Line, weight: np.ndarray, s_w: np.ndarray, b_w: np.ndarray, kernel: _Kernel
) -> Any:
    """One block: the integer product and its corrections (module docstring)."""
    axes = tuple(range(weight.ndim - 1))
    sums = weight.sum(axis=axes, dtype=np.int64) * s_w.astype(np.float64)
    totals = (sums + weight[..., 0].size * b_w).astype(np.float32)
    if weight.ndim == 2 and line.code_mean is not None:
        product = kernel(codes, weight, s_w) - line.code_mean * sums.astype(np.float32)
        return line.scale * product + line.value_mean * totals
    if np.any(b_w):
        # One more output channel sums the codes that each output sees.
        summing = np.concatenate([weight, np.ones_like(weight[..., :1])], axis=-1)
        products, code_sums = _split(
            kernel(codes, summing, np.append(s_w, np.float32(1))), [s_w.size, 1]
        )
        y = line.scale * (products + code_sums * b_w)
    else:
        y = line.scale * kernel(codes, weight, s_w)
    return y if line.offset is None else y + line.offset * totals


def _rows_share(line: Line, codes: Any) -> bool:
    return tuple(line.scale.shape[:-1]) != tuple(codes.shape[:-1])


def _split(x: Any, sizes: list[int]) -> list[Any]:
    return [x] if len(sizes) == 1 else require("tensorflow").split(x, sizes, axis=-1)


def _lines_of_blocks(line: Line) -> list[Line]:
    """One line per block, from lines with the blocks on their last axis."""
    blocks = line.scale.shape[-1]
    parts = [[None] * blocks if s is None else _split(s, [1] * blocks) for s in line]
    return [Line(*stats) for stats in zip(*parts, strict=True)]


def _pieces(x: BlockView, w: BlockView, length: int) -> Iterator[tuple[int, int]]:
    """Ranges of the contraction axis within which neither operand changes its block."""
    sizes = {min(getattr(view, "block", length), length) for view in (x, w)}
    starts = sorted({start for size in sizes for start in range(0, length, size)})
    return zip(starts, [*starts[1:], length], strict=True)


def _of_block(statistic: np.ndarray, view: BlockView, start: int) -> np.ndarray:
    """Of a kernel's statistic, blocks on the axis before the last: that of the block at `start`."""
    index = start // view.block if statistic.shape[-2] > 1 else 0
    return statistic[..., index, :].reshape(-1)


def _nominal(bits: int | float | str) -> float:
    return 4 if bits == "fp4" else bits


def outside_trace() -> Any:
    """A scope in which TensorFlow computes now, though a function is being traced."""
    return require("tensorflow").init_scope()
