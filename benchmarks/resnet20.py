"""Accuracy of quantized ResNet-20 on CIFAR-10, by method and setting.

    python benchmarks/resnet20.py --plan float --epochs 200 --workers 0 --out resnet20.json
    python benchmarks/resnet20.py --plan table --epochs 100 --workers 0 1 --out resnet20.json
    python benchmarks/resnet20.py --out resnet20.json --table --plot figures

Float runs train from random weights and leave a checkpoint, from which all others start. The first
convolution and the last layer stay in float, as with GDNSQ's authors. The accuracy is that of the
last epoch: no epoch is picked by the test images.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import recipes
import runs
from rows import Row

METHODS = ("recommended", "gdnsq", "ridge")
SETTINGS = ("A4W4", "A3W3", "A2W2", "A1W1")
# The README of the GDNSQ authors' code (MHAQ), up to 1000 epochs.
AUTHORS = {"float": 0.9282, "A4W4": 0.9278, "A3W3": 0.925, "A2W2": 0.914, "A1W1": 0.8578}
RATES = {"float": 0.1, "quantized": 2e-3}
FLOAT = {"method": "float", "setting": "float"}
EPOCHS = {"float": 200, "quantized": 100}
IMAGES = 50_000


@dataclasses.dataclass(frozen=True)
class Plans:
    """Which runs the table consists of.

    Attributes:
        task: the name that rows carry.
        epochs: of every run; None for `EPOCHS`.
        images: in the training set.
        small: whether recipes are those of tests.
    """

    task: str = "resnet20"
    epochs: int | None = None
    images: int = IMAGES
    small: bool = False

    def float(self, rows: Sequence[Row]) -> list[runs.Order]:
        """The float model, whose weights the others start from."""
        return self.runs([FLOAT])

    def table(self, rows: Sequence[Row]) -> list[runs.Order]:
        """Every method at every setting of GDNSQ's authors."""
        return self.runs([{"method": m, "setting": s} for s in SETTINGS for m in METHODS])

    def runs(self, places: Sequence[Mapping[str, Any]]) -> list[runs.Order]:
        """The runs of some places, with what they share."""
        return [self._run(place) for place in places]

    def _run(self, place: Mapping[str, Any]) -> runs.Order:
        kind = "float" if place["method"] == "float" else "quantized"
        run = {**runs.DEFAULTS, "task": self.task, "lr": RATES[kind], **place}
        steps = self.steps_per_epoch(run) * (self.epochs or EPOCHS[kind])
        return {"steps": steps, **run}

    def steps_per_epoch(self, run: runs.Order) -> int:
        """Full batches in the training set."""
        return self.images // recipes.resnet(run["method"], self.small).of(run).batch


PLANS = ("float", "table")
SMALL = Plans("resnet20-small", epochs=2, images=40, small=True)


def make_task(options: argparse.Namespace) -> Any:
    """What a worker trains; the parent imports no Keras."""
    import cifar

    return cifar.ResNet20.load(options.data, options.start, options.small)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs, or prints and draws what has been run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    runs.add_options(parser, PLANS)
    parser.add_argument("--epochs", type=int, help="in place of --steps")
    parser.add_argument("--start", type=Path, default=runs.CACHE / "resnet20_float.weights.h5")
    options = parser.parse_args(arguments)
    if options.worker:
        runs.serve(lambda: make_task(options), options.checkpoints)
        return 0
    plans = SMALL if options.small else Plans()
    plans = dataclasses.replace(plans, epochs=options.epochs or plans.epochs)
    if options.table or options.plot:
        import resnet20_tables

        return runs.show(options, resnet20_tables, plans)
    named = {name: getattr(plans, name) for name in PLANS}
    stock = {"task": plans.task}
    chosen = plans.runs(runs.chosen(options, named, stock))
    return runs.work(options, __file__, chosen, ("--start", str(options.start)))


if __name__ == "__main__":
    sys.exit(main())
