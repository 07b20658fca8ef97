"""Cells, tables and curves of accuracy benchmarks, from the rows that runs left."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import runs
from rows import Row
from summary import table

COLORS = ("#2458a6", "#d9822b", "#3d9970", "#9b59b6", "#c0392b", "#7f8c8d", "#b8860b", "#17becf")
INK, GRID = "#33404d", "#e6eaee"


def look_up(rows: Sequence[Row], run: runs.Order) -> Row | None:
    """The row of a run, also of one that failed."""
    key = runs.key_of(run)
    return next((row for row in rows if runs.key_of(row) == key), None)


def cell(row: Row | None) -> str:
    """Accuracy and loss of a run; empty where it has not been run."""
    if row is None:
        return ""
    if row.get("error"):
        return "fails"
    if row["val_accuracy"] is None or row["val_loss"] is None:
        return "NaN"
    mark = " (diverged)" if row["diverged"] else ""
    return f"{row['val_accuracy']:.4f} ({row['val_loss']:.3f}{width(row)}){mark}"


def is_wide(row: Row) -> bool:
    """Whether trained bit widths ended more than a bit above the setting's, scales included."""
    if not any("bits_weights" in point for point in row.get("curve", ())):
        return False
    wanted = re.search(r"W([\d.]+)", row["setting"])
    stored = row.get("bits_per_element")
    return bool(wanted and stored) and stored > float(wanted[1]) + 1


def width(row: Row) -> str:
    """What to add to a run whose trained bit widths stayed wide; empty for the others."""
    return f", {row['bits_per_element']:.1f} bits" if is_wide(row) else ""


def mean(rows: Sequence[Row], name: str) -> float:
    """Mean of a number over runs; NaN where one has none, or there is no run."""
    values = [row.get(name) for row in rows]
    known = bool(values) and None not in values
    return statistics.mean(values) if known else math.nan


def mean_cell(rows: Sequence[Row], name: str, digits: int = 4) -> str:
    """Mean and sample standard deviation over seeds."""
    middle = mean(rows, name)
    if math.isnan(middle):
        return "" if not rows else "NaN"
    if len(rows) == 1:
        return f"{middle:.{digits}f}"
    spread = statistics.stdev(row[name] for row in rows)
    return f"{middle:.{digits}f} ± {spread:.{digits}f}"


def signed(difference: float) -> str:
    """A difference with its sign; empty where one side is not known."""
    return "" if math.isnan(difference) else f"{difference:+.4f}"


def grid(
    rows: Sequence[Row], corner: str, lines: Mapping[str, Mapping[str, runs.Order]]
) -> str | None:
    """A Markdown table of single runs, or None where none has been run.

    Args:
        rows: of the results.
        corner: title of the first column.
        lines: the run of each cell, by line and column.
    """
    columns = list(dict.fromkeys(name for line in lines.values() for name in line))
    found = {
        name: [cell(look_up(rows, line[column])) if column in line else "" for column in columns]
        for name, line in lines.items()
    }
    known = [[name, *cells] for name, cells in found.items() if any(cells)]
    return table([corner, *columns], known, left=1) if known else None


def others(rows: Sequence[Row], planned: Iterable[runs.Order]) -> str | None:
    """Runs that belong to no table, the best first."""
    keys = {runs.key_of(run) for run in planned}
    rest = [row for row in rows if runs.key_of(row) not in keys]
    rest.sort(key=lambda row: -(row.get("val_accuracy") or 0.0))
    lines = [
        [runs.title(row), cell(row), "" if row.get("error") else f"{row['ms_per_step'] or 0:.2f}"]
        for row in rest
    ]
    return table(["run", "accuracy (loss)", "ms a step"], lines, left=1) if lines else None


def best(rows: Iterable[Row | None], name: str = "val_accuracy") -> Row | None:
    """The row with the highest accuracy; one whose trained widths stayed wide does not count."""
    known = [r for r in rows if r is not None and r.get(name) is not None and not is_wide(r)]
    return max(known, key=lambda row: row[name]) if known else None


def plot_curves(panels: Mapping[str, Mapping[str, Row]], path: Path, title: str) -> None:
    """Draws validation accuracy by step, a line for each run.

    Args:
        panels: by the panel's title: rows by their label.
        path: image file.
        title: of the figure.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2 * len(panels) + 1, 4.6), layout="constrained")
    figure.suptitle(title, x=0.01, ha="left", fontweight="bold", color=INK)
    names = list(dict.fromkeys(_method(name) for rows in panels.values() for name in rows))
    colors = {name: COLORS[index % len(COLORS)] for index, name in enumerate(names)}
    colors["float"] = INK
    drawn = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, (name, rows) in zip(drawn, panels.items(), strict=True):
        _draw_curves(axes, rows, colors)
        axes.set_title(name, loc="left", fontsize=10, color=INK)
    drawn[0].set_ylabel("validation accuracy", color=INK)
    figure.savefig(path, dpi=160)


def _method(label: str) -> str:
    """The label without what `width` added: a method has one color in all panels."""
    return label.partition(",")[0]


def _draw_curves(axes: Any, rows: Mapping[str, Row], colors: Mapping[str, str]) -> None:
    ends = []
    for name, row in rows.items():
        points = [p for p in row["curve"] if p.get("val_accuracy") is not None]
        x, y = [p["step"] for p in points], [p["val_accuracy"] for p in points]
        if points:
            style = (0, (4, 3)) if name == "float" else "-"
            axes.plot(x, y, color=colors[_method(name)], lw=1.6, ls=style)
            ends.append((y[-1], x[-1], name))
    axes.grid(color=GRID, lw=0.8)
    axes.set_xlabel("step", color=INK)
    axes.tick_params(colors=INK)
    axes.spines[["top", "right"]].set_visible(False)
    # Names stand where the lines end, pushed apart where those are close.
    low, high = axes.get_ylim()
    left, right = axes.get_xlim()
    heights = spread([y for y, _, _ in sorted(ends)], 0.045 * (high - low))
    for (y, x, name), height in zip(sorted(ends), heights, strict=True):
        axes.annotate(
            name,
            (x, y),
            xytext=(x + 0.02 * (right - left), height),
            textcoords="data",
            va="center",
            fontsize=9,
            color=colors[_method(name)],
            annotation_clip=False,
        )


def spread(heights: Sequence[float], spacing: float) -> list[float]:
    """Moves sorted heights apart to at least `spacing`, each cluster about its middle."""
    clusters: list[list[float]] = []
    for height in heights:
        clusters.append([height])
        while len(clusters) > 1 and _bottom(clusters[-1], spacing) < _top(clusters[-2], spacing):
            clusters[-2:] = [clusters[-2] + clusters[-1]]
    return [_bottom(c, spacing) + (i + 0.5) * spacing for c in clusters for i in range(len(c))]


def _bottom(cluster: Sequence[float], spacing: float) -> float:
    return statistics.mean(cluster) - 0.5 * spacing * len(cluster)


def _top(cluster: Sequence[float], spacing: float) -> float:
    return statistics.mean(cluster) + 0.5 * spacing * len(cluster)
