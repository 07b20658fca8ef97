"""Accuracy of quantized nanoGPT on characters of Shakespeare, by method and setting.

    python benchmarks/nanogpt.py --plan first sweep --workers 0 1 --out nanogpt.json
    python benchmarks/nanogpt.py --method ridge --fields trust=1.6 range=rms --lr 4e-3 --out r.json
    python benchmarks/nanogpt.py --out nanogpt.json --table

The recipe is the stock one of nanoGPT's `train_shakespeare_char.py`, through `compile` and `fit`;
linear layers inside the blocks are quantized, embeddings and the head stay in float. Rows that
--out has are not run again; what --time-limit interrupts goes on where it was. A GPU that is named
twice in --workers compiles for one run while it trains another.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import runs
from rows import Row

METHODS = ("recommended", "quest", "ridge", "ridge_linear", "ste", "bitnet", "lsq", "gdnsq")
SETTINGS = ("A1W1", "A1.5W1.5", "A2W2", "A4W4")
SPARSE = ("A4W1", "A4W1-2:4", "A4W1-1:4", "A1W1-2:4")
RATES = (1e-3, 2e-3, 4e-3, 8e-3)
SEEDS = (0, 1, 2)
DECIDING = ("recommended", "quest", "ridge")
DECIDING_SETTINGS = ("A1W1", "A4W4")
FLOAT = {"method": "float", "setting": "float"}
DECIDING_PLACES = (
    FLOAT,
    *({"method": m, "setting": s} for s in DECIDING_SETTINGS for m in DECIDING),
)
# One field of `Ridge` after the other is changed; a trust mask takes the place of the fading. The
# range is one that linear and affine grids can both have.
KNOB_BASE = {
    "affine": True,
    "range": "rms",
    "rotation": "hadamard",
    "trust": None,
    "fade": 1.2,
    "ridge_lambda": 0.01,
    "fit_gradient": True,
    "block_size": 128,
}
KNOB_RATE = 4e-3
KNOBS: dict[str, tuple[Any, ...]] = {
    "affine": (True, False),
    "rotation": (None, "hadamard"),
    "fade": (None, 0.9, 1.2, 1.6, 2.0),
    "trust": (None, 0.3, 0.6, 1.0),
    "ridge_lambda": (0.0, 1e-4, 1e-2, 1.0),
    "fit_gradient": (True, False),
    "block_size": (32, 64, 128, "channel"),
    "range": ("rms", "absmax", "minmax"),
}
Place = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Plans:
    """Which runs the tables consist of.

    Attributes:
        task: the name that rows carry.
        short: steps of the broad tables.
        long: steps of the deciding one.
    """

    task: str = "nanogpt"
    short: int = 2000
    long: int = 5000

    def first(self, rows: Sequence[Row]) -> list[runs.Order]:
        """Every method at every dense setting, at the stock rate."""
        pairs = [{"method": m, "setting": s} for s in SETTINGS for m in METHODS]
        return self.runs([FLOAT, *pairs])

    def sparse(self, rows: Sequence[Row]) -> list[runs.Order]:
        """One-bit weights under four-bit activations, and sparse weights."""
        methods = ("recommended", "quest")
        return self.runs([{"method": m, "setting": s} for s in SPARSE for m in methods])

    def sweep(self, rows: Sequence[Row]) -> list[runs.Order]:
        """Every method at A1W1 and every rate."""
        return self.runs(
            [{"method": m, "setting": "A1W1", "lr": lr} for lr in RATES for m in METHODS]
        )

    def deciding_sweep(self, rows: Sequence[Row]) -> list[runs.Order]:
        """The rates of what the deciding table compares, where `sweep` has none."""
        places = [FLOAT, *({"method": m, "setting": "A4W4"} for m in DECIDING)]
        return self.runs([{**place, "lr": lr} for place in places for lr in RATES])

    def deciding(self, rows: Sequence[Row]) -> list[runs.Order]:
        """Long runs with several seeds, each at its best rate.

        The first seed runs at the two rates that were best among the short runs, since the best
        rate falls as runs grow longer; the others at the better of these.
        """
        trials = [self.trials(rows, place) for place in DECIDING_PLACES]
        chosen = [{**self.better(rows, pair), "seed": s} for s in SEEDS[1:] for pair in trials]
        return [*(trial for pair in trials for trial in pair), *chosen]

    def trials(self, rows: Sequence[Row], place: Place) -> list[runs.Order]:
        """The long runs of the first seed, by which the rate is chosen."""
        rates = self.best_rates(rows, place)[:2]
        return self.runs([{**place, "lr": lr} for lr in rates], self.long)

    def better(self, rows: Sequence[Row], trials: Sequence[runs.Order]) -> runs.Order:
        """The most accurate of some runs; the first while one of them is not known."""
        known = [runs.find(rows, run) for run in trials]
        if None in known:
            return trials[0]
        return max(zip(trials, known, strict=True), key=lambda one: one[1]["val_accuracy"] or 0)[0]

    def knobs(self, rows: Sequence[Row]) -> list[runs.Order]:
        """What each field of `Ridge` is worth, at A1W1."""
        return [run for knob in KNOBS for run in self.knob(knob)]

    def knob(self, name: str) -> list[runs.Order]:
        """The runs that differ in one field."""
        place = {"method": "ridge", "setting": "A1W1", "lr": KNOB_RATE}
        base = {**KNOB_BASE, "fade": None} if name == "trust" else KNOB_BASE
        fields = [{"both": {**base, name: value}} for value in KNOBS[name]]
        return self.runs([{**place, "fields": one} for one in fields])

    def best_rates(self, rows: Sequence[Row], place: Place) -> list[float]:
        """Rates from the best of the short runs of a method at a setting to the worst."""
        swept = [runs.find(rows, run) for run in self.runs([{**place, "lr": r} for r in RATES])]
        known = [row for row in swept if row is not None and row["val_accuracy"] is not None]
        if len(known) < len(RATES):
            where = f"{place['method']} {place['setting']}"
            runs.tell(f"{where}: {len(known)} of {len(RATES)} rates are known")
        ranked = sorted(known, key=lambda row: -row["val_accuracy"])
        return [row["lr"] for row in ranked] or [RATES[0]]

    def runs(self, places: Sequence[Place], steps: int | None = None) -> list[runs.Order]:
        """The runs of some places, with what they share."""
        base = {"task": self.task, "lr": RATES[0], "steps": steps or self.short}
        return [{**runs.DEFAULTS, **base, **place} for place in places]


PLANS = ("first", "sparse", "sweep", "deciding_sweep", "deciding", "knobs")
SMALL = Plans("nanogpt-small", 20, 40)


def make_task(options: argparse.Namespace) -> Any:
    """What a worker trains; the parent imports no Keras."""
    import shakespeare

    return shakespeare.NanoGPT.load(options.data, small=options.small)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs, or prints and draws what has been run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    runs.add_options(parser, PLANS)
    options = parser.parse_args(arguments)
    if options.worker:
        runs.serve(lambda: make_task(options), options.checkpoints)
        return 0
    plans = SMALL if options.small else Plans()
    if options.table or options.plot:
        import nanogpt_tables

        return runs.show(options, nanogpt_tables, plans)
    stock = {"task": plans.task, "lr": RATES[0], "steps": plans.long}
    named = {name: getattr(plans, name) for name in PLANS}
    return runs.work(options, __file__, runs.chosen(options, named, stock))


if __name__ == "__main__":
    sys.exit(main())
