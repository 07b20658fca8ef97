"""Tiny models of every kind, which hold every supported layer between them."""

from __future__ import annotations

from typing import Any, NamedTuple

import keras
import numpy as np
from keras import layers, ops


class Member(NamedTuple):
    """A model and something to train it on."""

    model: keras.Model
    x: Any
    y: np.ndarray

    def predict(self, model: keras.Model | None = None) -> np.ndarray:
        return (model or self.model).predict(self.x, verbose=0)

    def fit(self, epochs: int = 1, model: keras.Model | None = None) -> list[float]:
        history = (model or self.model).fit(
            self.x, self.y, epochs=epochs, batch_size=8, shuffle=False, verbose=0
        )
        return history.history["loss"]

    def compile(self, jit_compile: bool = keras.backend.backend() == "jax") -> None:
        """Compiled steps take long to make: see test_compiled.py."""
        self.model.compile(keras.optimizers.Adam(2e-2), "mse", jit_compile=jit_compile)


def _numbers(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(16, *shape)).astype(np.float32)


def _targets() -> np.ndarray:
    return np.random.default_rng(1).normal(size=(16, 2)).astype(np.float32)


def images() -> Member:
    """All layers in two dimensions, with a float layer in between; Functional."""
    inputs = keras.Input((6, 6, 3), name="pixels")
    x = layers.Conv2D(8, 3, padding="same", strides=2, use_bias=False, name="conv")(inputs)
    x = layers.BatchNormalization(name="norm")(x)
    x = layers.ReLU()(x)
    x = layers.DepthwiseConv2D(2, padding="same", name="depthwise")(x)
    x = layers.SeparableConv2D(8, 2, name="separable")(x)
    x = layers.Conv2DTranspose(4, 2, name="transposed")(x)
    x = layers.GlobalAveragePooling2D()(x)
    outputs = layers.Dense(2, name="head")(x)
    return Member(keras.Model(inputs, outputs, name="images"), _numbers(6, 6, 3), _targets())


def tokens() -> Member:
    """All layers in one dimension, attention, and an embedding; Functional."""
    inputs = keras.Input((6,), dtype="int32", name="tokens")
    x = layers.Embedding(9, 8, name="embedding")(inputs)
    x = layers.Conv1D(8, 3, padding="causal", name="conv")(x)
    x = layers.DepthwiseConv1D(2, name="depthwise")(x)
    x = layers.SeparableConv1D(8, 2, name="separable")(x)
    x = layers.Conv1DTranspose(8, 2, name="transposed")(x)
    x = layers.MultiHeadAttention(2, 4, use_bias=False, name="attention")(x, x)
    x = layers.GroupQueryAttention(4, 4, 2, use_bias=False, name="grouped")(x, x)
    x = layers.EinsumDense("abc,cd->abd", (5, 6), bias_axes="d", name="einsum")(x)
    x = layers.TimeDistributed(layers.Dense(4, name="inner"), name="steps")(x)
    outputs = layers.Dense(2, name="head")(layers.Flatten()(x))
    x = np.random.default_rng(0).integers(0, 9, (16, 6)).astype(np.int32)
    return Member(keras.Model(inputs, outputs, name="tokens"), x, _targets())


def volumes() -> Member:
    """All layers in three dimensions; Sequential."""
    model = keras.Sequential(
        [
            keras.Input((3, 4, 3, 2)),
            layers.Conv3D(4, 2, padding="same", activation="relu", name="conv"),
            layers.Conv3DTranspose(2, 2, name="transposed"),
            layers.Flatten(),
            layers.Dense(2, name="head"),
        ],
        name="volumes",
    )
    return Member(model, _numbers(3, 4, 3, 2), _targets())


def sequences() -> Member:
    """Recurrent layers: masked, in both directions, stacked and convolutional; Functional."""
    inputs = keras.Input((4,), dtype="int32", name="tokens")
    x = layers.Embedding(9, 8, mask_zero=True, name="embedding")(inputs)
    x = layers.Bidirectional(layers.LSTM(3, return_sequences=True), name="both")(x)
    cells = [layers.SimpleRNNCell(4), layers.GRUCell(4)]
    x = layers.RNN(cells, name="stack")(x)
    x = layers.Reshape((2, 2, 1), name="frames")(x)
    x = layers.ConvLSTM1D(2, 3, padding="same", name="frames_lstm")(x)
    outputs = layers.Dense(2, name="head")(layers.Flatten()(x))
    x = np.random.default_rng(0).integers(0, 9, (16, 4)).astype(np.int32)
    return Member(keras.Model(inputs, outputs, name="sequences"), x, _targets())


def nested() -> Member:
    """A Sequential model and a layer that is called twice, inside a Functional model."""
    inner = keras.Sequential([keras.Input((8,)), layers.Dense(8, "relu", name="first")], name="in")
    shared = layers.Dense(8, name="shared")
    inputs = keras.Input((8,))
    x = shared(shared(inner(inputs)))
    return Member(
        keras.Model(inputs, layers.Dense(2, name="head")(x), name="nested"), _numbers(8), _targets()
    )


@keras.saving.register_keras_serializable("zoo")
class Blocks(keras.Model):
    """Layers in a list and in a dictionary, of which its configuration says nothing."""

    def __init__(self, width: int = 8, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.width = width
        self.stack = [layers.Dense(width, "relu"), layers.Dense(width)]
        self.heads = {
            "mix": layers.MultiHeadAttention(2, 4, use_bias=False),
            "out": layers.Dense(2),
        }

    def call(self, inputs: Any) -> Any:
        x = inputs
        for layer in self.stack:
            x = layer(x)
        x = x + self.heads["mix"](x, x)
        return self.heads["out"](ops.mean(x, axis=1))

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "width": self.width}


def subclassed() -> Member:
    member = Member(Blocks(name="blocks"), _numbers(3, 8), _targets())
    member.model(member.x[:1])
    return member


MAKERS = {f.__name__: f for f in (images, tokens, volumes, sequences, nested, subclassed)}
