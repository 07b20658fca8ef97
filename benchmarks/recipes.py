"""Models' sizes and how they are trained. A run's `fields["recipe"]` replaces single values."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Self


class Changeable:
    """A recipe that a run may change."""

    def of(self, run: Mapping[str, Any]) -> Self:
        """The recipe of one run.

        Raises:
            ValueError: for a value that the recipe does not have.
        """
        changes = run["fields"].get("recipe", {})
        known = [field.name for field in dataclasses.fields(self)]
        if unknown := set(changes) - set(known):
            raise ValueError(f"The recipe has no {sorted(unknown)}. It has {', '.join(known)}.")
        return dataclasses.replace(self, **changes)


@dataclasses.dataclass(frozen=True)
class GPTRecipe(Changeable):
    """nanoGPT's `train_shakespeare_char.py`.

    Attributes:
        context: characters that a prediction may look at.
        batch: windows of a batch.
        final: last learning rate over the peak.
        interval: most steps between two evaluations; their number divides the steps.
        windows: of the validation text, spread over all of it; four times as many at the end.
    """

    width: int = 384
    blocks: int = 6
    heads: int = 6
    context: int = 256
    dropout: float = 0.2
    batch: int = 64
    warmup: int = 100
    final: float = 0.1
    weight_decay: float = 0.1
    beta_2: float = 0.99
    clip: float = 1.0
    interval: int = 250
    windows: int = 448


@dataclasses.dataclass(frozen=True)
class ResNetRecipe(Changeable):
    """ResNet-20 on CIFAR-10, from random weights or from a float checkpoint.

    Attributes:
        blocks: of each of the three stages.
        batch: images of a batch; the rest of an epoch is left out.
        optimizer: "sgd" (Nesterov momentum 0.9) or "adam".
        weight_decay: decoupled, of the kernels. With momentum 0.9 it does what an L2 penalty
            of a tenth of it does.
        warmup: steps.
        final: last learning rate over the peak.
        interval: most epochs between two evaluations; their number divides the epochs.
        pretrained: whether to start from the float checkpoint.
        distil: whether to train on the logits of that model, in place of the labels; None: where
            the method's authors do.
    """

    blocks: int = 3
    batch: int = 250
    optimizer: str = "sgd"
    weight_decay: float = 5e-3
    warmup: int = 400
    final: float = 0.0
    interval: int = 5
    pretrained: bool = False
    distil: bool | None = None


GPT = GPTRecipe()
GPT_SMALL = GPTRecipe(
    width=32, blocks=1, heads=2, context=16, batch=8, warmup=4, interval=10, windows=16
)
RESNET = ResNetRecipe()
RESNET_TUNED = ResNetRecipe(optimizer="adam", weight_decay=1e-4, warmup=200, pretrained=True)
SMALL = {"blocks": 1, "batch": 10, "warmup": 2, "interval": 1}
RESNET_SMALL = dataclasses.replace(RESNET, **SMALL)
RESNET_TUNED_SMALL = dataclasses.replace(RESNET_TUNED, **SMALL)


def resnet(method: str, small: bool) -> ResNetRecipe:
    """The recipe of a float or of a quantized ResNet."""
    if method == "float":
        return RESNET_SMALL if small else RESNET
    return RESNET_TUNED_SMALL if small else RESNET_TUNED
