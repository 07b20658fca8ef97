"""The energy proxy of arXiv 2409.09245: bits of both operands x density x multiplications."""

from __future__ import annotations

from collections import Counter
from typing import Any, NamedTuple

import keras
from keras.src.models.functional import Functional

from keras_rq.layers.base import is_quantized
from keras_rq.layers.products import Lookup, Product, ReversedLookup
from keras_rq.layers.recurrent import steps_of
from keras_rq.layers.registry import built_shape, output_shape_of, products_of
from keras_rq.numerics.grids import Bits
from keras_rq.policy import LayerQuantization

_FLOAT_BITS = 32.0


class Use(NamedTuple):
    """How a model uses a layer.

    Attributes:
        times: how often one call of the model calls it; None where that is not known.
        shape: of its input, where the model knows more of it than the layer.
    """

    times: int | None = 1
    shape: tuple[int | None, ...] | None = None


def energy(
    layer: keras.layers.Layer,
    quantization: LayerQuantization,
    kernels: dict[str, Any],
    density: float,
    use: Use,
) -> float | None:
    """What the products of a layer and its kernels cost per sample.

    Args:
        layer: any layer.
        quantization: what it does with its operands.
        kernels: arrays, by the names of its products.
        density: share of their elements that are not pruned.
        use: what `uses` says of the layer.

    Returns:
        The proxy, without data movement; None where a size is unknown.
    """
    steps = use.times
    if quantization.matmuls is not None:
        return _energy_of_pairs(layer, as_number(quantization.matmuls.bits), steps)
    if not kernels:
        return 0.0
    products = products_of(layer)
    shapes = use.shape or built_shape(layer), None
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


def uses(model: keras.layers.Layer) -> dict[int, Use]:
    """How a model uses the layers within it, by `id(layer)`.

    Calls are counted in graphs and in loops over time. A subclassed model does not say how often it
    calls what it holds: once, then, as does a table that a graph only looks up. What several of
    them hold counts as in the one that calls it most.
    """
    found: dict[int, Use] = {id(model): Use()}

    def visit(outer: keras.layers.Layer, times: int | None, around: tuple[int, ...]) -> None:
        steps, calls = steps_of(outer), _calls(outer)
        for inner in outer._flatten_layers(include_self=False, recursive=False):
            if id(inner) in around:
                continue
            factors = times, steps, max(calls[id(inner)], 1)
            inside = None if None in factors else factors[0] * factors[1] * factors[2]
            known = found.get(id(inner))
            if known is None or _is_more(inside, known.times):
                found[id(inner)] = Use(inside, _attended(outer, inner))
                visit(inner, inside, (*around, id(inner)))

    visit(model, 1, (id(model),))
    return found


def _is_more(times: int | None, than: int | None) -> bool:
    """Of calls; a number that is not known is the most."""
    return than is not None and (times is None or times > than)


def _calls(outer: keras.layers.Layer) -> Counter[int]:
    """How often a graph calls each of its layers to multiply, by `id(layer)`; none without one."""
    nodes = outer._nodes_by_depth.values() if isinstance(outer, Functional) else ()
    return Counter(id(node.operation) for depth in nodes for node in depth if _multiplies(node))


def _multiplies(node: Any) -> bool:
    """Whether a call of a table, if it is one, does not look rows up."""
    products = products_of(node.operation) if isinstance(node.operation, keras.Layer) else {}
    if not any(isinstance(product, ReversedLookup) for product in products.values()):
        return True
    given = node.arguments
    return bool(given.kwargs.get("reverse", given.args[1] if len(given.args) > 1 else False))


def _attended(outer: keras.layers.Layer, inner: keras.layers.Layer) -> tuple[Any, ...] | None:
    """The input of attention's last projection, which Keras builds for queries of any number."""
    query = (getattr(outer, "_build_shapes_dict", None) or {}).get("query_shape")
    if query is None or inner is not getattr(outer, "_output_dense", None):
        return None
    return (*query[:-1], *built_shape(inner)[len(query) - 1 :])


def as_number(bits: Bits | None) -> float:
    """A bit width to calculate with; None is float."""
    if bits is None:
        return _FLOAT_BITS
    return 4.0 if bits == "fp4" else float(bits)
