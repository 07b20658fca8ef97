"""`rq.ops` against float64 NumPy, finite differences and automatic differentiation."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import keras
import numpy as np
import pytest
import reference
from gradients import BACKEND, compiled, relative_error, to_numpy, value_and_gradient
from keras import ops
from quantizer_cases import CASES, Case, make

import keras_rq as rq

# JAX compiles each case; the others are compared with TensorFlow's in `test_agreement.py`.
HERE = CASES[::2] if BACKEND == "jax" else CASES
cases = pytest.mark.parametrize("case", HERE, ids=lambda case: case.name)


class Evaluation(NamedTuple):
    """What the package makes of a case; `codes` are the values that the formulas speak of."""

    x: np.ndarray
    upstream: np.ndarray
    codes: np.ndarray
    y: np.ndarray
    gradient: np.ndarray | None


@functools.cache
def evaluate(case: Case) -> Evaluation:
    x, upstream = case.data()
    stored = compiled(lambda x: case.quantizer.quantize(x, case.blocks).codes)(x)
    codes = to_numpy(stored) / case.quantizer.grid.code_multiplier
    if BACKEND == "numpy":
        y, gradient = to_numpy(case.fake_quantize(x)), None
    else:
        y, gradient = value_and_gradient(case.fake_quantize, x, upstream)
    return Evaluation(x.astype(float), upstream.astype(float), codes, y, gradient)


@pytest.mark.forward
@cases
def test_codes_are_nearest(case: Case):
    """Only values within 1e-5 of a rounding tie may be rounded otherwise than in float64."""
    seen = evaluate(case)
    expected = reference.quantize(seen.x, case.spec)
    other = seen.codes != expected.codes
    assert (expected.tie_distance[other] < 1e-5).all()
    assert other.mean() < 0.002


@pytest.mark.forward
@cases
def test_fake_quantize_is_the_formula(case: Case):
    seen = evaluate(case)
    expected = reference.quantize(seen.x, case.spec, seen.codes)
    assert relative_error(seen.y, expected.y) < 1e-6


@cases
def test_gradient_is_the_closed_form_and_the_finite_difference(case: Case):
    seen = evaluate(case)
    arguments = (seen.x, seen.upstream, case.spec, seen.codes)
    assert relative_error(seen.gradient, reference.gradient(*arguments)) < 1e-5
    assert relative_error(seen.gradient, reference.finite_differences(*arguments)) < 1e-5


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("bits", [1, 1.5, 2, 4, "fp4"])
def test_gradient_is_automatic_differentiation_of_ridge_dequantize(bits: Any, affine: bool):
    """Codes `f + stop_gradient(round(f) - f)` through the closed form give the same gradient."""
    case = make("Ridge", bits, affine, "rms", shape=(5, 32))
    x, upstream = case.data(1)
    view = case.blocks.view(x.shape)
    encoding = case.quantizer.encode(ops.convert_to_tensor(x), view, case.blocks)
    span, noise = encoding.span, ops.stop_gradient(encoding.noise)

    def differentiable(x: Any) -> Any:
        position = span.position(x) + case.quantizer.grid.anchor
        return rq.ops.ridge_dequantize(x, position + noise, affine=affine)

    y, gradient = value_and_gradient(case.fake_quantize, x, upstream)
    automatic_y, automatic = value_and_gradient(differentiable, x, upstream)
    assert relative_error(y, automatic_y) < 1e-6
    assert relative_error(gradient, automatic) < 1e-5


@pytest.mark.parametrize("affine", [True, False])
def test_ridge_dequantize_differentiates_in_both_arguments(affine: bool):
    rng = np.random.default_rng(0)
    x, codes, upstream = rng.normal(size=(3, 2, 9, 4)).astype("float32")[..., :4]
    spec = reference.Spec(4, affine, "absmax")

    def value(x: np.ndarray, codes: np.ndarray) -> float:
        rows = [
            reference.dequantize(v, q, spec, 1.0, 0.0) for v, q in zip(x[0], codes[0], strict=True)
        ]
        return float(np.sum(np.array(rows) * upstream[0]))

    for argument in (0, 1):
        pair = [x, codes]

        def function(t: Any, pair: list = pair, argument: int = argument) -> Any:
            arguments = [t if i == argument else p for i, p in enumerate(pair)]
            return rq.ops.ridge_dequantize(*arguments, affine=affine)

        _, received = value_and_gradient(function, pair[argument], upstream)
        expected = np.zeros(x[0].shape)
        for at in np.ndindex(expected.shape):
            both = []
            for sign in (1, -1):
                moved = [p.astype(float) for p in pair]
                moved[argument][(0, *at)] += sign * 1e-5
                both.append(value(*moved))
            expected[at] = (both[0] - both[1]) / 2e-5
        assert relative_error(received[0], expected) < 1e-5


@pytest.mark.forward
@pytest.mark.parametrize("axis", [-1, 0, (1, 2), (2, 0)])
@pytest.mark.parametrize("bits", [1, 1.5, 4, "fp4"])
def test_quantize_dequantizes_to_fake_quantize(bits: Any, axis: Any):
    x = np.random.default_rng(0).normal(size=(3, 4, 10)).astype("float32")
    quantizer = rq.quantizers.Ridge(bits, block_size=8)
    tensor = rq.ops.quantize(x, quantizer, axis)
    expected = to_numpy(rq.ops.fake_quantize(x, quantizer, axis))
    assert np.array_equal(to_numpy(tensor.dequantize()), expected)
    codes, scale, offset = tensor
    assert ops.shape(codes) == x.shape
    assert keras.backend.standardize_dtype(codes.dtype) == "int8"
    assert ops.shape(scale) == ops.shape(offset)


@pytest.mark.forward
def test_a_bit_width_is_a_ridge_quantizer():
    x = np.random.default_rng(0).normal(size=(4, 16)).astype("float32")
    expected = to_numpy(rq.ops.fake_quantize(x, rq.quantizers.Ridge(2)))
    assert np.array_equal(to_numpy(rq.ops.fake_quantize(x, 2)), expected)


X = np.zeros((2, 3), "float32")


@pytest.mark.forward
@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: rq.ops.fake_quantize(X, 4, axis=2), ValueError, ["axis (2,)", "(2, 3)"]),
        (lambda: rq.ops.fake_quantize(X, 4, axis=(1, -1)), ValueError, ["(1, -1)", "twice"]),
        (lambda: rq.ops.quantize(X, 4, axis=-3), ValueError, ["axis (-3,)", "(2, 3)"]),
        (lambda: rq.ops.fake_quantize(X, 9), ValueError, ["`bits`", "bits=9", "1.5", "'fp4'"]),
        (lambda: rq.ops.fake_quantize(X, None), TypeError, ["`quantizer`", "bit width", "None"]),
        (lambda: rq.ops.fake_quantize(X, object()), TypeError, ["bit width", "<object object"]),
        (lambda: rq.ops.quantize(np.zeros(3, "int32"), 4), TypeError, ["`x`", "floating", "int32"]),
        (
            lambda: rq.ops.ridge_dequantize(X, X, ridge_lambda=-1),
            ValueError,
            ["`ridge_lambda`", ">= 0", "ridge_lambda=-1"],
        ),
        (lambda: rq.ops.ridge_dequantize(X, X, axis=5), ValueError, ["axis (5,)", "(2, 3)"]),
    ],
)
def test_errors_name_argument_value_and_choices(call: Any, error: type, words: list[str]):
    with pytest.raises(error) as raised:
        call()
    for word in words:
        assert word in str(raised.value)
