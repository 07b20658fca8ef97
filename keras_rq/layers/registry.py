"""Which quantized class takes the place of which Keras class."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras

_CLASSES: dict[type, type] = {}
_DERIVED: dict[type, type | None] = {}  # of subclasses that nobody registered; None: not alike
_derive: Callable[[type], type | None] = lambda keras_class: None  # noqa: E731
_AROUND: dict[type, type] = {}


def quantizes(keras_class: type):
    """Class decorator: registers a quantized layer as the counterpart of `keras_class`.

    The class is saved as `keras_rq>Quantized...` but keeps the name of the Keras class, because
    that name is part of the path of every weight in a weights file: so float checkpoints load into
    quantized models and back.
    """

    def register(cls: type) -> type:
        keras.saving.register_keras_serializable("keras_rq", cls.__name__)(cls)
        _CLASSES[keras_class] = stands_for(keras_class)(cls)
        _DERIVED.clear()
        return cls

    return register


def stands_for(keras_class: type):
    """Class decorator: gives a quantized class the name of the class whose place it takes."""

    def name(cls: type) -> type:
        cls.__name__ = keras_class.__name__
        cls._rq_keras_class = keras_class
        return cls

    return name


def derives(function: Callable[[type], type | None]) -> None:
    """Sets what makes the quantized counterparts of subclasses that nobody registered."""
    global _derive
    _derive = function


def contains(keras_class: type):
    """Class decorator: a mix-in for layers of `keras_class` that hold quantized layers."""

    def register(cls: type) -> type:
        _AROUND[keras_class] = cls
        return cls

    return register


def container_mixins(keras_class: type) -> tuple[type, ...]:
    """What a class of containers does differently around quantized layers."""
    return tuple(mixin for base, mixin in _AROUND.items() if issubclass(keras_class, base))


def quantized_class(keras_class: type) -> type | None:
    """The quantized counterpart of exactly this Keras class."""
    if keras_class in _CLASSES:
        return _CLASSES[keras_class]
    if keras_class not in _DERIVED:
        _DERIVED[keras_class] = _derive(keras_class)
    return _DERIVED[keras_class]


def float_class(cls: type) -> type:
    """The Keras class of which `cls` is the quantized counterpart."""
    return cls._rq_keras_class


def supported_layers() -> list[type]:
    """The Keras classes that have a quantized counterpart."""
    return list(_CLASSES)


def products_of(layer: keras.layers.Layer) -> dict[str, Any]:
    """The products of a layer, quantized or not, by kernel attribute; {} for unknown classes."""
    cls = quantized_class(type(layer)) or type(layer)
    # `products` reads only attributes of the Keras class, so a float layer can stand in for self.
    return cls.products(layer) if hasattr(cls, "products") else {}


def pairs_of(layer: keras.layers.Layer) -> dict[str, Any]:
    """The products of two activations of a layer, quantized or not; {} for unknown classes."""
    cls = quantized_class(type(layer)) or type(layer)
    return cls.pairs(layer) if hasattr(cls, "pairs") else {}


def output_shape_of(layer: keras.layers.Layer) -> tuple[int | None, ...] | None:
    """Shape of what a layer with products returns; None where it does not say."""
    cls = quantized_class(type(layer)) or type(layer)
    try:
        return cls.output_shape_of(layer, built_shape(layer))
    except NotImplementedError:  # a layer of a user's own
        return None


def built_shape(layer: keras.layers.Layer) -> tuple[int | None, ...] | None:
    """Shape of the (first) input that a layer was built for."""
    return next(iter((getattr(layer, "_build_shapes_dict", None) or {}).values()), None)


def refuse_keras_quantization(layer: keras.layers.Layer) -> None:
    """Raises for a layer that Keras itself has quantized; names it."""
    mode = getattr(layer, "quantization_mode", None)
    if mode is not None:
        raise ValueError(
            f"Layer {layer.path!r} carries Keras's own quantization ({mode!r}). Start from the "
            "float model."
        )


def owns_weights(layer: keras.layers.Layer) -> bool:
    """Whether a report has a row for a layer: it has weights that are not its children's."""
    return bool(products_of(layer) or layer._trainable_variables or layer._non_trainable_variables)
