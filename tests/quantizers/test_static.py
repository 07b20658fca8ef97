"""Static ranges: constants after calibration, and the gradient that remains."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import reference
from gradients import to_numpy
from learned import value_and_gradients

from keras_rq.numerics.blocks import Blocks
from keras_rq.quantizers import Ridge, StraightThrough
from keras_rq.quantizers.parameters import Observation

X = np.random.default_rng(0).normal(0.3, 1.0, (6, 40)).astype("float32")
G = np.random.default_rng(1).normal(size=X.shape).astype("float32")
BLOCKS = Blocks((-1,), (), "tensor")
CASES = [
    (estimator, bits, affine)
    for estimator in (Ridge, StraightThrough)
    for bits in (1, 1.5, 2, 4, 8, "fp4")
    for affine in (True, False)
]


def calibrated(quantizer: Any, x: np.ndarray = X) -> dict[str, Any]:
    x = x.astype(float).ravel()
    return quantizer.calibrated(Observation(x.min(), x.max(), x))


@pytest.mark.forward
@pytest.mark.parametrize(("estimator", "bits", "affine"), CASES)
def test_on_its_own_data_it_is_the_dynamic_quantizer(estimator: Any, bits: Any, affine: bool):
    """The range and the regression over the calibration set, held fixed."""
    static = estimator(bits, affine=affine, calibration="static")
    dynamic = estimator(bits, affine=affine, block_size="tensor")
    received = to_numpy(static.fake_quantize(X, BLOCKS, calibrated(static)))
    expected = to_numpy(dynamic.fake_quantize(X, BLOCKS))
    np.testing.assert_allclose(received, expected, atol=1e-5 * np.abs(X).max())


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
