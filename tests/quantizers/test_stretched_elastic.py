"""ParetoQ: what its levels are, and what it refuses. Its numbers: `test_authors.py`."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest
from gradients import few, to_numpy
from hypothesis import given
from hypothesis import strategies as st

import keras_rq as rq
from keras_rq.numerics.blocks import Blocks
from keras_rq.quantizers import LearnedStep, StretchedElastic

LEVELS = {1: [-1, 1], 1.5: [-2 / 3, 0, 2 / 3], 2: [-0.75, -0.25, 0.25, 0.75]}


@pytest.mark.forward
@few
@given(st.sampled_from([1, 1.5, 2]), st.integers(0, 2**32 - 1), st.sampled_from([None, "2:4"]))
def test_levels_are_balanced_and_stretched_over_the_range(bits: Any, seed: int, sparsity: Any):
    x = np.random.default_rng(seed).normal(size=(2, 20)).astype("float32")
    quantizer = StretchedElastic(bits, sparsity=sparsity)
    y = to_numpy(rq.ops.fake_quantize(x, quantizer))
    magnitude = np.abs(x)
    alpha = magnitude.mean(1, keepdims=True) if bits == 1 else magnitude.max(1, keepdims=True)
    distance = np.abs((y / alpha)[..., None] - np.array([*LEVELS[bits], 0.0]))
    allowed = distance if sparsity else distance[..., :-1]
    assert allowed.min(axis=-1).max() < 1e-6
    np.testing.assert_array_equal(to_numpy(rq.ops.quantize(x, quantizer).dequantize()), y)


@pytest.mark.forward
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_from_three_bits_up_it_is_a_learned_step(bits: int):
    x = np.random.default_rng(0).normal(size=(2, 20)).astype("float32")
    blocks, step = Blocks((-1,), (), "tensor"), np.float32(0.3)
    expected = LearnedStep(bits).fake_quantize(x, blocks, {"step": step})
    received = StretchedElastic(bits).fake_quantize(x, blocks, {"alpha": step})
    np.testing.assert_array_equal(to_numpy(received), to_numpy(expected))


@pytest.mark.once
def test_what_it_refuses():
    with pytest.raises(ValueError, match=r"integer grids.*Received: bits='fp4'"):
        StretchedElastic("fp4")
    with pytest.raises(ValueError, match="StretchedElastic takes no `affine`"):
        StretchedElastic(2, affine=True)
    model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(4, name="head")])
    policy = rq.QuantizationPolicy(activations=StretchedElastic(2))
    with pytest.raises(ValueError, match=r"head' \(Dense\): StretchedElastic quantizes weights"):
        model.quantize(policy, verbose=False)


def test_it_trains_and_travels(tmp_path: Any):
    model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(4, name="head")])
    model.quantize(rq.QuantizationPolicy(weights=StretchedElastic(2)), verbose=False)
    x = np.random.default_rng(0).normal(size=(32, 8)).astype("float32")
    model.compile(keras.optimizers.Adam(1e-2), "mse", jit_compile=False)
    losses = model.fit(x, x[:, :4], epochs=5, verbose=0).history["loss"]
    assert losses[-1] < losses[0]
    assert [v.name for v in model.trainable_variables] == ["kernel", "bias", "kernel_alpha"]
    model.save(tmp_path / "m.keras")
    loaded = keras.saving.load_model(tmp_path / "m.keras")
    np.testing.assert_array_equal(loaded.predict(x, verbose=0), model.predict(x, verbose=0))
