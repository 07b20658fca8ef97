"""Models to export, and a layer class in a module that another process can import."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import keras
import numpy as np
from keras import layers

import keras_rq as rq
from keras_rq.quantizers import BitNet, QuEST, Ridge, StraightThrough


@keras.saving.register_keras_serializable("export_cases")
class Doubled(layers.Layer):
    """A float layer of a user's own."""

    def call(self, x: Any) -> Any:
        return 2 * x


@keras.saving.register_keras_serializable("export_cases")
def tripled(x: Any) -> Any:
    """An activation of a user's own."""
    return 3 * x


def dense(**arguments: Any) -> keras.Model:
    """One quantized layer of 16 inputs and 8 outputs."""
    model = keras.Sequential([keras.Input((16,), name="x"), layers.Dense(8, name="d")], name="net")
    model.quantize(rq.QuantizationPolicy(**{"spec": "A4W1", **arguments}), verbose=False)
    return model


BRANCHES = {
    "dense": lambda i: layers.Dense(12, name="dense")(i["flat"]),
    "relu": lambda i: layers.Dense(12, "relu", use_bias=False, name="relu")(i["flat"]),
    "tokens": lambda i: layers.Dense(5, name="tokens")(i["series"]),
    "einsum": lambda i: layers.EinsumDense(
        "abc,cde->abde", (6, 2, 4), bias_axes="de", name="einsum"
    )(i["series"]),
    "contracted": lambda i: layers.EinsumDense("abc,bcd->ad", 6, name="contracted")(i["series"]),
    "conv1d": lambda i: layers.Conv1D(8, 3, padding="causal", name="conv1d")(i["series"]),
    "conv2d": lambda i: layers.Conv2D(8, 3, padding="same", strides=2, name="conv2d")(i["image"]),
    "dilated": lambda i: layers.Conv2D(8, 2, dilation_rate=2, name="dilated")(i["image"]),
    "depthwise": lambda i: layers.DepthwiseConv2D(3, name="depthwise")(i["image"]),
    "separable": lambda i: layers.SeparableConv2D(8, 3, name="separable")(i["image"]),
    "transposed": lambda i: layers.Conv2DTranspose(8, 2, name="transposed")(i["image"]),
    "grouped": lambda i: layers.Conv2D(8, 3, groups=2, name="grouped")(i["image"]),
    "lookup": lambda i: layers.Embedding(9, 12, name="lookup")(i["index"]),
}

# Those that become an integer product of XNNPACK, the pointwise half of "separable" included.
INTEGER = {
    *("dense", "relu", "tokens", "einsum", "contracted"),
    *("conv1d", "conv2d", "dilated", "separable"),
}

# One of each way in which a product is lowered, and the settings that are tried on all of them.
FEW = ("dense", "tokens", "contracted", "conv2d", "depthwise", "transposed", "lookup")
THOROUGH = ("A8W8", "A4W1", "A1.5W1.5", "rotated", "QuEST A4W4")

SHAPES = {"flat": (70,), "series": (6, 12), "image": (6, 6, 8), "index": (4,)}


def branches(names: Collection[str] = tuple(BRANCHES)) -> keras.Model:
    """Layers directly behind an input, each with an output of its own."""
    inputs = {
        name: keras.Input(shape, dtype="int32" if name == "index" else "float32", name=name)
        for name, shape in SHAPES.items()
    }
    outputs = {name: BRANCHES[name](inputs) for name in names}
    model = keras.Model(inputs, outputs, name="branches")
    for layer in model.layers:
        if getattr(layer, "bias", None) is not None:
            layer.bias.assign(np.random.default_rng(2).normal(size=layer.bias.shape))
    return model


def inputs(samples: int = 4, seed: int = 0) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(seed)
    arrays = {
        name: generator.normal(0.2, 1.0, (samples, *shape)).astype(np.float32)
        for name, shape in SHAPES.items()
    }
    arrays["index"] = generator.integers(0, 9, (samples, *SHAPES["index"])).astype(np.int32)
    return arrays


def both(quantizer: Any) -> rq.QuantizationPolicy:
    return rq.QuantizationPolicy(weights=quantizer, activations=quantizer)


# By name: a policy, and the storage of its weights in the file.
SETTINGS = {
    "A8W8": (rq.QuantizationPolicy("A8W8"), "INT8"),
    "A4W4": (rq.QuantizationPolicy("A4W4"), "INT4"),
    "A4W1": (rq.QuantizationPolicy("A4W1"), "INT2"),
    "A1W1": (rq.QuantizationPolicy("A1W1"), "INT2"),
    "A1.5W1.5": (rq.QuantizationPolicy("A1.5W1.5"), "INT2"),
    "A8W2": (rq.QuantizationPolicy("A8W2"), "INT2"),
    # Halves are doubled: -12 .. 12.
    "Afp4Wfp4": (rq.QuantizationPolicy("Afp4Wfp4"), "INT8"),
    "A8W4-2:4": (rq.QuantizationPolicy("A8W4-2:4"), "INT4"),
    # Ragged: 70 is two blocks of 32 and one of 6.
    "A4W4-32": (rq.QuantizationPolicy("A4W4-32"), "INT4"),
    "A4W4-channel": (rq.QuantizationPolicy("A4W4-channel"), "INT4"),
    "A8W4-tensor": (rq.QuantizationPolicy("A8W4-tensor"), "INT4"),
    "blocks that cut each other": (
        rq.QuantizationPolicy(weights=Ridge(4, block_size=24), activations=Ridge(4, block_size=32)),
        "INT4",
    ),
    "blocks of the kernel alone": (
        rq.QuantizationPolicy(
            weights=Ridge(4, block_size=32), activations=Ridge(8, block_size="channel")
        ),
        "INT4",
    ),
    "rotated": (both(Ridge(4, rotation="hadamard")), "INT4"),
    "straight-through": (both(StraightThrough(8, conv_block_size=4, block_size=32)), "INT8"),
    "QuEST A4W4": (both(QuEST(4)), "INT4"),
    "QuEST A1W1": (both(QuEST(1)), "INT2"),
    "QuEST A8W8": (both(QuEST(8)), "INT8"),
    # Odd codes, -15 .. 15, and zero.
    "QuEST A8W4-4:8-paired": (
        rq.QuantizationPolicy(weights=QuEST(4, sparsity="4:8-paired"), activations=QuEST(8)),
        "INT8",
    ),
    "BitNet A8W1": (rq.QuantizationPolicy(weights=BitNet(1), activations=BitNet(8)), "INT2"),
}
