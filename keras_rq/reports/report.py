"""`report`: bits, bytes, energy proxy and error of every layer with weights."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import keras
import numpy as np
from keras import ops

from keras_rq import backend
from keras_rq.layers import paths
from keras_rq.layers.base import QuantizedLayer
from keras_rq.layers.folding import norm_behind
from keras_rq.layers.parameters import kept_with
from keras_rq.layers.products import Product
from keras_rq.layers.registry import owns_weights, products_of, refuse_keras_quantization
from keras_rq.numerics.blocks import Blocks
from keras_rq.policy import LayerQuantization
from keras_rq.quantizers import Quantizer
from keras_rq.quantizers.gdnsq import STORED_BITS
from keras_rq.quantizers.tensor import QuantizedTensor
from keras_rq.reports.energy import Use, as_number, energy, uses

_FLOAT_BITS = 32
_FLOAT = LayerQuantization(None, None)


@dataclass(frozen=True)
class Row:
    """One layer, or the sum of all.

    Attributes:
        path: Keras's path of the layer.
        layer: name of its class.
        activation_bits: 1, 1.5, 2 ... 8, "fp4", or 32 for float; None if it multiplies no input.
            Of a width that is trained: what it takes now, until it has come down to its target.
        weight_bits: likewise; None for products of two activations.
        sparsity: fraction of kernel elements that are pruned.
        parameters: number of all weights.
        kernel_elements: those that are multiplied or looked up.
        nbytes: stored bytes of all weights: packed codes, masks, scales and offsets; biases and
            the like in float32.
        bits_per_element: stored bits of the kernels (codes, masks, scales, offsets) over their
            elements; None without kernels.
        energy: activation bits x weight bits x density x multiplications per sample: the proxy of
            arXiv 2409.09245, without data movement. None where an output size is unknown. A layer
            that a graph calls several times counts as often, each time as large as it was built;
            one that several models hold, as in the one that calls it most. Products of two
            activations count where a policy quantizes them.
        sqnr_db: signal-to-quantization-noise ratio of the kernels in decibels; None in float.
        reason: why the layer stays in float, where it could be or was asked to be quantized.
        folded_into: path of the layer that folds this BatchNormalization into its kernel while it
            is trained (`fold_batch_norm`); None for others.
    """

    path: str
    layer: str
    activation_bits: int | float | str | None
    weight_bits: int | float | str | None
    sparsity: float
    parameters: int
    kernel_elements: int
    nbytes: int
    bits_per_element: float | None
    energy: float | None
    sqnr_db: float | None
    reason: str | None = None
    folded_into: str | None = None


@dataclass(frozen=True)
class Report:
    """The layers of a model and their sum. `str()` is a table."""

    name: str
    rows: tuple[Row, ...]

    @property
    def total(self) -> Row:
        """All layers together; bits per element and sparsity over all kernels, float ones too."""
        elements = sum(row.kernel_elements for row in self.rows)
        kernels = [row for row in self.rows if row.kernel_elements]
        bits = sum(row.bits_per_element * row.kernel_elements for row in kernels)
        pruned = sum(row.sparsity * row.kernel_elements for row in kernels)
        energies = [row.energy for row in self.rows]
        return Row(
            path="total",
            layer="",
            activation_bits=None,
            weight_bits=None,
            sparsity=pruned / elements if elements else 0.0,
            parameters=sum(row.parameters for row in self.rows),
            kernel_elements=elements,
            nbytes=sum(row.nbytes for row in self.rows),
            bits_per_element=bits / elements if elements else None,
            energy=None if None in energies else sum(energies),
            sqnr_db=None,
        )

    @property
    def kept_float(self) -> dict[str, str]:
        """Layers that stay in float, by path, with the reason."""
        return {row.path: row.reason for row in self.rows if row.reason is not None}

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and strings, for JSON."""
        return {
            "name": self.name,
            "rows": [dataclasses.asdict(row) for row in self.rows],
            "total": dataclasses.asdict(self.total),
        }

    @property
    def folded(self) -> dict[str, str]:
        """Normalizations that are folded in training, by path, with the layer that folds them."""
        return {row.path: row.folded_into for row in self.rows if row.folded_into is not None}

    def summary(self) -> str:
        """What was quantized and what was not, in a few lines."""
        quantized = sum(1 for row in self.rows if _is_quantized(row))
        total = self.total.bits_per_element
        bits = "" if total is None else f", {total:.2f} bits per kernel element"
        lines = [f"{self.name}: {quantized} of {len(self.rows)} layers quantized{bits}"]
        return "\n".join([*lines, *self.lines_below("  ")])

    def lines_below(self, indent: str = "") -> list[str]:
        """What is folded, and why layers stay in float."""
        folded = [f"{norm} into {layer}" for norm, layer in self.folded.items()]
        more = ", ..." if len(folded) > 3 else ""
        lines = [f"{indent}folded: {', '.join(folded[:3])}{more}"] if folded else []
        return lines + self.float_lines(indent)

    def float_lines(self, indent: str = "") -> list[str]:
        """Why layers stay in float: those of one class for one reason share a line."""
        groups: dict[tuple[str, str], list[str]] = {}
        for row in self.rows:
            if row.reason is not None:
                groups.setdefault((row.layer, row.reason), []).append(row.path)
        return [
            f"{indent}float: {paths[0] if len(paths) == 1 else f'{len(paths)} {layer} layers'} "
            f"({reason})"
            for (layer, reason), paths in groups.items()
        ]

    def __str__(self) -> str:
        from keras_rq.reports.table import render

        return render(self)

    def plot(self, path: str) -> None:
        """Draws bytes and error of every layer to an image file; needs `keras-rq[plots]`."""
        from keras_rq.reports.plot import plot

        plot(self, path)


def report(model: keras.layers.Layer, kept: dict[int, str] | None = None) -> Report:
    """Reports what every layer with weights costs.

    Args:
        model: a built Keras model, quantized or not.
        kept: why layers stay in float, by `id(layer)`; `keras_rq.quantize` passes it.

    Returns:
        A `Report`.

    Raises:
        TypeError, ValueError: if `model` is no Keras model, has not been built, or is quantized by
            Keras.

    Example:

    >>> import keras, keras_rq as rq
    >>> model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(4)])
    >>> rq.report(model).total.parameters
    36
    """
    if not isinstance(model, keras.layers.Layer):
        raise TypeError(f"`model` must be a Keras model. Received: {model!r}")
    if not model.built:
        raise ValueError(
            f"Model {model.name!r} is not built. Call it on a batch of data, or "
            "model.build(input_shape), first."
        )
    paths.complete(model)
    for layer in model._flatten_layers():
        refuse_keras_quantization(layer)
    kept, used = kept or {}, uses(model)
    layers = [
        layer
        for layer in model._flatten_layers()
        if owns_weights(layer) or id(layer) in kept or _matmuls_of(layer) is not None
    ]
    folded = _folded(model)
    rows = [_row(layer, kept.get(id(layer)), used[id(layer)]) for layer in layers]
    rows = [
        dataclasses.replace(row, folded_into=folded.get(id(layer)))
        for row, layer in zip(rows, layers, strict=True)
    ]
    return Report(model.name, tuple(rows))


def _folded(model: keras.layers.Layer) -> dict[int, str]:
    """Paths of the layers that fold a BatchNormalization, by its id."""
    return {
        id(norm_behind(layer)): layer.path
        for layer in model._flatten_layers()
        if isinstance(layer, QuantizedLayer) and layer.quantization.fold_batch_norm
    }


def _matmuls_of(layer: keras.layers.Layer) -> Quantizer | None:
    return layer.quantization.matmuls if isinstance(layer, QuantizedLayer) else None


def _is_quantized(row: Row) -> bool:
    return any(bits not in (None, _FLOAT_BITS) for bits in (row.weight_bits, row.activation_bits))


def _row(layer: keras.layers.Layer, reason: str | None, use: Use) -> Row:
    quantization = layer.quantization if isinstance(layer, QuantizedLayer) else _FLOAT
    kernels = {name: _value(_kernel(layer, name)) for name in products_of(layer)}
    costs = [
        _kernel_cost(kernels[name], quantization.weights, product, _parameters(layer, name))
        for name, product in products_of(layer).items()
    ]
    elements = sum(kernel.size for kernel in kernels.values())
    # A wrapper may list the kernel of the layer that it holds.
    inside = {id(v) for one in layer._flatten_layers(include_self=False) for v in _variables(one)}
    own = [variable for variable in _variables(layer) if id(variable) not in inside]
    if isinstance(layer, QuantizedLayer):  # what training notes is no weight
        noted = {id(variable) for variable in kept_with(layer)}
        own = [variable for variable in own if id(variable) not in noted]
    parameters = max(sum(math.prod(variable.shape) for variable in own), elements)
    # A learned step of a kernel is the scale that is stored with its codes: counted there.
    learned = sum(v.size for name in kernels for v in _parameters(layer, name).values())
    stored = sum(cost.nbytes for cost in costs)
    widths = _widths(layer)
    density = sum(cost.kept for cost in costs) / elements if elements else 1.0
    activations = widths.activations if _has_input(layer) else None
    if quantization.matmuls is not None:
        activations = quantization.matmuls.bits
    return Row(
        path=layer.path,
        layer=type(layer).__name__,
        activation_bits=activations,
        weight_bits=widths.weights if quantization.matmuls is None else None,
        sparsity=1.0 - density,
        parameters=parameters,
        kernel_elements=elements,
        nbytes=stored + _FLOAT_BITS // 8 * (parameters - elements - learned),
        bits_per_element=8.0 * stored / elements if elements else None,
        energy=energy(layer, quantization, kernels, density, use),
        sqnr_db=_decibels(costs) if quantization.weights else None,
        reason=reason,
    )


def _variables(layer: keras.layers.Layer) -> list[keras.Variable]:
    return [*layer._trainable_variables, *layer._non_trainable_variables]


def _kernel(layer: keras.layers.Layer, name: str) -> Any:
    """What is, or would be, quantized."""
    if isinstance(layer, QuantizedLayer):
        return layer.kernel_to_quantize(name)
    return getattr(layer, name)


class _Cost(NamedTuple):
    nbytes: int
    kept: int
    signal: float
    noise: float


def _parameters(layer: keras.layers.Layer, name: str) -> dict[str, np.ndarray]:
    if not isinstance(layer, QuantizedLayer):
        return {}
    return {key: _value(value) for key, value in layer.kernel_parameters(name).items()}


def _kernel_cost(
    kernel: np.ndarray,
    quantizer: Quantizer | None,
    product: Product,
    parameters: dict[str, np.ndarray],
) -> _Cost:
    in_float = _Cost(_FLOAT_BITS // 8 * kernel.size, kernel.size, 0.0, 0.0)
    if quantizer is None:
        return in_float
    blocks = product.kernel_blocks(quantizer)
    if as_number(quantizer.kernel_bits(kernel, blocks, parameters)) > STORED_BITS:
        return in_float  # nothing narrower holds it yet
    quantized, values, kept = _quantization(quantizer, blocks)(kernel, parameters)
    error = ops.convert_to_numpy(values).astype(np.float64) - kernel
    return _Cost(
        quantized.nbytes,
        kept,
        float(np.square(kernel, dtype=np.float64).sum()),
        float(np.square(error).sum()),
    )


@functools.lru_cache(maxsize=64)
def _quantization(quantizer: Quantizer, blocks: Blocks) -> Callable[..., tuple[Any, Any, int]]:
    """Kernel and parameters to the quantized tensor, its values, and how many are not pruned.

    Compiled once a shape.

    With parameters it runs as it stands: their values may say which codes there are.
    """
    tensors: dict[tuple[int, ...], QuantizedTensor] = {}

    def arrays(kernel: Any, parameters: dict[str, Any]) -> tuple[Any, ...]:
        made = quantizer.quantize(kernel, blocks, parameters)
        tensors[tuple(kernel.shape)] = dataclasses.replace(made, codes=None, line=None)
        mask = quantizer.keep_mask(quantizer.rotate(kernel, blocks), blocks)
        kept = None if mask is None else ops.sum(ops.cast(mask, "int32"))
        return made.codes, made.line, made.dequantize(), kept

    run = arrays if quantizer.has_parameters else backend.compiled(arrays)

    def quantized(
        kernel: np.ndarray, parameters: dict[str, np.ndarray]
    ) -> tuple[QuantizedTensor, Any, int]:
        codes, line, values, kept = run(kernel, parameters)
        tensor = dataclasses.replace(tensors[kernel.shape], codes=codes, line=line)
        return tensor, values, kernel.size if kept is None else int(kept)

    return quantized


def _decibels(costs: list[_Cost]) -> float | None:
    signal, noise = sum(c.signal for c in costs), sum(c.noise for c in costs)
    ratio = signal / noise if noise else 0.0
    return 10.0 * math.log10(ratio) if 0.0 < ratio < math.inf else None  # None where NaN, too


def _has_input(layer: keras.layers.Layer) -> bool:
    return any(product.input_axes for product in products_of(layer).values())


class _Widths(NamedTuple):
    weights: int | float | str
    activations: int | float | str


def _widths(layer: keras.layers.Layer) -> _Widths:
    """What the operands of a layer take now: the most of all its kernels, 32 in float."""
    if not isinstance(layer, QuantizedLayer) or not products_of(layer):
        return _Widths(_FLOAT_BITS, _FLOAT_BITS)
    pairs = [layer.bits_now(name) for name in products_of(layer)]
    found = []
    for bits in zip(*pairs, strict=True):
        known = [b for b in bits if b is not None]
        found.append(max(known, key=as_number) if known else _FLOAT_BITS)
    return _Widths(*(b if isinstance(b, str) else round(b, 2) for b in found))


def _value(variable: Any) -> np.ndarray:
    return np.asarray(ops.convert_to_numpy(ops.cast(variable, "float32")))
