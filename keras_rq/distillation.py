"""Losses for `keras.distillation`."""

from keras_rq.training.distillation import Jeffreys

__all__ = ["Jeffreys"]
