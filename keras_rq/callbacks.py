"""Callbacks for `fit`."""

from keras_rq.training.backup import BackupAndRestore
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
    "BackupAndRestore",
    "DelayedStart",
    "GradualBits",
    "GradualSparsity",
    "QuantizationSchedule",
    "RidgeLambda",
]
