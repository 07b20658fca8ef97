"""Export of models whose bit widths were trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from export_cases import BRANCHES, FEW, INTEGER, branches, inputs
from gradients import BACKEND
from keras import ops

import keras_rq as rq
from keras_rq.layers import parameters
from keras_rq.quantizers import GDNSQ
from keras_rq.training.surgery import quantized_layers

POLICIES = {
    "four": (GDNSQ(4), GDNSQ(4)),
    "eight": (GDNSQ(8), GDNSQ(8)),
    "one": (GDNSQ(1), GDNSQ(1)),
    "ternary": (GDNSQ(1.5), GDNSQ(2)),
    "blocks": (GDNSQ(2, block_size=16, conv_block_size=4), GDNSQ(4)),
    "rotated": (GDNSQ(4, rotation="hadamard"), GDNSQ(4, rotation="hadamard")),
    "weights": (GDNSQ(4), None),
}
# What the other policies change is seen in one of each kind of product.
THOROUGH = ("four", "blocks", "rotated")


def quantized(name: str, names: Any = tuple(BRANCHES)) -> keras.Model:
    model = branches(names)
    weights, activations = POLICIES[name]
    model.quantize(rq.QuantizationPolicy(weights=weights, activations=activations), verbose=False)
    if activations is not None:
        rq.calibrate(model, inputs(), verbose=False)
    return model


def bring_down(model: keras.Model) -> None:
    """Gives every width what training would: a little less than its target."""
    for layer in quantized_layers(model):
        for name in layer.products():
            of = parameters.of_kernel(layer, name)
            for kind, given in (("weights", of.weights), ("activations", of.inputs)):
                if given:
                    levels = 2.0 ** getattr(layer.quantization, kind).target
                    ratio = 1023 / (levels - 1) if kind == "weights" else 1024 / levels
                    moved = ops.add(given["log_step"], np.log2(1.005 * ratio))
                    given["log_step"].assign(moved)


@pytest.mark.once
@pytest.mark.parametrize("name", POLICIES)
def test_every_layer_computes_what_it_computes_in_training(name: str, tmp_path: Path):
    names = BRANCHES if name in THOROUGH else FEW
    model = quantized(name, names)
    bring_down(model)
    result = rq.export(model, tmp_path / "m.tflite", inputs=inputs(), verbose=False)
    assert result.verification.product_difference <= 1e-5
    integer = {p.path.split("/")[0] for p in result.products if p.kernel == "integer"}
    assert integer == (set() if name == "weights" else INTEGER & set(names))


@pytest.mark.skipif(BACKEND != "jax", reason="test_export_parameters.py from PyTorch")
def test_from_another_backend(tmp_path: Path):
    model = quantized("four", ("dense", "conv2d", "lookup"))
    bring_down(model)
    result = rq.export(model, tmp_path / "m.tflite", inputs=inputs(), verbose=False)
    assert result.verification.product_difference <= 1e-5


@pytest.mark.once
def test_a_trained_model_is_the_file(tmp_path: Path):
    keras.utils.set_random_seed(0)
    x = np.random.default_rng(0).normal(size=(64, 16)).astype("float32")
    y = np.tanh(x[:, :4])
    model = keras.Sequential(
        [
            keras.Input((16,)),
            keras.layers.Dense(16, activation="relu"),
            keras.layers.Dense(4),
        ]
    )
    four = GDNSQ(4)
    model.quantize(rq.QuantizationPolicy(weights=four, activations=four), verbose=False)
    rq.calibrate(model, x, verbose=False)
    callback = rq.callbacks.GDNSQ(warmup=8, growth=0.3)
    model.compile(keras.optimizers.Adam(0.03), "mse")
    model.fit(x, y, batch_size=8, epochs=4, callbacks=[callback], verbose=0)
    assert not callback.converged
    with pytest.raises(ValueError, match=r"its kernel takes \d\.\d\d bits so far, and 4 is the"):
        rq.export(model, tmp_path / "m.tflite", inputs=x[:8], verbose=False)
    model.fit(x, y, batch_size=8, epochs=30, callbacks=[callback], verbose=0)
    assert callback.converged
    result = rq.export(model, tmp_path / "m.tflite", inputs=x[:8], verbose=False)
    assert {p.kernel for p in result.products} == {"integer"}
    assert result.verification.product_difference <= 1e-5
