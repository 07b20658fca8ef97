"""Tables and figures of `nanogpt.py`, from its rows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import accuracy
import nanogpt
import runs
from nanogpt import DECIDING, FLOAT, KNOBS, METHODS, RATES, SEEDS, SETTINGS, SPARSE, Plans
from rows import Row
from summary import table

TITLE = "nanoGPT, characters of Shakespeare"
EVERYWHERE = ("recommended", "quest")


def tables(rows: Sequence[Row], plans: Plans, with_others: bool = True) -> str:
    """All tables that there are rows for, as Markdown.

    Args:
        rows: of the results.
        plans: which runs they consist of.
        with_others: list the runs that belong to none of them, too.
    """
    sections = {
        f"Accuracy (loss) after {plans.short:,} steps, rate {RATES[0]:g}": first(rows, plans),
        "One-bit and sparse weights": sparse(rows, plans),
        "A1W1 by learning rate": rates(rows, plans, "A1W1", METHODS),
        "A4W4 by learning rate": rates(rows, plans, "A4W4", DECIDING),
        f"{plans.long:,} steps, the two rates that are best after {plans.short:,}": trials(
            rows, plans
        ),
        f"{plans.long:,} steps, each at its better rate": deciding(rows, plans),
        **{f"A1W1, `{name}` of `Ridge`": knob(rows, plans, name) for name in KNOBS},
    }
    if with_others:
        sections["Other runs"] = accuracy.others(rows, planned(rows, plans))
    return "\n\n".join(f"### {name}\n\n{text}" for name, text in sections.items() if text)


def planned(rows: Sequence[Row], plans: Plans) -> list:
    """Every run that a table has a place for."""
    return [run for name in nanogpt.PLANS for run in getattr(plans, name)(rows)]


def first(rows: Sequence[Row], plans: Plans) -> str | None:
    """Methods by setting; the float model has one number."""
    float_run = plans.runs([FLOAT])[0]
    lines = {"float": dict.fromkeys(SETTINGS[:1], float_run)} | {
        method: {s: plans.runs([{"method": method, "setting": s}])[0] for s in SETTINGS}
        for method in METHODS
    }
    return accuracy.grid(rows, "method", lines)


def sparse(rows: Sequence[Row], plans: Plans) -> str | None:
    """The two leading methods where weights have a bit or less."""
    lines = {
        method: {s: plans.runs([{"method": method, "setting": s}])[0] for s in SPARSE}
        for method in EVERYWHERE
    }
    return accuracy.grid(rows, "method", lines)


def rates(rows: Sequence[Row], plans: Plans, setting: str, methods: Sequence[str]) -> str | None:
    """Methods by learning rate, and the float model."""
    places = {method: {"method": method, "setting": setting} for method in methods}
    lines = {
        name: {f"{lr:g}": plans.runs([{**place, "lr": lr}])[0] for lr in RATES}
        for name, place in {"float": FLOAT, **places}.items()
    }
    # The float model's short run at the stock rate belongs to the first table already.
    known = any(accuracy.look_up(rows, run) for run in list(lines["float"].values())[1:])
    return accuracy.grid(rows, "method", lines if known else {m: lines[m] for m in methods})


def deciding(rows: Sequence[Row], plans: Plans) -> str | None:
    """Mean and spread over seeds, and the distance to float and to the recommended recipe."""
    floats = _long(rows, plans, FLOAT)
    lines = [_deciding_line("", "float", floats, [], [])] if floats else []
    for setting in nanogpt.DECIDING_SETTINGS:
        found = {m: _long(rows, plans, {"method": m, "setting": setting}) for m in DECIDING}
        ours = found["recommended"]
        lines += [
            _deciding_line(setting, method, some, floats, ours if some is not ours else [])
            for method, some in found.items()
            if some
        ]
    head = ["setting", "method", "rate", "seeds", "accuracy", "loss", "diverged"]
    head += ["minus float", "recommended minus it"]
    return table(head, lines, left=2) if lines else None


def _deciding_line(
    setting: str, method: str, found: Sequence[Row], floats: Sequence[Row], ours: Sequence[Row]
) -> list[str]:
    own, reference, best = (accuracy.mean(r, "val_accuracy") for r in (found, floats, ours))
    return [
        setting,
        method,
        f"{found[0]['lr']:g}",
        f"{len(found)}",
        accuracy.mean_cell(found, "val_accuracy"),
        accuracy.mean_cell(found, "val_loss", 3),
        f"{sum(row['diverged'] for row in found)}",
        accuracy.signed(own - reference),
        accuracy.signed(best - own),
    ]


def _long(rows: Sequence[Row], plans: Plans, place: nanogpt.Place) -> list[Row]:
    """The long runs of a place at the rate that most seeds have; of several, at the best."""
    rates = []
    for trial in plans.trials(rows, place):
        found = (runs.find(rows, {**trial, "seed": seed}) for seed in SEEDS)
        rates.append([row for row in found if row is not None])
    return max(rates, key=lambda some: (len(some), sum(row["val_accuracy"] or 0 for row in some)))


def trials(rows: Sequence[Row], plans: Plans) -> str | None:
    """The long runs by which rates were chosen."""
    lines = {}
    for place in nanogpt.DECIDING_PLACES:
        name = "float" if place is FLOAT else f"{place['method']} {place['setting']}"
        by_rate = {run["lr"]: run for run in plans.trials(rows, place)}
        lines[name] = {f"{lr:g}": by_rate[lr] for lr in RATES if lr in by_rate}
    return accuracy.grid(rows, "method", lines)


def knob(rows: Sequence[Row], plans: Plans, name: str) -> str | None:
    """What one field of `Ridge` is worth."""
    lines = {
        f"{value}": {"accuracy (loss)": run}
        for value, run in zip(KNOBS[name], plans.knob(name), strict=True)
    }
    return accuracy.grid(rows, f"`{name}`", lines)


def figures(rows: Sequence[Row], plans: Plans, folder: Path) -> list[Path]:
    """Draws what there are rows for and returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn = [curves(rows, plans, folder / "nanogpt_curves.png")]
    axes = {
        "storage": ("bits_per_element", "bits per element of the quantized layers"),
        "energy": ("energy_per_product", "activation bits x weight bits x density"),
    }
    for name, (field, label) in axes.items():
        drawn.append(frontier(rows, plans, folder / f"nanogpt_{name}.png", field, label))
    return [path for path in drawn if path is not None]


def curves(rows: Sequence[Row], plans: Plans, path: Path) -> Path | None:
    """Learning curves at A1W1, at the stock rate and at each method's best."""
    stock, tuned = {}, {}
    for method in ("float", *METHODS):
        place = FLOAT if method == "float" else {"method": method, "setting": "A1W1"}
        found = [runs.find(rows, run) for run in plans.runs([{**place, "lr": r} for r in RATES])]
        known = [row for row in found if row is not None]
        if (at_stock := next((r for r in known if r["lr"] == RATES[0]), None)) is not None:
            stock[method + accuracy.width(at_stock)] = at_stock
        if (at_best := accuracy.best(known)) is not None:
            tuned[method] = at_best
    if not stock and not tuned:
        return None
    panels = {f"rate {RATES[0]:g}": stock, "each at the best of its rates": tuned}
    if all(row["lr"] == RATES[0] for row in tuned.values()):
        del panels["each at the best of its rates"]
    accuracy.plot_curves(panels, path, f"{TITLE}, A1W1")
    return path


def frontier(rows: Sequence[Row], plans: Plans, path: Path, cost: str, label: str) -> Path | None:
    """Accuracy against a cost, each method and setting at the best rate known."""
    import keras_rq as rq
    from keras_rq.reports.frontier import Point

    points = []
    for method in METHODS:
        for setting in (*SETTINGS, *SPARSE):
            row = _best_short(rows, plans, {"method": method, "setting": setting})
            if row is not None:
                points.append(Point(setting, row[cost], row["val_accuracy"], method))
    if not points:
        return None
    row = _best_short(rows, plans, FLOAT)
    reference = None if row is None else Point("float", row[cost], row["val_accuracy"])
    title = f"{TITLE}, {plans.short:,} steps"
    rq.plot_frontier(
        points,
        str(path),
        cost=label,
        quality="validation accuracy",
        title=title,
        reference=reference,
    )
    return path


def _best_short(rows: Sequence[Row], plans: Plans, place: nanogpt.Place) -> Row | None:
    found = (accuracy.look_up(rows, run) for run in plans.runs([{**place, "lr": r} for r in RATES]))
    return accuracy.best(found)
