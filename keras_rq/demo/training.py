"""One recipe, used unchanged by every method of the demo."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import keras
import numpy as np

from keras_rq.demo.digits import Digits


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a model is trained: Adam, cosine decay to zero, cross-entropy; the last epoch counts."""

    epochs: int
    learning_rate: float
    batch_size: int = 64

    def steps(self, digits: Digits) -> int:
        """Full batches in one epoch; the remainder, another one each epoch, is left out."""
        return len(digits.train_images) // self.batch_size

    def __str__(self) -> str:
        epochs = f"{self.epochs} epoch{'s' if self.epochs > 1 else ''}"
        return (
            f"Adam, learning rate {self.learning_rate:g} with cosine decay to 0, {epochs}, "
            f"batches of {self.batch_size}, cross-entropy, accuracy after the last epoch"
        )


class Trainer:
    """Trains one model several times from the same weights, and compiles it once.

    Args:
        model: the model, holding the weights that every run starts from.
        recipe: how to train.
        digits: what to train on.
    """

    def __init__(self, model: keras.Model, recipe: Recipe, digits: Digits):
        self.model, self.recipe, self.digits = model, recipe, digits
        decay = keras.optimizers.schedules.CosineDecay(
            recipe.learning_rate, recipe.epochs * recipe.steps(digits)
        )
        model.compile(
            optimizer=keras.optimizers.Adam(decay),
            loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        )
        model.optimizer.build(model.trainable_variables)
        self._variables = [*model.variables, *model.optimizer.variables]
        self._start = [keras.ops.convert_to_numpy(variable) for variable in self._variables]

    def run(self, seed: int, on_epoch: Callable[[], None]) -> float:
        """Trains from the start and returns the accuracy on the test images.

        Args:
            seed: decides the order of the images, and nothing else.
            on_epoch: called after each epoch.
        """
        for variable, value in zip(self._variables, self._start, strict=True):
            variable.assign(value)
        order = self._order(seed)
        # All epochs in one row, already shuffled: the order is the same under every backend.
        self.model.fit(
            self.digits.train_images[order],
            self.digits.train_labels[order],
            batch_size=self.recipe.batch_size,
            shuffle=False,
            verbose=0,
            callbacks=[_EveryEpoch(self.recipe.steps(self.digits), on_epoch)],
        )
        return accuracy(self.model, self.digits)

    def _order(self, seed: int) -> np.ndarray:
        generator = np.random.default_rng(seed)
        kept = self.recipe.steps(self.digits) * self.recipe.batch_size
        count = len(self.digits.train_images)
        return np.concatenate(
            [generator.permutation(count)[:kept] for _ in range(self.recipe.epochs)]
        )


class _EveryEpoch(keras.callbacks.Callback):
    def __init__(self, steps: int, on_epoch: Callable[[], None]):
        super().__init__()
        self._steps, self._on_epoch = steps, on_epoch

    def on_train_batch_end(self, batch: int, logs: dict | None = None) -> None:
        if (batch + 1) % self._steps == 0:
            self._on_epoch()


def predict(model: keras.Model, digits: Digits) -> np.ndarray:
    """The model's logits for all test images."""
    return model.predict(digits.test_images, batch_size=len(digits.test_images), verbose=0)


def accuracy(model: keras.Model, digits: Digits) -> float:
    """Share of the test images that the model puts in their class."""
    return float(np.mean(predict(model, digits).argmax(-1) == digits.test_labels))
