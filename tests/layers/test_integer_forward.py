"""`forward="int8"`: integer products in the forward pass, the gradients of the float ones."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest
from gradients import BACKEND, compiled, relative_error, to_numpy

import keras_rq as rq
from keras_rq.quantizers import Ridge

X = np.random.default_rng(0).normal(size=(32, 96)).astype("float32")
Y = np.random.default_rng(1).normal(size=(32, 8)).astype("float32")


def model(
    forward: str | None,
    layer: str = "Dense",
    policy: Any = rq.QuantizationPolicy,
    **quantizers: Any,
) -> keras.Model:
    keras.utils.set_random_seed(0)
    made = keras.Sequential([keras.Input((96,)), *LAYERS[layer]()])
    rq.quantize(made, policy(**quantizers, forward=forward), verbose=False)
    made.compile(keras.optimizers.SGD(0.1), "mse")
    return made


def run(made: keras.Model) -> np.ndarray:
    return to_numpy(compiled(made)(X))


def merged() -> list[keras.layers.Layer]:
    """A product of two merged axes, as attention layers have, the order of axes another."""
    return [
        keras.layers.Reshape((4, 2, 12)),
        keras.layers.EinsumDense("abcd,dbef->afec", (2, 2, 2)),
        keras.layers.Flatten(),
    ]


LAYERS = {"Dense": lambda: [keras.layers.Dense(8)], "EinsumDense": merged}
SPECS = ["A8W8-channel", "A4W4-32", "A4W1-128", "A1.5W1.5-channel", "A1W1-96"]
POLICIES = [
    *((rq.QuantizationPolicy, spec) for spec in SPECS),
    *((rq.presets.quest, spec) for spec in ("A8W8", "A1W1", "A4W7-channel-4:8-paired")),
    (rq.presets.bitnet, "A1W1-channel"),
]
CASES = [(layer, *policy) for layer in LAYERS for policy in POLICIES]
# JAX compiles each; how axes are merged is no backend's, whatever the policy.
HERE = CASES[: len(POLICIES) + 2] if BACKEND == "jax" else CASES
cases = pytest.mark.parametrize(("layer", "policy", "spec"), HERE)


@pytest.mark.forward
@pytest.mark.filterwarnings("error:forward=")
@cases
def test_outputs_are_those_of_the_float_product(layer: str, policy: Any, spec: str):
    received, expected = (run(model(f, layer, policy, spec=spec)) for f in ("int8", None))
    assert relative_error(received, expected) < 2e-6


@pytest.mark.skipif(BACKEND == "numpy", reason="no gradients")
@pytest.mark.filterwarnings("error:forward=")
@cases
def test_gradients_are_those_of_the_float_product(layer: str, policy: Any, spec: str):
    integer, floating = (model(f, layer, policy, spec=spec) for f in ("int8", None))
    start = integer.get_weights()
    for one in (integer, floating):
        one.train_on_batch(X, Y)
    for before, received, expected in zip(
        start, integer.get_weights(), floating.get_weights(), strict=True
    ):
        assert relative_error(received - before, expected - before) < 1e-5


@pytest.mark.skipif(BACKEND != "jax", reason="jaxpr")
def test_the_forward_product_is_one_of_integers():
    import jax

    made = model("int8", spec="A8W8-channel")
    jaxpr = str(jax.make_jaxpr(lambda x: made(x))(X))
    products = [line for line in jaxpr.splitlines() if "dot_general[" in line]
    assert any("i32[" in line.split("=")[0] for line in products)


@pytest.mark.forward
def test_rotated_operands():
    rotated = {k: Ridge(8, rotation="hadamard") for k in ("weights", "activations")}
    received, expected = (run(model(f, **rotated)) for f in ("int8", None))
    assert relative_error(received, expected) < 2e-6


@pytest.mark.forward
@pytest.mark.parametrize(
    ("quantizers", "reason"),
    [
        ({"spec": "W4"}, "only one of its operands is quantized"),
        ({"spec": "Afp4W4"}, "FP4 codes are no integers"),
        ({"weights": Ridge(4), "activations": Ridge(4, block_size=32)}, "different blocks"),
        (
            {"weights": Ridge(4), "activations": Ridge(4, rotation="hadamard")},
            "only one of its operands is rotated",
        ),
    ],
)
def test_a_layer_without_an_integer_product_is_named(quantizers: dict, reason: str):
    with pytest.warns(UserWarning, match=rf"forward='int8'.*{reason}: .*dense"):
        made = model("int8", **quantizers)
    assert np.isfinite(run(made)).all()


@pytest.mark.forward
def test_convolutions_are_named():
    made = keras.Sequential([keras.Input((8, 8, 3)), keras.layers.Conv2D(4, 3)])
    with pytest.warns(UserWarning, match="1 layers in float.*no plain matrix product"):
        rq.quantize(made, rq.QuantizationPolicy("A8W8", forward="int8"), verbose=False)


@pytest.mark.once("torch")
def test_it_is_saved_and_checked():
    policy = rq.QuantizationPolicy("A8W8", forward="int8")
    assert rq.QuantizationPolicy.from_config(policy.get_config()).forward == "int8"
    old = {**policy.get_config(), "version": 1}
    del old["forward"], old["matmuls"]
    assert rq.QuantizationPolicy.from_config(old).forward is None
    for wrong in ("int4", True, 8):
        with pytest.raises(ValueError, match=r"`forward` must be None or 'int8'\. Received"):
            rq.QuantizationPolicy("A8W8", forward=wrong)
