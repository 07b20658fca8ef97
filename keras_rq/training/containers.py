"""Saving containers whose own configuration says nothing of their children.

Sequential and Functional models save their layers. MultiHeadAttention, subclassed models and the
like save their constructor's arguments and rebuild their children as float layers. Such a
container gets a subclass of its own class whose configuration is an envelope: the original
configuration and, by position, what each quantized descendant does.
"""

from __future__ import annotations

from typing import Any

import keras
from keras.src.models.functional import Functional

from keras_rq.layers.base import LabelledCount, QuantizedLayer, read_quantization
from keras_rq.layers.registry import container_mixins, float_class, quantized_class
from keras_rq.policy import LayerQuantization

_PACKAGE = "keras_rq"
_SAVE_THEIR_LAYERS = (keras.Sequential, keras.Model, Functional)
_envelopes: dict[type, type] = {}


def needs_envelope(layer: keras.layers.Layer) -> bool:
    """Whether saving `layer` would lose the quantization of its descendants."""
    if isinstance(layer, _Envelope) or type(layer) in _SAVE_THEIR_LAYERS:
        return False
    return any(isinstance(child, QuantizedLayer) for child in descendants(layer))


def descendants(layer: keras.layers.Layer) -> list[keras.layers.Layer]:
    """All layers inside `layer`, each before those inside it, in an order that no backend changes.

    Of the layers of a graph that is the graph's order, and of others that of their attributes. The
    graph comes first: a model that is one may also have its layers as attributes, which KerasHub
    hides from Keras on PyTorch.
    """
    found: dict[int, keras.layers.Layer] = {}

    def visit(parent: keras.layers.Layer) -> None:
        graph = parent.operations if isinstance(parent, Functional) else ()
        for child in (*graph, *parent._layers):
            if isinstance(child, keras.layers.Layer) and id(child) not in found:
                found[id(child)] = child
                visit(child)

    visit(layer)
    return list(found.values())


def swap_class(layer: keras.layers.Layer, cls: type) -> None:
    """Gives a living layer another class with the same variables."""
    object.__setattr__(layer, "__class__", cls)


def enclose(layer: keras.layers.Layer) -> None:
    """Swaps the class of a container for its envelope class."""
    original = type(layer)
    if original not in _envelopes:
        body = {"__module__": __name__, "_rq_original": original}
        if hasattr(original, "save_to_preset"):
            body["save_to_preset"] = _refuse_preset
        bases = (_Envelope, *container_mixins(original), original)
        envelope = type(original.__name__, bases, body)
        # One registered name for every envelope; what it holds says which class is inside.
        keras.saving.register_keras_serializable(_PACKAGE, "QuantizedContainer")(envelope)
        keras.saving.register_keras_serializable(_PACKAGE, "QuantizedContainer")(QuantizedContainer)
        _envelopes[original] = envelope
    swap_class(layer, _envelopes[original])


def original_class(layer: keras.layers.Layer) -> type:
    """The class a user gave the layer, under an envelope or not."""
    return getattr(type(layer), "_rq_original", type(layer))


def attach(layer: keras.layers.Layer, quantization: LayerQuantization) -> None:
    """Makes a built Keras layer quantized, in place."""
    swap_class(layer, quantized_class(type(layer)))
    layer.take_quantization(quantization)


def detach(layer: keras.layers.Layer) -> None:
    """Undoes `enclose` and `attach`: the layer gets the class back that it had in float."""
    if isinstance(layer, _Envelope):
        swap_class(layer, type(layer)._rq_original)
    if isinstance(layer, QuantizedLayer):
        layer.drop_quantization()
        swap_class(layer, float_class(type(layer)))


def _refuse_preset(layer: keras.layers.Layer, *args: Any, **kwargs: Any) -> None:
    """KerasHub builds a task from its preset without asking what was saved: heads would be lost."""
    raise ValueError(
        f"{layer.name!r} is quantized by keras_rq, and a KerasHub preset describes float models. "
        "Write model.save('model.keras'), or keras_rq.dequantize(model) before save_to_preset()."
    )


class _Envelope:
    """Mix-in of all envelope classes."""

    def count_params(self) -> int:
        inside = [
            one.label for one in (self, *descendants(self)) if isinstance(one, QuantizedLayer)
        ]
        return LabelledCount(int(super().count_params()), "/".join(dict.fromkeys(inside)))

    def get_config(self) -> dict[str, Any]:
        envelope = type(self)
        swap_class(self, envelope._rq_original)
        try:
            inner = keras.saving.serialize_keras_object(self)
        finally:
            swap_class(self, envelope)
        # The envelope is compiled, not what is inside.
        inner.pop("compile_config", None)
        quantized = {
            str(position): {"class": type(child).__name__, **child.quantization.get_config()}
            for position, child in enumerate(descendants(self))
            if isinstance(child, QuantizedLayer)
        }
        return {"inner": inner, "quantized": quantized}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> keras.layers.Layer:
        return QuantizedContainer.from_config(config)

    def __reduce__(self) -> tuple[Any, ...]:
        # Keras's own names the class by its module, and an envelope is in none.
        return keras.layers.Layer._unpickle_model, super().__reduce__()[1]


@keras.saving.register_keras_serializable(_PACKAGE)
class QuantizedContainer:
    """The name under which envelopes are saved. `from_config` gives the container back."""

    def get_config(self) -> dict[str, Any]:
        raise NotImplementedError("Envelopes save themselves; this class only loads them.")

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> keras.layers.Layer:
        inner, quantized = _opened(config)
        container = keras.saving.deserialize_keras_object(inner)
        if not container.built:
            raise ValueError(
                f"The saved layer {container.name!r} ({type(container).__name__}) cannot be rebuilt"
                " from its configuration, so its quantized layers cannot be restored. Give the"
                " class a build() that builds all its layers, or get_build_config() and"
                " build_from_config()."
            )
        children = descendants(container)
        for position, saved in quantized.items():
            _restore(container, children, int(position), dict(saved))
        for layer in [*children, container]:
            if needs_envelope(layer):
                enclose(layer)
        return container


def _opened(config: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What is inside an envelope, and what is quantized there."""
    rest = dict(config)
    inner, quantized = rest.pop("inner", None), rest.pop("quantized", None)
    if not (isinstance(inner, dict) and isinstance(inner.get("config"), dict)):
        raise ValueError(
            "A saved container of quantized layers must have 'inner', the layer as Keras saves it. "
            f"Received: inner={inner!r}"
        )
    if not (isinstance(quantized, dict) and all(map(_is_entry, quantized.items()))):
        raise ValueError(
            f"The saved layer {inner['config'].get('name')!r} ({inner.get('class_name')}) must "
            "have 'quantized': by position among its layers, each one's 'class' and quantization. "
            f"Received: quantized={quantized!r}"
        )
    if rest:
        # Bidirectional renames the layers that it copies, and turns one of them around.
        inner = {**inner, "config": {**inner["config"], **rest}}
    return inner, quantized


def _is_entry(entry: tuple[Any, Any]) -> bool:
    position, saved = entry
    return str(position).isdecimal() and isinstance(saved, dict) and "class" in saved


def _restore(
    container: keras.layers.Layer,
    children: list[keras.layers.Layer],
    position: int,
    saved: dict[str, Any],
) -> None:
    class_name = saved.pop("class")
    child = children[position] if position < len(children) else None
    if child is None or original_class(child).__name__ != class_name:
        found = "no layer" if child is None else type(child).__name__
        raise ValueError(
            f"The saved layer {container.name!r} ({type(container).__name__}) had a quantized "
            f"{class_name} as layer number {position}; the class as it is now has {found} there. "
            "Load the file with the code that saved it."
        )
    if not isinstance(child, QuantizedLayer):
        attach(child, read_quantization(child.path, saved))
