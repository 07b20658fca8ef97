"""What users combine with quantization: options of optimizers and of `compile`, and wrappers."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import keras
import numpy as np
import pytest
from gradients import BACKEND
from keras import layers

import keras_rq as rq
from keras_rq.quantizers import LearnedStep, Ridge

# All kernels of few shapes: JAX compiles for each.
X = np.random.default_rng(0).normal(size=(32, 8)).astype("float32")
Y = np.random.default_rng(1).normal(size=(32, 3)).astype("float32")
BATCH, STEPS, RATE = 8, 4, 0.1
POLICIES = {
    "blocks": rq.QuantizationPolicy(weights=Ridge(2, block_size=5), activations=Ridge(4)),
    "channels": rq.QuantizationPolicy(weights=LearnedStep(4)),
}
Arrays = list[np.ndarray]


def layers_of_a_model() -> list[keras.layers.Layer]:
    keras.utils.set_random_seed(0)
    return [layers.Dense(8, "relu", name="first"), layers.Dense(3, name="head")]


def connected(*stack: keras.layers.Layer) -> keras.Model:
    x = inputs = keras.Input((8,))
    for layer in stack:
        x = layer(x)
    return keras.Model(inputs, x)


def make(policy: str) -> keras.Model:
    model = connected(*layers_of_a_model())
    model.quantize(POLICIES[policy], verbose=False)
    return model


def compiled(model: keras.Model, optimizer: Any = None, **options: Any) -> keras.Model:
    """With plain gradient descent unless told otherwise: it scales no gradient that is rounding."""
    options = {"jit_compile": BACKEND == "jax", **options}
    model.compile(optimizer or keras.optimizers.SGD(RATE), "mse", **options)
    return model


def fit(model: keras.Model, epochs: int = 1, batch_size: int = BATCH) -> list[float]:
    options = {"batch_size": batch_size, "epochs": epochs, "shuffle": False, "verbose": 0}
    return model.fit(X, Y, **options).history["loss"]


def trained(model: keras.Model) -> Arrays:
    return [keras.ops.convert_to_numpy(v) for v in model.trainable_variables]


def assert_close(received: Arrays, expected: Arrays, **tolerance: float) -> None:
    for a, b in zip(received, expected, strict=True):
        np.testing.assert_allclose(a, b, **{"rtol": 1e-5, "atol": 1e-6, **tolerance})


def largest_gap(some: Arrays, others: Arrays) -> float:
    return max(float(np.abs(a - b).max()) for a, b in zip(some, others, strict=True))


class Plain(NamedTuple):
    """An epoch without anything: the weights before it and after each step, and its loss."""

    policy: str
    weights: list[Arrays]
    loss: float


@pytest.fixture(scope="module", params=POLICIES)
def plain(request: Any) -> Plain:
    model = compiled(make(request.param))
    weights, losses = [trained(model)], []
    for at in range(0, len(X), BATCH):
        losses.append(float(model.train_on_batch(X[at : at + BATCH], Y[at : at + BATCH])))
        weights.append(trained(model))
        model.reset_metrics()
    assert largest_gap(weights[0], weights[-1]) > 1e-2
    return Plain(request.param, weights, float(np.mean(losses)))


def test_small_batches_that_are_accumulated_are_one_large_batch(plain: Plain):
    """Two updates: what was accumulated for the first is gone in the second."""
    whole = compiled(make(plain.policy))
    optimizer = keras.optimizers.SGD(RATE, gradient_accumulation_steps=STEPS)
    parts = compiled(make(plain.policy), optimizer)
    fit(whole, epochs=2, batch_size=len(X))
    fit(parts, epochs=2)
    assert_close(trained(parts), trained(whole))
    assert largest_gap(trained(whole), plain.weights[-1]) > 1e-2


@pytest.mark.skipif(BACKEND == "torch", reason="Keras takes one step at a time with PyTorch")
def test_steps_of_one_execution_are_those_of_several(plain: Plain):
    """Three and one: the second execution is a shorter one."""
    model = compiled(make(plain.policy), steps_per_execution=3)
    np.testing.assert_allclose(fit(model), plain.loss, rtol=1e-5)
    assert_close(trained(model), plain.weights[-1])
    assert int(model.optimizer.iterations) == STEPS


def test_fit_ends_with_averaged_weights_which_are_saved(plain: Plain, tmp_path: Path):
    momentum, means = 0.7, plain.weights[1]
    for now in plain.weights[2:]:
        means = [momentum * a + (1 - momentum) * b for a, b in zip(means, now, strict=True)]
    optimizer = keras.optimizers.SGD(RATE, use_ema=True, ema_momentum=momentum)
    model = compiled(make(plain.policy), optimizer)
    fit(model)
    assert_close(trained(model), means)
    assert largest_gap(means, plain.weights[-1]) > 1e-2

    # Saved first: with JAX, Keras predicts on arrays that the optimizer still needs (3.15.1).
    model.save(tmp_path / "m.keras")
    loaded = keras.saving.load_model(tmp_path / "m.keras")
    fresh = make(plain.policy)
    fresh.set_weights(model.get_weights())
    expected = fresh.predict(X, verbose=0)
    np.testing.assert_array_equal(model.predict(X, verbose=0), expected)
    np.testing.assert_array_equal(loaded.predict(X, verbose=0), expected)


# With TensorFlow, Keras rematerializes no whole layer in a graph, in float either:
# tf.recompute_grad refuses the arguments of Keras layers.
@pytest.mark.parametrize("mode", ["activations"] + ["full"] * (BACKEND != "tensorflow"))
def test_rematerialized_layers_are_trained_alike(mode: str, plain: Plain):
    with keras.RematScope(mode=mode):  # not the model, which would be rematerialized as a whole
        stack = layers_of_a_model()
    model = connected(*stack)
    model.quantize(POLICIES[plain.policy], verbose=False)
    assert [layer._remat_mode.mode for layer in stack] == [mode, mode]
    np.testing.assert_allclose(fit(compiled(model)), plain.loss, rtol=1e-5)
    assert_close(trained(model), plain.weights[-1])


def distiller(student: keras.Model, teacher: keras.Model) -> keras.distillation.Distiller:
    """Both ways in which Keras compares: by logits, and by the outputs of layers."""
    losses = [
        # Given by name, the divergence is that of logits and not of their softmax (Keras 3.15.1).
        keras.distillation.LogitsDistillation(2.0, keras.losses.KLDivergence()),
        keras.distillation.FeatureDistillation(
            teacher_layer_name="first", student_layer_name="first"
        ),
    ]
    return keras.distillation.Distiller(
        teacher, student, losses, distillation_loss_weights=[0.5, 0.5], student_loss_weight=0.2
    )


def distillation_loss(student: keras.Model, teacher: keras.Model) -> float:
    """What the distiller minimizes, in NumPy."""
    logits, hidden, log_p = [], [], []
    for model in (teacher, student):
        both = keras.Model(model.inputs, [model.get_layer("first").output, model.output])
        for found, y in zip((hidden, logits), both(X), strict=True):
            found.append(keras.ops.convert_to_numpy(y))
        log_p.append(logits[-1] / 2 - np.log(np.exp(logits[-1] / 2).sum(-1, keepdims=True)))
    divergence = np.mean(np.sum(np.exp(log_p[0]) * (log_p[0] - log_p[1]), -1))
    features = np.mean((hidden[0] - hidden[1]) ** 2)
    return 0.2 * np.mean((Y - logits[1]) ** 2) + 0.8 * (0.5 * 2.0**2 * divergence + 0.5 * features)


def test_a_quantized_student_learns_from_a_float_teacher(tmp_path: Path):
    teacher, student = connected(*layers_of_a_model()), make("blocks")
    student.set_weights(teacher.get_weights())
    before = teacher.get_weights()
    pair = compiled(distiller(student, teacher), keras.optimizers.Adam(0.02))
    expected = distillation_loss(student, teacher)
    losses = fit(pair, epochs=12, batch_size=len(X))
    np.testing.assert_allclose(losses[0], expected, rtol=1e-4)
    assert losses[-1] < 0.8 * losses[0]
    for a, b in zip(teacher.get_weights(), before, strict=True):
        np.testing.assert_array_equal(a, b)

    prediction = student.predict(X, verbose=0)
    for saved, path in ((student, tmp_path / "s.keras"), (pair, tmp_path / "pair.keras")):
        saved.save(path)
        loaded = keras.saving.load_model(path)
        loaded = getattr(loaded, "student", loaded)
        assert loaded.get_layer("first").quantization == student.get_layer("first").quantization
        np.testing.assert_array_equal(loaded.predict(X, verbose=0), prediction)
