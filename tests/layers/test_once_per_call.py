"""A kernel that a model uses several times is quantized once a step."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from gradients import BACKEND
from keras import ops

import keras_rq as rq
from keras_rq.quantizers import Quantizer


@pytest.fixture
def quantized(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes of the tensors that went through `fake_quantize`."""
    shapes: list[tuple[int, ...]] = []
    original = Quantizer.fake_quantize

    def counted(self, x, *args, **kwargs):
        shapes.append(tuple(x.shape))
        return original(self, x, *args, **kwargs)

    monkeypatch.setattr(Quantizer, "fake_quantize", counted)
    return shapes


def twice(dense: keras.layers.Layer) -> keras.Model:
    inputs = keras.Input((24,))
    return keras.Model(inputs, dense(dense(inputs)))


X = np.random.default_rng(0).normal(size=(16, 24)).astype("float32")


@pytest.mark.forward
def test_a_shared_layer_quantizes_its_kernel_once_in_a_call(quantized: list):
    model = twice(keras.layers.Dense(24))
    rq.quantize(model, rq.QuantizationPolicy("A4W4"), verbose=False)
    quantized.clear()
    first = ops.convert_to_numpy(model(X))
    assert quantized == [(24, 24)]
    model.layers[-1].kernel.assign(2 * model.layers[-1].kernel)
    assert not np.array_equal(ops.convert_to_numpy(model(X)), first)  # nothing is kept for long
    assert quantized == [(24, 24)] * 2


@pytest.mark.skipif(BACKEND == "numpy", reason="no gradients")
def test_the_gradient_is_that_of_two_layers_with_equal_kernels():
    """The sum of the two layers' gradients: the rule is linear in the upstream gradient."""
    keras.utils.set_random_seed(0)
    shared = twice(keras.layers.Dense(24, use_bias=False))
    inputs = keras.Input((24,))
    first, second = (keras.layers.Dense(24, use_bias=False) for _ in range(2))
    apart = keras.Model(inputs, second(first(inputs)))
    start = shared.get_weights()[0]
    apart.set_weights([start, start])
    for model in (shared, apart):
        rq.quantize(model, rq.QuantizationPolicy("A4W4"), verbose=False)
        model.compile(keras.optimizers.SGD(1.0), "mse")
        model.train_on_batch(X, X)
    steps = [w - start for w in apart.get_weights()]
    np.testing.assert_allclose(shared.get_weights()[0] - start, sum(steps), rtol=1e-4, atol=1e-6)


@pytest.mark.skipif(BACKEND != "jax", reason="a loop's body is a trace of its own")
def test_tensors_of_a_loop_stay_in_the_loop():
    class Looped(keras.layers.Layer):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            self.dense = keras.layers.Dense(24)

        def build(self, shape):
            self.dense.build(shape)

        def call(self, x):
            looped, _ = ops.scan(lambda carry, _: (self.dense(carry), None), x, length=3)
            return self.dense(looped)

    inputs = keras.Input((24,))
    model = keras.Model(inputs, Looped()(inputs))
    rq.quantize(model, rq.QuantizationPolicy("A4W4"), verbose=False)
    model.compile("sgd", "mse")
    assert np.isfinite(model.train_on_batch(X, X))
