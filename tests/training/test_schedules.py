"""What a schedule puts in force is what `fit` computes, from the first step on."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from gradients import BACKEND
from keras import layers

import keras_rq as rq
from keras_rq.callbacks import (
    DelayedStart,
    GradualBits,
    GradualSparsity,
    QuantizationSchedule,
    RidgeLambda,
)
from keras_rq.quantizers import QuEST, Ridge
from keras_rq.training.surgery import quantized_layers

X = np.random.default_rng(0).normal(size=(32, 16)).astype("float32")
Y = np.random.default_rng(1).normal(size=(32, 2)).astype("float32")
BATCH = 8
STEPS = len(X) // BATCH
# PyTorch's compiler takes a minute for each step, and JAX as long without its own.
compiled = pytest.mark.parametrize(
    "jit", {"torch": [False], "jax": [True]}.get(BACKEND, [False, True])
)


def make(policy: Any = "A8W8", jit: bool = False) -> keras.Model:
    keras.utils.set_random_seed(0)
    inner = keras.Sequential([keras.Input((16,)), layers.Dense(8, "relu", name="first")], name="in")
    model = keras.Sequential([keras.Input((16,)), inner, layers.Dense(2, name="head")], name="net")
    if policy is not None:
        policy = rq.QuantizationPolicy(policy) if isinstance(policy, str) else policy
        model.quantize(policy, verbose=False)
    model.compile(keras.optimizers.Adam(1e-2), "mse", jit_compile=jit)
    return model


def fit(
    model: keras.Model, epochs: int, first: int = 0, **arguments: Any
) -> dict[str, list[float]]:
    return model.fit(
        X,
        Y,
        epochs=epochs,
        initial_epoch=first,
        batch_size=BATCH,
        shuffle=False,
        verbose=0,
        **arguments,
    ).history


def by_hand(policies: list[Any], jit: bool) -> tuple[list[float], list[np.ndarray]]:
    """An epoch with each policy, every time with a model that never knew another."""
    losses, weights, state = [], None, None
    for policy in policies:
        model = make(policy, jit)
        if weights is not None:
            model.set_weights(weights)
            model.optimizer.build(model.trainable_variables)
            for variable, value in zip(model.optimizer.variables, state, strict=True):
                variable.assign(value)
        losses += fit(model, 1)["loss"]
        weights = model.get_weights()
        state = [keras.ops.convert_to_numpy(v) for v in model.optimizer.variables]
    return losses, weights


def bits(model: keras.Model) -> list[tuple[Any, Any]]:
    return [
        tuple(
            None if q is None else q.bits
            for q in (a.quantization.weights, a.quantization.activations)
        )
        for a in quantized_layers(model)
    ]


@compiled
def test_every_epoch_is_trained_with_what_is_in_force(jit: bool):
    model = make("A8W8", jit)
    losses = fit(model, 3, callbacks=[QuantizationSchedule({0: None, 1: "A8W8", 2: "A2W1"})])[
        "loss"
    ]
    expected, weights = by_hand([None, "A8W8", "A2W1"], jit)
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    for received, wanted in zip(model.get_weights(), weights, strict=True):
        np.testing.assert_allclose(received, wanted, rtol=1e-4, atol=1e-6)
    assert losses[2] != pytest.approx(by_hand([None, "A8W8", "A8W8"], jit)[0][2], rel=1e-3)


@compiled
def test_a_step_in_the_middle_of_an_epoch(jit: bool):
    """The first stage ends after one epoch, though in the middle of it when counted in epochs."""
    model = make("A8W8", jit)
    schedule = QuantizationSchedule({STEPS: "A2W1"}, unit="step")
    long = model.fit(
        np.tile(X, (2, 1)),
        np.tile(Y, (2, 1)),
        batch_size=BATCH,
        shuffle=False,
        verbose=0,
        callbacks=[schedule],
    ).history["loss"]
    expected, weights = by_hand(["A8W8", "A2W1"], jit)
    np.testing.assert_allclose(long[0], np.mean(expected), rtol=1e-5)
    for received, wanted in zip(model.get_weights(), weights, strict=True):
        np.testing.assert_allclose(received, wanted, rtol=1e-4, atol=1e-6)


def bits_by_batch(optimizer: Any, stages: dict[int, int], y: np.ndarray = Y) -> list[int]:
    """Of the weights, in every batch of three epochs."""
    model, seen = make(), []
    model.compile(optimizer, "mse", jit_compile=BACKEND == "jax")
    look = keras.callbacks.LambdaCallback(
        on_train_batch_begin=lambda batch, logs: seen.append(bits(model)[0][0])
    )
    callbacks = [GradualBits(weights=stages, unit="step"), look]
    model.fit(X, y, epochs=3, batch_size=BATCH, shuffle=False, verbose=0, callbacks=callbacks)
    return seen


def test_a_step_of_accumulated_gradients_is_several_batches():
    optimizer = keras.optimizers.SGD(1e-3, gradient_accumulation_steps=3)
    assert bits_by_batch(optimizer, {0: 8, 2: 4}) == [8] * 6 + [4] * 6


def test_steps_that_loss_scaling_skips_do_not_turn_a_schedule_back():
    y = Y.copy()
    y[: 2 * BATCH] = np.inf  # two of the four batches of every epoch
    optimizer = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(1e-3))
    # Known when an epoch ends: steps 2 and 3 are its last, and 4 the first that is taken after it.
    assert bits_by_batch(optimizer, {0: 8, 3: 6, 5: 4}, y) == [8] * 3 + [6] * 4 + [4] * 5


@compiled
def test_validation_and_prediction_know_the_change(jit: bool):
    model = make("A8W8", jit)
    before = model.predict(X, verbose=0)
    history = fit(
        model,
        2,
        callbacks=[QuantizationSchedule({1: "A1W1"})],
        validation_data=(X, Y),
        validation_batch_size=32,
    )
    other = make("A1W1", jit)
    other.set_weights(model.get_weights())
    np.testing.assert_allclose(
        history["val_loss"][1], other.evaluate(X, Y, batch_size=32, verbose=0), rtol=1e-5
    )
    prediction = model.predict(X, verbose=0)
    np.testing.assert_allclose(prediction, other.predict(X, verbose=0), rtol=1e-5, atol=1e-6)
    assert np.abs(prediction - before).max() > 1e-2


@pytest.mark.skipif(BACKEND != "torch", reason="PyTorch only")
def test_compiled_by_torch(monkeypatch: pytest.MonkeyPatch):
    """Its compiler keeps graphs by the code of a function, also after that was compiled again."""
    import torch

    # Which graph is kept is decided before kernels are generated, which takes the longest.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    model = make("A8W8", jit=True)
    losses = fit(model, 2, callbacks=[QuantizationSchedule({1: "A2W1"})])["loss"]
    expected, weights = by_hand(["A8W8", "A2W1"], jit=False)
    np.testing.assert_allclose(losses, expected, rtol=1e-4)
    for received, wanted in zip(model.get_weights(), weights, strict=True):
        np.testing.assert_allclose(received, wanted, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("unit", ["epoch", "step"])
def test_resumed_training_is_as_if_never_interrupted(unit: str, tmp_path: Path):
    per = 1 if unit == "epoch" else STEPS

    def schedule() -> Any:
        return GradualBits(weights={0: 8, per: 4, 2 * per: 2}, activations={per: 4}, unit=unit)

    whole = make()
    expected = fit(whole, 4, callbacks=[schedule()])["loss"]
    part = make()
    losses = fit(part, 2, callbacks=[schedule()])["loss"]
    assert bits(part) == [(4, 4), (4, 4)]
    part.save(tmp_path / "m.keras")
    loaded = keras.saving.load_model(tmp_path / "m.keras")
    assert bits(loaded) == [(4, 4), (4, 4)]
    losses += fit(loaded, 4, first=2, callbacks=[schedule()])["loss"]
    assert losses == expected
    assert bits(loaded) == bits(whole) == [(2, 4), (2, 4)]


def test_a_file_from_the_float_phase_is_taken_up(tmp_path: Path):
    policy = rq.QuantizationPolicy("A4W1", rules=[rq.Rule("head", weights=8, activations=8)])
    whole = make(policy)
    expected = fit(whole, 3, callbacks=[DelayedStart(2, policy)])["loss"]
    part = make(policy)
    fit(part, 1, callbacks=[DelayedStart(2, policy)])
    assert bits(part) == [(None, None), (None, None)]
    part.save(tmp_path / "m.keras")
    loaded = keras.saving.load_model(tmp_path / "m.keras")
    assert fit(loaded, 3, first=1, callbacks=[DelayedStart(2, policy)])["loss"] == expected[1:]
    assert bits(loaded) == bits(whole) == [(1, 4), (8, 8)]


def test_a_second_fit_starts_over():
    model, callback = make(), GradualBits(weights={0: 8, 1: 4})
    for _ in range(2):
        fit(model, 1, callbacks=[callback])
        assert bits(model) == [(8, 8), (8, 8)]
        fit(model, 2, first=1, callbacks=[callback])
        assert bits(model) == [(4, 8), (4, 8)]


@pytest.mark.once("torch")
def test_sparsity_and_penalty():
    model = make(rq.QuantizationPolicy(weights=Ridge(4), activations=QuEST(4)))
    callbacks = [GradualSparsity({0: None, 1: "2:4", 2: "1:4"}), RidgeLambda({0: 1.0, 2: 0.5})]
    seen = []
    for epoch in range(3):
        fit(model, epoch + 1, first=epoch, callbacks=callbacks)
        (weights,) = {layer.quantization.weights for layer in quantized_layers(model)}
        seen.append((weights.sparsity, weights.ridge_lambda, weights.has_offset))
    assert seen == [(None, 1.0, True), ("2:4", 1.0, False), ("1:4", 0.5, False)]
    assert {layer.quantization.activations for layer in quantized_layers(model)} == {QuEST(4)}


@pytest.mark.once("torch")
@pytest.mark.parametrize("match", ["first", lambda layer: layer.units == 8])
def test_layers_that_do_not_match_stay_as_they_are(match: Any):
    model = make(rq.QuantizationPolicy("A8W8"))
    fit(model, 1, callbacks=[GradualBits(weights={0: 2}, match=match)])
    assert bits(model) == [(2, 8), (8, 8)]


@pytest.mark.once("torch")
def test_what_quantize_left_in_float_stays_in_float():
    model = make(rq.QuantizationPolicy("A8W8", rules=[rq.Rule("head", skip=True)]))
    fit(model, 1, callbacks=[QuantizationSchedule({0: "A4W4"})])
    assert bits(model) == [(4, 4)] and not isinstance(model.layers[-1], rq.layers.QuantizedLayer)


@pytest.mark.once("torch")
def test_a_layer_that_cannot_share_a_rotation_gets_none():
    model = keras.Sequential(
        [keras.Input((4, 4)), layers.DepthwiseConv1D(3), layers.Flatten(), layers.Dense(2)]
    )
    model.quantize(rq.QuantizationPolicy("A8W8"), verbose=False)
    model.compile("sgd", "mse")
    rotation = {"rotation": "hadamard"}
    stages = {0: "A1W1", 1: "A8W8", 2: {"weights": rotation, "activations": rotation}}
    seen = []
    for epoch in stages:
        x = X.reshape(32, 4, 4)
        schedule = QuantizationSchedule(stages)
        model.fit(x, Y, epochs=epoch + 1, initial_epoch=epoch, callbacks=[schedule], verbose=0)
        found = [layer.quantization for layer in quantized_layers(model)]
        seen.append([(one.weights.rotation, one.activations.rotation) for one in found])
    assert seen == [
        [(None, None), ("hadamard", "hadamard")],
        [(None, None), (None, None)],
        [(None, None), ("hadamard", "hadamard")],
    ]


@pytest.mark.once("torch")
def test_nothing_is_compiled_anew_where_nothing_changes():
    model = make("A8W8")
    functions = []

    class Watch(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
            functions.append(self.model.train_function)

    fit(model, 3, callbacks=[GradualBits(weights={0: 8, 2: 4}), Watch()])
    assert len(set(map(id, functions[: 2 * STEPS]))) == 1 and len(set(map(id, functions))) == 2


@pytest.mark.once("torch")
@pytest.mark.parametrize(
    ("make_schedule", "error", "words"),
    [
        (lambda: QuantizationSchedule({}), TypeError, ["`stages`", "stages={}"]),
        (lambda: QuantizationSchedule("A4W1"), TypeError, ["`stages`", "stages='A4W1'"]),
        (lambda: QuantizationSchedule({-1: None}), ValueError, [">= 0", "Received: -1"]),
        (lambda: QuantizationSchedule({0.5: None}), ValueError, [">= 0", "Received: 0.5"]),
        (lambda: QuantizationSchedule({0: 4}), TypeError, ["shorthand", "Received: 4"]),
        (lambda: QuantizationSchedule({0: {"bits": 4}}), TypeError, ["{'weights': {'bits': 4}}"]),
        (lambda: QuantizationSchedule({0: "A9W1"}), ValueError, ["A9W1", "bits=9"]),
        (lambda: QuantizationSchedule({0: None}, unit="day"), ValueError, ["`unit`", "unit='day'"]),
        (lambda: QuantizationSchedule({0: None}, match=4), TypeError, ["`match`", "match=4"]),
        (lambda: GradualBits(weights=4), TypeError, ["`bits`", "{0: ..., 5: ...}", "Received: 4"]),
        (lambda: GradualBits(), TypeError, ["`stages`"]),
        (lambda: DelayedStart(3, 4), TypeError, ["Received: 4"]),
    ],
)
def test_errors_name_argument_value_and_choices(make_schedule: Any, error: type, words: list[str]):
    with pytest.raises(error) as raised:
        make_schedule()
    for word in words:
        assert word in str(raised.value)


@pytest.mark.once("torch")
@pytest.mark.parametrize(
    ("policy", "schedule", "words"),
    [
        (None, GradualBits(weights={0: 4}), ["'net'", "model.quantize(policy)"]),
        ("A8W8", GradualBits(weights={0: 4}, match="tail"), ["'net'", "'tail'"]),
        ("A8W8", GradualBits(weights={7: 9}), ["in/first", "bits=9"]),
        (
            "A8W8",
            QuantizationSchedule({7: {"weights": {"bit": 4}}}),
            ["Stage 7", "'bit'", "'bits'"],
        ),
        ("W8", GradualBits(activations={7: 4}), ["Stage 7", "'bits'", "activations"]),
        (
            rq.QuantizationPolicy(weights=rq.quantizers.LearnedStep(4)),
            GradualBits(weights={7: 2}),
            ["in/first", "variables", "match="],
        ),
    ],
)
def test_what_a_model_cannot_have_is_told_before_training(
    policy: Any, schedule: Any, words: list[str]
):
    model = make(policy)
    before = model.get_weights()
    with pytest.raises(ValueError) as raised:
        fit(model, 1, callbacks=[schedule])
    for word in words:
        assert word in str(raised.value)
    assert all(np.array_equal(a, b) for a, b in zip(before, model.get_weights(), strict=True))
