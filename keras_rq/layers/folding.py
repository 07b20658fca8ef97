"""BatchNormalization behind a layer with a kernel: which can become a part of that layer, and how.

In inference `gamma (x w + b - mean) / sqrt(variance + epsilon) + beta` is a product with the kernel
`g w` and the bias `g (b - mean) + beta`, where `g = gamma / sqrt(variance + epsilon)`.

Which layer is in front of a normalization is known by the graph that Keras keeps of Sequential and
Functional models, and by nothing else: layers hold no reference to each other, so that models are
saved, loaded, cloned and cut as ever.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import keras
from keras import ops
from keras.src.models.functional import Functional

from keras_rq import backend
from keras_rq.layers.products import Product
from keras_rq.layers.registry import products_of, quantized_class

_BatchNorm = keras.layers.BatchNormalization
# Below this the factor of a kernel does not follow `gamma`, which often starts at zero: what is
# quantized could not be scaled back.
SMALLEST_GAMMA = 2.0**-10


def norm_behind(layer: keras.layers.Layer) -> Any:
    """The BatchNormalization that a layer's output goes to; None where the graph has none."""
    for node in reversed(layer._outbound_nodes):
        if type(node.operation) is _BatchNorm:
            return node.operation
    return None


def factor(norm: Any, product: Product, kernel_shape: tuple[int, ...]) -> Any:
    """`|gamma| / sqrt(moving variance + epsilon)`, float32, in the layout of a kernel.

    A sign would turn the grid of a channel around, which the kernel can do without: the codes of a
    file are negated where `gamma` is negative.
    """
    # The normalization behind the layer moves its statistics before the backward pass.
    variance = backend.as_it_is_now(_value(norm.moving_variance))
    scale = ops.rsqrt(variance + norm.epsilon)
    if norm.gamma is not None:
        scale = scale * ops.maximum(ops.abs(_value(norm.gamma)), SMALLEST_GAMMA)
    return ops.reshape(scale, product.columns(norm.axis, norm.input_spec.ndim, kernel_shape))


def _value(variable: Any) -> Any:
    return ops.cast(ops.convert_to_tensor(variable), "float32")


@dataclass
class Pairs:
    """The normalizations of a model.

    Attributes:
        norms: those that are a part of the layer before them in inference, by the id of that layer.
        reasons: the others, and why they are not.
    """

    norms: dict[int, Any] = field(default_factory=dict)
    reasons: list[tuple[Any, str]] = field(default_factory=list)


def find(model: keras.layers.Layer) -> Pairs:
    """Looks at every BatchNormalization of a model, quantized or not."""
    graph, pairs = _Graph(model), Pairs()
    for norm in model._flatten_layers():
        if isinstance(norm, _BatchNorm):
            layer, reason = _before(norm, graph)
            if reason is None:
                pairs.norms[id(layer)] = norm
            else:
                pairs.reasons.append((norm, reason))
    return pairs


class _Graph:
    """All that the graphs inside a model say."""

    def __init__(self, model: keras.layers.Layer) -> None:
        layers = model._flatten_layers()
        graphs = [graph for layer in layers if (graph := _graph_of(layer)) is not None]
        levels = [level for graph in graphs for level in graph._nodes_by_depth.values()]
        self.nodes = list({id(node): node for level in levels for node in level}.values())
        self.outputs = {id(tensor) for graph in graphs for tensor in graph.outputs}
        self.held_by_code = {
            id(inner) for layer in layers if _graph_of(layer) is None for inner in layer._layers
        }

    def calls(self, layer: keras.layers.Layer) -> list[Any]:
        """The nodes at which a layer is called."""
        return [node for node in self.nodes if node.operation is layer]

    def readers(self, layer: keras.layers.Layer) -> Iterator[keras.layers.Layer]:
        """Where the outputs of a layer go."""
        for node in self.nodes:
            if any(source is layer for source in _sources(node)):
                yield node.operation


def _graph_of(layer: keras.layers.Layer) -> Functional | None:
    """The graph that the `call` of a model runs; None for other layers, and a `call` of its own."""
    if isinstance(layer, keras.Sequential):
        return layer._functional if type(layer).call is keras.Sequential.call else None
    is_graph = isinstance(layer, Functional) and type(layer).call is Functional.call
    return layer if is_graph else None


def _sources(node: Any) -> list[Any]:
    return [tensor._keras_history.operation for tensor in node.input_tensors]


def _before(norm: Any, graph: _Graph) -> tuple[Any, str | None]:
    """The layer that a normalization can become a part of, or why there is none."""
    if type(norm) is not _BatchNorm:
        return None, f"{type(norm).__name__} is a subclass and may do more than its parent"
    nodes = graph.calls(norm)
    if not nodes or id(norm) in graph.held_by_code:
        return None, "it is called by code, and not in a Sequential or Functional graph alone"
    if any(node.arguments.kwargs.get("training") for node in nodes):
        return None, "it is called with training=True"
    sources = {id(source): source for node in nodes for source in _sources(node)}
    layer = next(iter(sources.values()))
    if len(sources) > 1:
        return None, "it normalizes the outputs of several layers"
    return layer, _reason_against(layer, norm, graph)


def _reason_against(layer: Any, norm: Any, graph: _Graph) -> str | None:
    cls = quantized_class(type(layer)) or type(layer)
    if not getattr(cls, "ends_in_bias", False):
        return f"{layer.name!r} before it is no Dense, EinsumDense or convolution"
    if layer.activation not in (None, keras.activations.linear):
        return f"{layer.name!r} before it has an activation"
    if id(layer) in graph.held_by_code:
        return f"{layer.name!r} before it is called by code, too"
    if any(id(tensor) in graph.outputs for node in graph.calls(layer) for tensor in node.outputs):
        return f"what {layer.name!r} before it returns is an output of the model"
    if others := [reader.name for reader in graph.readers(layer) if reader is not norm]:
        return f"what {layer.name!r} before it returns goes to {others[0]!r}, too"
    name, product = list(products_of(layer).items())[-1]
    shape = tuple(getattr(layer, name).shape)
    if product.columns(norm.axis, norm.input_spec.ndim, shape) is None:
        return f"its axis is not that of the channels of {layer.name!r} before it"
    return None
