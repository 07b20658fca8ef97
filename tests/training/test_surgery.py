"""`quantize`: whole or not at all, in place, and every layer accounted for."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest
from keras import layers, ops

import keras_rq as rq
from keras_rq.layers import QuantizedLayer
from keras_rq.quantizers import Ridge, StraightThrough
from keras_rq.training import containers, surgery

pytestmark = pytest.mark.once

A4W1 = rq.QuantizationPolicy("A4W1")


@keras.saving.register_keras_serializable("surgery")
class Attention(layers.Layer):
    """A container of a user's own; its configuration says nothing of what is inside."""

    def build(self, shape: Any) -> None:
        self.mix = layers.MultiHeadAttention(2, 4, name="mix")
        self.mix.build(shape, shape)

    def call(self, x: Any) -> Any:
        return self.mix(x, x)


class Scaled(layers.Dense):
    """A subclass that computes its product itself."""

    def call(self, inputs: Any) -> Any:
        return ops.matmul(inputs, 2 * self.kernel)


class Cell(layers.SimpleRNNCell):
    """A subclass whose call is its parent's."""


def make() -> keras.Model:
    """Plain and nested layers, containers within containers, and layers that stay in float."""
    inputs = keras.Input((5, 8))
    x = layers.Dense(8, name="first")(inputs)
    x = keras.Sequential([keras.Input((5, 8)), layers.Dense(8, name="deep")], name="inner")(x)
    x = Attention(name="attention")(x)
    x = layers.LayerNormalization(name="norm")(x)
    x = Scaled(4, name="scaled")(x)
    x = layers.RNN(Cell(4, name="cell"), name="loop")(x)
    return keras.Model(inputs, layers.Dense(2, name="head")(x), name="net")


X = np.random.default_rng(0).normal(size=(2, 5, 8)).astype(np.float32)


def state(model: keras.Model) -> dict[str, Any]:
    """All that a failed call might change."""
    found: dict[str, Any] = {"predictions": np.asarray(model(X)).tobytes()}
    for i, layer in enumerate(_layers(model)):
        found[f"{i}/class"] = type(layer)
        found[f"{i}/config"] = layer.get_config()
        found[f"{i}/attributes"] = sorted(layer.__dict__)
    for variable in model.weights:
        found[variable.path] = np.asarray(variable).tobytes()
    return found


def _layers(model: Any) -> list[Any]:
    return model._flatten_layers()


# Arguments and states that are refused.


@pytest.mark.parametrize(
    ("arguments", "kind", "complaint"),
    [
        (lambda: ("model", A4W1), TypeError, "'model'"),
        (lambda: (None, A4W1), TypeError, "None"),
        (lambda: (make(), "A4W1"), TypeError, "keras_rq.QuantizationPolicy('A4W1')"),
        (lambda: (make(), None), TypeError, "Received: None"),
        (lambda: (make(), Ridge(4)), TypeError, "Received: Ridge(4"),
        (lambda: (make(), A4W1, 3), TypeError, "`filters`"),
    ],
)
def test_wrong_arguments(arguments: Any, kind: type, complaint: str):
    with pytest.raises(kind) as error:
        rq.quantize(*arguments())
    assert complaint in str(error.value)


def test_an_unbuilt_model_is_told_to_be_built():
    model = keras.Sequential([layers.Dense(2, name="late")], name="unbuilt")
    with pytest.raises(ValueError, match=r"'late' of 'unbuilt' is not built.*Call the model"):
        rq.quantize(model, A4W1)


def test_an_unbuilt_subclassed_model_is_told_to_be_built():
    with pytest.raises(ValueError, match=r"'never' is not built. Call it on"):
        rq.quantize(keras.Model(name="never"), A4W1)


def test_twice_is_refused():
    model = make()
    rq.quantize(model, A4W1, verbose=False)
    before = state(model)
    with pytest.raises(ValueError, match=r"Layer 'first' is quantized already.*in one policy"):
        rq.quantize(model, A4W1)
    assert state(model) == before


def test_a_part_quantized_before_is_refused():
    model = make()
    rq.quantize(model.get_layer("inner"), A4W1, verbose=False)
    with pytest.raises(ValueError, match=r"Layer 'inner/deep' is quantized already"):
        rq.quantize(model, A4W1)


@pytest.mark.parametrize("mode", ["int8", "int4", "float8"])
def test_keras_own_quantization_before_is_refused(mode: str):
    model = keras.Sequential([keras.Input((8,)), layers.Dense(8, name="d")])
    model.quantize(mode)
    before = [w.tobytes() for w in model.get_weights()]
    with pytest.raises(ValueError, match=rf"'{mode}.*Start from the float model"):
        rq.quantize(model, A4W1)
    assert [w.tobytes() for w in model.get_weights()] == before


def test_keras_own_quantization_afterwards_is_refused():
    model = make()
    rq.quantize(model, A4W1, verbose=False)
    before = state(model)
    with pytest.raises(ValueError, match=r"'net' is quantized by keras_rq.*mode='int8'"):
        model.quantize("int8")
    with pytest.raises(ValueError, match="quantized by keras_rq"):
        model.quantize(config=keras.quantizers.Int8QuantizationConfig())
    assert state(model) == before


def test_quantizers_that_a_layer_cannot_have_name_it():
    grouped = layers.Conv2D(4, 1, groups=2, name="grouped")
    model = keras.Sequential([keras.Input((4, 4, 8)), layers.Conv2D(8, 1, name="plain"), grouped])
    policy = rq.QuantizationPolicy(weights=Ridge(4), activations=Ridge(4, conv_block_size=3))
    with pytest.raises(ValueError, match=r"grouped' \(Conv2D\): conv_block_size=3 must divide"):
        rq.quantize(model, policy)
    assert not any(isinstance(layer, QuantizedLayer) for layer in model.layers)


# Failure.


def _fail_at(call: int, function: Any) -> Any:
    """`function` that raises when it is called for the `call`-th time."""
    calls = []

    def wrapped(*arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) == call:
            raise KeyboardInterrupt
        return function(*arguments)

    return wrapped


@pytest.mark.parametrize(
    ("name", "call"),
    [("attach", 1), ("attach", 4), ("attach", 7), ("enclose", 1), ("enclose", 2)],
)
def test_a_late_failure_leaves_the_model_as_it_was(name: str, call: int, monkeypatch: Any):
    model = make()
    before = state(model)
    function = _fail_at(call, getattr(containers, name))
    with monkeypatch.context() as patch:
        patch.setattr(containers, name, function)
        with pytest.raises(KeyboardInterrupt):
            rq.quantize(model, A4W1)
    assert state(model) == before
    rq.quantize(model, A4W1, verbose=False)  # and it can be quantized still
    assert state(model) != before


def test_a_failure_within_one_layer_leaves_it_as_it_was(monkeypatch: Any):
    model = make()
    before = state(model)
    with monkeypatch.context() as patch:
        patch.setattr(containers, "swap_class", _fail_at(1, containers.swap_class))
        with pytest.raises(KeyboardInterrupt):
            rq.quantize(model, A4W1)
    assert state(model) == before


# Which layers, and why not.


def test_every_layer_with_weights_is_accounted_for():
    model = make()
    rules = [rq.Rule("head", skip=True)]
    report = model.quantize(
        rq.QuantizationPolicy("A4W1", rules=rules),
        filters=lambda layer: layer.name != "deep",
        verbose=False,
    )
    rows = {row.path: row for row in report.rows}
    quantized = {path for path, row in rows.items() if row.weight_bits == 1}
    kept = report.kept_float
    owners = [layer for layer in _layers(model) if layer._trainable_variables]
    assert quantized | set(kept) == set(rows) == {layer.path for layer in owners}
    cell = next(path for path, row in rows.items() if row.layer == "Cell")
    assert quantized == {"first", cell} | {
        f"attention/mix/{name}" for name in ("query", "key", "value", "attention_output")
    }
    assert "register_layer(Scaled, like=keras.layers.Dense)" in kept["scaled"]
    assert "multiplies no matrix" in kept["norm"]
    assert kept["inner/deep"] == "excluded by `filters`"
    assert kept["head"] == "Rule('head') leaves it in float"


@pytest.mark.parametrize("filters", ["first|head", ["^first$", "^head$"], ("first", "head")])
def test_filters_are_searched_in_names(filters: Any):
    model = make()
    report = rq.quantize(model, A4W1, filters, verbose=False)
    assert {r.path for r in report.rows if r.weight_bits == 1} == {"first", "head"}


def test_an_embedding_without_a_quantizer_for_its_table_stays_in_float():
    model = keras.Sequential([keras.Input((3,), dtype="int32"), layers.Embedding(5, 4, name="e")])
    report = model.quantize(rq.QuantizationPolicy(activations=4), verbose=False)
    assert "Embedding multiplies none" in next(iter(report.kept_float.values()))
    assert not isinstance(model.layers[0], QuantizedLayer)


# Rotations.

IMAGE, SERIES, INDEX = keras.Input((6, 6, 8)), keras.Input((5, 8)), keras.Input((3,), dtype="int32")
ROTATED = {
    "Dense": lambda: layers.Dense(4)(SERIES),
    "EinsumDense": lambda: layers.EinsumDense("abc,bcd->ad", 4)(SERIES),
    "LSTM": lambda: layers.LSTM(4)(SERIES),
    "Conv2D": lambda: layers.Conv2D(4, 3)(IMAGE),
    "Conv2DTranspose": lambda: layers.Conv2DTranspose(4, 3)(IMAGE),
    "of whole blocks": lambda: layers.Conv2D(4, 1, groups=2)(keras.Input((2, 2, 256))),
}
NOT_ROTATED = {
    "DepthwiseConv2D": lambda: layers.DepthwiseConv2D(3)(IMAGE),
    "SeparableConv2D": lambda: layers.SeparableConv2D(4, 3)(IMAGE),
    "grouped": lambda: layers.Conv2D(4, 3, groups=2)(IMAGE),
    "Embedding": lambda: layers.Embedding(9, 8)(INDEX),
    "tied": lambda: layers.ReversibleEmbedding(9, 8)(INDEX),
    "not tied": lambda: layers.ReversibleEmbedding(9, 8, tie_weights=False)(INDEX),
}


def rotations(make: Any, policy: rq.QuantizationPolicy) -> set[tuple[Any, ...]]:
    """Of the quantizers of the one layer that `make` calls, after a save and a load."""
    output = make()
    model = keras.Model(output._keras_history.operation.input, output)
    model.quantize(policy, verbose=False)
    copy = keras.Model.from_config(model.get_config())
    found = [
        layer.quantization
        for one in (model, copy)
        for layer in _layers(one)
        if isinstance(layer, QuantizedLayer)
    ]
    assert len(found) == 2
    return {tuple(q and q.rotation for q in (one.weights, one.activations)) for one in found}


@pytest.mark.parametrize("policy", [rq.QuantizationPolicy("A1W1"), rq.presets.quest("A4W4")])
@pytest.mark.parametrize("name", [*ROTATED, *NOT_ROTATED])
def test_operands_are_rotated_where_their_product_is_the_same(
    name: str, policy: rq.QuantizationPolicy
):
    rotation = "hadamard" if name in ROTATED else None
    make = ROTATED.get(name) or NOT_ROTATED[name]
    assert rotations(make, policy) == {(rotation, rotation)}


@pytest.mark.parametrize("activations", [None, Ridge(8)], ids=["alone", "beside another"])
@pytest.mark.parametrize("name", ["Dense", *NOT_ROTATED])
def test_a_rotation_of_weights_alone_is_kept(name: str, activations: Any):
    weights = Ridge(4, rotation="hadamard")
    policy = rq.QuantizationPolicy(weights=weights, activations=activations)
    make = ROTATED.get(name) or NOT_ROTATED[name]
    assert rotations(make, policy) == {("hadamard", None)}


@pytest.mark.parametrize("name", ["first", "second"])
def test_graphs_of_a_layer_that_traces_itself_are_made_anew(name: str):
    import tensorflow as tf

    class Traced(layers.Layer):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = layers.Dense(6, name="first"), layers.Dense(4, name="second")
            self.run = tf.function(lambda x: self.first(x))

        def build(self, shape: Any) -> None:
            self.first.build(shape)
            self.second.build((*shape[:-1], 6))

        @tf.function
        def decorated(self, x: Any) -> Any:
            return self.second(x)

        def call(self, x: Any) -> Any:
            return self.decorated(self.run(x))

    x = np.random.default_rng(0).normal(size=(3, 8)).astype("float32")
    model = keras.Sequential([keras.Input((8,)), Traced()])
    before = model(x).numpy(), model.predict(x, verbose=0)
    rq.quantize(model, rq.QuantizationPolicy("A2W2"), filters=name, verbose=False)
    for was, now in zip(before, (model(x).numpy(), model.predict(x, verbose=0)), strict=True):
        assert np.abs(now - was).max() > 0.01
    rq.dequantize(model)
    np.testing.assert_array_equal(model(x).numpy(), before[0])


@keras.saving.register_keras_serializable("test_surgery")
class Own(StraightThrough):
    """An estimator that has one field and knows of no rotation."""

    def __init__(self, bits: Any) -> None:
        super().__init__(bits)

    def get_config(self) -> dict[str, Any]:
        return {"bits": self.bits}


@pytest.mark.parametrize("name", [*ROTATED, *NOT_ROTATED])
def test_estimators_without_rotation_quantize_every_layer(name: str):
    policy = rq.QuantizationPolicy(weights=Own(4), activations=Own(4))
    assert rotations(ROTATED.get(name) or NOT_ROTATED[name], policy) == {(None, None)}


class Weighted(layers.Layer):
    """Multiplies activations, and its weight is none of a matrix."""

    def build(self, shape: Any) -> None:
        self.scale = self.add_weight((), name="scale")

    def call(self, x: Any) -> Any:
        return self.scale * ops.matmul(x, ops.swapaxes(x, 1, 2))


@pytest.mark.parametrize(
    "layer, reason",
    [
        (layers.Attention(use_scale=True), "the products of Attention have no quantized"),
        (layers.AdditiveAttention(), "the products of AdditiveAttention have no quantized"),
        (Weighted(), "Weighted calls ops.matmul itself, which `matmuls` does not reach"),
        (layers.LayerNormalization(), "multiplies no matrix"),
        (layers.PReLU(), "PReLU multiplies no matrix by an operation of Keras"),
        (layers.STFTSpectrogram(frame_length=2), "STFTSpectrogram has no quantized counterpart"),
    ],
    ids=lambda value: getattr(type(value), "__name__", None),
)
def test_what_is_said_of_weights_that_are_no_kernels(layer: layers.Layer, reason: str):
    x = keras.Input((5, 8))
    takes_two = isinstance(layer, layers.Attention)
    model = keras.Model(x, layer([x, x] if takes_two else x))
    kept = model.quantize(rq.QuantizationPolicy("A4W4", matmuls=8), verbose=False).kept_float
    assert kept[layer.path].startswith(reason)


def test_what_is_done_is_printed_unless_it_is_not_wanted(capsys: Any):
    make().quantize(A4W1)
    printed = capsys.readouterr().out
    assert "net: 8 of 10 layers quantized" in printed
    assert "scaled (Scaled is a subclass of Dense" in printed
    make().quantize(A4W1, verbose=False)
    assert capsys.readouterr().out == ""


def test_layers_keep_identity_class_name_and_isinstance():
    model = make()
    before = _layers(model)
    rq.quantize(model, A4W1, verbose=False)
    assert [id(layer) for layer in _layers(model)] == [id(layer) for layer in before]
    head = model.get_layer("head")
    assert isinstance(head, layers.Dense) and isinstance(head, rq.layers.QuantizedDense)
    assert type(head).__name__ == "Dense"
    assert isinstance(model.get_layer("attention"), Attention)


def test_a_single_layer_can_be_quantized():
    layer = layers.Dense(3)
    layer.build((None, 8))
    report = rq.quantize(layer, A4W1, verbose=False)
    assert [row.weight_bits for row in report.rows] == [1]


# `model.quantize`.


def test_the_method_passes_everything_else_to_keras():
    model = keras.Sequential([keras.Input((8,)), layers.Dense(8), layers.Dense(4, name="last")])
    model.quantize("int8", filters="last")
    assert [layer.quantization_mode for layer in model.layers] == [None, "int8"]
    model = keras.Sequential([keras.Input((8,)), layers.Dense(8)])
    model.quantize(config=keras.quantizers.Int8QuantizationConfig())
    assert model.layers[0].quantization_mode == "int8"
    with pytest.raises(ValueError, match="Invalid quantization mode"):
        make().quantize("one")


def test_the_method_takes_the_policy_as_config_too():
    model = make()
    report = model.quantize(config=A4W1, filters="head", verbose=False)
    assert [row.path for row in report.rows if row.weight_bits == 1] == ["head"]


class Overriding(keras.Model):
    """A model with a `quantize` of its own, which asks the one of its base."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = layers.Dense(4)

    def call(self, x: Any) -> Any:
        return self.dense(x)

    def quantize(self, mode: Any = None, **arguments: Any) -> None:
        self.asked = mode
        super().quantize(mode, **arguments)


def test_a_model_with_a_quantize_of_its_own():
    model = Overriding()
    model(X)
    model.quantize("int8")
    assert (model.asked, model.dense.quantization_mode) == ("int8", "int8")
    model = Overriding()
    model(X)
    assert rq.quantize(model, A4W1, verbose=False).rows[0].weight_bits == 1


def test_importing_twice_changes_nothing():
    import importlib

    from keras_rq import api

    installed = keras.Model.__dict__["quantize"]
    api.install()
    importlib.reload(importlib.import_module("keras_rq"))
    assert keras.Model.__dict__["quantize"] is installed
    assert not hasattr(installed.original, "original")


def test_step_functions_are_traced_anew():
    model = make()
    before = model.predict(X, verbose=0)
    rq.quantize(model, A4W1, verbose=False)
    assert np.abs(model.predict(X, verbose=0) - before).max() > 1e-3


def test_planning_changes_nothing():
    model = make()
    before = state(model)
    plan = surgery.make_plan(model, A4W1, None)
    assert len(plan.quantized) == 8
    assert state(model) == before
