"""The demo: one small network at three precisions, by three methods, down to files that run.

From one float checkpoint, each setting is reached by ridge regression without training, by
straight-through training and by ridge training. Both trainings share one recipe. The best ridge
model becomes a .tflite file, which is run over all test images and compared with its model.

The demo prints what it measured, flattering or not, and writes it to `demo.json`.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import time
from collections.abc import Callable
from pathlib import Path

import keras
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

import keras_rq as rq
from keras_rq.demo import chart, digits, files, table, training
from keras_rq.demo.methods import METHODS, SETTINGS, Method, quantized
from keras_rq.demo.results import Results, Row
from keras_rq.demo.training import Recipe, Trainer

FLOAT_RECIPE = Recipe(epochs=10, learning_rate=3e-3)
RECIPE = Recipe(epochs=12, learning_rate=3e-3)
SEEDS = (0, 1, 2)


def run(out: Path, *, epochs: int | None = None, quick: bool = False) -> Results:
    """Runs the demo.

    Args:
        out: folder for `demo.json`, `demo.png`, `demo.md` and the .tflite files.
        epochs: epochs of quantization-aware training; by default what the recipe says.
        quick: one seed and one epoch, to see that everything works: the accuracies mean little.

    Returns:
        What was measured.
    """
    started = time.monotonic()
    # It warns of every model after the fifth that is compiled; here that is the purpose.
    logging.getLogger("tensorflow").setLevel(logging.ERROR)
    console = Console()
    recipe = Recipe(epochs or (1 if quick else RECIPE.epochs), RECIPE.learning_rate)
    study = _Study(recipe, SEEDS[:1] if quick else SEEDS)
    with _progress(console) as progress:
        task = progress.add_task("float", total=study.epochs)
        study.train(
            tell=lambda text: progress.update(task, description=text),
            advance=lambda: progress.advance(task),
        )
        progress.update(task, description="writing and running .tflite files")
        rows = study.rows(out)
    results = Results(
        rows=rows,
        recipe=str(recipe),
        float_recipe=str(FLOAT_RECIPE),
        train_images=len(study.digits.train_images),
        test_images=len(study.digits.test_images),
        parameters=study.models[files.FLOAT].count_params(),
        seconds=time.monotonic() - started,
    )
    table.show(results, console)
    _write(results, out)
    console.print(f"{results.seconds:.0f} seconds. Everything is in {out}/", highlight=False)
    return results


class _Study:
    """Trains all models, and keeps one of each setting for export."""

    def __init__(self, recipe: Recipe, seeds: tuple[int, ...]):
        self.recipe, self.seeds = recipe, seeds
        self.digits = digits.load()
        self.models: dict[str, keras.Model] = {}
        self._rows: list[Row] = []

    @property
    def epochs(self) -> int:
        """Epochs of the whole study."""
        trained = sum(method.trains for method in METHODS) * len(SETTINGS) * len(self.seeds)
        return FLOAT_RECIPE.epochs + trained * self.recipe.epochs

    def train(self, tell: Callable[[str], None], advance: Callable[[], None]) -> None:
        """Trains the float model, then every setting by every method."""
        keras.utils.set_random_seed(0)
        checkpoint = digits.network()
        reached = Trainer(checkpoint, FLOAT_RECIPE, self.digits).run(0, advance)
        self._add(files.FLOAT, "trained once", checkpoint, [reached])
        self.models[files.FLOAT] = checkpoint
        for setting in SETTINGS:
            for method in METHODS:
                tell(f"{setting} {method.name}")
                self._train(checkpoint, setting, method, advance)

    def _train(
        self, checkpoint: keras.Model, setting: str, method: Method, advance: Callable[[], None]
    ) -> None:
        model = quantized(checkpoint, method, setting)
        if not method.trains:
            self._add(setting, method.name, model, [training.accuracy(model, self.digits)])
            return
        trainer = Trainer(model, self.recipe, self.digits)
        accuracies, weights = [], []
        for seed in self.seeds:
            accuracies.append(trainer.run(seed, advance))
            weights.append(model.get_weights())
        self._add(setting, method.name, model, accuracies)
        if method.exports:
            model.set_weights(weights[int(np.argmax(accuracies))])
            self.models[setting] = model

    def _add(self, setting: str, method: str, model: keras.Model, accuracies: list[float]) -> None:
        bits = rq.report(model).total.bits_per_element
        self._rows.append(Row(setting, method, tuple(accuracies), bits))

    def rows(self, out: Path) -> tuple[Row, ...]:
        """Writes the files to `out` and adds what they do to the rows of their models."""
        checked = self.digits.test_images[:8]
        paths = {
            name: files.write(model, name, out, checked) for name, model in self.models.items()
        }
        measured = files.compare(self.models, paths, self.digits)
        return tuple(
            dataclasses.replace(row, file=measured[row.setting]) if _exports(row) else row
            for row in self._rows
        )


def _exports(row: Row) -> bool:
    methods = {method.name for method in METHODS if method.exports}
    return row.setting == files.FLOAT or row.method in methods


def _write(results: Results, out: Path) -> None:
    (out / "demo.json").write_text(json.dumps(results.to_dict(), indent=2) + "\n")
    lines = [table.markdown(results), "", *table.notes(results)]
    (out / "demo.md").write_text("\n".join(lines) + "\n")
    chart.draw(results, out / "demo.png")


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description:<34}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("epochs"),
        TimeElapsedColumn(),
        console=console,
    )
