"""Statistics taken by way of parts are those of whole blocks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from gradients import relative_error, to_numpy
from keras import ops

from keras_rq.numerics.blocks import Blocks
from keras_rq.quantizers import EWGS, BitNet, QuEST, Ridge, StraightThrough

QUANTIZERS = {
    "eight bits": Ridge(8),
    "one bit, fading": Ridge(1, fade=1.6),
    "sparse": Ridge(1, sparsity="2:4"),
    "ternary": Ridge(1.5),
    "fp4": Ridge("fp4"),
    "rotated": Ridge(4, rotation="hadamard"),
    "straight through": StraightThrough(4),
    "ewgs": EWGS(2),
    "bitnet": BitNet(1.5, block_size=128),
    "quest": QuEST(1, rotation=None, trust=1.0),
}
# Shape, contraction axis, block size: whole blocks, a shorter last one, one block, an outer axis;
# then whole blocks along the last axis, shorter last ones, and a part of two.
SHAPES = [
    ((256, 40), 0, 128),
    ((144, 40), 0, 64),
    ((144, 40), 0, "channel"),
    ((2, 80, 5, 8), 1, 32),
    ((6, 256), -1, 128),
    ((2, 3, 144), -1, 64),
    ((6, 77), -1, 48),
    ((6, 640), -1, 512),
    ((6, 80), -1, 32),
]


@pytest.mark.parametrize(("shape", "axis", "size"), SHAPES, ids=str)
@pytest.mark.parametrize("name", QUANTIZERS)
def test_both_passes_are_those_of_whole_blocks(name: str, shape: Any, axis: int, size: Any):
    random = np.random.default_rng(0)
    x, upstream = (ops.convert_to_tensor(random.normal(size=shape), "float32") for _ in range(2))
    rule = QUANTIZERS[name].rule(shape, Blocks((axis,), (), size))
    assert rule.in_parts.view != rule.view
    expected, found = (
        (y, one.again(x, statistics), one.backward(x, statistics, upstream))
        for one in (rule, rule.in_parts)
        for y, statistics in [one.forward(x)]
    )
    for wanted, made in zip(expected, found, strict=True):
        assert relative_error(to_numpy(made), to_numpy(wanted)) < 1e-6


@pytest.mark.parametrize(
    "function",
    [
        lambda a, b, s: 0.5 * a + s - b / s,
        lambda a, b, s: 1.0 - a * b,
        lambda a, b, s: abs(-a) * (2.0 + b),
    ],
)
@pytest.mark.parametrize(("shape", "axis"), [((6, 256), -1), ((256, 40), 0)])
def test_parts_know_arithmetic(function: Any, shape: Any, axis: int):
    random = np.random.default_rng(0)
    pair = [ops.convert_to_tensor(random.normal(size=shape), "float32") for _ in range(2)]
    rule = Ridge(4).rule(shape, Blocks((axis,), (), 128))

    def made(view: Any) -> Any:
        a, b = (view.split(one) for one in pair)
        return view.mean_of_present(function(a, b, view.magnitude(a)))

    plain, parts = to_numpy(made(rule.view)), to_numpy(made(rule.in_parts.view.for_statistics))
    if axis == 0:  # there, parts have an entry each, equal within a block
        parts = parts.reshape(2, -1, 1, 40)[:, 0]
    assert relative_error(parts, plain) < 1e-5


@pytest.mark.parametrize(
    ("shape", "axis", "size"),
    [
        ((4, 256), 1, 16),  # one element a part
        ((4, 256), 1, "channel"),
        ((4, 80), 1, 40),  # no vectors fill the blocks
        ((256, 40), 0, "tensor"),
        ((77, 40), 0, 11),  # no part divides the blocks
        ((16, 40), 0, 128),  # one part
        ((256, None), 0, 128),
    ],
    ids=str,
)
def test_other_views_stay_as_they_are(shape: Any, axis: int, size: Any):
    rule = Ridge(4).rule(shape, Blocks((axis,), (), size))
    assert rule.in_parts.view is rule.view


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_no_number_stays_in_its_block(value: float, axis: int):
    x = np.random.default_rng(0).normal(size=(256, 40)).astype("float32")
    x[3, 7] = value
    x = x if axis == 0 else x.T
    rule = Ridge(4).rule(x.shape, Blocks((axis,), (), 128)).in_parts
    y = to_numpy(rule.forward(ops.convert_to_tensor(x))[0])
    lost = ~np.isfinite(y if axis == 0 else y.T)
    assert lost[:128, 7].any() and not lost[128:].any() and not np.delete(lost, 7, 1).any()
