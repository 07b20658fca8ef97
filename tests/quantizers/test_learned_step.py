"""LSQ: the paper's formulas, block by block, in float64 NumPy."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from gradients import few, to_numpy
from hypothesis import given
from hypothesis import strategies as st
from learned import value_and_gradients

import keras_rq as rq
from keras_rq.numerics.blocks import Blocks
from keras_rq.quantizers import LearnedStep
from keras_rq.quantizers.parameters import Observation

BITS = (1, 1.5, 2, 3, 4, 8, "fp4")
LEVELS = {
    1: [-1.0, 1.0],
    1.5: [-1.0, 0.0, 1.0],
    "fp4": sorted(s * v for s in (-1, 1) for v in (0, 0.5, 1, 1.5, 2, 3, 4, 6)),
}


def levels(bits: Any) -> np.ndarray:
    if bits in LEVELS:
        return np.unique(LEVELS[bits])
    return np.arange(-(2 ** (bits - 1)), 2 ** (bits - 1), dtype=float)


def lsq(
    x: np.ndarray, step: np.ndarray, bits: Any, upstream: np.ndarray, shift: float = 0.0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(y, dL/dx, dL/ds for every row), one step a row; arXiv 1902.08153, equations 1 to 5."""
    codes = levels(bits)
    v = x / step - shift
    nearest = codes[np.abs(v[..., None] - codes).argmin(axis=-1)]
    inside = (codes[0] <= v) & (v <= codes[-1])
    slope = np.where(inside & (bits != 1), nearest - v, nearest + shift)
    gradient_scale = 1 / math.sqrt(x.size * (codes[-1] + shift))
    to_step = (upstream * slope).sum(axis=-1, keepdims=True) * gradient_scale
    return step * (nearest + shift), upstream * inside, to_step


X = (np.random.default_rng(0).normal(size=(3, 40)) + 0.2).astype("float32")
G = np.random.default_rng(1).normal(size=X.shape).astype("float32")


@pytest.mark.parametrize("bits", BITS)
def test_values_and_gradients_are_those_of_the_paper(bits: Any):
    step = (0.9 + 0.3 * np.arange(3, dtype="float32")[:, None]) / math.sqrt(levels(bits)[-1])
    quantizer = LearnedStep(bits)
    y, to_x, given = value_and_gradients(quantizer, X, {"step": step}, G, quantizer.blocks((-1,)))
    expected = lsq(X.astype(float), step.astype(float), bits, G.astype(float))
    for received, want in zip((y, to_x, given["step"]), expected, strict=True):
        assert received.shape == want.shape
        np.testing.assert_allclose(received, want, rtol=2e-6, atol=2e-6 * np.abs(want).max())


@pytest.mark.parametrize("bits", [b for b in BITS if b != "fp4"])
def test_an_input_that_is_never_negative_has_codes_from_zero(bits: Any):
    x, quantizer = np.abs(X), LearnedStep(bits)
    found = quantizer.calibrated(Observation(0.0, float(x.max()), x.astype(float).ravel()))
    shift = -levels(bits)[0]
    assert found["shift"] == shift
    mean = np.abs(x).astype(float).mean()
    first = mean if bits == 1 else 2 * mean / math.sqrt(levels(bits)[-1] + shift)
    np.testing.assert_allclose(found["step"], first, rtol=1e-6)
    y, to_x, given = value_and_gradients(quantizer, x, found, G, quantizer.input_blocks((-1,)))
    flat = (x.reshape(1, -1).astype(float), found["step"].astype(float), bits, G.reshape(1, -1))
    expected = lsq(*flat, shift)
    np.testing.assert_allclose(y, expected[0].reshape(X.shape), rtol=2e-6, atol=1e-6)
    np.testing.assert_array_equal(to_x, expected[1].reshape(X.shape))
    np.testing.assert_allclose(given["step"], expected[2][0, 0], rtol=1e-5)
    assert y.min() >= 0


@pytest.mark.forward
@pytest.mark.parametrize("bits", BITS)
def test_the_first_step_is_that_of_the_paper(bits: Any):
    scale = to_numpy(rq.ops.quantize(X, LearnedStep(bits)).scale)[:, 0]
    mean = np.abs(X.astype(float)).mean(axis=1)
    expected = mean if bits == 1 else 2 * mean / math.sqrt(levels(bits)[-1])
    multiplier = 0.5 if bits == "fp4" else 1.0  # its codes are stored doubled
    np.testing.assert_allclose(scale, multiplier * expected, rtol=1e-6)


@pytest.mark.forward
@few
@given(
    st.sampled_from(BITS),
    st.sampled_from([7, "channel", "tensor"]),
    st.sampled_from([None, "2:4"]),
    st.integers(0, 2**32 - 1),
)
def test_codes_are_of_the_grid_and_stand_for_the_values(
    bits: Any, size: Any, sparsity: Any, seed: int
):
    x = np.random.default_rng(seed).normal(size=(2, 20)).astype("float32")
    quantizer = LearnedStep(bits, block_size=size, sparsity=sparsity)
    tensor = rq.ops.quantize(x, quantizer)
    codes = to_numpy(tensor.codes)
    allowed = np.array(tensor.grid.codes) * tensor.grid.code_multiplier
    assert np.isin(codes, [*allowed, 0] if sparsity else allowed).all()
    if sparsity:
        assert (np.count_nonzero(codes.reshape(2, 5, 4), axis=-1) <= 2).all()
    np.testing.assert_array_equal(
        to_numpy(tensor.dequantize()), to_numpy(rq.ops.fake_quantize(x, quantizer))
    )


@pytest.mark.forward
@few
@given(st.sampled_from(BITS), st.floats(2.0**-20, 2.0**20, width=32), st.integers(0, 2**32 - 1))
def test_quantizing_twice_is_quantizing_once(bits: Any, step: float, seed: int):
    x = step * np.random.default_rng(seed).normal(size=(2, 20)).astype("float32") * 4
    quantizer, blocks = LearnedStep(bits, block_size="tensor"), Blocks((-1,), (), "tensor")
    given = {"step": np.float32(step)}
    once = quantizer.fake_quantize(x.astype("float32"), blocks, given)
    np.testing.assert_array_equal(
        to_numpy(quantizer.fake_quantize(once, blocks, given)), to_numpy(once)
    )


@pytest.mark.parametrize("trust", [0.5, 1.0])
def test_trust_lets_gradients_pass_beyond_the_edge(trust: float):
    quantizer, step = LearnedStep(2, trust=trust), np.full((3, 1), 0.6, "float32")
    _, to_x, _ = value_and_gradients(quantizer, X, {"step": step}, G, quantizer.blocks((-1,)))
    v = X / 0.6
    np.testing.assert_array_equal(to_x, G * ((v >= -2 - trust / 2) & (v <= 1 + trust / 2)))


def test_pruned_elements_keep_their_gradient_and_do_not_move_the_step():
    quantizer, step = LearnedStep(4, sparsity="2:4"), np.full((3, 1), 0.3, "float32")
    y, to_x, given = value_and_gradients(quantizer, X, {"step": step}, G, quantizer.blocks((-1,)))
    lines = np.abs(X).reshape(-1, 4)
    kept = (lines >= np.sort(lines, axis=1)[:, 2:3]).reshape(X.shape)
    dense, to_dense, _ = lsq(X.astype(float), step.astype(float), 4, G.astype(float))
    only_kept = lsq(X.astype(float), step.astype(float), 4, G * kept)[2]
    np.testing.assert_allclose(y, dense * kept, rtol=1e-6)
    np.testing.assert_array_equal(to_x, to_dense)
    np.testing.assert_allclose(given["step"], only_kept, rtol=1e-5)


def test_a_rotation_is_undone_and_its_gradient_too():
    quantizer = LearnedStep(8, rotation="hadamard", trust=1e6)
    step = np.full((3, 1), 0.05, "float32")
    y, to_x, _ = value_and_gradients(quantizer, X, {"step": step}, G, quantizer.blocks((-1,)))
    assert np.abs(y - X).max() < 0.2
    np.testing.assert_allclose(to_x, G, atol=1e-5)


@pytest.mark.forward
@pytest.mark.parametrize("step", [0.0, -1.0])
def test_a_step_that_training_made_vanish_gives_numbers(step: float):
    blocks = Blocks((-1,), (), "tensor")
    y = LearnedStep(4).fake_quantize(X, blocks, {"step": np.float32(step)})
    assert np.isfinite(to_numpy(y)).all()


@pytest.mark.once
@pytest.mark.parametrize(
    ("fields", "error", "words"),
    [
        *(
            ({name: "auto"}, ValueError, [f"takes no `{name}`", "Leave it out"])
            for name in ("affine", "range", "calibration", "ridge_lambda")
        ),
        ({"blocks": 3}, TypeError, ["LearnedStep has no argument 'blocks'"]),
        ({"block_size": 0}, ValueError, ["`block_size`"]),
        ({"trust": -1.0}, ValueError, ["`trust`"]),
    ],
)
def test_wrong_fields(fields: dict[str, Any], error: type[Exception], words: list[str]):
    with pytest.raises(error) as caught:
        LearnedStep(4, **fields)
    assert all(word in str(caught.value) for word in words), caught.value


@pytest.mark.once
def test_config_round_trip():
    quantizer = LearnedStep(4, block_size=32, trust=0.5, sparsity="2:4", rotation="hadamard")
    assert LearnedStep.from_config(quantizer.get_config()) == quantizer
    assert quantizer.replace(bits=2).bits == 2
    policy = rq.QuantizationPolicy(weights=quantizer, activations=LearnedStep(8))
    assert rq.QuantizationPolicy.from_config(policy.get_config()).weights == quantizer


def test_sums_of_codes_are_for_quantizers_without_variables():
    quantizer = LearnedStep(4)
    with pytest.raises(TypeError, match="LearnedStep has variables of its own; use `quantize`"):
        quantizer.quantize_and_sum(np.ones((2, 8), "float32"), quantizer.blocks((-1,)))
