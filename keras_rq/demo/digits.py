"""The demo's data and its float network."""

from __future__ import annotations

from typing import NamedTuple

import keras
import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

TEST_SHARE = 0.2
SPLIT_SEED = 0


class Digits(NamedTuple):
    """Images of 8 x 8 x 1 in [0, 1] and their classes 0..9."""

    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray


def load() -> Digits:
    """scikit-learn's 1,797 handwritten digits, split 80/20 within every class, always alike."""
    data = load_digits()
    images = (data.images[..., None] / 16.0).astype("float32")
    train_x, test_x, train_y, test_y = train_test_split(
        images,
        data.target.astype("int32"),
        test_size=TEST_SHARE,
        stratify=data.target,
        random_state=SPLIT_SEED,
    )
    return Digits(train_x, train_y, test_x, test_y)


def network() -> keras.Model:
    """A convolutional network with a Dense head, small enough for a laptop.

    Three 3 x 3 convolutions, the second of stride 2, and two Dense layers; every one of them is
    quantized, the first and the last too.
    """
    layers = keras.layers
    inputs = keras.Input((8, 8, 1), name="image")
    hidden = layers.Conv2D(32, 3, padding="same", use_bias=False, name="stem")(inputs)
    hidden = _norm_relu(hidden, "stem")
    hidden = layers.Conv2D(64, 3, 2, padding="same", use_bias=False, name="reduce")(hidden)
    hidden = _norm_relu(hidden, "reduce")
    hidden = layers.Conv2D(64, 3, padding="same", use_bias=False, name="middle")(hidden)
    hidden = _norm_relu(hidden, "middle")
    hidden = layers.Flatten(name="flatten")(hidden)
    hidden = layers.Dense(64, use_bias=False, name="hidden")(hidden)
    hidden = _norm_relu(hidden, "hidden")
    return keras.Model(inputs, layers.Dense(10, name="logits")(hidden), name="digits")


def _norm_relu(tensor: keras.KerasTensor, name: str) -> keras.KerasTensor:
    # An epoch has 22 steps: moving averages with Keras' default momentum would lag behind.
    normalized = keras.layers.BatchNormalization(momentum=0.9, name=f"{name}_norm")(tensor)
    return keras.layers.ReLU(name=f"{name}_relu")(normalized)
