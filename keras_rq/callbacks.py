"""Callbacks for `fit`."""

from keras_rq.training.gdnsq import GDNSQ
from keras_rq.training.schedules import (
    DelayedStart,
    GradualBits,
    GradualSparsity,
    QuantizationSchedule,
    RidgeLambda,
)

__all__ = [
    "GDNSQ",
    "DelayedStart",
    "GradualBits",
    "GradualSparsity",
    "QuantizationSchedule",
    "RidgeLambda",
]
