"""Training steps that the backend compiles: XLA with TensorFlow and JAX, Inductor with PyTorch."""

from __future__ import annotations

import shutil

import keras
import numpy as np
import pytest
from gradients import BACKEND
from keras import layers
from zoo import MAKERS

import keras_rq as rq
from keras_rq.layers import parameters
from keras_rq.quantizers import GDNSQ, LearnedStep, Ridge

X = np.random.default_rng(0).normal(size=(32, 8)).astype("float32")
Y = np.random.default_rng(1).normal(size=(32, 4)).astype("float32")
STATIC = Ridge(4, calibration="static")
POLICY = rq.QuantizationPolicy(
    "A8W3-tensor",
    fold_batch_norm=True,
    rules=[
        rq.Rule("shared", weights=Ridge(1, block_size=3), activations=Ridge(4)),
        rq.Rule("learned", weights=LearnedStep(4), activations=LearnedStep(4)),
        rq.Rule("static", weights=4, activations=STATIC),
        rq.Rule("widths", weights=GDNSQ(4, noise="none"), activations=GDNSQ(4, noise="none")),
    ],
)


def folding() -> keras.Sequential:
    stack = [layers.Dense(4, use_bias=False), layers.BatchNormalization(momentum=0.8)]
    return keras.Sequential([keras.Input((8,)), *stack], name="folding")


def branches() -> keras.Model:
    """A branch for all that a compiler sees differently, so that no layer hides another's error."""
    keras.utils.set_random_seed(0)
    inputs = keras.Input((8,))
    shared = layers.Dense(8, name="shared")
    found = [layers.Dense(4, name=name)(inputs) for name in ("learned", "static", "widths")]
    # PyTorch's compiler falls apart into many graphs at Keras's normalization: see below.
    found.append(layers.Dense(4)(inputs) if BACKEND == "torch" else folding()(inputs))
    model = keras.Model(inputs, layers.Add()([*found, shared(shared(inputs))[:, :4]]))
    report = model.quantize(POLICY, verbose=False)
    assert report.folded or BACKEND == "torch"
    rq.calibrate(model, X, verbose=False)
    return model


@pytest.mark.timeout(900)  # PyTorch's compiler takes minutes on a machine that is busy
@pytest.mark.skipif(
    BACKEND == "torch" and shutil.which("g++") is None, reason="torch.compile needs g++ on a CPU"
)
def test_compiled_steps_are_the_plain_ones():
    """With plain gradient descent: Adam makes whole steps of gradients that are all rounding."""
    models, losses = (branches(), branches()), []
    before = {v.path: keras.ops.convert_to_numpy(v) for v in models[0].trainable_variables}
    for model, jit in zip(models, (False, True), strict=True):
        model.compile(keras.optimizers.SGD(0.1), "mse", jit_compile=jit)
        callback = rq.callbacks.GDNSQ(warmup=1, growth=0.05)
        history = model.fit(X, Y, batch_size=8, shuffle=False, verbose=0, callbacks=[callback])
        losses.append(history.history["loss"])
    np.testing.assert_allclose(*losses, rtol=1e-4)
    for plain, compiled in zip(*(m.variables for m in models), strict=True):
        now = keras.ops.convert_to_numpy(plain)
        received = keras.ops.convert_to_numpy(compiled)
        np.testing.assert_allclose(received, now, rtol=1e-4, atol=1e-5, err_msg=plain.path)
        # Where inputs have values of both signs, LSQ shifts nothing.
        if plain.trainable and not plain.path.endswith("input_shift"):
            assert np.any(now != before[plain.path]), plain.path
    for model in models:
        steps = parameters.kept_with(model.get_layer("widths"))[0]
        assert float(keras.ops.convert_to_numpy(steps)[0]) == 4


@pytest.mark.skipif(BACKEND != "torch", reason="PyTorch only: the others compile the step above")
def test_the_backward_pass_reads_statistics_that_have_moved_since():
    import torch

    gradients = []
    for jit in (False, True):
        keras.utils.set_random_seed(0)
        model = folding()
        assert model.quantize(POLICY, verbose=False).folded
        # What is at stake is decided before kernels are generated.
        call = torch.compile(model, backend="aot_eager_decomp_partition") if jit else model
        (call(torch.from_numpy(X), training=True) * torch.from_numpy(Y)).sum().backward()
        gradients.append([v.value.grad.numpy() for v in model.trainable_variables])
    for plain, compiled in zip(*gradients, strict=True):
        assert np.abs(plain).max() > 1e-2
        np.testing.assert_allclose(compiled, plain, rtol=1e-4, atol=1e-5)


# JAX compiles every step of every journey in test_fit_and_save.py.
@pytest.mark.once
@pytest.mark.parametrize("name", ["images", "subclassed"])
def test_fit(name: str):
    member = MAKERS[name]()
    member.model.quantize(rq.QuantizationPolicy("A4W1"), verbose=False)
    member.compile(jit_compile=True)
    losses = member.fit(epochs=20)
    assert losses[-1] < 0.9 * losses[0]
