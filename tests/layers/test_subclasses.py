"""Subclasses that nobody registered: which are like their parents, and what is said of others."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from gradients import BACKEND, compiled, to_numpy
from keras import layers, ops

import keras_rq as rq
from keras_rq.layers import quantized_class
from keras_rq.layers.base import is_quantized
from keras_rq.training.surgery import quantized_layers

register = keras.saving.register_keras_serializable("alike")
A4W4 = rq.QuantizationPolicy("A4W4")
X = np.random.default_rng(0).normal(size=(3, 5, 8)).astype(np.float32)


@register
class Defaults(layers.Dense):
    """Sets an argument, and has a method that computes nothing of the product."""

    def __init__(self, units: int, **kwargs: Any) -> None:
        super().__init__(units, **{"use_bias": False, **kwargs})

    def penalty(self, y: Any) -> Any:
        return ops.sum(ops.square(y))


@register
class Around(layers.EinsumDense):
    """Does something before and after."""

    def call(self, inputs: Any, training: bool | None = None) -> Any:
        return ops.tanh(super().call(inputs / 2.0, training=training))


class Mixed:
    """A mix-in that comes before the Keras class."""

    def call(self, inputs: Any) -> Any:
        return 0.5 * super().call(inputs)


@register
class Halved(Mixed, layers.Conv1D):
    """Its call is that of the mix-in."""


@register
class Same(layers.ReversibleEmbedding):
    """As in KerasHub."""


@register
class Cached(layers.MultiHeadAttention):
    """Attention to keys that the layer is given; as in KerasHub."""

    def call(
        self,
        query: Any,
        value: Any,
        key: Any = None,
        cache: Any = None,
        training: bool | None = None,
    ) -> Any:
        query = self._query_dense(query)
        if cache is None:
            cache = self._key_dense(value), self._value_dense(value)
        output, _ = self._compute_attention(query, *cache, training=training)
        return self._output_dense(output)


def model() -> keras.Model:
    inputs = keras.Input((5,), dtype="int32")
    table = Same(9, 8, name="table")
    x = Defaults(8, name="defaults")(table(inputs))
    x = Around("abc,cd->abd", (5, 8), name="around")(x)
    x = Cached(2, 4, name="cached")(x, x)
    x = Halved(8, 3, padding="same", name="halved")(x)
    return keras.Model(inputs, table(x, reverse=True), name="alike")


TOKENS = np.random.default_rng(1).integers(0, 9, (4, 5)).astype(np.int32)


def test_they_are_trained_and_saved_as_their_parents_are(tmp_path: Path):
    one = model()
    policy = rq.QuantizationPolicy("A4W4", matmuls=8)
    report = one.quantize(policy, verbose=False)
    assert not report.kept_float
    assert {row.layer for row in report.rows} >= {"Same", "Defaults", "Around", "Cached", "Halved"}
    one.compile(
        keras.optimizers.Adam(1e-2),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        jit_compile=BACKEND == "jax",
    )
    losses = one.fit(TOKENS, TOKENS, epochs=4, verbose=0).history["loss"]
    assert losses[-1] < losses[0]
    one.save(tmp_path / "m.keras")
    loaded = keras.saving.load_model(tmp_path / "m.keras")
    assert [(type(a), a.quantization) for a in quantized_layers(loaded)] == [
        (type(a), a.quantization) for a in quantized_layers(one)
    ]
    expected = one.predict(TOKENS, verbose=0)
    np.testing.assert_array_equal(loaded.predict(TOKENS, verbose=0), expected)
    rq.dequantize(one)
    assert type(one.get_layer("halved")) is Halved
    clone = keras.models.clone_model(loaded)
    assert type(clone.get_layer("defaults")) is type(loaded.get_layer("defaults"))


@pytest.mark.forward
@pytest.mark.parametrize(
    ("make", "base", "arguments", "change"),
    [
        (Defaults, layers.Dense, {"units": 4, "use_bias": False}, lambda x, f: f(x)),
        (
            Around,
            layers.EinsumDense,
            {"equation": "abc,cd->abd", "output_shape": (5, 4)},
            lambda x, f: np.tanh(f(x / 2.0)),
        ),
        (
            Halved,
            layers.Conv1D,
            {"filters": 4, "kernel_size": 3, "use_bias": False},
            lambda x, f: 0.5 * f(x),
        ),
    ],
    ids=["Dense", "EinsumDense", "Conv1D"],
)
def test_they_compute_what_their_parents_compute(make: Any, base: Any, arguments: Any, change: Any):
    layer, plain = make(**arguments), base(**arguments)
    for one in (layer, plain):
        one.build(X.shape)
        one.set_weights(layer.get_weights())
        rq.quantize(one, A4W4, verbose=False)
    run = [compiled(lambda x, f=f: f(x)) for f in (layer, plain)]
    expected = change(X, lambda x: to_numpy(run[1](ops.convert_to_tensor(x))))
    np.testing.assert_allclose(to_numpy(run[0](ops.convert_to_tensor(X))), expected, atol=1e-5)


class Itself(layers.Dense):
    def call(self, inputs: Any) -> Any:
        return ops.matmul(inputs, ops.ones((8, 4)))


class Operator(layers.Dense):
    def call(self, inputs: Any) -> Any:
        return super().call(inputs) + self.more(inputs)

    def more(self, inputs: Any) -> Any:
        return inputs @ ops.ones((8, 4))


class Reading(layers.Dense):
    def call(self, inputs: Any) -> Any:
        return super().call(inputs) + ops.sum(self.kernel)


class Renewed(layers.Dense):
    @property
    def kernel(self) -> Any:
        return ops.sign(self._kernel)


class Alone(layers.Dense):
    def call(self, inputs: Any) -> Any:
        return inputs


class Weighted(layers.Dense):
    def build(self, input_shape: Any) -> None:
        super().build(input_shape)
        self.gain = self.add_weight((), name="gain")

    def call(self, inputs: Any) -> Any:
        return self.gain * super().call(inputs)


class Convolving(layers.Conv1D):
    def convolution_op(self, inputs: Any, kernel: Any) -> Any:
        return super().convolution_op(inputs, kernel)


class Attending(layers.MultiHeadAttention):
    def call(self, query: Any, value: Any, key: Any = None) -> Any:
        return self._output_dense(self._query_dense(query))


class Otherwise(layers.MultiHeadAttention):
    def _compute_attention(self, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> Any:
        return value, None


@pytest.mark.once
@pytest.mark.parametrize(
    ("cls", "why"),
    [
        (Itself, r"whose call\(\) calls ops.matmul"),
        (Operator, r"whose more\(\) calls @"),
        (Reading, r"whose call\(\) uses 'kernel' itself"),
        (Renewed, r"that replaces its 'kernel'"),
        (Alone, r"whose call\(\) does without super\(\).call\(\)"),
        (Weighted, r"that has weights of its own"),
        (Convolving, r"that replaces convolution_op\(\)"),
        (Attending, r"that replaces call\(\)"),
        (Otherwise, r"whose _compute_attention\(\) does without super\(\)._compute_attention\(\)"),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "",
)
def test_what_speaks_against_the_others_is_said(cls: type, why: str):
    assert quantized_class(cls) is None
    base = cls.__mro__[1]
    given = {"Dense": (4,), "Conv1D": (4, 3), "MultiHeadAttention": (2, 4)}[base.__name__]
    inputs = keras.Input((5, 8))
    layer = cls(*given, name="odd")
    outputs = layer(inputs, inputs) if base is layers.MultiHeadAttention else layer(inputs)
    one = keras.Model(inputs, outputs)
    report = one.quantize(rq.QuantizationPolicy("W4", matmuls=8), verbose=False)
    assert not is_quantized(layer)
    (reason,) = [report.kept_float["odd"]]
    assert f"{cls.__name__} is a subclass of {base.__name__} " in reason
    assert re.search(why, reason), reason
    assert f"register_layer({cls.__name__}, like=keras.layers.{base.__name__})" in reason


@pytest.mark.once
def test_registration_overrules_what_the_code_says():
    class Overruled(Reading):
        pass

    assert quantized_class(Overruled) is None
    rq.register_layer(Overruled, like=layers.Dense)
    assert quantized_class(Overruled) is not None


@pytest.mark.once
def test_a_class_that_is_not_what_it_was_when_saved_is_named():
    saved = keras.saving.serialize_keras_object(_quantized(Defaults(4)))
    saved["config"]["keras_class"] = {"class_name": "Alone", "module": __name__}
    register(Alone)
    saved["config"]["keras_class"]["registered_name"] = "alike>Alone"
    with pytest.raises(ValueError, match=r"Alone.* as it is now is not known"):
        keras.saving.deserialize_keras_object(saved)


def _quantized(layer: Any) -> Any:
    layer.build(X.shape)
    rq.quantize(layer, A4W4, verbose=False)
    return layer


class Table(layers.Layer):
    """Holds a table of positions, and adds it."""

    def build(self, shape: Any) -> None:
        self.positions = self.add_weight(shape[1:], name="positions")

    def call(self, x: Any) -> Any:
        return x + self.positions


@pytest.mark.once
def test_a_layer_that_multiplies_nothing_is_told_how_its_table_can_be_quantized():
    inputs = keras.Input((5, 8))
    one = keras.Model(inputs, Table(name="table")(inputs))
    reason = one.quantize(A4W4, verbose=False).kept_float["table"]
    assert "multiplies no matrix of its own" in reason
    assert "keras_rq.register_layer(Table, products={'positions': -1})" in reason
    rq.register_layer(Table, products={"positions": -1})
    again = keras.Model(inputs, Table(name="table")(inputs))
    assert not again.quantize(A4W4, verbose=False).kept_float
    table = again.get_weights()[0]
    expected = to_numpy(rq.ops.fake_quantize(table, rq.quantizers.Ridge(4)))
    np.testing.assert_allclose(to_numpy(again(X * 0))[0], expected, atol=1e-6)
