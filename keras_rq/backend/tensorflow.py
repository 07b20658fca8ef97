"""Custom gradients in TensorFlow."""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from keras_rq.backend.rule import GradientRule


def with_gradient(rule: GradientRule, x: Any) -> Any:
    """Applies `rule` to `x`; see `keras_rq.backend.rule`."""

    @tf.custom_gradient
    def apply(x: Any) -> Any:
        # Cut from the tape, which would keep every intermediate of the forward pass alive.
        y, statistics = rule.forward(tf.stop_gradient(x))
        return y, lambda upstream: rule.backward(x, statistics, upstream)

    return apply(tf.convert_to_tensor(x))
