"""Static ranges: constants after calibration, and the gradient that remains."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import reference
from gradients import to_numpy
from learned import value_and_gradients

from keras_rq.numerics.blocks import Blocks
from keras_rq.quantizers import EWGS, BitNet, QuEST, Ridge, StraightThrough
from keras_rq.quantizers.parameters import Observation

X = np.random.default_rng(0).normal(0.3, 1.0, (6, 40)).astype("float32")
G = np.random.default_rng(1).normal(size=X.shape).astype("float32")
BLOCKS = Blocks((-1,), (), "tensor")
BITS = (1, 1.5, 2, 4, 8, "fp4")
CASES = [
    (estimator, bits, affine)
    for estimator in (Ridge, StraightThrough)
    for bits in BITS
    for affine in (True, False)
]
RULES = [
    *(estimator(bits, affine=affine) for estimator, bits, affine in CASES),
    *(
        Ridge(4, affine=affine, range=rule)
        for rule in ("rms", "absmean")
        for affine in (True, False)
    ),
    *(
        StraightThrough(bits, range="absmax", affine=affine)
        for bits in (1, 4)
        for affine in (True, False)
    ),
    *(QuEST(bits, rotation=None, range=rule) for bits in BITS for rule in ("rms", "absmax")),
    *(BitNet(bits) for bits in (1, 1.5, 8)),
]


def calibrated(quantizer: Any, x: np.ndarray = X) -> dict[str, Any]:
    x = x.astype(float).ravel()
    return quantizer.calibrated(Observation(x.min(), x.max(), x))


@pytest.mark.forward
@pytest.mark.parametrize("quantizer", RULES, ids=repr)
def test_on_its_own_data_it_is_the_dynamic_quantizer(quantizer: Any):
    """The range and the regression over the calibration set, held fixed."""
    static = quantizer.replace(calibration="static")
    given = calibrated(static)
    assert given.keys() == static.input_parameters().keys()
    received = to_numpy(static.fake_quantize(X, BLOCKS, given))
    expected = to_numpy(quantizer.replace(block_size="tensor").fake_quantize(X, BLOCKS))
    np.testing.assert_allclose(received, expected, atol=1e-5 * np.abs(X).max())


@pytest.mark.forward
@pytest.mark.parametrize("bits", BITS)
def test_a_named_observer_puts_the_outermost_level_on_its_interval(bits: Any):
    quantizer = QuEST(bits, rotation=None, calibration="static")
    given = quantizer.calibrated(Observation(-1.5, 3.0, X.astype(float).ravel(), is_chosen=True))
    y = to_numpy(quantizer.fake_quantize(3 * X, BLOCKS, given))
    assert y.max() == pytest.approx(3.0, rel=1e-6)
    assert y.min() == pytest.approx(-3.0, rel=1e-6)


@pytest.mark.parametrize(("bits", "trust"), [(4, 1.0), (1, 0.3)])
def test_trust_that_an_estimator_knows_itself_holds_for_static_ranges(bits: int, trust: float):
    auto, told = (
        QuEST(bits, rotation=None, calibration="static", trust=one) for one in ("auto", trust)
    )
    given = calibrated(auto)
    received, expected = (
        value_and_gradients(one, 2 * X, given, G, BLOCKS)[1] for one in (auto, told)
    )
    np.testing.assert_array_equal(received, expected)
    assert 0.0 < (received == 0.0).mean() < 1.0


@pytest.mark.parametrize(("estimator", "bits", "affine"), CASES)
@pytest.mark.parametrize("trust", [None, 0.5])
def test_other_data_meets_the_same_line(estimator: Any, bits: Any, affine: bool, trust: Any):
    quantizer = estimator(bits, affine=affine, calibration="static", trust=trust)
    given = calibrated(quantizer)
    x = 2 * X[::-1]
    y, to_x, to = value_and_gradients(quantizer, x, given, G, BLOCKS)
    codes = reference.levels(bits, affine)
    scale, origin = float(given["range_scale"]), float(given.get("range_origin", 0.0))
    position = (x.astype(float) - origin) / scale + quantizer.grid.anchor
    nearest = codes[np.abs(position[..., None] - codes).argmin(axis=-1)]
    expected = float(given["scale"]) * nearest + float(given.get("offset", 0.0))
    tie = np.abs(np.sort(np.abs(position[..., None] - codes))[..., :2] @ [-1.0, 1.0]) < 1e-4
    np.testing.assert_allclose(np.where(tie, expected, y), expected, atol=1e-5)
    beyond = np.maximum(position - codes[-1], codes[0] - position)
    step = codes[-1] - codes[-2]
    reach = np.inf if trust is None else trust * step / 2
    edge = np.abs(beyond - reach) < 1e-4
    slope = float(given["scale"]) / scale * (beyond <= reach)
    np.testing.assert_allclose(np.where(edge, G * slope, to_x), G * slope, rtol=1e-5, atol=1e-6)
    assert all(np.all(gradient == 0) for gradient in to.values())
    tensor = quantizer.quantize(x, BLOCKS, given)
    np.testing.assert_allclose(to_numpy(tensor.dequantize()), y, atol=1e-6)  # one of them compiled
    assert tensor.scale.shape == (1, 1)


@pytest.mark.once
def test_the_regression_is_that_of_the_paper():
    given = calibrated(Ridge(2, calibration="static", ridge_lambda=0.05, range="minmax"))
    x = X.astype(float)
    codes = np.clip(np.round((x - x.min()) / ((x.max() - x.min()) / 3)) - 2, -2, 1)
    covariance = (x * codes).mean() - x.mean() * codes.mean()
    slope = covariance / (codes.var() + 0.05)
    assert given["scale"] == pytest.approx(slope, rel=1e-5)
    assert given["offset"] == pytest.approx(x.mean() - slope * codes.mean(), rel=1e-4)


@pytest.mark.once
def test_a_kernel_has_no_static_range():
    quantizer = Ridge(4, calibration="static")
    with pytest.raises(ValueError, match=r"fixes the range of inputs.*calibration='dynamic'"):
        quantizer.kernel_parameters(BLOCKS.view((4, 4)))
    assert Ridge.from_config(quantizer.get_config()) == quantizer


@pytest.mark.once
def test_gradients_that_depend_on_what_comes_back_have_no_static_range():
    with pytest.raises(ValueError, match=r"EWGS.*calibration='static'.*'dynamic'"):
        EWGS(4, calibration="static")
