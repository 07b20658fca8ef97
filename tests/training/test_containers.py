"""What a container saves of the quantized layers inside it."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from keras import layers

import keras_rq as rq
from keras_rq.training.surgery import quantized_layers

pytestmark = pytest.mark.once

X = np.random.default_rng(0).normal(size=(2, 5, 8)).astype(np.float32)
A4W1 = rq.QuantizationPolicy("A4W1")


def saved_and_loaded(model: keras.Model, folder: Path, **arguments: Any) -> keras.Model:
    model.save(folder / "m.keras")
    return keras.saving.load_model(folder / "m.keras", **arguments)


def assert_same(loaded: keras.Model, model: keras.Model) -> None:
    np.testing.assert_array_equal(np.asarray(loaded(X)), np.asarray(model(X)))
    pairs = zip(quantized_layers(loaded), quantized_layers(model), strict=True)
    assert all(a.quantization == b.quantization for a, b in pairs)


class Tower(keras.Model):
    """A subclassed model that is not registered with Keras."""

    def __init__(self, width: int = 4, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.width = width
        self.attention = layers.MultiHeadAttention(2, 4)
        self.out = layers.Dense(width)

    def call(self, x: Any) -> Any:
        return self.out(self.attention(x, x))

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "width": self.width}


def test_an_unregistered_class_is_named_when_loading(tmp_path: Path):
    model = Tower(3)
    model(X)
    model.quantize(A4W1, verbose=False)
    loaded = saved_and_loaded(model, tmp_path, custom_objects={"Tower": Tower})
    assert isinstance(loaded, Tower) and loaded.width == 3
    assert_same(loaded, model)


def test_a_container_is_pickled_as_its_class_is():
    model = keras.saving.register_keras_serializable("test_containers")(Tower)(3)
    model(X)
    model.quantize(A4W1, verbose=False)
    assert_same(pickle.loads(pickle.dumps(model)), model)


def test_containers_within_containers(tmp_path: Path):
    tower = Tower(8, name="tower")
    inputs = keras.Input((5, 8))
    x = tower(inputs)
    x = layers.TimeDistributed(layers.Dense(4))(x)
    x = layers.Bidirectional(layers.LSTM(2))(x)
    model = keras.Sequential([keras.Model(inputs, x), layers.Dense(2)])
    model.quantize(A4W1, verbose=False)
    assert len(quantized_layers(model)) == 9
    loaded = saved_and_loaded(model, tmp_path, custom_objects={"Tower": Tower})
    assert_same(loaded, model)
    assert_same(saved_and_loaded(loaded, tmp_path, custom_objects={"Tower": Tower}), model)


def test_different_quantizers_find_their_layers_again(tmp_path: Path):
    model = Tower()
    model(X)
    rules = [
        rq.Rule("query", weights=2),
        rq.Rule("value", weights=rq.quantizers.StraightThrough(4), activations=None),
        rq.Rule("key", skip=True),
    ]
    model.quantize(rq.QuantizationPolicy("A8W8", rules=rules), verbose=False)
    assert_same(saved_and_loaded(model, tmp_path, custom_objects={"Tower": Tower}), model)


def test_from_config_and_back():
    layer = layers.MultiHeadAttention(2, 4, name="attention")
    layer(X, X)
    rq.quantize(layer, A4W1, verbose=False)
    config = layer.get_config()
    restored = type(layer).from_config(config)
    assert restored.get_config() == config
    assert type(restored) is type(layer)
    assert isinstance(restored, layers.MultiHeadAttention)
    restored.set_weights(layer.get_weights())
    np.testing.assert_array_equal(np.asarray(restored(X, X)), np.asarray(layer(X, X)))


def test_plain_models_are_saved_as_keras_saves_them():
    model = keras.Sequential([keras.Input((8,)), layers.Dense(4)])
    model.quantize(A4W1, verbose=False)
    assert type(model) is keras.Sequential
    saved = keras.saving.serialize_keras_object(model)["config"]["layers"][1]
    assert saved["registered_name"] == "keras_rq>QuantizedDense"


class Changing(keras.Model):
    """A class whose layers are not the ones it was saved with."""

    kinds = (layers.Dense, layers.Dense)

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.parts = [kind(8) for kind in self.kinds]

    def build(self, shape: Any) -> None:
        for part in self.parts:
            part.build(shape)

    def call(self, x: Any) -> Any:
        for part in self.parts:
            x = part(x)
        return x


@pytest.mark.parametrize(
    ("kinds", "complaint"),
    [
        ((layers.Dense,), "layer number 1; the class as it is now has no layer there"),
        ((layers.Dense, layers.LayerNormalization), "has LayerNormalization there"),
    ],
)
def test_code_that_changed_since_saving_is_told_where(kinds: Any, complaint: str, monkeypatch: Any):
    model = Changing(name="changing")
    model(X)
    model.quantize(A4W1, verbose=False)
    config = keras.saving.serialize_keras_object(model)
    monkeypatch.setattr(
        Changing,
        "kinds",
        [k if k is layers.Dense else lambda _: layers.LayerNormalization() for k in kinds],
    )
    with pytest.raises(ValueError) as error:
        keras.saving.deserialize_keras_object(config, custom_objects={"Changing": Changing})
    assert complaint in str(error.value)
    assert "Load the file with the code that saved it" in str(error.value)


class Unbuildable(keras.Model):
    """Its shape depends on the data it is called on, and it has no build()."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.out = layers.Dense(4)

    def call(self, first: Any, second: Any) -> Any:
        return self.out(first + second)


def test_a_class_that_cannot_be_rebuilt_is_told_what_it_lacks():
    model = Unbuildable()
    model(X, X)
    model.quantize(A4W1, verbose=False)
    config = keras.saving.serialize_keras_object(model)
    config["config"]["inner"].pop("build_config", None)
    with pytest.raises(ValueError, match=r"cannot be rebuilt.*Give the class a build\(\)"):
        keras.saving.deserialize_keras_object(config, custom_objects={"Unbuildable": Unbuildable})


@keras.saving.register_keras_serializable("containers")
class Graph(keras.Model):
    """A Functional model with its layers as attributes, in no order of the graph's, or hidden."""

    def __init__(self, hidden: bool, **arguments: Any) -> None:
        first, second = layers.Dense(8, name="first"), layers.Dense(8, name="second")
        # As KerasHub does on PyTorch, where Keras cannot track attributes before `__init__`.
        keep = object.__setattr__ if hidden else setattr
        keep(self, "end", second)
        keep(self, "start", first)
        inputs = keras.Input((5, 8))
        super().__init__(inputs, second(first(inputs)), **arguments)

    def get_config(self) -> dict[str, Any]:
        return {"name": self.name}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Graph:
        return cls(hidden=not cls.hides, **config)

    hides = False


@pytest.mark.parametrize("hides", [False, True])
def test_layers_that_are_attributes_elsewhere_are_found_again(hides: bool, tmp_path: Path):
    model = Graph(hidden=hides)
    rules = [rq.Rule("first", weights=2)]
    model.quantize(rq.QuantizationPolicy("A4W4", rules=rules), verbose=False)
    Graph.hides = hides
    loaded = saved_and_loaded(model, tmp_path)
    by_name = {layer.name: layer.quantization for layer in quantized_layers(loaded)}
    assert by_name == {layer.name: layer.quantization for layer in quantized_layers(model)}
    np.testing.assert_array_equal(np.asarray(loaded(X)), np.asarray(model(X)))
