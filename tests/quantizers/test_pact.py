"""PACT: the paper's formulas in float64 NumPy."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest
from gradients import few, to_numpy
from hypothesis import given
from hypothesis import strategies as st
from learned import value_and_gradients

import keras_rq as rq
from keras_rq.quantizers import PACT
from keras_rq.quantizers.parameters import Observation

BITS = (1, 1.5, 2, 3, 4, 8)
X = np.random.default_rng(0).normal(size=(3, 40)).astype("float32")
G = np.random.default_rng(1).normal(size=X.shape).astype("float32")
BLOCKS = PACT(4).input_blocks((-1,))


def pact(
    x: np.ndarray, alpha: float, bits: float, upstream: np.ndarray, is_signed: bool
) -> tuple[np.ndarray, np.ndarray, float]:
    """(y, dL/dx, dL/dalpha): arXiv 1805.06085, equations 1 to 3; signed: from -alpha."""
    lowest = -alpha if is_signed else 0.0
    steps = (3 if bits == 1.5 else 2**bits) - 1
    clipped = 0.5 * (np.abs(x - lowest) - np.abs(x - alpha) + alpha + lowest)
    step = (alpha - lowest) / steps
    y = np.round((clipped - lowest) / step) * step + lowest
    to_alpha = upstream[x >= alpha].sum() - (upstream[x <= lowest].sum() if is_signed else 0.0)
    return y, upstream * ((x >= lowest) & (x < alpha)), to_alpha


@pytest.mark.parametrize("is_signed", [False, True])
@pytest.mark.parametrize("bits", BITS)
def test_values_and_gradients_are_those_of_the_paper(bits: Any, is_signed: bool):
    given = {"alpha": np.float32(0.9), "floor": np.float32(-is_signed)}
    y, to_x, to = value_and_gradients(PACT(bits), X, given, G, BLOCKS)
    alpha = float(given["alpha"])
    expected = pact(X.astype(float), alpha, bits, G.astype(float), is_signed)
    np.testing.assert_allclose(y, expected[0], atol=1e-6)
    np.testing.assert_array_equal(to_x, expected[1])
    np.testing.assert_allclose(to["alpha"], expected[2], rtol=1e-5)
    assert np.all(to["floor"] == 0)


@pytest.mark.forward
@few
@given(st.sampled_from(BITS), st.booleans(), st.integers(0, 2**32 - 1))
def test_codes_are_of_the_grid_and_stand_for_the_values(bits: Any, is_signed: bool, seed: int):
    x = np.random.default_rng(seed).normal(size=(2, 20)).astype("float32")
    x = x if is_signed else np.abs(x)
    quantizer = PACT(bits)
    seen = Observation(float(x.min()), float(x.max()), x.astype(float).ravel())
    given = quantizer.calibrated(seen)
    assert given["floor"] == (-1 if x.min() < 0 else 0)
    assert given["alpha"] == np.abs(x).max()
    tensor = quantizer.quantize(x, BLOCKS, given)
    assert np.isin(to_numpy(tensor.codes), tensor.grid.codes).all()
    y = to_numpy(quantizer.fake_quantize(x, BLOCKS, given))
    np.testing.assert_array_equal(to_numpy(tensor.dequantize()), y)
    again = to_numpy(quantizer.fake_quantize(y.astype("float32"), BLOCKS, given))
    np.testing.assert_allclose(again, y, atol=1e-6 * np.abs(x).max())


@pytest.mark.once
def test_what_it_refuses():
    for name in ("affine", "range", "block_size", "conv_block_size", "sparsity", "calibration"):
        with pytest.raises(ValueError, match=f"PACT takes no `{name}`.*Leave it out"):
            PACT(4, **{name: "channel"})
    with pytest.raises(ValueError, match=r"uniform levels.*Received: bits='fp4'"):
        PACT("fp4")
    model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(4, name="head")])
    with pytest.raises(ValueError, match=r"head' \(Dense\): PACT clips the inputs of layers"):
        model.quantize(rq.QuantizationPolicy(weights=PACT(4)), verbose=False)


@pytest.mark.once
def test_config_round_trip():
    quantizer = PACT(4, trust=0.5, rotation="hadamard")
    assert PACT.from_config(quantizer.get_config()) == quantizer
    policy = rq.QuantizationPolicy("W4", activations=quantizer)
    assert rq.QuantizationPolicy.from_config(policy.get_config()).activations == quantizer


def test_it_trains_and_travels(tmp_path: Any):
    layers = [keras.layers.Dense(16, "relu", name="first"), keras.layers.Dense(4, name="head")]
    model = keras.Sequential([keras.Input((8,)), *layers])
    model.quantize(rq.QuantizationPolicy("W4", activations=PACT(4)), verbose=False)
    x = np.random.default_rng(0).normal(size=(32, 8)).astype("float32")
    # The extremes would clip nothing, and a clip moves by what it clips.
    found = rq.calibrate(model, x, method="mse", verbose=False)
    assert [given["floor"] for given in found.values()] == [-1, 0]
    before = [given["alpha"] for given in found.values()]
    model.compile(keras.optimizers.Adam(1e-2), "mse", jit_compile=False)
    losses = model.fit(x, x[:, :4], epochs=5, verbose=0).history["loss"]
    assert losses[-1] < losses[0]
    clips = [v for v in model.trainable_variables if v.name == "kernel_input_alpha"]
    after = [float(keras.ops.convert_to_numpy(v)) for v in clips]
    assert all(a != b for a, b in zip(after, before, strict=True))
    model.save(tmp_path / "m.keras")
    loaded = keras.saving.load_model(tmp_path / "m.keras")
    np.testing.assert_array_equal(loaded.predict(x, verbose=0), model.predict(x, verbose=0))
