"""Models whose quantizers have variables of their own: calibrate, train, save, load, train on."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from gradients import BACKEND
from zoo import MAKERS, Member, nested, subclassed

import keras_rq as rq
from keras_rq.layers import parameters
from keras_rq.quantizers import LearnedStep, Ridge
from keras_rq.training.surgery import quantized_layers

POLICIES = {
    "eight": rq.QuantizationPolicy(weights=LearnedStep(8), activations=LearnedStep(8)),
    "learned": rq.QuantizationPolicy(weights=LearnedStep(4), activations=LearnedStep(4)),
    "static": rq.QuantizationPolicy("W4", activations=Ridge(4, calibration="static")),
    "mixed": rq.QuantizationPolicy(
        weights=LearnedStep(2, sparsity="2:4", rotation="hadamard"),
        activations=Ridge(4, calibration="static", rotation="hadamard", trust=1.0),
    ),
}


def arrays(variables: Any) -> list[np.ndarray]:
    return [keras.ops.convert_to_numpy(keras.ops.cast(v, "float32")) for v in variables]


def assert_all_equal(received: Any, expected: Any) -> None:
    received, expected = arrays(received), arrays(expected)
    assert len(received) == len(expected)
    for a, b in zip(received, expected, strict=True):
        np.testing.assert_array_equal(a, b)


@functools.cache
def trained_weights(name: str, dtype: str) -> list[np.ndarray]:
    """Weights after some training in float: ranges do not follow its first steps."""
    keras.utils.set_random_seed(0)
    member = MAKERS[name]()
    member.compile()
    member.fit(epochs=20)
    return member.model.get_weights()


def made(name: str, policy: str) -> Member:
    """A trained and calibrated model."""
    weights = trained_weights(name, keras.config.dtype_policy().name)
    member = MAKERS[name]()
    member.model.set_weights(weights)
    member.model.compile()
    member.model.quantize(POLICIES[policy], verbose=False)
    rq.calibrate(member.model, member.x, verbose=False)
    return member


def once(*case: str) -> Any:
    return pytest.param(*case, marks=pytest.mark.once("torch"))


# What is the same on every backend, the bookkeeping of one more kind of layer, is tried on one.
CASES = [
    ("learned", "images"),
    once("learned", "volumes"),
    ("learned", "sequences"),
    once("learned", "nested"),
    ("learned", "subclassed"),
    ("eight", "tokens"),  # a dozen layers, one behind the other
    ("static", "images"),
    ("mixed", "nested"),
]


@pytest.mark.parametrize(("policy", "name"), CASES)
def test_train_save_load_and_train_on(policy: str, name: str, tmp_path: Path):
    member = made(name, policy)
    model = member.model
    ours = [v for layer in quantized_layers(model) for v in parameters.variables_of(layer)]
    before = arrays(ours)
    # A step is small, and so must be the learning rate of an optimizer that normalizes gradients.
    model.compile(keras.optimizers.Adam(2e-3), "mse", jit_compile=BACKEND == "jax")
    losses = member.fit(epochs=10)
    assert np.isfinite(losses).all() and min(losses) < losses[0]
    moved = [np.any(a != b) for a, b in zip(before, arrays(ours), strict=True)]
    assert moved == [v.trainable for v in ours]

    model.save(tmp_path / "m.keras")
    loaded = keras.saving.load_model(tmp_path / "m.keras")
    assert [v.name for v in loaded.weights] == [v.name for v in model.weights]
    assert [layer.quantization for layer in quantized_layers(loaded)] == [
        layer.quantization for layer in quantized_layers(model)
    ]
    assert_all_equal(loaded.weights, model.weights)
    assert_all_equal(loaded.optimizer.variables, model.optimizer.variables)
    np.testing.assert_array_equal(member.predict(loaded), member.predict())
    assert member.fit(model=loaded) == member.fit()
    assert_all_equal(loaded.weights, model.weights)


@pytest.mark.parametrize("name", ["nested", "subclassed"])
def test_weights_alone(name: str, tmp_path: Path):
    """They say too that the inputs were calibrated."""
    member, other = made(name, "learned"), MAKERS[name]()
    other.model.quantize(POLICIES["learned"], verbose=False)
    member.model.save_weights(tmp_path / "q.weights.h5")
    other.model.load_weights(tmp_path / "q.weights.h5")
    assert_all_equal(other.model.weights, member.model.weights)
    np.testing.assert_array_equal(other.predict(), member.predict())


def test_a_float_checkpoint_gives_steps_to_the_kernels_it_brings(tmp_path: Path):
    keras.utils.set_random_seed(1)
    fresh = nested()
    fresh.model.save_weights(tmp_path / "float.weights.h5")
    member = made("nested", "learned")
    inputs = [v for layer in quantized_layers(member.model) for v in parameters.inputs_of(layer)]
    before = arrays(inputs)
    member.model.load_weights(tmp_path / "float.weights.h5")
    assert_all_equal(inputs, before)
    for layer in quantized_layers(member.model):
        kernel = arrays([layer.kernel])[0]
        step = 2 * np.abs(kernel).mean(axis=0, keepdims=True) / np.sqrt(7)
        received = arrays([layer.kernel_parameters("kernel")["step"]])[0]
        np.testing.assert_allclose(received, step, rtol=1e-6)


def test_clone_and_set_weights():
    member = made("nested", "learned")
    clone = keras.models.clone_model(member.model)
    clone.compile(jit_compile=False)
    clone.set_weights(member.model.get_weights())
    np.testing.assert_array_equal(member.predict(clone), member.predict())


@pytest.mark.parametrize("first", ["lora", "quantize"])
def test_lora(first: str, tmp_path: Path):
    member = nested()
    head = member.model.get_layer("head")
    if first == "lora":
        head.enable_lora(2)
    member.model.quantize(POLICIES["learned"], verbose=False)
    if first == "quantize":
        head.enable_lora(2)
    rq.calibrate(member.model, member.x, verbose=False)
    names = [v.name for v in head._trainable_variables]
    assert names[-2:] == ["kernel_step", "kernel_input_step"]
    member.compile()
    losses = member.fit(epochs=4)
    assert losses[-1] < losses[0]
    member.model.save(tmp_path / "m.keras")
    loaded = keras.saving.load_model(tmp_path / "m.keras")
    np.testing.assert_array_equal(member.predict(loaded), member.predict())
    assert_all_equal(loaded.optimizer.variables, member.model.optimizer.variables)


@pytest.mark.parametrize(
    ("dtype", "make", "policy"),
    [("mixed_bfloat16", subclassed, "learned"), ("mixed_float16", nested, "static")],
)
def test_mixed_precision(dtype: str, make: Any, policy: str, tmp_path: Path):
    previous = keras.config.dtype_policy()
    keras.config.set_dtype_policy(dtype)
    try:
        member = made(make.__name__, policy)
        member.compile()
        losses = member.fit(epochs=20)
        member.model.save(tmp_path / "m.keras")
        loaded = keras.saving.load_model(tmp_path / "m.keras")
    finally:
        keras.config.set_dtype_policy(previous)
    # A loss of four-bit layers jumps between epochs, in float32 too: the mean of some says more.
    assert np.mean(losses[-5:]) < 0.8 * losses[0]
    for layer in quantized_layers(member.model):
        assert {v.dtype for v in parameters.variables_of(layer)} == {"float32"}
    np.testing.assert_array_equal(member.predict(loaded), member.predict())


def by_name(optimizer: Any) -> dict[str, list[np.ndarray]]:
    found: dict[str, list[np.ndarray]] = {}
    for variable, value in zip(optimizer.variables, arrays(optimizer.variables), strict=True):
        found.setdefault(variable.path.rsplit("/")[-1], []).append(value)
    return found


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_model_that_was_trained_gets_an_optimizer_for_the_new_variables(wrapped: bool):
    member = nested()
    optimizer = keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(1e-2, 100))
    if wrapped:
        optimizer = keras.optimizers.LossScaleOptimizer(optimizer)
    member.model.compile(optimizer, "mse", jit_compile=BACKEND == "jax")
    member.fit(epochs=2)
    before = by_name(optimizer)
    with pytest.warns(UserWarning, match="has got a new optimizer of the same configuration"):
        member.model.quantize(POLICIES["learned"], verbose=False)
    new = member.model.optimizer
    assert new is not optimizer and type(new) is type(optimizer)
    after = by_name(new)
    for name, values in before.items():
        np.testing.assert_array_equal(after[name], values)
    assert {"head_kernel_step_momentum", "head_kernel_input_step_velocity"} <= set(after)
    rq.calibrate(member.model, member.x, verbose=False)
    losses = member.fit(epochs=4)
    assert losses[-1] < losses[0]


@pytest.mark.once("torch")
def test_a_model_without_new_variables_keeps_its_optimizer():
    member = nested()
    member.compile()
    member.fit()
    optimizer = member.model.optimizer
    member.model.quantize(rq.QuantizationPolicy("A4W1"), verbose=False)
    assert member.model.optimizer is optimizer


@pytest.mark.once("torch")
def test_frozen_layers_stay_as_they_are():
    member = made("nested", "learned")
    shared = member.model.get_layer("shared")
    shared.trainable = False
    before = arrays(shared.weights)
    member.compile()
    member.fit()
    assert_all_equal(shared.weights, before)


@pytest.mark.once("torch")
def test_a_failure_takes_the_variables_away_again(monkeypatch: Any):
    member = subclassed()
    model = member.model
    names = [v.path for v in model.weights]
    stored = [set(layer._tracker.stored_ids["trainable_variables"]) for layer in model.layers]
    original, calls = parameters.create, []

    def failing(layer: Any) -> None:
        original(layer)
        calls.append(layer)
        if len(calls) == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(parameters, "create", failing)
        with pytest.raises(KeyboardInterrupt):
            model.quantize(POLICIES["learned"], verbose=False)
    assert len(calls) == 3
    assert [v.path for v in model.weights] == names
    assert not quantized_layers(model)
    assert [set(layer._tracker.stored_ids["trainable_variables"]) for layer in model.layers] == (
        stored
    )
    assert not any(layer.__dict__.keys() & {"_rq_parameters", "quantization"} for layer in calls)
    model.quantize(POLICIES["learned"], verbose=False)


@pytest.mark.once("torch")
@pytest.mark.parametrize(
    ("policy", "words"),
    [
        (
            rq.QuantizationPolicy(weights=Ridge(4, calibration="static")),
            ["head' (Dense)", "fixes the range of inputs", "calibration='dynamic'"],
        ),
    ],
)
def test_a_quantizer_of_the_wrong_operand_is_refused(policy: Any, words: list[str]):
    model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(4, name="head")])
    with pytest.raises(ValueError) as caught:
        model.quantize(policy, verbose=False)
    assert all(word in str(caught.value) for word in words), caught.value
    assert not quantized_layers(model)
