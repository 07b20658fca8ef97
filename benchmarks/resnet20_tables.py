"""The table and the figures of `resnet20.py`, from its rows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import accuracy
import runs
from resnet20 import AUTHORS, METHODS, SETTINGS, Plans
from rows import Row
from summary import table

AXES = {
    "storage": ("bits_per_element", "bits per element of the quantized layers"),
    "energy": ("energy_per_product", "activation bits x weight bits x density"),
}


def tables(rows: Sequence[Row], plans: Plans, with_others: bool = True) -> str:
    """The table for every number of epochs, as Markdown.

    Args:
        rows: of the results.
        plans: which runs it consists of.
        with_others: list the runs that have no place in it, too.
    """
    rows = [row for row in rows if row["task"] == plans.task]
    planned = [row for row in rows if _is_planned(row, plans)]
    sections = {
        "ResNet-20 on CIFAR-10: accuracy after the last epoch (epochs)": comparison(planned, plans),
        "Other runs": accuracy.others(rows, planned) if with_others else None,
    }
    return "\n\n".join(f"### {name}\n\n{text}" for name, text in sections.items() if text)


def _is_planned(row: Row, plans: Plans) -> bool:
    """Whether only the number of epochs and the seed tell a run from a planned one."""
    own = {"steps": row["steps"], "seed": row["seed"]}
    wanted = plans.float([]) + plans.table([])
    return runs.key_of(row) in {runs.key_of({**run, **own}) for run in wanted}


def comparison(rows: Sequence[Row], plans: Plans) -> str | None:
    """Settings by method; where a method has runs of several lengths, the longest."""
    lines = []
    for setting in ("float", *SETTINGS):
        # The float model has one number, in the first column.
        methods = ("float", "", "") if setting == "float" else METHODS
        cells = [_cell(rows, plans, method, setting) for method in methods]
        if any(cells):
            lines.append([setting, f"{100 * AUTHORS[setting]:.2f}", *cells])
    return table(["setting", "GDNSQ's authors", *METHODS], lines, left=1) if lines else None


def _cell(rows: Sequence[Row], plans: Plans, method: str, setting: str) -> str:
    found = [r for r in rows if (r["method"], r["setting"]) == (method, setting)]
    known = [row for row in found if not row.get("error")]
    if not known:
        return "fails" if found else ""
    steps = max(row["steps"] for row in known)
    longest = [row for row in known if row["steps"] == steps]
    epochs = steps // plans.steps_per_epoch(longest[0])
    percent = [{"accuracy": 100 * r["val_accuracy"]} for r in longest if r["val_accuracy"]]
    seeds = f", {len(longest)} seeds" if len(longest) > 1 else ""
    return f"{accuracy.mean_cell(percent, 'accuracy', 2) or 'NaN'} ({epochs}{seeds})"


def figures(rows: Sequence[Row], plans: Plans, folder: Path) -> list[Path]:
    """Draws the frontiers that there are rows for and returns the files."""
    import keras_rq as rq
    from keras_rq.reports.frontier import Point

    folder.mkdir(parents=True, exist_ok=True)
    planned = [row for row in rows if row["task"] == plans.task and _is_planned(row, plans)]
    drawn = []
    for name, (field, label) in AXES.items():
        best = {
            (m, s): accuracy.best(r for r in planned if (r["method"], r["setting"]) == (m, s))
            for m, s in (("float", "float"), *((m, s) for m in METHODS for s in SETTINGS))
        }
        points = {
            place: Point(place[1], row[field], row["val_accuracy"], place[0])
            for place, row in best.items()
            if row is not None
        }
        reference = points.pop(("float", "float"), None)
        if points:
            drawn.append(folder / f"resnet20_{name}.png")
            rq.plot_frontier(
                list(points.values()),
                str(drawn[-1]),
                cost=label,
                quality="test accuracy",
                title="ResNet-20, CIFAR-10",
                reference=reference,
            )
    return drawn
