"""Exactly N of every M survive, the largest; unstructured patterns keep the largest of all."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import reference
from gradients import compiled, few, to_numpy
from hypothesis import given
from hypothesis import strategies as st
from keras import ops

from keras_rq.numerics.sparsity import NM, Unstructured, check_sparsity, keep_mask

pytestmark = pytest.mark.forward
SHAPES = (((3, 12), (-1,)), ((12, 3), (0,)), ((2, 10), (1,)), ((4, 3, 6), (2, 0)), ((3,), (0,)))


@few
@given(
    st.sampled_from(SHAPES),
    st.sampled_from([(1, 2), (2, 4), (1, 4), (3, 4), (4, 8)]),
    st.booleans(),
    st.integers(0, 2**32 - 1),
    st.booleans(),
)
def test_n_of_every_m_survive(
    layout: Any, pattern: tuple[int, int], paired: bool, seed: int, with_ties: bool
):
    (shape, axes), (n, m) = layout, pattern
    if paired:
        n, m = pattern = 2 * n, 2 * m
    rng = np.random.default_rng(seed)
    x = rng.integers(-2, 3, shape) if with_ties else rng.normal(size=shape)
    x = x.astype("float32")
    mask = to_numpy(
        compiled(lambda x: keep_mask(x, NM(n, m, paired), axes))(ops.convert_to_tensor(x))
    )
    assert np.array_equal(mask, reference.keep_mask(x.astype(float), pattern, axes, paired))
    lines = reference.to_lines(mask, axes)
    for start in range(0, lines.shape[1], m):
        group = lines[:, start : start + m]
        kept, most = group.sum(axis=1), min(n, group.shape[1])
        # At an odd end one pair has a single element, which counts as a pair where it is kept.
        is_odd = paired and group.shape[1] % 2 == 1
        assert ((kept == most) | (is_odd & (kept == most - 1))).all()


@pytest.mark.parametrize("fraction", [0.01, 0.5, 0.9, 0.999])
def test_the_largest_fraction_survives(fraction: float):
    x = np.random.default_rng(0).normal(size=(7, 30)).astype("float32")
    mask = to_numpy(keep_mask(ops.convert_to_tensor(x), Unstructured(fraction), (-1,))) == 1
    assert mask.sum() == max(1, round(x.size * (1 - fraction)))
    assert np.abs(x[mask]).min() > np.abs(x[~mask]).max()


@pytest.mark.once
def test_notations():
    assert check_sparsity("2:4") == check_sparsity((2, 4)) == check_sparsity([2, 4]) == NM(2, 4)
    assert check_sparsity(0.75) == Unstructured(0.75) and check_sparsity(None) is None
    assert check_sparsity("4:8-paired") == NM(4, 8, paired=True)
    assert str(NM(4, 8, paired=True)) == "4:8-paired" and NM(4, 8, paired=True).density == 0.5
    assert str(NM(1, 4)) == "1:4" and NM(1, 4).density == 0.25
    assert str(Unstructured(0.75)) == "0.75" and Unstructured(0.75).density == 0.25


@pytest.mark.once
@pytest.mark.parametrize(
    "sparsity", ["2/4", "half", 0.0, 1.0, 1, True, (2,), (2.0, 4), (True, 4), {}]
)
def test_other_notations_are_named_in_the_error(sparsity: Any):
    with pytest.raises(ValueError, match=r"`sparsity` must be 'N:M' or \(N, M\)") as raised:
        check_sparsity(sparsity)
    assert f"Received: sparsity={sparsity!r}" in str(raised.value)


@pytest.mark.once
@pytest.mark.parametrize("sparsity", ["4:4", "0:4", "5:4", (4, 4), (0, 2)])
def test_patterns_that_keep_all_or_nothing_are_refused(sparsity: Any):
    with pytest.raises(ValueError, match="0 < N < M, as in '2:4'") as raised:
        check_sparsity(sparsity)
    assert f"Received: sparsity={sparsity!r}" in str(raised.value)


@pytest.mark.once
@pytest.mark.parametrize("sparsity", ["1:4-paired", "2:5-paired", "3:8-paired"])
def test_pairs_are_not_split(sparsity: str):
    with pytest.raises(ValueError, match="must be even, as in '4:8-paired'") as raised:
        check_sparsity(sparsity)
    assert f"Received: sparsity={sparsity!r}" in str(raised.value)


@pytest.mark.forward
@pytest.mark.parametrize("factor", [1e-30, 1e30])
def test_pairs_are_compared_where_squares_leave_float32(factor: float):
    x = np.random.default_rng(0).normal(size=(4, 64))
    mask = to_numpy(keep_mask(ops.convert_to_tensor(x * factor, "float32"), NM(4, 8, True), (-1,)))
    assert np.array_equal(mask, reference.keep_mask(x, (4, 8), (-1,), paired=True))
