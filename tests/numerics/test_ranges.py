"""Where grids lie over data, apart from what the reference of whole quantizers covers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from gradients import few, to_numpy
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from keras import ops

from keras_rq.numerics.blocks import Blocks
from keras_rq.numerics.grids import grid_for
from keras_rq.numerics.ranges import find_range

pytestmark = pytest.mark.forward


def ends(x: np.ndarray, bits: Any) -> tuple[np.ndarray, np.ndarray]:
    """The outermost levels of every row."""
    view, grid = Blocks(axes=(-1,), size="channel").view(x.shape), grid_for(bits, True)
    span = find_range(view.split(ops.convert_to_tensor(x)), view, grid, "rms")
    low = to_numpy(span.origin).reshape(-1)
    return low, low + to_numpy(span.scale).reshape(-1) * (grid.high - grid.low)


def noise(x: np.ndarray, low: float, high: float, levels: int) -> float:
    """Mean squared error of the nearest of evenly spaced levels, after a linear fit; float64."""
    step = (high - low) / (levels - 1)
    codes = np.clip(np.round((x - low) / step), 0, levels - 1)
    shared = np.mean(x * codes) - x.mean() * codes.mean()
    return float(x.var() - shared**2 / max(codes.var(), 1e-9))


def relu(x: np.ndarray) -> np.ndarray:
    return np.maximum(x, 0.0)


@pytest.mark.parametrize("bits", [1.5, 2, 3, 4])
@pytest.mark.parametrize(
    "shape",
    [lambda x: x, relu, lambda x: -relu(x), lambda x: relu(x - 0.5), lambda x: relu(x) ** 1.5],
    ids=["normal", "relu", "negative", "sparse", "long tail"],
)
def test_gaussian_ranges_are_nearly_the_best_of_one_sided_data_too(bits: Any, shape: Callable):
    x = shape(np.random.default_rng(0).normal(size=4096)).astype("float32")
    levels = len(grid_for(bits, True).codes)
    (low,), (high,) = ends(x[None], bits)
    x = x.astype("float64")
    around, spread = x.mean(), x.std()
    tried = [
        noise(x, around - below * spread, around + above * spread, levels)
        for below in np.arange(0.25, 3, 0.25)
        for above in np.arange(0.25, 5, 0.25)
    ]
    assert noise(x, low, high, levels) < 1.45 * min(tried)


@pytest.mark.parametrize("bits", [1.5, 2, 3, 4])
def test_they_reach_as_far_on_both_sides_where_there_is_data(bits: Any):
    x = np.random.default_rng(0).normal(1.0, 2.0, size=(4, 4096)).astype("float32")
    low, high = ends(x, bits)
    reach = grid_for(bits, True).gaussian_edge * x.std(axis=1)
    np.testing.assert_allclose(low, x.mean(axis=1) - reach, rtol=1e-5)
    np.testing.assert_allclose(high, x.mean(axis=1) + reach, rtol=1e-5)


def test_the_fine_levels_of_fp4_stay_around_the_mean():
    x = relu(np.random.default_rng(0).normal(size=(2, 4096))).astype("float32")
    low, high = ends(x, "fp4")
    np.testing.assert_allclose((low + high) / 2, x.mean(axis=1), rtol=1e-5)


@few
@given(
    arrays.arrays("float32", (3, 12), elements=st.floats(-1e4, 1e4, width=32)),
    st.sampled_from([1.5, 2, 3, 4, 8]),
)
def test_no_level_lies_where_there_is_no_data(x: np.ndarray, bits: Any):
    low, high = ends(x, bits)
    rounding = 1e-6 * np.abs(x).max(axis=1) + 1e-30
    assert np.all(low >= x.min(axis=1) - rounding)
    assert np.all(high <= x.max(axis=1) + rounding)
