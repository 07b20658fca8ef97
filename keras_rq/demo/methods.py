"""What the demo compares: precisions, and the ways to reach them."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import keras

import keras_rq as rq

SETTINGS = ("A8W8", "A4W1", "A1W1")


def ridge_policy(setting: str) -> rq.QuantizationPolicy:
    """Ridge regression, the package's default: the shorthand says it all."""
    return rq.QuantizationPolicy(setting)


def straight_through_policy(setting: str) -> rq.QuantizationPolicy:
    """The straight-through estimator on the same grids and blocks, nothing rotated."""
    activation_bits, weight_bits = map(int, re.fullmatch(r"A(\d)W(\d)", setting).groups())
    return rq.QuantizationPolicy(
        weights=rq.quantizers.StraightThrough(weight_bits),
        activations=rq.quantizers.StraightThrough(activation_bits),
    )


@dataclasses.dataclass(frozen=True)
class Method:
    """A way from the float checkpoint to a quantized model."""

    name: str
    policy: Callable[[str], Any]
    trains: bool
    exports: bool = False


METHODS = (
    Method("ridge, not trained", ridge_policy, trains=False),
    Method("straight-through", straight_through_policy, trains=True),
    Method("ridge", ridge_policy, trains=True, exports=True),
)


def quantized(checkpoint: keras.Model, method: Method, setting: str) -> keras.Model:
    """A copy of the float model, with its weights, quantized by a method at a setting."""
    model = keras.models.clone_model(checkpoint)
    model.set_weights(checkpoint.get_weights())
    rq.quantize(model, method.policy(setting), verbose=False)
    return model
