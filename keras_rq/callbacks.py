"""Callbacks for `fit`."""

from keras_rq.training.schedules import (
    DelayedStart,
    GradualBits,
    GradualSparsity,
    QuantizationSchedule,
    RidgeLambda,
)

__all__ = [
    "DelayedStart",
    "GradualBits",
    "GradualSparsity",
    "QuantizationSchedule",
    "RidgeLambda",
]
