"""The energy proxy of arXiv 2409.09245: bits of both operands x density x multiplications."""

from __future__ import annotations

from typing import Any

import keras

from keras_rq.layers.base import is_quantized
from keras_rq.layers.products import Lookup, Product
from keras_rq.layers.recurrent import steps_of
from keras_rq.layers.registry import built_shape, output_shape_of, products_of
from keras_rq.numerics.grids import Bits
from keras_rq.policy import LayerQuantization

_FLOAT_BITS = 32.0


def energy(
    layer: keras.layers.Layer,
    quantization: LayerQuantization,
    kernels: dict[str, Any],
    steps: int | None,
) -> float | None:
    """What the products of a layer and its kernels cost per sample.

    Args:
        layer: any layer.
        quantization: what it does with its operands.
        kernels: arrays, by the names of its products.
        steps: how often a call of the model calls the layer, as `time_steps` counts.

    Returns:
        The proxy, without data movement; None where a size is unknown.
    """
    if quantization.matmuls is not None:
        return _energy_of_pairs(layer, as_number(quantization.matmuls.bits), steps)
    if not kernels:
        return 0.0
    products = products_of(layer)
    weights = quantization.weights
    density = weights.pattern.density if weights and weights.pattern else 1.0
    shapes = built_shape(layer), None
    if shapes[0] is not None:
        shapes = shapes[0], output_shape_of(layer)
    costs = [
        _cost(product, _bits_per_product(layer, name), kernels[name].size, *shapes)
        for name, product in products.items()
    ]
    if None in costs or (steps is None and any(costs)):
        return None
    return sum(costs) * density * (steps or 1)


def _energy_of_pairs(layer: Any, width: float, steps: int | None) -> float | None:
    shapes = layer.pair_shapes()
    counts = [pair.multiplications(*shapes[name]) for name, pair in layer.pairs().items()]
    return None if None in (*counts, steps) else width * width * sum(counts) * steps


def _cost(product: Product, bits: float, elements: int, *shapes: Any) -> float | None:
    if None in shapes and not isinstance(product, Lookup):
        return None
    positions = product.positions(*shapes)
    return bits * elements * positions if positions else positions


def _bits_per_product(layer: keras.layers.Layer, name: str) -> float:
    """Bits of the kernel times bits of what it meets, as they are now."""
    weights, activations = layer.bits_now(name) if is_quantized(layer) else (None, None)
    return as_number(weights) * as_number(activations)


def time_steps(model: keras.layers.Layer) -> dict[int, int | None]:
    """How often one call of `model` calls a layer, by `id(layer)`, where it lies in a loop."""
    found: dict[int, int | None] = {}
    for outer in model._flatten_layers():
        if (steps := steps_of(outer)) == 1:
            continue
        for inner in outer._flatten_layers(include_self=False):
            before = found.get(id(inner), 1)
            found[id(inner)] = None if None in (before, steps) else before * steps
    return found


def as_number(bits: Bits | None) -> float:
    """A bit width to calculate with; None is float."""
    if bits is None:
        return _FLOAT_BITS
    return 4.0 if bits == "fp4" else float(bits)
