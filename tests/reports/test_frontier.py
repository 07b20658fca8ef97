"""Which points of a trade-off are the best ones, and the picture of them."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import keras_rq as rq
from keras_rq.reports.frontier import Point, _ticks, pareto

pytestmark = pytest.mark.once

NUMBERS = st.sampled_from([0.5, 1.0, 1.5, 2.0, 4.0, math.nan, math.inf])
POINTS = st.lists(st.builds(Point, st.text(max_size=2), NUMBERS, NUMBERS), max_size=12)


def _beaten(point: Point, points: list[Point]) -> bool:
    return any(
        o.cost <= point.cost
        and o.quality >= point.quality
        and (o.cost, o.quality) != (point.cost, point.quality)
        for o in points
    )


@given(POINTS)
def test_the_best_points_are_those_that_no_other_beats(points: list[Point]):
    known = [p for p in points if math.isfinite(p.cost) and math.isfinite(p.quality)]
    best = pareto(points)
    assert sorted(map(repr, best)) == sorted(repr(p) for p in known if not _beaten(p, known))
    assert [p.cost for p in best] == sorted(p.cost for p in best)


POINTS_DRAWN = [
    Point("A1W1", 1.25, 0.48, "ours"),
    Point("A1W1", 1.25, 0.44, "theirs"),
    Point("A2W2", 2.25, 0.47, "ours"),
    Point("A4W4", 4.25, 0.57, "ours"),
]


def test_a_picture_has_the_points_their_series_and_the_line(tmp_path: Path):
    path = tmp_path / "frontier.png"
    figure = rq.plot_frontier(
        POINTS_DRAWN,
        str(path),
        cost="bits",
        quality="right",
        title="A title",
        reference=Point("float", 32, 0.58),
    )
    (axes,) = figure.axes
    assert path.stat().st_size > 5_000
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("bits", "right")
    assert axes.get_title(loc="left") == "A title"
    assert [t.get_text() for t in axes.get_legend().get_texts()] == ["ours", "theirs"]
    # One label each, and the float model's beside its line.
    assert sorted(t.get_text() for t in axes.texts) == ["A1W1", "A2W2", "A4W4", "float 0.580"]
    assert any(list(line.get_xdata()) == [1.25, 4.25] for line in axes.lines)
    assert sum(len(c.get_offsets()) for c in axes.collections) == 4


def test_labels_do_not_overlap():
    crowd = [Point(f"A{i}W{i}", 1 + i / 50, 0.5 + i / 500) for i in range(1, 12)]
    figure = rq.plot_frontier([*crowd, Point("far", 8, 0.7)])
    texts = [t for t in figure.axes[0].texts if t.get_text() != "far"]
    boxes = [t.get_window_extent() for t in texts]
    assert len(texts) >= 3
    free = [i for i, a in enumerate(boxes) if not any(a.overlaps(b) for b in boxes if b is not a)]
    assert len(free) >= 3


@pytest.mark.parametrize("lowest, highest", [(1.25, 1.25), (0.5, 16), (1, 1024), (1.7, 1.8)])
def test_ticks_lie_at_the_costs(lowest: float, highest: float):
    ticks = _ticks(lowest, highest)
    assert 1 <= len(ticks) <= 10
    assert all(lowest / 1.3 <= tick <= highest * 1.3 for tick in ticks)


def test_there_must_be_a_point_to_draw():
    with pytest.raises(ValueError, match="no point with a finite cost"):
        rq.plot_frontier([Point("nan", 1.0, math.nan)])
    with pytest.raises(ValueError, match=r"positive. Received: \[0.0\]"):
        rq.plot_frontier([Point("free", 0.0, 0.5)])
