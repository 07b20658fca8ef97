"""What precision costs and what it is worth: points of a trade-off, and its best ones."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_INK, _FAINT, _GRID = "#33404d", "#8d98a4", "#e6eaee"
_COLORS = ("#2458a6", "#d9822b", "#3d9970", "#9b59b6", "#c0392b", "#7f8c8d", "#b8860b", "#17becf")
_MARKERS = "os^Dv<>P"
_PIXELS = 72  # points per inch, which is what annotation offsets are measured in
# Where a label may go, best first: offsets in points, and how it is aligned to them.
_PLACES = (
    (6, 6, "left", "bottom"),
    (-6, 6, "right", "bottom"),
    (6, -6, "left", "top"),
    (-6, -6, "right", "top"),
    (9, 0, "left", "center"),
    (-9, 0, "right", "center"),
    (0, 10, "center", "bottom"),
    (0, -10, "center", "top"),
)


@dataclass(frozen=True)
class Point:
    """One model in a trade-off.

    Attributes:
        label: what stands beside it, such as its precision.
        cost: a positive number, such as bits per element.
        quality: higher is better, such as accuracy.
        group: its series, such as the method; a colour and an entry of the legend.
    """

    label: str
    cost: float
    quality: float
    group: str = ""


def pareto(points: Iterable[Point]) -> list[Point]:
    """The points that none of the others beats, in order of cost.

    A point is beaten by one that costs no more and is at least as good, and better in one of both.

    Args:
        points: in any order; those of infinite or undefined cost or quality do not count.

    Example:

    >>> from keras_rq.reports.frontier import Point, pareto
    >>> [p.label for p in pareto([Point("a", 1, 0.5), Point("b", 2, 0.4), Point("c", 2, 0.7)])]
    ['a', 'c']
    """
    known = [p for p in points if math.isfinite(p.cost) and math.isfinite(p.quality)]
    best: list[Point] = []
    for point in sorted(known, key=lambda p: (p.cost, -p.quality)):
        ties = best and (point.cost, point.quality) == (best[-1].cost, best[-1].quality)
        if not best or point.quality > best[-1].quality or ties:
            best.append(point)
    return best


def plot_frontier(
    points: Sequence[Point],
    path: str | None = None,
    *,
    cost: str = "bits per element",
    quality: str = "accuracy",
    title: str | None = None,
    reference: Point | None = None,
) -> Figure:
    """Draws quality against cost on a logarithmic axis, and the line of the best points.

    Of points with one label, the best is labelled.

    Args:
        points: at least one with a finite quality and a positive finite cost.
        path: image file to write, if any; the suffix says the format.
        cost: label of the horizontal axis.
        quality: label of the vertical axis.
        title: of the figure.
        reference: a model whose cost is beside the point, such as the float one: a line across.

    Returns:
        The matplotlib figure.

    Raises:
        ImportError: without matplotlib.
        ValueError: if there is no point to draw, or a cost is not positive.

    Example:

    >>> import keras_rq as rq
    >>> from keras_rq.reports.frontier import Point
    >>> points = [Point("A1W1", 1.25, 0.48, "ridge"), Point("A4W4", 4.25, 0.57, "ridge")]
    >>> figure = rq.plot_frontier(points, title="nanoGPT")
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("Plots need matplotlib: pip install 'keras-rq[plots]'.") from error
    drawn = [p for p in points if math.isfinite(p.cost) and math.isfinite(p.quality)]
    if not drawn:
        raise ValueError(f"There is no point with a finite cost and quality in {list(points)!r}.")
    if any(point.cost <= 0 for point in drawn):
        raise ValueError(f"Costs must be positive. Received: {[p.cost for p in drawn]!r}")
    figure = Figure(figsize=(8.5, 5), layout="constrained")
    axes = figure.subplots()
    if reference is not None:
        _draw_reference(axes, reference)
    _draw_line(axes, pareto(drawn))
    for index, (group, members) in enumerate(_groups(drawn).items()):
        x, y = [p.cost for p in members], [p.quality for p in members]
        marker, color = _MARKERS[index % len(_MARKERS)], _COLORS[index % len(_COLORS)]
        axes.scatter(x, y, s=42, marker=marker, color=color, label=group or None, zorder=3)
    _draw_axes(axes, [p.cost for p in drawn], cost, quality, title)
    if any(point.group for point in drawn):
        axes.legend(frameon=False, loc="lower right", fontsize=9)
    _draw_labels(figure, axes, drawn)
    if path is not None:
        figure.savefig(path, dpi=160)
    return figure


def _groups(points: Sequence[Point]) -> dict[str, list[Point]]:
    groups: dict[str, list[Point]] = {}
    for point in points:
        groups.setdefault(point.group, []).append(point)
    return groups


def _draw_line(axes: Axes, best: Sequence[Point]) -> None:
    """A staircase: what is the best that each cost buys."""
    x, y = [p.cost for p in best], [p.quality for p in best]
    axes.step(x, y, where="post", color=_FAINT, lw=1.3, ls=(0, (4, 3)), zorder=1)


def _draw_reference(axes: Axes, reference: Point) -> None:
    axes.axhline(reference.quality, color=_INK, lw=1, zorder=1)
    axes.annotate(
        f"{reference.label} {reference.quality:.3f}",
        (0.01, reference.quality),
        xycoords=("axes fraction", "data"),
        xytext=(0, 3),
        textcoords="offset points",
        fontsize=8.5,
        color=_INK,
    )


def _draw_axes(
    axes: Axes, costs: Sequence[float], cost: str, quality: str, title: str | None
) -> None:
    ticks = _ticks(min(costs), max(costs))
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_xticks([], minor=True)
    axes.margins(0.08, 0.1)
    axes.set_xlabel(cost, color=_INK)
    axes.set_ylabel(quality, color=_INK)
    axes.tick_params(colors=_INK)
    axes.grid(color=_GRID, lw=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if title is not None:
        axes.set_title(title, loc="left", fontweight="bold", color=_INK)


def _ticks(lowest: float, highest: float) -> list[float]:
    """Powers of two around the costs, and their halfway marks where those are few."""
    low, high = math.floor(math.log2(lowest)), math.ceil(math.log2(highest))
    stride = max(1, math.ceil((high - low) / 9))
    ticks = [2.0**power for power in range(low, high + 1, stride)]
    if high - low <= 4:
        ticks = sorted([*ticks, *(1.5 * tick for tick in ticks[:-1])])
    # Those outside would stretch the axis.
    return [tick for tick in ticks if lowest / 1.25 <= tick <= highest * 1.25]


def _draw_labels(figure: Figure, axes: Axes, points: Sequence[Point]) -> None:
    """Labels the best points first, each where it covers no marker and no other text."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure).draw()  # settles the layout, which decides what overlaps
    best = pareto(points)
    centres = [axes.transData.transform((p.cost, p.quality)) for p in points]
    radius = 4 * figure.dpi / _PIXELS
    taken: list[Any] = [_box(x - radius, y - radius, x + radius, y + radius) for x, y in centres]
    legend = axes.get_legend()
    if legend is not None:
        taken.append(legend.get_window_extent())
    taken += [text.get_window_extent() for text in axes.texts]
    leaders = {p.label: p for p in sorted(points, key=lambda p: p.quality)}
    for point in sorted(leaders.values(), key=lambda p: p not in best):
        on_line = point in best
        for place in _PLACES:
            text = _annotate(axes, point, place, on_line)
            extent = text.get_window_extent()
            if _inside(axes.bbox, extent) and not any(extent.overlaps(box) for box in taken):
                taken.append(extent)
                break
            text.remove()
        else:
            if on_line:  # crowded, but the best points are what the figure is about
                _annotate(axes, point, _PLACES[0], on_line)


def _annotate(axes: Axes, point: Point, place: tuple[Any, ...], on_line: bool) -> Any:
    x, y, horizontal, vertical = place
    return axes.annotate(
        point.label,
        (point.cost, point.quality),
        xytext=(x, y),
        textcoords="offset points",
        ha=horizontal,
        va=vertical,
        fontsize=8.5,
        color=_INK if on_line else _FAINT,
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6, "alpha": 0.85},
        zorder=2,
    )


def _box(*edges: float) -> Any:
    from matplotlib.transforms import Bbox

    return Bbox.from_extents(*edges)


def _inside(outer: Any, inner: Any) -> bool:
    corners = itertools.product((inner.x0, inner.x1), (inner.y0, inner.y1))
    return all(outer.contains(x, y) for x, y in corners)
