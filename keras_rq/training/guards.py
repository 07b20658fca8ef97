"""A check before Keras' training loops start.

The layers themselves raise when they are called without a range. Within `fit` and `predict` that is
too late on JAX: Keras has moved the variables out of the model by then, and does not put them back
when a step fails (Keras 3.15.1). So the error comes when a loop asks for its step function.
"""

from __future__ import annotations

import functools
from typing import Any

import keras

from keras_rq.layers.base import QuantizedLayer, is_quantized

_LOOPS = ("make_train_function", "make_test_function", "make_predict_function")


def set_guards(model: keras.layers.Layer) -> None:
    """Makes the loops of a model, and of those inside it, check that all inputs have ranges."""
    for one in _models(model):
        for name in _LOOPS:
            if hasattr(one, name) and _unready(one):
                one.__dict__[name] = functools.partial(_checked, one, name)


def remove_guards(model: keras.layers.Layer) -> None:
    """Undoes `set_guards`."""
    for one in _models(model):
        for name in _LOOPS:
            one.__dict__.pop(name, None)


def _checked(model: keras.Model, name: str, *args: Any, **kwargs: Any) -> Any:
    for layer in _unready(model):
        layer.require_calibration()
    return getattr(type(model), name)(model, *args, **kwargs)


def _models(model: keras.layers.Layer) -> list[keras.Model]:
    return [layer for layer in model._flatten_layers() if isinstance(layer, keras.Model)]


def _unready(model: keras.Model) -> list[QuantizedLayer]:
    layers = (layer for layer in model._flatten_layers() if is_quantized(layer))
    return [layer for layer in layers if layer.needs_calibration]
