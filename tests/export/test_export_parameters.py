"""Export of models whose quantizers have variables of their own: learned steps, static ranges."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from export_cases import BRANCHES, INTEGER, branches, inputs
from gradients import BACKEND
from keras import ops

import keras_rq as rq
from keras_rq.quantizers import PACT, LearnedStep, Ridge, StraightThrough, StretchedElastic

STATIC = {"calibration": "static"}
POLICIES = {
    "learned": rq.QuantizationPolicy(weights=LearnedStep(4), activations=LearnedStep(4)),
    "learned-eight": rq.QuantizationPolicy(weights=LearnedStep(8), activations=LearnedStep(8)),
    "learned-one": rq.QuantizationPolicy(weights=LearnedStep(1), activations=LearnedStep(2)),
    "learned-blocks": rq.QuantizationPolicy(
        weights=LearnedStep(2, block_size=16, conv_block_size=4, sparsity="2:4"),
        activations=LearnedStep(4),
    ),
    "learned-rotated": rq.QuantizationPolicy(
        weights=LearnedStep(4, rotation="hadamard", block_size="tensor"),
        activations=LearnedStep(4, rotation="hadamard"),
    ),
    "pact": rq.QuantizationPolicy(weights=StretchedElastic(2), activations=PACT(4)),
    "pact-ternary": rq.QuantizationPolicy(weights=StretchedElastic(1.5), activations=PACT(8)),
    "learned-weights": rq.QuantizationPolicy(weights=LearnedStep(4)),
    "static": rq.QuantizationPolicy("W4", activations=Ridge(8, **STATIC)),
    "static-one": rq.QuantizationPolicy("W1", activations=Ridge(1, **STATIC)),
    "static-fp4": rq.QuantizationPolicy("W1.5", activations=Ridge("fp4", **STATIC)),
    "static-linear": rq.QuantizationPolicy(
        weights=LearnedStep(4), activations=StraightThrough(4, affine=False, **STATIC)
    ),
}


def quantized(policy: rq.QuantizationPolicy, names: Any = tuple(BRANCHES)) -> keras.Model:
    model = branches(names)
    model.quantize(policy, verbose=False)
    if any("input" in v.name for v in model.weights):
        rq.calibrate(model, inputs(), verbose=False)
    # Steps that training has moved are no statistics of the kernels.
    for variable in model.trainable_variables:
        if variable.name.endswith(("_step", "_alpha")):
            variable.assign(ops.multiply(variable, 1.1))
    return model


@pytest.mark.once
@pytest.mark.parametrize("name", POLICIES)
def test_every_layer_computes_what_it_computes_in_training(name: str, tmp_path: Path):
    model = quantized(POLICIES[name])
    result = rq.export(model, tmp_path / "m.tflite", inputs=inputs(), verbose=False)
    assert result.verification.product_difference <= 1e-5
    integer = {p.path.split("/")[0] for p in result.products if p.kernel == "integer"}
    assert integer == (set() if name == "learned-weights" else INTEGER)


@pytest.mark.skipif(BACKEND != "torch", reason="test_export_gdnsq.py from JAX")
def test_from_another_backend(tmp_path: Path):
    model = quantized(POLICIES["learned"], ("dense", "conv2d", "lookup"))
    result = rq.export(model, tmp_path / "m.tflite", inputs=inputs(), verbose=False)
    assert result.verification.product_difference <= 1e-5


@pytest.mark.once
def test_a_model_that_was_not_calibrated_says_what_to_do(tmp_path: Path):
    model = branches(("dense",))
    model.quantize(POLICIES["static"], verbose=False)
    with pytest.raises(ValueError, match=r"'dense' has no range.*keras_rq.calibrate\(model"):
        rq.export(model, tmp_path / "m.tflite", inputs=inputs(), verbose=False)
    assert not list(tmp_path.iterdir())


@pytest.mark.once
def test_a_static_range_is_two_constants_in_the_file(tmp_path: Path):
    """No statistics of the data: what is left are a product, a sum, a clip and a rounding."""
    model = keras.Sequential([keras.Input((16,)), keras.layers.Dense(8, name="dense")])
    model.quantize(POLICIES["static-linear"], verbose=False)
    rq.calibrate(model, np.random.default_rng(0).normal(size=(64, 16)), verbose=False)
    path = tmp_path / "m.tflite"
    rq.export(model, path, verbose=False)
    from keras_rq.export import interpreter

    names = {op["op_name"] for op in interpreter.load(path.read_bytes())._get_ops_details()}
    assert "FULLY_CONNECTED" in names
    assert not names & {"MEAN", "SUM", "REDUCE_MAX", "REDUCE_MIN", "ABS", "SQRT", "DIV"}, names
