"""GDNSQ through `fit`: widths come down from ten bits, and training stops and goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from gradients import BACKEND

import keras_rq as rq
from keras_rq.layers import parameters
from keras_rq.quantizers import GDNSQ, Ridge
from keras_rq.training.annealing import Annealed
from keras_rq.training.surgery import quantized_layers

X = np.random.default_rng(0).normal(size=(64, 12)).astype("float32")
Y = np.argmax(X @ np.random.default_rng(1).normal(size=(12, 3)), axis=1)
LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def float_model(seed: int = 0) -> keras.Sequential:
    keras.utils.set_random_seed(seed)
    return keras.Sequential(
        [
            keras.Input((12,)),
            keras.layers.Dense(16, activation="relu", name="hidden"),
            keras.layers.Dense(3, name="head"),
        ]
    )


def quantized(weights: Any = 4, activations: Any = 4, **fields: Any) -> keras.Sequential:
    model = float_model()
    model.quantize(
        rq.QuantizationPolicy(
            weights=GDNSQ(weights, **fields),
            activations=None if activations is None else GDNSQ(activations, **fields),
        ),
        verbose=False,
    )
    if activations is not None:
        rq.calibrate(model, X, verbose=False)
    return model


def compiled(model: keras.Model, rate: Any = 0.03, **options: Any) -> keras.Model:
    options = {"jit_compile": BACKEND == "jax", **options}
    model.compile(keras.optimizers.Adam(rate), LOSS, metrics=["accuracy"], **options)
    return model


def fit(model: keras.Model, callback: Any = None, **options: Any) -> dict[str, list[float]]:
    options = {"epochs": 1, "batch_size": 8, "shuffle": False, "verbose": 0, **options}
    callbacks = [] if callback is None else [callback]
    return model.fit(X, Y, callbacks=callbacks, **options).history


def arrays(model: keras.Model) -> list[np.ndarray]:
    return [keras.ops.convert_to_numpy(v) for v in (*model.variables, *model.optimizer.variables)]


def assert_alike(one: keras.Model, other: keras.Model, **tolerance: float) -> None:
    for a, b in zip(arrays(one), arrays(other), strict=True):
        np.testing.assert_allclose(a, b, **{"rtol": 0, **tolerance})


def levels(model: keras.Model) -> dict[str, int]:
    """How many codes every operand of every layer really has, on the data."""
    found, x = {}, X
    for layer in model.layers:
        for kind, values in (("weights", layer.kernel), ("activations", x)):
            quantizer = getattr(layer.quantization, kind)
            if quantizer is None:
                continue
            product = layer.products()["kernel"]
            is_kernel = kind == "weights"
            blocks = getattr(product, "kernel_blocks" if is_kernel else "input_blocks")(quantizer)
            given = getattr(layer, "kernel_parameters" if is_kernel else "input_parameters")
            view = blocks.view(tuple(values.shape))
            codes, _ = quantizer.codes_and_line(
                keras.ops.convert_to_tensor(values), view, blocks, given("kernel")
            )
            codes = keras.ops.convert_to_numpy(codes)
            found[f"{layer.name}/{kind}"] = int(codes.max() - codes.min()) + 1
            assert codes.min() >= quantizer.grid.low
        x = layer(x)
    return found


ONCE = pytest.mark.once


@pytest.mark.parametrize(
    ("weights", "activations"),
    [(4, 4), *(pytest.param(*bits, marks=ONCE) for bits in ((1.5, 2), (1, 1), (2, None)))],
)
def test_widths_come_down_from_ten_bits_to_their_targets(weights: Any, activations: Any):
    model = compiled(quantized(weights, activations), 0.02)
    callback = rq.callbacks.GDNSQ(warmup=80, growth=0.1)
    before = rq.report(model)
    assert {row.weight_bits for row in before.rows} == {10.0}
    assert {row.activation_bits for row in before.rows} == {10.0 if activations else 32}
    history = fit(model, callback, epochs=36)
    assert callback.converged
    bits = history["bits_weights"]
    assert bits[0] > 9.5 and len(callback.widths) == len(bits) == 36
    # The warm-up lasts ten epochs. Then widths come down gradually.
    assert min(bits[:10]) > 9.5 and bits[12] > bits[14] > bits[16] > bits[18]
    assert bits[14] > GDNSQ(weights).target + 1
    expected = [0.1 * 8 * max(epoch - 9, 0) for epoch in range(36)]
    np.testing.assert_allclose(history["temperature"], expected)
    limits = {"weights": len(GDNSQ(weights).grid.codes)}
    if activations is None:
        assert "bits_activations" not in history
    else:
        limits["activations"] = len(GDNSQ(activations).grid.codes)
    for name, count in levels(model).items():
        assert count <= limits[name.split("/")[1]], name
    rows = rq.report(model).rows
    assert {row.weight_bits for row in rows} == {weights}
    assert {row.activation_bits for row in rows} == {activations or 32}
    assert all(row.bits_per_element < 32 for row in rows)
    if weights == 4:  # below, so few and so large steps cost what such a network had learned
        assert history["accuracy"][-1] > 0.9


def test_the_penalty_is_in_the_gradient_of_plain_gradient_descent():
    """One step of `fit` moves the steps by the closed form of the penalty's gradient."""
    rate, growth = 1e-3, 7.0
    alone, pressed = (
        quantized(4, 4, noise="none"),
        quantized(4, 4, noise="none"),
    )
    for model in (alone, pressed):
        model.compile(keras.optimizers.SGD(rate), LOSS, jit_compile=BACKEND == "jax")
    callback = rq.callbacks.GDNSQ(warmup=0, growth=growth, decay=1)
    base = fit(alone, batch_size=64)["loss"][0]
    fit(pressed, callback, batch_size=64)  # the first batch only starts the mean
    assert_all_close = np.testing.assert_allclose
    steps = [
        [layer._rq_parameters["kernel"].weights["log_step"] for layer in m.layers]
        for m in (alone, pressed)
    ]
    for a, b in zip(*steps, strict=True):
        assert_all_close(*(keras.ops.convert_to_numpy(v) for v in (a, b)), rtol=1e-6)
    history = fit(pressed, callback, batch_size=64, initial_epoch=1, epochs=2)
    fit(alone, batch_size=64)
    assert_all_close(callback._read()[:2], [2.0, (base + history["base_loss"][0]) / 2], rtol=1e-5)
    share = (19 + 1e-3) / (21 + 1e-3)  # 16 + 3 output channels, 2 inputs
    for a, b, layer in zip(*steps, pressed.layers, strict=True):
        kernel = keras.ops.convert_to_numpy(layer.kernel)
        step = 2.0 ** keras.ops.convert_to_numpy(a)
        to_step = step / (np.ptp(kernel, axis=0, keepdims=True) + step) - 1
        expected = -rate * growth * (base / 2) * share * to_step / 19
        received = keras.ops.convert_to_numpy(b) - keras.ops.convert_to_numpy(a)
        assert_all_close(received, expected, rtol=0.02, atol=2e-6)
        assert (np.abs(expected) > 2e-5).all()


# TensorFlow traces eight steps for each: the others compare constant rates.
@pytest.mark.parametrize("schedule", [True] + [False] * (BACKEND != "tensorflow"))
def test_training_that_is_saved_goes_on_as_if_it_had_not_stopped(schedule: bool, tmp_path: Path):
    rate = keras.optimizers.schedules.CosineDecay(0.03, 4000) if schedule else 0.03

    def callback() -> Any:
        return rq.callbacks.GDNSQ(warmup=8, growth=0.4, decay=0.99)

    straight, stopped = compiled(quantized(4, 4), rate), compiled(quantized(4, 4), rate)
    whole = callback()
    fit(straight, whole, epochs=24)
    assert whole.converged and isinstance(straight.optimizer._learning_rate, Annealed)
    for first, last in ((0, 3), (3, 18), (18, 24)):
        again = callback()
        fit(stopped, again, initial_epoch=first, epochs=last)
        stopped.save(tmp_path / "m.keras")
        stopped = keras.saving.load_model(tmp_path / "m.keras")
    assert_alike(stopped, straight, rtol=1e-5, atol=1e-6)
    assert again._read() == pytest.approx(whole._read(), rel=1e-5)
    expected = straight.optimizer._learning_rate
    assert whole._annealed > 0 and float(stopped.optimizer.learning_rate) == pytest.approx(
        float(expected(straight.optimizer.iterations)), rel=1e-4
    )


def test_weights_alone_bring_the_progress_along(tmp_path: Path):
    model, other = compiled(quantized()), quantized()
    fit(model, rq.callbacks.GDNSQ(warmup=2, growth=0.2), epochs=2)
    model.save_weights(tmp_path / "m.weights.h5")
    other.load_weights(tmp_path / "m.weights.h5")
    first = parameters.kept_with(other.layers[0])
    assert [v.name for v in first] == ["training_gdnsq"]
    np.testing.assert_array_equal(
        *(keras.ops.convert_to_numpy(parameters.kept_with(m.layers[0])[0]) for m in (model, other))
    )
    np.testing.assert_array_equal(other.predict(X, verbose=0), model.predict(X, verbose=0))


@pytest.mark.skipif(BACKEND == "torch", reason="Keras takes one step at a time with PyTorch")
def test_several_steps_in_one_execution_are_those_of_several():
    """With plain gradient descent: Adam makes whole steps of gradients that are all rounding."""
    models = []
    for steps in (1, 4):
        model = quantized(noise="none")
        jit = BACKEND == "jax"
        model.compile(keras.optimizers.SGD(0.05), LOSS, jit_compile=jit, steps_per_execution=steps)
        fit(model, rq.callbacks.GDNSQ(warmup=2, growth=0.05), epochs=1)
        models.append(model)
    assert_alike(*models, rtol=2e-3, atol=2e-4)
    progress = [parameters.kept_with(m.layers[0])[0] for m in models]
    assert {float(keras.ops.convert_to_numpy(p)[0]) for p in progress} == {8.0}


def test_evaluation_and_later_training_know_no_penalty():
    model = compiled(quantized())
    fit(model, rq.callbacks.GDNSQ(warmup=0, growth=50.0), epochs=2, validation_data=(X, Y))
    logits = model.predict(X, verbose=0)
    expected = float(LOSS(Y, logits))
    assert model.evaluate(X, Y, verbose=0)[0] == pytest.approx(expected, rel=1e-5)
    assert "compute_loss" not in model.__dict__
    history = fit(model, epochs=1)
    assert "base_loss" not in history and history["loss"][0] < 3 * expected


def test_a_fit_that_was_interrupted_leaves_no_second_penalty():
    class Stop(keras.callbacks.Callback):
        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            raise KeyboardInterrupt

    model = compiled(quantized())
    callback = rq.callbacks.GDNSQ(warmup=0, growth=1.0)
    with pytest.raises(KeyboardInterrupt):
        model.fit(X, Y, callbacks=[callback, Stop()], verbose=0)
    fit(model, callback)
    assert "compute_loss" not in model.__dict__


def test_distillation_from_the_float_model(tmp_path: Path):
    """The worked example: a float teacher, its quantized copy, no labels in the loss."""
    teacher = compiled(float_model())
    fit(teacher, epochs=30)
    student = float_model()
    student.set_weights(teacher.get_weights())
    student.quantize(rq.QuantizationPolicy(weights=GDNSQ(4), activations=GDNSQ(4)), verbose=False)
    rq.calibrate(student, X, verbose=False)
    distiller = keras.distillation.Distiller(
        teacher, student, rq.distillation.Jeffreys(), student_loss_weight=0.0
    )
    compiled(distiller, 0.01)
    gdnsq = rq.callbacks.GDNSQ(warmup=8, growth=0.5)
    before = [keras.ops.convert_to_numpy(v) for v in teacher.weights]
    history = fit(distiller, gdnsq, epochs=60)
    assert gdnsq.converged and history["bits_weights"][0] > 9
    for old, new in zip(before, teacher.weights, strict=True):
        np.testing.assert_array_equal(old, keras.ops.convert_to_numpy(new))
    agree = np.argmax(student.predict(X, verbose=0), 1) == np.argmax(
        teacher.predict(X, verbose=0), 1
    )
    assert agree.mean() > 0.85
    assert {row.weight_bits for row in rq.report(student).rows} == {4}
    student.save(tmp_path / "m.keras")
    loaded = keras.saving.load_model(tmp_path / "m.keras")
    np.testing.assert_array_equal(loaded.predict(X, verbose=0), student.predict(X, verbose=0))


@pytest.mark.skipif(
    BACKEND == "tensorflow", reason="tf.recompute_grad refuses the arguments of Keras layers"
)
def test_rematerialised_layers_train(tmp_path: Path):
    quantized().save_weights(tmp_path / "m.weights.h5")  # calibrated
    with keras.RematScope(mode="full"):
        model = float_model()
    policy = rq.QuantizationPolicy(weights=GDNSQ(4), activations=GDNSQ(4))
    model.quantize(policy, verbose=False)
    model.load_weights(tmp_path / "m.weights.h5")
    model.compile(keras.optimizers.Adam(0.01), LOSS, jit_compile=BACKEND == "jax")
    losses = fit(model, rq.callbacks.GDNSQ(warmup=1), epochs=3)["base_loss"]
    assert losses[-1] < losses[0]


@pytest.mark.once
def test_layers_have_targets_of_their_own_and_other_estimators_stay():
    model = float_model()
    rules = [rq.Rule("head", weights=GDNSQ(2), activations=Ridge(8))]
    policy = rq.QuantizationPolicy(weights=GDNSQ(4), activations=GDNSQ(8), rules=rules)
    model.quantize(policy, verbose=False)
    rq.calibrate(model, X, verbose=False)
    callback = rq.callbacks.GDNSQ(warmup=8, growth=0.3)
    fit(compiled(model), callback, epochs=30)
    assert callback.converged
    assert [row.weight_bits for row in rq.report(model).rows] == [4, 2]
    hidden, head = callback.widths[-1].values()
    assert set(hidden) == {"weights", "activations"} and set(head) == {"weights"}
    assert len(quantized_layers(model)) == 2


def test_a_loss_that_overflows_once_is_not_remembered():
    model = quantized()
    model.compile(keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam(0.03)), "mse")
    y = np.random.default_rng(2).normal(size=(64, 3)).astype("float32")
    overflowing = y.copy()
    overflowing[8] = np.inf
    callback = rq.callbacks.GDNSQ(warmup=4, growth=0.4)
    options = {"batch_size": 8, "shuffle": False, "verbose": 0, "callbacks": [callback]}
    model.fit(X, overflowing, **options)
    history = model.fit(X, y, epochs=12, **options).history
    assert np.isfinite(history["loss"]).all() and np.isfinite(history["base_loss"]).all()
    assert history["bits_weights"][-1] < 6.0 < 8.0 < history["bits_weights"][0]


@pytest.mark.once
def test_data_that_runs_out():
    """Keras warns, and ends the epochs that have no batch."""
    batches = ((X[i : i + 8], Y[i : i + 8]) for i in range(0, 48, 8))
    callback = rq.callbacks.GDNSQ(warmup=4, growth=0.4)
    with pytest.warns(UserWarning, match="ran out of data"):
        compiled(quantized()).fit(
            batches, steps_per_epoch=3, epochs=4, callbacks=[callback], verbose=0
        )
    assert len(callback.widths) == 4


@pytest.mark.once
def test_a_training_step_that_does_not_ask_for_the_loss():
    import tensorflow as tf

    class Own(keras.Sequential):
        def train_step(self, data: Any) -> dict[str, Any]:
            x, y = data
            with tf.GradientTape() as tape:
                loss = keras.ops.mean(LOSS(y, self(x, training=True)))
            variables = self.trainable_variables
            self.optimizer.apply_gradients(
                zip(tape.gradient(loss, variables), variables, strict=True)
            )
            return {"loss": loss}

    model = Own(quantized().layers)
    model.compile(keras.optimizers.Adam(0.03), LOSS)
    with pytest.raises(RuntimeError, match=r"has called `compute_loss`.*bit widths stay"):
        fit(model, rq.callbacks.GDNSQ())


@pytest.mark.once
def test_what_it_cannot_work_on():
    model = float_model()
    model.quantize(rq.QuantizationPolicy("A4W4"), verbose=False)
    with pytest.raises(ValueError, match="has no width to train"):
        fit(compiled(model), rq.callbacks.GDNSQ())
    model = quantized()
    model.compile(keras.optimizers.Adam(lambda: 0.1), LOSS)
    with pytest.raises(ValueError, match="one learning rate"):
        fit(model, rq.callbacks.GDNSQ())
