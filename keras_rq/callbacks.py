"""Callbacks for `fit`."""

from keras_rq.training.gdnsq import GDNSQ

__all__ = [
    "GDNSQ",
]
