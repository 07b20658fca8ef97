"""One process of test_across_backends.py: saves a model, then predicts with those of others.

    python across.py FOLDER

Says "saved" when its model lies in the folder, waits for a line with the names of other backends,
and answers with the largest difference of each output of each of their models, as JSON.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import keras
import numpy as np
from keras import layers

import keras_rq as rq
from keras_rq.quantizers import GDNSQ, LearnedStep, QuEST, Ridge

BACKEND = keras.backend.backend()


def make() -> keras.Model:
    """A branch for each kind of layer and of quantizer, each with an output of its own."""
    series = keras.Input((5, 8), name="series")
    image = layers.Reshape((5, 4, 2))(series)
    x = layers.Conv2D(8, 3, padding="same", activation="relu", name="conv_first")(image)
    x = layers.BatchNormalization(name="norm")(x)
    x = layers.DepthwiseConv2D(3, strides=2, padding="same", name="conv_second")(x)
    outputs = {
        "convolutions": layers.Dense(4, name="one_bit")(layers.Flatten()(x)),
        "attention": layers.MultiHeadAttention(2, 4, name="attention")(series, series),
        "recurrent": layers.LSTM(3, name="recurrent")(series),
        "static": layers.Dense(6, name="static")(series),
        "learned": layers.Dense(6, name="learned")(series),
        "widths": layers.Conv1D(6, 3, name="widths")(series),
        "sparse": layers.EinsumDense("abc,cd->abd", (5, 6), name="sparse")(series),
        "rotated": layers.Dense(6, name="rotated")(series),
    }
    model = keras.Model(series, outputs, name="branches")
    generator = np.random.default_rng(0)
    for variable in model.weights:
        if "float" in variable.dtype:
            values = generator.uniform(0.05, 1.0, variable.shape)
            signs = generator.choice([-1.0, 1.0], variable.shape)
            variable.assign(values if "variance" in variable.path else values * signs)
    return model


def both(name: str, quantizer: rq.quantizers.Quantizer) -> rq.Rule:
    return rq.Rule(name, weights=quantizer, activations=quantizer)


POLICY = rq.QuantizationPolicy(
    "A4W4-4",
    matmuls=8,
    rules=[
        both("conv", Ridge(8)),
        both("one_bit", Ridge(1)),
        rq.Rule("static", activations=Ridge(8, calibration="static")),
        both("learned", LearnedStep(4)),
        both("widths", GDNSQ(4)),
        rq.Rule("sparse", weights=Ridge(4, sparsity="2:4")),
        both("rotated", QuEST(4)),
    ],
)


def inputs(seed: int = 2) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(4, 5, 8)).astype(np.float32)


def save(folder: Path) -> None:
    """Writes what this backend makes, and what that predicts."""
    model = make()
    model.quantize(POLICY, verbose=False)
    rq.calibrate(model, inputs(3), verbose=False)
    np.savez(folder / f"{BACKEND}.npz", **model.predict(inputs(), verbose=0))
    model.save(folder / f"{BACKEND}.keras")


def differences(folder: Path, backend: str) -> dict[str, float]:
    """By output: how far its predictions are from those of the backend that saved it.

    In units of the largest value.
    """
    model = keras.saving.load_model(folder / f"{backend}.keras")
    found, expected = model.predict(inputs(), verbose=0), np.load(folder / f"{backend}.npz")
    return {
        name: float(np.abs(found[name] - expected[name]).max() / np.abs(expected[name]).max())
        for name in expected.files
    }


if __name__ == "__main__":
    save(Path(sys.argv[1]))
    sys.stdout.write("saved\n")
    sys.stdout.flush()
    others = json.loads(sys.stdin.readline())
    found = {other: differences(Path(sys.argv[1]), other) for other in others}
    sys.stdout.write(json.dumps(found))
