"""Models with products of two activations: training, files, policies, reports and export."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from gradients import BACKEND, relative_error
from keras import layers, ops

import keras_rq as rq
from keras_rq.policy import LayerQuantization
from keras_rq.quantizers import Ridge
from keras_rq.training.surgery import quantized_layers

ROUNDING = 1e-5
M4 = rq.QuantizationPolicy(matmuls=4)


def draw(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


X = draw(0, 2, 5, 8)


@keras.saving.register_keras_serializable("matmuls")
class Attend(layers.Layer):
    """Attention as users write it, on drop-ins."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.scores = rq.layers.Einsum("btnh,bsnh->bnts", name="scores")
        self.mix = rq.layers.Einsum("bnts,bsnh->btnh", keep_zeros=True, name="mix")

    def build(self, shape: Any) -> None:
        self.qkv = layers.EinsumDense("btf,fkh->btkh", (None, 6, 4), name="qkv")
        self.qkv.build(shape)
        self.scores.build((shape[0], shape[1], 2, 4), (shape[0], shape[1], 2, 4))
        self.mix.build((shape[0], 2, shape[1], shape[1]), (shape[0], shape[1], 2, 4))

    def call(self, x: Any) -> Any:
        q, k, v = ops.split(self.qkv(x), 3, axis=2)
        weights = ops.softmax(self.scores(q, k))
        return ops.reshape(self.mix(weights, v), (-1, ops.shape(x)[1], 8))

    def compute_output_shape(self, shape: Any) -> Any:
        return (*shape[:2], 8)


def model(length: int | None = 5) -> keras.Model:
    inputs = keras.Input((length, 8))
    x = layers.MultiHeadAttention(2, 4, name="mha")(inputs, inputs, use_causal_mask=True)
    x = layers.GroupQueryAttention(4, 4, 2, name="gqa")(x, inputs)
    x = Attend(name="attend")(x)
    return keras.Model(inputs, layers.Dense(2, name="head")(x), name="net")


POLICY = rq.QuantizationPolicy("A8W4", matmuls=4)


def fit(one: keras.Model, epochs: int = 8, jit_compile: bool = BACKEND == "jax") -> list[float]:
    one.compile(keras.optimizers.Adam(1e-2), "mse", jit_compile=jit_compile)
    return one.fit(X, draw(2, 2, 5, 2), epochs=epochs, verbose=0).history["loss"]


@pytest.fixture(scope="module")
def trained() -> keras.Model:
    keras.utils.set_random_seed(0)
    one = model()
    report = one.quantize(POLICY, verbose=False)
    assert not report.kept_float
    before = [w.copy() for w in one.get_weights()]
    losses = fit(one)
    assert losses[-1] < 0.9 * losses[0]
    moved = [np.any(a != b) for a, b in zip(before, one.get_weights(), strict=True)]
    # The bias of keys shifts the scores of a query alike, and with them nothing.
    assert sum(moved) >= len(moved) - 2
    return one


def test_files(trained: keras.Model, tmp_path: Path):
    trained.save(tmp_path / "m.keras")
    loaded = keras.saving.load_model(tmp_path / "m.keras")
    saved = [layer.quantization for layer in quantized_layers(trained)]
    assert [layer.quantization for layer in quantized_layers(loaded)] == saved
    assert sum(q.matmuls is not None for q in saved) == 4
    np.testing.assert_array_equal(loaded.predict(X, verbose=0), trained.predict(X, verbose=0))
    clone = keras.models.clone_model(trained)
    clone.set_weights(trained.get_weights())
    np.testing.assert_array_equal(clone.predict(X, verbose=0), trained.predict(X, verbose=0))
    fresh = model()
    trained.save_weights(tmp_path / "q.weights.h5")
    fresh.load_weights(tmp_path / "q.weights.h5")
    for a, b in zip(fresh.get_weights(), trained.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


def test_products_alone_are_saved_too(tmp_path: Path):
    one = model()
    one.quantize(M4, verbose=False)
    one.save(tmp_path / "m.keras")
    loaded = keras.saving.load_model(tmp_path / "m.keras")
    assert len(quantized_layers(loaded)) == 4
    np.testing.assert_array_equal(loaded.predict(X, verbose=0), one.predict(X, verbose=0))


def test_unknown_lengths():
    one = model(length=None)
    one.quantize(POLICY, verbose=False)
    assert np.isfinite(fit(one, epochs=1)).all()
    longer = draw(3, 2, 9, 8)
    assert one.predict(longer, verbose=0).shape == (2, 9, 2)
    same = model()
    same.set_weights(one.get_weights())
    same.quantize(POLICY, verbose=False)
    assert relative_error(one.predict(X, verbose=0), same.predict(X, verbose=0)) < ROUNDING


def test_mixed_precision():
    previous = keras.config.dtype_policy()
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        one = model()
        one.quantize(POLICY, verbose=False)
        losses = fit(one)
    finally:
        keras.config.set_dtype_policy(previous)
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.once
def test_compiled_by_xla():
    one = model()
    one.quantize(POLICY, verbose=False)
    losses = fit(one, jit_compile=True)
    assert losses[-1] < 0.9 * losses[0]


# Policies and reports.


@pytest.mark.once
def test_reports():
    one = model()
    report = one.quantize(POLICY, verbose=False)
    rows = {row.path: row for row in report.rows if row.weight_bits is None}
    assert {path: row.activation_bits for path, row in rows.items()} == {
        "mha": 4,
        "gqa": 4,
        "attend/scores": 4,
        "attend/mix": 4,
    }
    assert rows["mha"].energy == 4 * 4 * 2 * (2 * 5 * 5 * 4)
    assert rows["gqa"].energy == 4 * 4 * 2 * (4 * 5 * 5 * 4)
    assert rows["attend/scores"].energy == rows["attend/mix"].energy == 4 * 4 * 2 * 5 * 5 * 4
    assert all(row.kernel_elements == row.nbytes == 0 for row in rows.values())
    assert "mha" in str(report) and report.summary().startswith("net: 14 of 14")
    assert rq.report(one).to_dict() == report.to_dict()


@pytest.mark.once
def test_unknown_sizes_have_no_energy():
    report = model(length=None).quantize(M4, verbose=False)
    assert {row.energy for row in report.rows if row.activation_bits == 4} == {None}


@pytest.mark.once
def test_rules_and_filters():
    rules = [rq.Rule("mha", matmuls=8), rq.Rule("gqa", skip=True), rq.Rule("scores", matmuls=None)]
    one = model()
    policy = rq.QuantizationPolicy("W4", matmuls=4, rules=rules)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = one.quantize(policy, filters=lambda layer: layer.name != "mix", verbose=False)
    assert one.get_layer("mha").quantization == LayerQuantization(None, None, matmuls=Ridge(8))
    kept = report.kept_float
    assert kept["gqa"] == "Rule('gqa') leaves its products of activations in float"
    assert kept["attend/scores"].startswith("Rule('scores') leaves its products")
    assert kept["attend/mix"] == "excluded by `filters`"
    assert one.get_layer("mha").query_dense.quantization.matmuls is None


@pytest.mark.once
def test_a_rule_alone_may_quantize_products():
    one = model()
    rules = [rq.Rule(layers.MultiHeadAttention, matmuls=8)]
    report = one.quantize(rq.QuantizationPolicy("W4", rules=rules), verbose=False)
    assert [row.path for row in report.rows if row.activation_bits == 8] == ["mha"]


@pytest.mark.once
def test_without_matmuls_attention_is_as_it_was():
    one = model()
    one.quantize(rq.QuantizationPolicy("W4"), verbose=False)
    assert not isinstance(one.get_layer("mha"), rq.layers.QuantizedLayer)


@pytest.mark.once
def test_flash_attention_is_not_used_and_that_is_said():
    inputs = keras.Input((5, 8))
    x = layers.MultiHeadAttention(2, 4, flash_attention=True, name="fused")(inputs, inputs)
    one = keras.Model(inputs, x)
    with pytest.warns(UserWarning, match=r"Flash attention.*not used in 1 layers: fused"):
        one.quantize(M4, verbose=False)
    assert np.isfinite(one.predict(X, verbose=0)).all()


class Fused(layers.Layer):
    """Attention on Keras's fused operation."""

    def call(self, x: Any) -> Any:
        heads = ops.expand_dims(x, 2)
        return ops.dot_product_attention(heads, heads, heads)[:, :, 0]


class Operators(layers.Layer):
    """A product in a helper, by the operator; and drop-ins whose names are those of operations."""

    def __init__(self) -> None:
        super().__init__(name="operators")
        self.matmul = rq.layers.Matmul(name="known")

    def call(self, x: Any) -> Any:
        return self._mixed(self.matmul(x, ops.transpose(x, (0, 2, 1))), x)

    def _mixed(self, weights: Any, x: Any) -> Any:
        return weights @ x


@pytest.mark.once
def test_products_that_are_out_of_reach_are_named():
    inputs = keras.Input((5, 8))
    x = Operators()(Fused(name="fused")(inputs))

    class Unsaid(layers.MultiHeadAttention):
        def _masked_softmax(self, *args: Any) -> Any:
            return super()._masked_softmax(*args)

    x = Unsaid(2, 4, name="unsaid")(x, x)
    x = layers.Dot((2, 2), name="dot")([x, layers.Attention(name="attention")([x, x])])
    one = keras.Model(inputs, x)
    kept = one.quantize(M4, verbose=False).kept_float
    assert "Fused calls ops.dot_product_attention itself" in kept["fused"]
    assert "Operators calls @ itself" in kept["operators"] and "matmul," not in kept["operators"]
    assert "register_layer(Unsaid, like=keras.layers.MultiHeadAttention)" in kept["unsaid"]
    assert all("no quantized counterpart" in kept[name] for name in ("dot", "attention"))
    assert not model().quantize(rq.QuantizationPolicy("W4"), verbose=False).kept_float


@pytest.mark.once
def test_export(tmp_path: Path):
    pytest.importorskip("ai_edge_litert")
    inputs = keras.Input((5, 8), name="x")
    x = layers.MultiHeadAttention(2, 4, name="mha")(inputs, inputs)
    one = keras.Model({"x": inputs}, x)
    one.quantize(rq.QuantizationPolicy("A8W4", matmuls=8), verbose=False)
    result = rq.export(one, tmp_path / "m.tflite", inputs={"x": X}, verbose=False)
    reasons = {p.path: p.reason for p in result.products if p.kernel == "float"}
    assert set(reasons) == {"mha/scores", "mha/outputs"}
    assert set(reasons.values()) == {"it is a product of two activations"}
