"""Next-character prediction on Shakespeare, as nanoGPT does it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import keras
import models
import numpy as np
import recipes
import steps
import train_step
from batches import Gathered, divisor, resident
from training import Run, Task, WarmupCosine

import keras_rq as rq

URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"


class NanoGPT(Task):
    """Next-character prediction.

    Args:
        text: what is learned; its last tenth is what is evaluated.
        recipe: the model and its training.
    """

    def __init__(self, text: str, recipe: recipes.GPTRecipe = recipes.GPT) -> None:
        # As nanoGPT's prepare.py: sorted characters, the first 90 % for training.
        characters = sorted(set(text))
        code = {character: index for index, character in enumerate(characters)}
        encoded = np.array([code[character] for character in text], "int32")
        split = int(0.9 * len(text))
        self.vocabulary = len(characters)
        self.train, self.val = resident(encoded[:split]), encoded[split:]
        self.recipe = recipe

    @classmethod
    def load(cls, path: Path | None, small: bool) -> NanoGPT:
        """The task on a text file, which is downloaded where none is given."""
        if steps.sees_gpu():
            keras.config.set_dtype_policy("mixed_bfloat16")
        path = path or Path(keras.utils.get_file("tinyshakespeare.txt", URL))
        return cls(path.read_text(encoding="utf-8"), recipes.GPT_SMALL if small else recipes.GPT)

    def rules(self) -> list[rq.Rule]:
        return train_step.RULES["nanogpt"](rq)

    def model(self, run: Run) -> keras.Model:
        recipe = self.recipe.of(vars(run))
        names = ("width", "blocks", "heads", "context", "dropout")
        sizes = {name: getattr(recipe, name) for name in names}
        return models.nanogpt(vocabulary=self.vocabulary, ends_dtype="float32", **sizes)

    def optimizer(self, run: Run) -> keras.optimizers.Optimizer:
        recipe = self.recipe.of(vars(run))
        schedule = WarmupCosine(run.lr, run.steps, recipe.warmup, recipe.final)
        optimizer = keras.optimizers.AdamW(
            schedule,
            weight_decay=recipe.weight_decay,
            beta_2=recipe.beta_2,
            global_clipnorm=recipe.clip,
        )
        return schedule.attach(optimizer)

    def warmup(self, run: Run) -> int:
        return self.recipe.of(vars(run)).warmup

    def batches(self, run: Run, start: int) -> Gathered:
        recipe = self.recipe.of(vars(run))
        shape = (run.steps, recipe.batch)
        last = len(self.train) - recipe.context
        offsets = np.random.default_rng(run.seed).integers(0, last, shape, dtype="int32")
        window = np.arange(recipe.context + 1, dtype="int32")

        def gather(text: Any, offset: Any) -> tuple[Any, Any]:
            characters = text[offset[:, None] + window]
            return characters[:, :-1], characters[:, 1:]

        return Gathered(gather, (self.train,), lambda step: (offsets[step],), start, run.steps)

    def interval(self, run: Run) -> int:
        return divisor(run.steps, self.recipe.of(vars(run)).interval)

    def validation(self, run: Run, final: bool) -> dict[str, Any]:
        recipe = self.recipe.of(vars(run))
        count = recipe.windows * (4 if final else 1)
        starts = np.linspace(0, len(self.val) - recipe.context - 1, count).astype("int32")
        windows = self.val[starts[:, None] + np.arange(recipe.context + 1)]
        return {"x": windows[:, :-1], "y": windows[:, 1:], "batch_size": recipe.batch}

    def uniform_loss(self) -> float:
        return float(np.log(self.vocabulary))
