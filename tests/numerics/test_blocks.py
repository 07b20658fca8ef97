"""Views split and merge without loss, and their statistics are those of the blocks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import reference
from gradients import compiled, few, to_numpy
from hypothesis import given
from hypothesis import strategies as st
from keras import ops

from keras_rq.numerics.blocks import Blocks, MergedAxes, check_block_size

pytestmark = pytest.mark.forward


@st.composite
def layouts(draw: st.DrawFn) -> tuple[tuple[int, ...], Blocks]:
    """A shape, contraction axes in any order and of either sign, shared axes, a block size."""
    shape = tuple(draw(st.lists(st.integers(1, 5), min_size=1, max_size=4)))
    rank = len(shape)
    order = draw(st.permutations(range(rank)))
    taken = draw(st.integers(1, rank))
    spare = draw(st.integers(0, rank - taken))
    axes = tuple(a - rank * draw(st.booleans()) for a in order[:taken])
    shared = tuple(order[taken : taken + spare])
    size = draw(st.sampled_from(["tensor", "channel", 1, 2, 3, 4, 7, 128]))
    return shape, Blocks(axes, shared, size)


def numbered(shape: tuple[int, ...]) -> np.ndarray:
    return np.arange(1, np.prod(shape) + 1, dtype="float32").reshape(shape)


@few
@given(layouts())
def test_merged_axes_are_those_of_the_reference_and_come_apart(layout: Any):
    shape, blocks = layout
    merged = MergedAxes(shape, tuple(a % len(shape) for a in blocks.axes))

    def there_and_back(x: Any) -> tuple[Any, Any]:
        flat = merged.merge(x)
        return flat, merged.unmerge(flat)

    x = numbered(shape)
    flat, back = map(to_numpy, compiled(there_and_back)(ops.convert_to_tensor(x)))
    lines = np.moveaxis(flat, merged.position, -1).reshape(-1, merged.length)
    assert np.array_equal(lines, reference.to_lines(x, blocks.axes))
    assert np.array_equal(back, x)


@few
@given(layouts())
def test_views_split_into_the_blocks_and_merge_again(layout: Any):
    shape, blocks = layout
    x, view = numbered(shape), blocks.view(shape)

    def everything(x: Any) -> tuple[Any, ...]:
        split = view.split(x)
        spread = [
            view.merge(s + ops.zeros_like(split)) for s in (view.mean(split), view.max(split))
        ]
        return view.merge(split), *spread, view.min(split)

    merged, mean, most, least = map(to_numpy, compiled(everything)(ops.convert_to_tensor(x)))
    assert np.array_equal(merged, x)
    spec = reference.Spec(
        4, True, "minmax", block=blocks.size, axes=blocks.axes, shared=blocks.shared
    )
    members = [x[at].astype(float) for at in reference.blocks(shape, spec)]
    assert np.array_equal(np.sort(least, axis=None), np.sort([m.min() for m in members]))
    for at, m in zip(reference.blocks(shape, spec), members, strict=True):
        assert np.allclose(mean[at], m.mean(), rtol=1e-6)
        assert (most[at] == m.max()).all()


def test_a_statistic_takes_the_place_of_the_contraction_axis():
    view = Blocks((1,), (), 4).view((2, 10, 3))
    x = ops.convert_to_tensor(numbered((2, 10, 3)))
    assert tuple(ops.shape(view.statistic(view.max(view.split(x))))) == (2, 3, 3)


def test_by_channel_keeps_the_axes():
    assert Blocks((1,), (2,), 7).by_channel == Blocks((1,), (2,), "channel")


@pytest.mark.parametrize(
    ("blocks", "shape", "words"),
    [
        (Blocks((2,)), (3, 4), ["axis (2,)", "(3, 4)"]),
        (Blocks((-3,)), (3, 4), ["axis (-3,)", "(3, 4)"]),
        (Blocks((0, -2)), (3, 4), ["(0, -2)", "twice"]),
        (Blocks((0,), (0,)), (3, 4), ["(0, 0)", "twice"]),
        (Blocks((1,), (), 2), (3, None), ["known size", "(1,)", "None", "block_size='channel'"]),
    ],
)
def test_layouts_that_do_not_fit_are_refused(blocks: Blocks, shape: Any, words: list[str]):
    with pytest.raises(ValueError) as raised:
        blocks.view(shape)
    for word in words:
        assert word in str(raised.value)


@pytest.mark.parametrize("size", [0, -1, 1.5, True, None, "row", [8]])
def test_other_block_sizes_are_named_in_the_error(size: Any):
    with pytest.raises(ValueError, match="`conv_block_size` must be a positive integer") as raised:
        check_block_size(size, "conv_block_size")
    for word in ("'channel'", "'tensor'", f"conv_block_size={size!r}"):
        assert word in str(raised.value)
    assert check_block_size(np.int64(8)) == 8
