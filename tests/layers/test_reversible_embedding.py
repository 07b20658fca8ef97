"""A table that is looked up and multiplied in reverse, with weights tied or not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from gradients import BACKEND, compiled, relative_error, to_numpy, value_and_gradient
from keras import layers, ops
from layer_cases import SCHEMES, Operand, Scheme, away_from_ties, quantized

import keras_rq as rq
from keras_rq.quantizers import LearnedStep, Ridge

ROUNDING = 2e-6
ROWS, WIDTH = 7, 16
IDS = np.array([[0, 3, 3], [6, 1, 0]], np.int32)
ALONG = Operand((-1,))


def policy(scheme: Scheme, **more: Any) -> rq.QuantizationPolicy:
    return rq.QuantizationPolicy(weights=scheme.weights, activations=scheme.activations, **more)


def make(scheme: Scheme, **arguments: Any) -> Any:
    """A layer whose tables lie away from rounding ties."""
    layer = layers.ReversibleEmbedding(ROWS, WIDTH, name="table", **arguments)
    layer.build((None, 3))
    table = away_from_ties(lambda r: r.normal(size=(ROWS, WIDTH)), scheme.weights, ALONG)
    tables = [table]
    if not layer.tie_weights:
        tables.append(table[::-1].T)
    layer.set_weights(tables)
    rq.quantize(layer, policy(scheme), verbose=False)
    return layer


@pytest.mark.forward
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "apart"])
@pytest.mark.parametrize("name", ["A4W1", "blocks", "tensor", "rotated"])
def test_both_ways(name: str, tied: bool):
    layer = make(SCHEMES[name], tie_weights=tied, logit_soft_cap=5.0)
    scheme = Scheme(name, layer.quantization.weights, layer.quantization.activations)
    rows = quantized(layer.get_weights()[0], scheme.weights, ALONG).y
    np.testing.assert_allclose(to_numpy(layer(IDS)), rows[IDS], atol=ROUNDING * np.abs(rows).max())
    x = away_from_ties(lambda r: r.normal(size=(2, 3, WIDTH)), scheme.activations, ALONG)
    matrix = rows.T if tied else rows[::-1].T
    logits = quantized(x, scheme.activations, ALONG).y @ matrix
    received = to_numpy(compiled(lambda x: layer(x, reverse=True))(ops.convert_to_tensor(x)))
    assert relative_error(received, 5.0 * np.tanh(logits / 5.0)) < 2 * ROUNDING


@pytest.mark.forward
def test_mask_and_dtype_of_the_way_back():
    layer = make(SCHEMES["W2"], mask_zero=True, reverse_dtype="float32", dtype="mixed_bfloat16")
    rows = layer(ops.convert_to_tensor(IDS))
    assert keras.backend.standardize_dtype(rows.dtype) == "bfloat16"
    mask = keras.src.backend.get_keras_mask(rows)
    np.testing.assert_array_equal(ops.convert_to_numpy(mask), IDS != 0)
    x = np.random.default_rng(0).normal(size=(2, 3, WIDTH)).astype(np.float32)
    logits = layer(ops.convert_to_tensor(x), reverse=True)
    assert keras.backend.standardize_dtype(logits.dtype) == "float32"


def test_the_gradient_of_tied_weights_is_the_sum_of_both_ways():
    scheme = SCHEMES["A4W1"]
    layer = make(scheme)
    upstream = np.random.default_rng(2).normal(size=(2, 3, ROWS)).astype(np.float32)

    def both(table: Any) -> Any:
        rows, _ = layer.stateless_call([table], [], ops.convert_to_tensor(IDS))
        return layer.stateless_call([table], [], rows, reverse=True)[0]

    def by_hand(table: Any) -> Any:
        table = rq.ops.fake_quantize(table, scheme.weights)
        rows = rq.ops.fake_quantize(ops.take(table, IDS, axis=0), scheme.activations)
        return ops.matmul(rows, ops.transpose(table))

    (table,) = layer.get_weights()
    received, expected = (value_and_gradient(f, table, upstream) for f in (both, by_hand))
    assert relative_error(received[0], expected[0]) < ROUNDING
    assert relative_error(received[1], expected[1]) < 1e-5


def model(tied: bool = True, reverse: bool = True) -> keras.Model:
    inputs = keras.Input((3,), dtype="int32", name="tokens")
    table = layers.ReversibleEmbedding(ROWS, WIDTH, tie_weights=tied, name="table")
    x = layers.Dense(WIDTH, name="dense")(table(inputs))
    x = table(x, reverse=True) if reverse else layers.Dense(ROWS, name="head")(x)
    return keras.Model({"tokens": inputs}, x)


def fit(one: keras.Model) -> list[float]:
    one.compile(
        keras.optimizers.Adam(1e-2),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        jit_compile=BACKEND == "jax",
    )
    return one.fit({"tokens": IDS}, IDS, epochs=4, verbose=0).history["loss"]


@pytest.mark.parametrize("reverse", [True, False], ids=["reversed", "only looked up"])
def test_models_with_learned_ranges_are_trained_and_saved(reverse: bool, tmp_path: Path):
    one = model(reverse=reverse)
    step = LearnedStep(4)
    one.quantize(rq.QuantizationPolicy(weights=step, activations=step), verbose=False)
    found = rq.calibrate(one, [{"tokens": IDS}], verbose=False)
    assert ("table/embeddings" in found) == reverse
    assert one.get_layer("table").quantization.activations == (step if reverse else None)
    losses = fit(one)
    assert np.isfinite(losses).all() and losses[-1] < losses[0]
    one.save(tmp_path / "m.keras")
    loaded = keras.saving.load_model(tmp_path / "m.keras")
    x = {"tokens": IDS}
    np.testing.assert_array_equal(loaded.predict(x, verbose=0), one.predict(x, verbose=0))


@pytest.mark.once
@pytest.mark.filterwarnings("ignore:Model .* has other variables to train")
def test_an_optimizer_at_work_forgets_the_range_of_an_input_that_is_not_there():
    one = model(reverse=False)
    step = LearnedStep(4)
    one.quantize(rq.QuantizationPolicy("W4", activations=step), verbose=False)
    rq.calibrate(one, [{"tokens": IDS}], verbose=False)
    again = model(reverse=False)
    again.compile(keras.optimizers.Adam(1e-2), "mse")
    again.optimizer.build(again.trainable_variables)
    again.quantize(rq.QuantizationPolicy("W4", activations=step), verbose=False)
    rq.calibrate(again, [{"tokens": IDS}], verbose=False)
    assert len(again.trainable_variables) == len(one.trainable_variables)
    losses = again.fit({"tokens": IDS}, np.zeros((2, 3, ROWS)), epochs=2, verbose=0)
    assert losses.history["loss"][-1] < losses.history["loss"][0]


@pytest.mark.once
def test_reports_count_the_table_once_and_its_product_per_token():
    rows = model().quantize(rq.QuantizationPolicy("A4W2"), verbose=False).rows
    table = next(row for row in rows if row.path == "table")
    assert (table.activation_bits, table.weight_bits) == (4, 2)
    assert table.kernel_elements == ROWS * WIDTH
    assert table.energy == 4 * 2 * 3 * ROWS * WIDTH
    rows = model(tied=False).quantize(rq.QuantizationPolicy("A4W2"), verbose=False).rows
    assert next(row for row in rows if row.path == "table").kernel_elements == 2 * ROWS * WIDTH


@pytest.mark.once
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "apart"])
def test_export(tied: bool, tmp_path: Path):
    pytest.importorskip("ai_edge_litert")
    one = model(tied)
    one.quantize(rq.QuantizationPolicy("A8W4"), verbose=False)
    result = rq.export(one, tmp_path / "m.tflite", inputs={"tokens": IDS}, verbose=False)
    reverse = "table/embeddings" if tied else "table/reverse_embeddings"
    assert sorted((p.path, p.kernel) for p in result.products) == sorted(
        [("table/embeddings", "float"), ("dense/kernel", "integer"), (reverse, "integer")]
    )


@pytest.mark.once
def test_integer_forward():
    one, same = model(), model()
    same.set_weights(one.get_weights())
    one.quantize(rq.QuantizationPolicy("A8W8-channel", forward="int8"), verbose=False)
    same.quantize(rq.QuantizationPolicy("A8W8-channel"), verbose=False)
    received, expected = (m.predict({"tokens": IDS}, verbose=0) for m in (one, same))
    assert relative_error(received, expected) < 1e-5


def test_lora():
    layer = make(SCHEMES["A4W1"])
    layer.enable_lora(2)
    layer.lora_embeddings_b.assign(np.full(layer.lora_embeddings_b.shape, 0.1))
    total = to_numpy(ops.convert_to_tensor(layer.embeddings))
    rows = quantized(total, Ridge(1), ALONG)
    assert rows.tie_distance.min() > 1e-5
    np.testing.assert_allclose(to_numpy(layer(IDS)), rows.y[IDS], atol=1e-5)
