"""What the papers say about special cases, and what holds whatever the data."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
import reference
from gradients import fake_quantizer, few, quantize, relative_error, to_numpy, value_and_gradient
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from keras import ops

import keras_rq as rq
from keras_rq.quantizers import EWGS, BitNet, QuEST, Ridge, StraightThrough

ROWS = np.random.default_rng(0).normal(size=(4, 96)).astype("float32")
UPSTREAM = np.random.default_rng(1).normal(size=ROWS.shape).astype("float32")


def fake_quantize(x: np.ndarray, quantizer: Any) -> np.ndarray:
    return to_numpy(rq.ops.fake_quantize(x, quantizer))


# Published special cases.


@pytest.mark.forward
@pytest.mark.parametrize("ridge_lambda", [0.0, 0.01, 1.0])
def test_one_linear_bit_has_the_mean_magnitude_for_scale(ridge_lambda: float):
    y = fake_quantize(ROWS, Ridge(1, affine=False, ridge_lambda=ridge_lambda))
    scale = np.abs(ROWS.astype(float)).mean(axis=1, keepdims=True) / (1 + ridge_lambda)
    assert relative_error(y, np.sign(ROWS) * scale) < 1e-6


@pytest.mark.forward
def test_one_affine_bit_without_penalty_gives_the_class_means():
    y = fake_quantize(ROWS, Ridge(1, ridge_lambda=0.0, range="minmax"))
    middle = (ROWS.max(axis=1) + ROWS.min(axis=1)) / 2
    for row, levels, threshold in zip(ROWS.astype(float), y, middle, strict=True):
        for members in (row > threshold, row <= threshold):
            assert np.allclose(levels[members], row[members].mean(), rtol=1e-6, atol=1e-6)


@pytest.mark.forward
def test_ternary_scale_is_that_of_ternary_weight_networks():
    quantizer = Ridge(1.5, ridge_lambda=0.01)
    codes, scale, _ = rq.ops.quantize(ROWS, quantizer)
    kept = np.abs(to_numpy(codes))
    expected = (np.abs(ROWS) * kept).sum(axis=1) / (kept.sum(axis=1) + 0.01 * ROWS.shape[1])
    assert relative_error(to_numpy(scale)[:, 0], expected) < 1e-6


@pytest.mark.forward
@pytest.mark.parametrize("bits", [1, 4])
def test_an_infinite_penalty_leaves_the_mean_or_nothing(bits: int):
    means = ROWS.mean(axis=1, keepdims=True) + 0 * ROWS
    assert relative_error(fake_quantize(ROWS, Ridge(bits, ridge_lambda=1e12)), means) < 1e-5
    assert np.abs(fake_quantize(ROWS, Ridge(bits, affine=False, ridge_lambda=1e12))).max() < 1e-6


def test_without_noise_ridge_is_straight_through():
    """Data on the grid, no penalty: delta = 0 and r = 1, so the gradient is the upstream one."""
    x = np.tile(np.arange(16, dtype="float32"), (2, 4))
    upstream = UPSTREAM[:2, :64]
    y, gradient = value_and_gradient(fake_quantizer(Ridge(4, ridge_lambda=0.0)), x, upstream)
    assert relative_error(y, x) < 1e-6 and relative_error(gradient, upstream) < 1e-5


def test_a_fit_without_gradient_leaves_its_slope():
    quantizer = Ridge(4, range="minmax", fit_gradient=False)
    _, gradient = value_and_gradient(fake_quantizer(quantizer), ROWS, UPSTREAM)
    scale = to_numpy(rq.ops.quantize(ROWS, quantizer).scale)
    width = (ROWS.max(axis=1, keepdims=True) - ROWS.min(axis=1, keepdims=True)) / 15
    assert relative_error(gradient, scale / width * UPSTREAM) < 1e-5


def quest(x: np.ndarray, bits: int, trust: float) -> tuple[np.ndarray, np.ndarray]:
    """Quantized values and trust mask as QuEST's code computes them."""
    alpha = {1: 0.7978845587140913, 2: 1.4935346200015913}[bits]
    std = np.sqrt(np.mean(x**2, axis=1, keepdims=True))
    scale = alpha * std
    step = 2 * scale / (2**bits - 1)
    clipped = np.clip(x, -scale, scale)
    # Mid-rise: the codes are odd multiples of half a step.
    quantized = np.clip(step * np.floor(clipped / step) + step / 2, -scale, scale)
    if trust == 1.0:
        return quantized, np.abs(quantized - x) <= alpha / (2**bits - 1) * std
    assert bits == 1
    return quantized, np.abs(x) <= (1 + trust) * scale  # the clip factor of its one-bit runs


@pytest.mark.parametrize(("bits", "trust"), [(1, 1.0), (2, 1.0), (1, 0.3)])
@pytest.mark.parametrize(
    "make",
    [
        functools.partial(StraightThrough, affine=False, range="rms", block_size="channel"),
        functools.partial(QuEST, rotation=None),
    ],
)
def test_trust_is_that_of_quest(make: Any, bits: int, trust: float):
    quantizer = make(bits, trust=trust)
    y, gradient = value_and_gradient(fake_quantizer(quantizer), ROWS, UPSTREAM)
    quantized, mask = quest(ROWS.astype(float), bits, trust)
    assert relative_error(y, quantized) < 1e-6
    assert 0.5 < mask.mean() < 1
    assert np.array_equal(gradient, UPSTREAM * mask)


@pytest.mark.parametrize("rule", ["minmax", "absmax"])
@pytest.mark.parametrize("bits", [1, 2, 3, 8])
def test_no_trust_is_lost_where_nothing_is_clipped(bits: int, rule: str):
    """The extremes lie on the edge of the grid, give or take the rounding of their position."""
    x = np.random.default_rng(0).normal(size=(64, 32)).astype("float32")
    quantizer = StraightThrough(bits, range=rule, block_size=16, trust=0.0)
    _, gradient = value_and_gradient(fake_quantizer(quantizer), x, x)
    assert np.array_equal(gradient, x)


BITNET = {
    "one bit": (BitNet(1), lambda w: np.sign(w - w.mean()) * np.abs(w).mean()),
    "one bit, activations": (
        BitNet(1, centered=False, block_size="channel"),
        lambda x: np.sign(x) * np.abs(x).mean(axis=1, keepdims=True),
    ),
    "ternary": (
        BitNet(1.5),
        lambda w: np.clip(np.round(w / np.abs(w).mean()), -1, 1) * np.abs(w).mean(),
    ),
    "8 bits": (
        BitNet(8),
        lambda x: (
            np.round(x * 127 / np.abs(x).max(axis=1, keepdims=True))
            * (np.abs(x).max(axis=1, keepdims=True) / 127)
        ),
    ),
}


@pytest.mark.parametrize("name", BITNET)
def test_bitnet_is_the_formula_of_its_papers(name: str):
    quantizer, formula = BITNET[name]
    x = ROWS + np.float32(0.3)
    y, gradient = value_and_gradient(fake_quantizer(quantizer), x, UPSTREAM)
    assert relative_error(y, formula(x.astype(float))) < 1e-6
    assert np.array_equal(gradient, UPSTREAM)


@pytest.mark.parametrize("delta", [0.0, 0.001, 0.5])
@pytest.mark.parametrize(
    "fields",
    [
        {"bits": 1},
        {"bits": 2, "range": "minmax"},
        {"bits": 4, "affine": False, "range": "rms"},
        {"bits": "fp4"},
        {"bits": 4, "sparsity": "2:4"},
    ],
    ids=str,
)
def test_ewgs_scales_gradients_by_what_was_rounded(fields: dict[str, Any], delta: float):
    quantizer = EWGS(delta=delta, block_size="channel", **fields)
    y, gradient = value_and_gradient(fake_quantizer(quantizer), ROWS, UPSTREAM)
    plain = StraightThrough(block_size="channel", **fields)
    assert relative_error(y, fake_quantize(ROWS, plain)) < 1e-6
    grid, (_, scale, offset) = quantizer.grid, rq.ops.quantize(ROWS, plain)
    edges = (edge * grid.code_multiplier for edge in (grid.low, grid.high))
    low, high = (to_numpy(scale) * edge + to_numpy(offset) for edge in edges)
    x_n, x_q = ((v - low) / (high - low) for v in (np.clip(ROWS, low, high), y))
    expected = UPSTREAM * (1 + delta * np.sign(UPSTREAM) * (x_n - x_q))
    inside = (low <= ROWS) & (high >= ROWS)
    near_edge = np.minimum(np.abs(ROWS - low), np.abs(ROWS - high)) < 1e-5 * (high - low)
    expected = np.where(inside | near_edge, expected, 0.0)
    assert relative_error(gradient, expected) < 1e-6
    if delta:
        assert not np.array_equal(gradient, UPSTREAM * inside)


# Properties of any data. Shapes are few: what varies is the data and the fields.

fields = st.fixed_dictionaries(
    {
        "bits": st.sampled_from([1, 1.5, 2, 4, 8, "fp4"]),
        "block_size": st.sampled_from([7, "channel"]),
        "estimator": st.sampled_from([Ridge, StraightThrough, QuEST, BitNet, EWGS]),
    }
)


def build(fields: dict[str, Any], **more: Any) -> Any:
    fields = dict(fields)
    return fields.pop("estimator")(**fields, **more)


def data(largest: float) -> st.SearchStrategy[np.ndarray]:
    elements = st.floats(-largest, largest, width=32, allow_subnormal=False)
    return arrays.arrays("float32", (2, 20), elements=elements)


@pytest.mark.forward
@few
@given(fields, data(np.float32(1e30)), st.sampled_from([None, "2:4", "4:8-paired"]))
def test_codes_are_integers_of_the_grid(fields: dict[str, Any], x: np.ndarray, sparsity: Any):
    tensor = rq.ops.quantize(x, build(fields, sparsity=sparsity))
    codes = to_numpy(tensor.codes)
    assert codes.dtype == np.int8
    allowed = np.array(tensor.grid.codes) * tensor.grid.code_multiplier
    assert np.isin(codes, [*allowed, 0] if sparsity else allowed).all()
    if sparsity:
        n, m = (2, 4) if sparsity == "2:4" else (4, 8)
        assert (np.count_nonzero(codes[:, :16].reshape(2, -1, m), axis=-1) <= n).all()


@pytest.mark.forward
@few
@given(fields, data(np.float32(1e30)))
def test_stored_codes_stand_for_the_fake_quantized_values(fields: dict[str, Any], x: np.ndarray):
    quantizer = build(fields)
    expected = fake_quantize(x, quantizer)
    assert np.array_equal(to_numpy(rq.ops.quantize(x, quantizer).dequantize()), expected)


@few
@given(fields, data(np.float32(1e30)), st.sampled_from([0.0, 0.01]))
def test_values_and_gradients_are_finite(
    fields: dict[str, Any], x: np.ndarray, ridge_lambda: float
):
    more = {"ridge_lambda": ridge_lambda} if fields["estimator"] is Ridge else {}
    quantizer = build(fields, **more)
    y, gradient = value_and_gradient(fake_quantizer(quantizer), x, UPSTREAM[:2, :20])
    assert np.isfinite(y).all() and np.isfinite(gradient).all()


@pytest.mark.forward
@few
@given(
    fields,
    st.sampled_from(["auto", "rms", "absmax"]),
    st.integers(0, 2**32 - 1),
    st.integers(-40, 40),
)
def test_a_power_of_two_scales_through_exactly(
    fields: dict[str, Any], rule: str, seed: int, exponent: int
):
    quantizer, factor = build(fields, range=rule), 2.0**exponent
    x = np.random.default_rng(seed).normal(size=(2, 20)).astype("float32")
    y = fake_quantize(x, quantizer)
    assert np.array_equal(fake_quantize((x * factor).astype("float32"), quantizer), y * factor)


@pytest.mark.forward
@few
@given(st.sampled_from([1, 2, 4]), st.sampled_from(["minmax", "rms"]), st.integers(0, 2**32 - 1))
def test_a_shift_passes_through_an_affine_quantizer(bits: int, rule: str, seed: int):
    x = np.random.default_rng(seed).integers(-512, 512, (2, 20)) / 256  # so that x + 1 is exact
    spec = reference.Spec(bits, True, rule, block=7, edge=Ridge(bits).grid.gaussian_edge)
    close = reference.quantize(x, spec).tie_distance < 1e-4
    blocks = [at for at in reference.blocks(x.shape, spec) if not close[at].any()]
    quantizer = Ridge(bits, range=rule, block_size=7)
    y, shifted = (fake_quantize(v.astype("float32"), quantizer) for v in (x, x + 1))
    for at in blocks:
        assert np.allclose(shifted[at], y[at] + 1, atol=4e-6)


@pytest.mark.forward
@few
@given(st.sampled_from([1, 1.5, 4, 8, "fp4"]), st.sampled_from([7, "channel"]), data(100.0))
def test_affine_ridge_keeps_the_mean_of_every_block(bits: Any, size: Any, x: np.ndarray):
    y = fake_quantize(x, Ridge(bits, affine=True, block_size=size))
    for at in reference.blocks(x.shape, reference.Spec(bits, True, "minmax", block=size)):
        largest = np.abs(x[at]).max()
        assert abs(y[at].mean() - x[at].astype(float).mean()) <= 2e-6 * largest + 1e-37  # subnormal


@few
@given(
    st.sampled_from([1, 2, 4, 8]),
    st.sampled_from(["minmax", "rms"]),
    st.sampled_from([0.0, 0.01]),
    st.floats(-(2.0**99), 2.0**99, width=32, allow_subnormal=False),
)
def test_flat_blocks_are_reproduced_and_pass_the_mean_gradient(
    bits: int, rule: str, ridge_lambda: float, value: float
):
    """The slope of a flat block is 0: what remains of the gradient is its mean."""
    x = np.full((2, 77), value, "float32")
    quantizer = Ridge(bits, range=rule, ridge_lambda=ridge_lambda)
    upstream = UPSTREAM[:2, :77].astype(float)
    y, gradient = value_and_gradient(fake_quantizer(quantizer), x, upstream)
    # To the last bit; only two levels of "rms" have to find the mean first.
    exact = rule == "minmax" or bits > 1
    assert (np.abs(y - x) <= (0 if exact else np.spacing(np.abs(x)) + 1e-37)).all()
    if ridge_lambda or exact:
        means = upstream.mean(axis=1, keepdims=True)
        assert np.abs(gradient - means).max() < 1e-5 * np.abs(upstream).max()


# Numbers at the edge of their formats.

EXTREMES = {  # few shapes: one compilation each
    "zeros": np.zeros((2, 40), "float32"),
    "subnormal": np.full((2, 40), 1e-40, "float32") * np.arange(-20, 20),
    "smallest": np.float32(1.2e-38) * np.arange(-20, 20, dtype="float32")[None],
    "tiny": ROWS[:, :40] * np.float32(1e-30),
    "huge": ROWS[:, :40] * np.float32(1e30),
    "single elements": ROWS[:, :1],
    "one outlier": np.where(np.arange(40) == 3, 1e30, ROWS[:, :40]).astype("float32"),
    "two ulps": (1 + np.arange(40) % 3 * 2.0**-23).astype("float32")[None],
    "float16 maximum": np.float16(65504) * np.sign(ROWS[:, :40]).astype("float16"),
    "one float16 maximum": np.where(np.arange(40) == 3, 65504, 1).astype("float16")[None],
    "float16 subnormal": (np.float16(6e-8) * np.arange(-20, 20)).astype("float16")[None],
}
QUANTIZERS = [
    Ridge(1),
    Ridge(4, ridge_lambda=0.0),
    Ridge(8, range="rms", ridge_lambda=0.0),
    Ridge(1.5, ridge_lambda=0.0),
    Ridge(4, affine=False, sparsity="2:4"),
    Ridge("fp4", rotation="hadamard", trust=0.3),
    StraightThrough(4, range="rms", trust=1.0),
    StraightThrough(8, rotation="hadamard"),
    QuEST(2),
    QuEST(4, rotation=None),
    QuEST(8, rotation=None, sparsity="4:8-paired"),
    BitNet(1),
    BitNet(1.5, sparsity="2:4"),
    EWGS(4, range="rms", trust=None),
]


def by_all(x: Any) -> Any:
    return ops.stack([rq.ops.fake_quantize(x, q.replace(block_size=16)) for q in QUANTIZERS])


@pytest.mark.parametrize("name", EXTREMES)
def test_extremes_stay_finite(name: str):
    x = EXTREMES[name]
    upstream = np.resize(UPSTREAM, (len(QUANTIZERS), *x.shape)).astype(x.dtype)
    y, gradient = value_and_gradient(by_all, x, upstream)
    assert np.isfinite(y).all() and np.isfinite(gradient).all()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
    "quantizer", [q for q in QUANTIZERS if q.rotation is None], ids=lambda q: repr(q)[:60]
)
def test_what_is_not_finite_spoils_its_own_block_alone(quantizer: Any, value: float):
    """The whole block is NaN, on every backend. So is its gradient with ridge, unless untrusted."""
    x, spoilt = ROWS.copy(), np.zeros(ROWS.shape, bool)
    x[1, 40], spoilt[1, 32:48] = value, True
    quantizer = quantizer.replace(block_size=16)
    function = fake_quantizer(quantizer)
    y, gradient = value_and_gradient(function, x, UPSTREAM)
    clean, clean_gradient = value_and_gradient(function, ROWS, UPSTREAM)
    assert np.isnan(y[spoilt]).all()
    assert np.array_equal(y[~spoilt], clean[~spoilt])
    assert np.array_equal(gradient[~spoilt], clean_gradient[~spoilt])
    if isinstance(quantizer, Ridge):
        assert np.isnan(gradient[spoilt]).all()


@pytest.mark.forward
def test_quantize_is_the_same_compiled():
    tensor, compiled = rq.ops.quantize(ROWS, 4), quantize(ROWS, 4)
    assert np.array_equal(to_numpy(tensor.codes), to_numpy(compiled.codes))
