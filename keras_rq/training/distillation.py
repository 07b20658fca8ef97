"""Distillation by the Jeffreys divergence."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
from keras import ops


@keras.saving.register_keras_serializable("keras_rq")
class Jeffreys(keras.distillation.DistillationLoss):
    """The Jeffreys divergence of student and teacher, as in GDNSQ (arXiv 2508.14004).

    `KL(p || q) + KL(q || p) = sum((p - q) * (log p - log q))`, with the softmax of the logits of
    both, averaged over all but the last axis: no temperature and no labels. The teacher of a
    quantized model is its float copy, and `student_loss_weight=0` leaves labels to the metrics.

    Example:

    >>> import keras, numpy as np, keras_rq as rq
    >>> student = keras.Sequential([keras.Input((8,)), keras.layers.Dense(3)])
    >>> teacher = keras.models.clone_model(student)
    >>> teacher.set_weights(student.get_weights())
    >>> _ = student.quantize(rq.QuantizationPolicy("A8W4"), verbose=False)
    >>> distiller = keras.distillation.Distiller(
    ...     teacher, student, rq.distillation.Jeffreys(), student_loss_weight=0.0
    ... )
    >>> loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    >>> distiller.compile("adam", loss=loss, metrics=["accuracy"])
    >>> x, y = np.linspace(-1, 1, 64).reshape(8, 8), np.zeros(8)
    >>> history = distiller.fit(x, y, epochs=2, verbose=0)
    """

    def compute_loss(self, teacher_outputs: Any, student_outputs: Any, **kwargs: Any) -> Any:
        """The divergence of logits `(..., classes)`, or of all outputs of several, summed."""
        pairs = zip(
            keras.tree.flatten(teacher_outputs), keras.tree.flatten(student_outputs), strict=True
        )
        return sum(jeffreys(student, teacher) for teacher, student in pairs)

    def get_config(self) -> dict[str, Any]:
        return {}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Jeffreys:
        return cls(**config)


def jeffreys(logits: Any, constant: Any) -> Any:
    """The mean Jeffreys divergence of the softmax of logits and of constant ones, float32."""
    constant = ops.stop_gradient(ops.convert_to_tensor(constant))
    log_p, log_q = (ops.log_softmax(ops.cast(x, "float32"), axis=-1) for x in (logits, constant))
    # What both rule out, as a mask does, adds nothing.
    is_out = ops.logical_and(log_p == -np.inf, log_q == -np.inf)
    ratio = ops.where(is_out, 0.0, log_p - log_q)
    return ops.mean(ops.sum((ops.exp(log_p) - ops.exp(log_q)) * ratio, axis=-1))
