"""Where a layer is within its model: the path that rules search and reports show."""

from __future__ import annotations

from collections import deque

import keras
from keras.src.models.functional import Functional


def complete(model: keras.layers.Layer) -> None:
    """Puts what layers lie in before their paths, where Keras has left it out.

    Keras notes a path when it builds a layer. It builds what a model holds before the model when it
    loads one, and a graph's layers before the layer that holds the graph: `encoder/dense` is then
    `dense`, like any other of that name.

    Args:
        model: a built model (or layer). Paths begin with what it holds if it is a graph, and else
            with its own name, as Keras has it. A path that says more already stays.
    """
    start = "" if isinstance(model, Functional) else f"{model.name}/"
    waiting, seen = deque([(model, start)]), {id(model)}
    while waiting:
        outer, before = waiting.popleft()
        for layer in outer._flatten_layers(include_self=False, recursive=False):
            if id(layer) in seen:
                continue
            seen.add(id(layer))
            path = f"{before}{layer.name}"
            if path.endswith(f"/{layer.path or layer.name}"):
                layer._path = path
            waiting.append((layer, f"{path}/"))
