"""The demo's chart: accuracy by setting and method, and the size of the files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from keras_rq.demo.results import Results

_COLORS = {"ridge, not trained": "#9aa5b1", "straight-through": "#d9822b", "ridge": "#2458a6"}
_MARKERS = {"ridge, not trained": "s", "straight-through": "^", "ridge": "o"}
_INK = "#33404d"
_TICKS = (0, 50, 80, 90, 95, 98, 99, 99.5, 99.9)


def draw(results: Results, path: Path) -> None:
    """Draws both panels and writes them as a PNG."""
    style = {
        "font.size": 10,
        "text.color": _INK,
        "axes.edgecolor": "#c4ccd4",
        "axes.labelcolor": _INK,
        "xtick.color": _INK,
        "ytick.color": _INK,
    }
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(10.5, 4.4), layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=(1.55, 1))
        _draw_accuracy(left, results)
        _draw_sizes(right, results)
        figure.savefig(path, dpi=160)


def _draw_accuracy(axes: Axes, results: Results) -> None:
    settings = list(dict.fromkeys(row.setting for row in results.rows[1:]))
    methods = list(dict.fromkeys(row.method for row in results.rows[1:]))
    ceiling = 1 - 0.5 / results.test_images  # no error at all is drawn as half an error
    for index, method in enumerate(methods):
        offset = 0.25 * (index - (len(methods) - 1) / 2)
        rows = [results.row(setting, method) for setting in settings]
        _draw_method(axes, method, np.arange(len(settings)) + offset, rows, ceiling)
    reference = results.rows[0].mean
    axes.axhline(_height(reference, ceiling), color=_INK, lw=1, ls=(0, (4, 3)), zorder=1)
    axes.text(
        len(settings) - 0.42,
        _height(reference, ceiling),
        f"float {100 * reference:.1f}",
        ha="right",
        va="bottom",
        fontsize=9,
    )
    lowest = min(min(row.accuracies) for row in results.rows)
    ticks = [tick for tick in _TICKS if 100 * lowest - 20 < tick < 100 * ceiling]
    axes.set_yticks([_height(tick / 100, 1) for tick in ticks], [f"{tick:g}" for tick in ticks])
    axes.set_xticks(range(len(settings)), settings)
    axes.set_xlim(-0.6, len(settings) - 0.4)
    axes.set_ylabel("accuracy %, equal steps halve the errors")
    axes.set_title("Accuracy on held-out digits", loc="left", fontweight="bold")
    axes.grid(axis="y", color="#e6eaee", lw=0.8)
    axes.legend(frameon=False, loc="lower left", fontsize=9)
    _declutter(axes)


def _draw_method(
    axes: Axes, method: str, positions: np.ndarray, rows: Sequence, ceiling: float
) -> None:
    means = np.array([row.mean for row in rows])
    spreads = np.array([row.spread or 0.0 for row in rows])
    heights = _height(means, ceiling)
    axes.errorbar(
        positions,
        heights,
        yerr=[
            heights - _height(means - spreads, ceiling),
            _height(means + spreads, ceiling) - heights,
        ],
        fmt=_MARKERS.get(method, "D"),
        color=_COLORS.get(method, _INK),
        markersize=7,
        capsize=3,
        lw=1.2,
        label=method,
        zorder=3,
    )
    for position, height, mean in zip(positions, heights, means, strict=True):
        axes.annotate(
            f"{100 * mean:.1f}",
            (position, height),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            fontsize=8.5,
            color=_COLORS.get(method, _INK),
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6, "alpha": 0.85},
            zorder=2,
        )


def _height(accuracy: float | np.ndarray, ceiling: float) -> float | np.ndarray:
    """Height of an accuracy on an axis where each step halves the errors."""
    return -np.log2(1 - np.minimum(accuracy, ceiling))


def _draw_sizes(axes: Axes, results: Results) -> None:
    rows = [row for row in results.rows if row.file is not None]
    names = [row.setting for row in rows]
    sizes = np.array([row.file.size for row in rows]) / 1024
    colors = [_INK] + [_COLORS["ridge"]] * (len(rows) - 1)
    axes.barh(names, sizes, color=colors, height=0.55)
    axes.invert_yaxis()
    for index, size in enumerate(sizes):
        ratio = "" if index == 0 else f"   1/{sizes[0] / size:.1f}"
        axes.text(size + 0.015 * sizes.max(), index, f"{size:.0f} KiB{ratio}", va="center")
    axes.set_xlim(0, 1.3 * sizes.max())
    axes.set_xlabel("KiB")
    axes.set_title("Size of the .tflite file", loc="left", fontweight="bold")
    axes.tick_params(axis="y", length=0)
    _declutter(axes)


def _declutter(axes: Axes) -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
