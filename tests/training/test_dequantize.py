"""`dequantize`, the way back to float layers; and what `summary` shows until then."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from gradients import BACKEND, relative_error
from keras import layers

import keras_rq as rq
from keras_rq.quantizers import Ridge
from keras_rq.training.surgery import quantized_layers

A4W1 = rq.QuantizationPolicy("A4W1", matmuls=4)
X = np.random.default_rng(0).normal(size=(4, 5, 8)).astype(np.float32)


@keras.saving.register_keras_serializable("dequantize")
class Own(layers.Layer):
    """A layer of a user's own, with a kernel and with layers inside."""

    def build(self, shape: Any) -> None:
        self.kernel = self.add_weight((shape[-1], 8), name="kernel")
        self.inner = layers.Dense(8, name="inner")
        self.inner.build((*shape[:-1], 8))

    def call(self, x: Any) -> Any:
        return self.inner(rq.layers.multiply(self, "kernel", x))


rq.register_layer(Own, products={"kernel": "matmul"})


def make() -> keras.Model:
    inputs = keras.Input((5, 8))
    x = layers.Dense(8, name="first")(inputs)
    x = layers.MultiHeadAttention(2, 4, name="mha")(x, x)
    x = keras.Sequential([keras.Input((5, 8)), Own(name="own")], name="nested")(x)
    x = layers.Bidirectional(layers.LSTM(4), name="both")(x)
    return keras.Model(inputs, layers.Dense(2, name="head")(x), name="net")


def state(model: keras.Model) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for i, layer in enumerate(model._flatten_layers()):
        found[f"{i}/class"] = type(layer)
        found[f"{i}/config"] = layer.get_config()
        # Keras notes a call, and keeps the masks of dropout (none here).
        noted = {"_called", "_dropout_mask", "_recurrent_dropout_mask"}
        found[f"{i}/attributes"] = sorted(set(layer.__dict__) - noted)
    return found


def test_the_model_is_what_it_was():
    model = make()
    expected = model.predict(X, verbose=0)
    before = state(model)
    model.quantize(A4W1, verbose=False)
    assert relative_error(model.predict(X, verbose=0), expected) > 1e-3
    assert rq.dequantize(model) is model
    assert state(model) == before
    np.testing.assert_array_equal(model.predict(X, verbose=0), expected)
    model.quantize(A4W1, verbose=False)  # and again
    assert len(quantized_layers(model)) == 11


def test_training_goes_on_with_the_same_optimizer():
    model, y = make(), np.zeros((4, 2), np.float32)
    model.quantize(A4W1, verbose=False)
    model.compile(keras.optimizers.Adam(1e-2), "mse", jit_compile=BACKEND == "jax")
    model.fit(X, y, epochs=2, verbose=0)
    optimizer, weights = model.optimizer, model.get_weights()
    kept = [keras.ops.convert_to_numpy(v) for v in optimizer.variables]
    rq.dequantize(model)
    for a, b in zip(model.get_weights(), weights, strict=True):
        np.testing.assert_array_equal(a, b)
    assert model.optimizer is optimizer
    for a, b in zip(optimizer.variables, kept, strict=True):
        np.testing.assert_array_equal(keras.ops.convert_to_numpy(a), b)
    losses = model.fit(X, y, epochs=4, verbose=0).history["loss"]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    "weights",
    [Ridge(2), Ridge(4, rotation="hadamard", block_size=4), Ridge(4, sparsity="2:4")],
    ids=["plain", "rotated", "sparse"],
)
def test_baked_kernels_are_the_quantized_ones(weights: Any):
    model = make()
    model.quantize(rq.QuantizationPolicy(weights=weights), verbose=False)
    expected = model.predict(X, verbose=0)
    rq.dequantize(model, baked=True)
    assert relative_error(model.predict(X, verbose=0), expected) < 1e-5
    assert not quantized_layers(model)
    other = make()
    other.set_weights(model.get_weights())
    np.testing.assert_array_equal(other.predict(X, verbose=0), model.predict(X, verbose=0))


@pytest.mark.once("torch")
def test_baked_tables_and_convolutions():
    inputs = keras.Input((6,), dtype="int32")
    x = layers.Embedding(9, 8)(inputs)
    x = layers.SeparableConv1D(4, 3)(layers.DepthwiseConv1D(2)(layers.Conv1D(8, 3)(x)))
    model = keras.Model(inputs, layers.Conv1DTranspose(4, 3)(x))
    model.quantize(rq.QuantizationPolicy("W3"), verbose=False)
    tokens = np.random.default_rng(0).integers(0, 9, (2, 6)).astype(np.int32)
    expected = model.predict(tokens, verbose=0)
    rq.dequantize(model, baked=True)
    assert relative_error(model.predict(tokens, verbose=0), expected) < 1e-5


@pytest.mark.once("torch")
def test_baked_with_lora():
    model = keras.Sequential([keras.Input((5, 8)), layers.Dense(4, name="d")])
    layer = model.get_layer("d")
    layer.enable_lora(2)
    layer.lora_kernel_b.assign(np.random.default_rng(0).normal(size=(2, 4)))
    model.quantize(rq.QuantizationPolicy("W4"), verbose=False)
    expected, adapter = model.predict(X, verbose=0), keras.ops.convert_to_numpy(layer.lora_kernel_b)
    rq.dequantize(model, baked=True)
    assert relative_error(model.predict(X, verbose=0), expected) < 1e-5
    np.testing.assert_array_equal(keras.ops.convert_to_numpy(layer.lora_kernel_b), adapter)


@pytest.mark.once("torch")
def test_variables_of_quantizers_go_with_them():
    model = keras.Sequential([keras.Input((8,)), layers.Dense(8), layers.Dense(2)])
    count, learned = len(model.variables), rq.quantizers.LearnedStep(4)
    policy = rq.QuantizationPolicy(weights=learned, activations=learned)
    rq.quantize(model, policy, verbose=False)
    rq.calibrate(model, X[0], verbose=False)
    model.compile("adam", "mse")
    model.fit(X[0], X[0, :, :2], verbose=0)
    moments = {v.path: keras.ops.convert_to_numpy(v) for v in model.optimizer.variables}
    with pytest.warns(UserWarning, match="new optimizer"):
        rq.dequantize(model)
    assert len(model.variables) == count
    for variable in model.optimizer.variables:
        known = [value for path, value in moments.items() if path.endswith(variable.name)]
        assert any(np.array_equal(keras.ops.convert_to_numpy(variable), one) for one in known)
    model.fit(X[0], X[0, :, :2], verbose=0)
    rq.quantize(model, rq.QuantizationPolicy("A4W1"), verbose=False)


def test_files_need_keras_rq_no_more(tmp_path: Path):
    inputs = keras.Input((5, 8))
    x = layers.MultiHeadAttention(2, 4)(inputs, inputs)
    model = keras.Model(inputs, layers.Bidirectional(layers.GRU(4))(x))
    model.quantize(A4W1, verbose=False)
    model = rq.dequantize(model)
    model.save(tmp_path / "m.keras")
    np.save(tmp_path / "x.npy", X)
    script = (
        "import sys, keras, numpy as np\n"
        "model = keras.saving.load_model(sys.argv[1])\n"
        "assert not any(name.startswith('keras_rq') for name in sys.modules)\n"
        "np.save(sys.argv[3], model.predict(np.load(sys.argv[2]), verbose=0))\n"
    )
    paths = [str(tmp_path / name) for name in ("m.keras", "x.npy", "y.npy")]
    environment = {**os.environ, "KERAS_BACKEND": BACKEND}
    command = [sys.executable, "-c", script, *paths]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    np.testing.assert_allclose(np.load(paths[2]), model.predict(X, verbose=0), rtol=1e-6)


@pytest.mark.once("torch")
def test_layers_made_quantized():
    quantization = rq.policy.LayerQuantization(Ridge(4), None)
    model = keras.Sequential(
        [keras.Input((8,)), rq.layers.QuantizedDense(4, quantization=quantization)]
    )
    rq.dequantize(model)
    assert type(model.layers[0]) is layers.Dense


@pytest.mark.once("torch")
def test_what_is_refused():
    with pytest.raises(TypeError, match="Received: 'model'"):
        rq.dequantize("model")
    with pytest.raises(ValueError, match=r"'net' has no layer that keras_rq quantized"):
        rq.dequantize(make())


# Summaries.


def summary(model: keras.Model, **arguments: Any) -> str:
    lines: list[str] = []
    model.summary(print_fn=lambda text, **_: lines.append(text), line_length=120, **arguments)
    return "\n".join(lines)


@pytest.mark.once("torch")
def test_summaries_show_what_is_quantized(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "130")
    model = make()
    before = summary(model, expand_nested=True)
    rules = [rq.Rule("head", skip=True), rq.Rule("first", activations=None)]
    model.quantize(rq.QuantizationPolicy("A4W1", matmuls=8, rules=rules), verbose=False)
    shown = summary(model, expand_nested=True)
    rows = {line.split()[1]: line for line in shown.splitlines() if "(" in line and "│" in line}
    assert "72 W1" in rows["first"]
    assert "288 M8/A4W1" in rows["mha"]
    assert "136 A4W1" in rows["└"]
    assert "416 A4W1" in rows["both"]
    assert "W" not in rows["head"].split(")")[-1]
    assert model.count_params() == sum(np.prod(w.shape) for w in model.weights)
    rq.dequantize(model)
    assert summary(model, expand_nested=True) == before


@pytest.mark.once("torch")
def test_the_count_is_a_number():
    layer = layers.Dense(4)
    layer.build((None, 8))
    rq.quantize(layer, A4W1, verbose=False)
    count = layer.count_params()
    assert (count, f"{count}", f"{count:d}", f"{count:,}") == (36, "36", "36", "36 A4W1")
    table = layers.Embedding(9, 4)
    table.build((None,))
    rq.quantize(table, A4W1, verbose=False)
    assert f"{table.count_params():,}" == "36 W1"
