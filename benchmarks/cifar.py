"""CIFAR-10 on the device, padded, cropped and flipped there."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import keras
import methods
import models
import numpy as np
import recipes
from batches import Gathered, divisor, resident
from training import Run, Task, WarmupCosine

import keras_rq as rq

MEAN = np.array([125.3, 123.0, 113.9], "float32")
SPREAD = np.array([63.0, 62.1, 66.7], "float32")
PAD = 4
NAMES = ("x_train", "y_train", "x_test", "y_test")
# How many test images a batch holds, at most.
EVALUATED = 1000


class ResNet20(Task):
    """Classification of images; the first convolution and the last layer stay in float.

    Args:
        data: images (uint8, NHWC) and labels: training, then test.
        start: float weights: written by float runs, read by those that start from them.
        small: whether the recipes are those of tests.
    """

    def __init__(self, data: tuple[np.ndarray, ...], start: Path, small: bool = False) -> None:
        x_train, y_train, x_test, y_test = data
        self.start, self.small = start, small
        self.count, self.size = len(x_train), x_train.shape[1]
        padded = np.pad(x_train, ((0, 0), (PAD, PAD), (PAD, PAD), (0, 0)))
        self.train = resident(padded), resident(y_train.reshape(-1).astype("int32"))
        self.test = normalized(x_test), y_test.reshape(-1).astype("int32")

    @classmethod
    def load(cls, path: Path | None, start: Path, small: bool) -> ResNet20:
        """The task on an .npz file with `NAMES`, or on what Keras downloads."""
        if path is None:
            (x_train, y_train), (x_test, y_test) = keras.datasets.cifar10.load_data()
            return cls((x_train, y_train, x_test, y_test), start, small)
        with np.load(path) as file:
            return cls(tuple(file[name] for name in NAMES), start, small)

    def _recipe(self, run: Run) -> recipes.ResNetRecipe:
        return recipes.resnet(run.method, self.small).of(vars(run))

    def rules(self) -> list[rq.Rule]:
        return [rq.Rule("stem", skip=True), rq.Rule("head", skip=True)]

    def model(self, run: Run) -> keras.Model:
        recipe = self._recipe(run)
        model = models.resnet20(blocks=recipe.blocks, size=self.size)
        if recipe.pretrained:
            if not self.start.exists():
                raise FileNotFoundError(
                    f"{self.start}: the float weights that {run.method} starts from. Run --plan "
                    "float first, or set --recipe pretrained=false."
                )
            model.load_weights(self.start)
        return model

    def teacher(self, run: Run) -> keras.Model | None:
        """The float model that the run starts from, where its recipe distils."""
        recipe = self._recipe(run)
        wanted = methods.METHODS[run.method].distils if recipe.distil is None else recipe.distil
        return self.model(run) if recipe.pretrained and wanted else None

    def warmup(self, run: Run) -> int:
        return self._recipe(run).warmup

    def finished(self, run: Run, model: keras.Model) -> None:
        if run.method == "float":
            self.start.parent.mkdir(parents=True, exist_ok=True)
            model.save_weights(self.start)

    def optimizer(self, run: Run) -> keras.optimizers.Optimizer:
        recipe = self._recipe(run)
        schedule = WarmupCosine(run.lr, run.steps, recipe.warmup, recipe.final)
        decay = {"weight_decay": recipe.weight_decay}
        if recipe.optimizer == "adam":
            return schedule.attach(keras.optimizers.AdamW(schedule, **decay))
        return schedule.attach(keras.optimizers.SGD(schedule, momentum=0.9, nesterov=True, **decay))

    def batches(self, run: Run, start: int) -> Gathered:
        batch = self._recipe(run).batch
        per_epoch = self.count // batch

        @functools.lru_cache(maxsize=1)
        def order(epoch: int) -> np.ndarray:
            return np.random.default_rng((run.seed, epoch)).permutation(self.count).astype("int32")

        def choose(step: int) -> tuple[np.ndarray, ...]:
            epoch, place = divmod(step, per_epoch)
            random = np.random.default_rng((run.seed, epoch, place))
            corners = random.integers(0, 2 * PAD + 1, (2, batch), dtype="int32")
            flips = random.integers(0, 2, batch, dtype="int32")
            return order(epoch)[place * batch : (place + 1) * batch], *corners, flips

        gather = functools.partial(cropped, size=self.size)
        return Gathered(gather, self.train, choose, start, run.steps)

    def interval(self, run: Run) -> int:
        recipe = self._recipe(run)
        per_epoch = self.count // recipe.batch
        if run.steps % per_epoch:
            raise ValueError(f"An epoch has {per_epoch} steps. Received: steps={run.steps}")
        return per_epoch * divisor(run.steps // per_epoch, recipe.interval)

    def validation(self, run: Run, final: bool) -> dict[str, Any]:
        x, y = self.test
        return {"x": x, "y": y, "batch_size": divisor(len(x), EVALUATED)}

    def uniform_loss(self) -> float:
        return float(np.log(10))


def normalized(images: Any) -> Any:
    """Images of mean 0 and variance 1 by channel, roughly; float32."""
    return (images - MEAN) * (1.0 / SPREAD)


def cropped(
    images: Any, labels: Any, index: Any, top: Any, left: Any, flip: Any, *, size: int
) -> tuple[Any, Any]:
    """Crops of padded images, some of them mirrored, and their labels.

    Args:
        images: uint8, padded.
        labels: int32.
        index: which images.
        top: the first row of each crop.
        left: the first column.
        flip: 1 for a mirrored crop, 0 for the others.
        size: of a crop.
    """
    along = np.arange(size, dtype="int32")
    rows = top[:, None] + along
    columns = left[:, None] + along + flip[:, None] * (size - 1 - 2 * along)
    picked = images[index[:, None, None], rows[:, :, None], columns[:, None, :]]
    return normalized(picked), labels[index]
