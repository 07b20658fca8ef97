"""What becomes of BatchNormalization in a file: a factor of quantized kernels, and a bias.

The codes of a kernel stay those of training. Per channel, `g = gamma / sqrt(variance + epsilon)`
multiplies its scale and offset; where `g` is negative the codes are negated, because integer
kernels take positive scales only. What is left of the normalization is added after the product.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_rq.export._litert_checks import storage_bits
from keras_rq.layers import folding
from keras_rq.layers.base import QuantizedLayer, is_quantized
from keras_rq.numerics.blocks import BlockView
from keras_rq.numerics.dequantizers import Line
from keras_rq.quantizers.tensor import QuantizedTensor


@dataclass(frozen=True, eq=False)
class Fold:
    """What a file does to one kernel beside quantizing it.

    Attributes:
        layer: whose last product it is.
        name: of the kernel.
        factor: float32, broadcasts against the kernel: what its values are multiplied with once
            they are quantized.
        norm: the BatchNormalization that is folded into the layer; None if a kernel that was
            trained for one is exported without it.
        gain: float32 vector: `g` of every channel; ones without `norm`.
        shift: float32 vector: what is added to the product; None without `norm`.
    """

    layer: QuantizedLayer
    name: str
    factor: np.ndarray
    norm: Any
    gain: np.ndarray
    shift: np.ndarray | None

    def scaled(self, y: np.ndarray) -> np.ndarray:
        """`gain` times what the product gives in the model."""
        if self.norm is None:
            return y
        return y * self.gain.reshape(self._along(y.ndim))

    def _along(self, rank: int) -> list[int]:
        """The shape of a vector along the channels; converters fuse a bias only if it is flat."""
        after = rank - 1 - self.norm.axis % rank
        return [-1, *[1] * after]


def folds_of(model: keras.layers.Layer) -> dict[int, Fold]:
    """All kernels of a model that a file multiplies, by the id of the layer."""
    norms = folding.find(model).norms
    found = {}
    for layer in model._flatten_layers():
        if not is_quantized(layer):
            continue
        norm = norms.get(id(layer))
        if norm is not None or layer.quantization.fold_batch_norm:
            fold = _fold(layer, norm)
            if fold is not None:
                found[id(layer)] = fold
    return found


def _fold(layer: QuantizedLayer, norm: Any) -> Fold | None:
    name, product = list(layer.products().items())[-1]
    trained = layer.fold_of(name)
    trained = 1.0 if trained is None else ops.convert_to_numpy(trained).astype(np.float64)
    if norm is None:
        return Fold(layer, name, (1.0 / trained).astype(np.float32), None, np.ones(1), None)
    gain, shift = _affine(norm, layer.bias)
    shape = product.columns(norm.axis, norm.input_spec.ndim, tuple(getattr(layer, name).shape))
    factor = (gain.reshape(shape) / trained).astype(np.float32)
    return Fold(layer, name, factor, norm, gain.astype(np.float32), shift.astype(np.float32))


def _affine(norm: Any, bias: Any) -> tuple[np.ndarray, np.ndarray]:
    """`g` and `g (bias - mean) + beta`, float64."""
    gamma, beta, mean, variance = (
        None if value is None else ops.convert_to_numpy(value).astype(np.float64)
        for value in (norm.gamma, norm.beta, norm.moving_mean, norm.moving_variance)
    )
    gain = 1.0 / np.sqrt(variance + norm.epsilon)
    if gamma is not None:
        gain = gain * gamma
    if bias is not None:
        mean = mean - np.ravel(ops.convert_to_numpy(bias))
    return gain, (0.0 if beta is None else beta) - gain * mean


def summary(model: keras.layers.Layer) -> tuple[tuple[str, ...], dict[str, str]]:
    """Paths of the normalizations that are folded; those of others, and why they are not."""
    layers = [layer for layer in model._flatten_layers() if is_quantized(layer)]
    if not layers:
        return (), {}
    pairs = folding.find(model)
    folded = tuple(pairs.norms[id(layer)].path for layer in layers if id(layer) in pairs.norms)
    reasons = {norm.path: reason for norm, reason in pairs.reasons}
    reasons |= {
        norm.path: "the layer before it stays in float"
        for norm in pairs.norms.values()
        if norm.path not in folded
    }
    return folded, reasons


@contextmanager
def without_norms(folds: dict[int, Fold]) -> Iterator[None]:
    """Within, folded normalizations add what is left of them, and biases before them are off."""
    with ExitStack() as stack:
        for fold in folds.values():
            if fold.norm is not None:
                stack.enter_context(_instead(fold.layer, "bias", None))
                stack.enter_context(_instead(fold.norm, "call", _adding(fold)))
        yield


def _adding(fold: Fold) -> Any:
    def call(inputs: Any, training: bool | None = None, mask: Any = None) -> Any:
        return inputs + fold.shift.reshape(fold._along(len(inputs.shape)))

    return call


@contextmanager
def _instead(layer: keras.layers.Layer, name: str, value: Any) -> Iterator[None]:
    """Another attribute for a while, which no tracker of Keras sees."""
    had, before = name in layer.__dict__, layer.__dict__.get(name)
    layer.__dict__[name] = value
    try:
        yield
    finally:
        if had:
            layer.__dict__[name] = before
        else:
            del layer.__dict__[name]


def multiplied(tensor: QuantizedTensor, factor: np.ndarray, bits: float) -> QuantizedTensor:
    """`factor` times a quantized kernel, with scales of no other sign than before.

    Args:
        tensor: the kernel; its parts in NumPy.
        factor: of its shape; the same along the axes that are contracted.
        bits: nominal bits of a code.

    Returns:
        The tensor. Its line has an entry for every column, and its codes fit where they did.
    """
    view, codes, line = tensor.view, tensor.codes, tensor.line
    flips = factor < 0
    negated = np.where(flips, -codes.astype(np.int16), codes)
    by_column = _per_statistic(view, factor)
    scale = line.scale * np.abs(by_column)
    offset = None if line.offset is None else line.offset * by_column
    if not _fits(negated, storage_bits(codes, bits), bits):
        # One has no counterpart of the other sign: count from -1 instead, which has.
        negated = np.where(flips, -1 - codes.astype(np.int16), codes)
        moved = np.where(by_column < 0, scale, np.float32(0))
        offset = moved if offset is None else offset + moved
    scale = np.where(scale < np.finfo(np.float32).tiny, np.float32(0), scale)
    return replace(tensor, codes=negated.astype(np.int8), line=Line(scale, offset))


def _fits(codes: np.ndarray, width: int, bits: float) -> bool:
    try:
        return storage_bits(codes, bits) == width
    except ValueError:
        return False


def _per_statistic(view: BlockView, factor: np.ndarray) -> np.ndarray:
    """A factor of the kernel's shape in the layout of its statistics, one entry per column."""
    values = ops.convert_to_numpy(view.split(factor))
    present = ops.convert_to_numpy(view.split(np.ones_like(factor)))
    for axis in range(values.ndim):
        first = values.take([0], axis)  # which is no padding
        if np.all((values == first) | (present == 0)):
            values, present = first, present.take([0], axis)
    return values
