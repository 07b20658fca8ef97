"""Layers as users write them, in a module that another process can import."""

from __future__ import annotations

from typing import Any

import keras
from keras import layers, ops

import keras_rq as rq

register = keras.saving.register_keras_serializable("own")


@register
class Plain(layers.Dense):
    """A subclass that changes nothing of the product."""


@register
class Scaled(layers.Dense):
    """A subclass that does something to the result, with a constructor of its own."""

    def __init__(self, units: int, gain: float, name: str | None = None, **_: Any) -> None:
        super().__init__(units, use_bias=False, name=name)
        self.gain = gain

    def call(self, inputs: Any, training: bool | None = None) -> Any:
        return self.gain * super().call(inputs)

    def get_config(self) -> dict[str, Any]:
        return {"units": self.units, "gain": self.gain, "name": self.name}


@register
class Selfish(layers.Dense):
    """A subclass that multiplies its kernel without its parent."""

    def call(self, inputs: Any) -> Any:
        return ops.matmul(inputs, self.kernel)


@register
class Tied(layers.Embedding):
    """A table that is looked up, and multiplied in reverse; as in KerasHub."""

    def call(self, inputs: Any, reverse: bool = False) -> Any:
        if reverse:
            return ops.matmul(inputs, ops.transpose(ops.convert_to_tensor(self.embeddings)))
        return super().call(inputs)

    def compute_output_spec(self, inputs: Any, reverse: bool = False) -> Any:
        last = self.input_dim if reverse else self.output_dim
        shape = (*inputs.shape[:-1], last) if reverse else (*inputs.shape, last)
        return keras.KerasTensor(shape, dtype=self.compute_dtype)


@register
class Cell(layers.GRUCell):
    """A cell of a user's own."""


@register
class LowRank(layers.Layer):
    """Two products, and a constructor that Keras saves by itself."""

    def __init__(self, units: int, rank: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.units, self.rank = units, rank

    def build(self, input_shape: Any) -> None:
        self.down = self.add_weight((input_shape[-1], self.rank), name="down")
        self.up = self.add_weight((self.rank, self.units), name="up")
        self.gate = None

    def call(self, x: Any) -> Any:
        return x[..., : self.units] + self._raised(rq.layers.multiply(self, "down", x))

    def _raised(self, x: Any) -> Any:
        return rq.layers.multiply(self, "up", x)

    def compute_output_shape(self, input_shape: Any) -> Any:
        return (*input_shape[:-1], self.units)


@register
class Mixer(layers.Layer):
    """A product in Einstein notation, and a layer inside."""

    def build(self, input_shape: Any) -> None:
        _, tokens, features = input_shape
        self.kernel = self.add_weight((tokens, tokens), name="kernel")
        self.inner = layers.Dense(features, name="inner")
        self.inner.build(input_shape)

    def call(self, x: Any) -> Any:
        return self.inner(rq.layers.multiply(self, "kernel", x))


@register
class Foreign(layers.Layer):
    """A layer whose `call` knows nothing of keras_rq."""

    def build(self, input_shape: Any) -> None:
        self.kernel = self.add_weight((input_shape[-1], 4), name="kernel")
        self.bias = self.add_weight((self.kernel.shape[-1],), name="bias")

    def call(self, x: Any) -> Any:
        return ops.add(ops.matmul(x, self.kernel), self.bias)


@register
class Unheard(Foreign):
    """Registered as if it called `keras_rq.layers.multiply`."""


class Unregistered(layers.Layer):
    """Holds a matrix, and nobody said what for."""

    def build(self, input_shape: Any) -> None:
        self.matrix = self.add_weight((input_shape[-1], 4), name="matrix")

    def call(self, x: Any) -> Any:
        return ops.matmul(x, self.matrix)


rq.register_layer(Plain, like=layers.Dense)
rq.register_layer(Scaled, like=layers.Dense)
rq.register_layer(Selfish, like=layers.Dense)
rq.register_layer(Tied, like=layers.Embedding)
rq.register_layer(Cell, like=layers.GRUCell)
rq.register_layer(LowRank, products={"down": "matmul", "up": "matmul", "gate": "matmul"})
rq.register_layer(Mixer, products={"kernel": lambda layer: "btf,tu->buf"})
rq.register_layer(Foreign, products={"kernel": 0})
rq.register_layer(Unheard, products={"kernel": "matmul"})


def model() -> keras.Model:
    """All of them that can be quantized on both sides, in one model."""
    inputs = keras.Input((6,), dtype="int32")
    table = Tied(9, 8, name="table")
    x = Mixer(name="mixer")(table(inputs))
    x = LowRank(8, 4, name="low_rank")(x)
    x = Plain(8, "relu", name="plain")(x)
    x = Scaled(8, 0.5, name="scaled")(x)
    x = layers.RNN(Cell(8), name="loop")(x)
    x = table(x, reverse=True)
    return keras.Model(inputs, Foreign(name="foreign")(x), name="own")
