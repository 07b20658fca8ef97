"""BatchNormalization folded into the kernel that is trained, against float64 NumPy."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest
import reference
from gradients import BACKEND, compiled, relative_error, to_numpy
from keras import layers

import keras_rq as rq
from keras_rq.layers import folding
from keras_rq.quantizers import LearnedStep, StraightThrough

EPSILON = 1e-3
# Ridge, 4 bits, one line for the whole kernel: that is where a factor per channel shows.
SPEC = reference.Spec(4, affine=True, rule="minmax", block="tensor")


def disturb(norm: layers.BatchNormalization, zero: bool = True) -> None:
    """Gives a normalization values of both signs, and one channel that begins at zero."""
    size = norm.moving_mean.shape
    generator = np.random.default_rng(7)
    gamma = np.where(np.arange(*size) % 2, 1.0, -1.0) * generator.uniform(0.2, 3.0, size)
    if norm.gamma is not None:
        norm.gamma.assign(np.where(np.arange(*size) == 2, 0.0 if zero else 1.0, gamma))
    norm.moving_mean.assign(generator.normal(size=size))
    norm.moving_variance.assign(generator.uniform(0.2, 4.0, size))
    if norm.beta is not None:
        norm.beta.assign(generator.normal(size=size))


# A layer, the shape of its input, and the shape in which a channel of its output is one of its
# last kernel.
KINDS = {
    "Dense": (lambda: layers.Dense(6), (9,), (1, 6)),
    "EinsumDense": (
        lambda: layers.EinsumDense("abc,dce->abed", (3, 5, 6), bias_axes="d"),
        (3, 4),
        (6, 1, 1),
    ),
    "Conv1D": (lambda: layers.Conv1D(6, 3, padding="same"), (7, 4), (1, 1, 6)),
    "Conv2D": (lambda: layers.Conv2D(6, 3, strides=2, use_bias=False), (7, 7, 3), (1, 1, 1, 6)),
    "Conv3D": (lambda: layers.Conv3D(6, 2), (3, 3, 3, 2), (1, 1, 1, 1, 6)),
    "DepthwiseConv2D": (
        lambda: layers.DepthwiseConv2D(3, depth_multiplier=2),
        (5, 5, 3),
        (1, 1, 3, 2),
    ),
    "SeparableConv2D": (lambda: layers.SeparableConv2D(6, 3), (5, 5, 3), (1, 1, 1, 6)),
    "Conv2DTranspose": (lambda: layers.Conv2DTranspose(6, 3), (4, 4, 3), (1, 1, 6, 1)),
}


# JAX compiles every operation of every shape; where the channels of a kernel lie is no backend's.
TRIED = ("EinsumDense", "DepthwiseConv2D") if BACKEND == "jax" else tuple(KINDS)


def value(variable: Any) -> np.ndarray:
    return keras.ops.convert_to_numpy(variable).astype(np.float64)


def quantized(kernel: np.ndarray) -> np.ndarray:
    return reference.quantize(kernel, SPEC).y


def without_bias(layer: layers.Layer) -> layers.Layer:
    """The float layer."""
    float_class = getattr(layers, type(layer).__name__)
    config = {k: v for k, v in layer.get_config().items() if k != "quantization"}
    is_einsum = isinstance(layer, layers.EinsumDense)
    return float_class.from_config(
        config | ({"bias_axes": None} if is_einsum else {"use_bias": False})
    )


def model_of_kinds() -> keras.Model:
    """One of each kind, with a normalization behind it that is folded."""
    inputs = {kind: keras.Input(KINDS[kind][1], name=kind) for kind in TRIED}
    outputs = {}
    for kind in TRIED:
        layer, norm = KINDS[kind][0](), layers.BatchNormalization(epsilon=EPSILON)
        outputs[kind] = norm(layer(inputs[kind]))
        disturb(norm)
        if layer.bias is not None:
            layer.bias.assign(np.random.normal(size=layer.bias.shape))
    model = keras.Model(inputs, outputs)
    policy = rq.QuantizationPolicy("W4-tensor", fold_batch_norm=True)
    assert len(model.quantize(policy, verbose=False).folded) == len(TRIED)
    return model


def test_in_inference_it_is_one_layer_with_the_quantized_folded_kernel():
    model, added, plain = model_of_kinds(), {}, {}
    for kind in TRIED:
        columns = KINDS[kind][2]
        norm = model.output[kind]._keras_history.operation
        layer = norm.input._keras_history.operation
        gamma, beta, mean, variance = (value(v) for v in norm.weights)
        deviation = np.sqrt(variance + EPSILON)
        scale = (np.maximum(np.abs(gamma), folding.SMALLEST_GAMMA) / deviation).reshape(columns)
        gain = gamma / deviation

        *before, kernel = [value(getattr(layer, name)) for name in layer.products()]
        deployed = quantized(kernel * scale) / scale * gain.reshape(columns)
        bias = 0.0 if layer.bias is None else value(layer.bias)
        added[kind] = gain * (bias - mean) + beta
        plain[kind] = without_bias(layer)(model.input[kind])
        operation = plain[kind]._keras_history.operation
        operation.set_weights([*(quantized(k) for k in before), deployed])

    x = {kind: np.random.normal(size=(2, *KINDS[kind][1])).astype("float32") for kind in TRIED}
    received, expected = (compiled(m)(x) for m in (model, keras.Model(model.input, plain)))
    for kind in TRIED:
        y = to_numpy(expected[kind]) + added[kind]
        assert relative_error(to_numpy(received[kind]), y) < 1e-5, kind


# Training. `e` is what quantization adds to the folded kernel, a constant of the gradient.


def loss_in_training(state: dict[str, np.ndarray], e: np.ndarray, x: Any, upstream: Any) -> float:
    scale = np.abs(state["gamma"]) / np.sqrt(state["variance"] + EPSILON)
    z = x @ ((state["kernel"] * scale + e) / scale)
    normalized = (z - z.mean(axis=0)) / np.sqrt(z.var(axis=0) + EPSILON)
    return float(np.mean((state["gamma"] * normalized + state["beta"]) * upstream))


def dense(weights: Any, **arguments: Any) -> keras.Model:
    norm = layers.BatchNormalization(epsilon=EPSILON, momentum=0.5)
    model = keras.Sequential([keras.Input((9,)), layers.Dense(6, use_bias=False), norm])
    disturb(norm, zero=False)
    policy = rq.QuantizationPolicy(weights=weights, fold_batch_norm=True, **arguments)
    model.quantize(policy, verbose=False)
    return model


def test_gradients_are_those_of_the_folded_kernel():
    model = dense(StraightThrough(3, block_size="tensor"))
    layer, norm = model.layers
    names = ("kernel", "gamma", "beta", "mean", "variance")
    before = dict(zip(names, (value(v) for v in (*layer.weights, *norm.weights)), strict=True))
    scale = np.abs(before["gamma"]) / np.sqrt(before["variance"] + EPSILON)
    spec = reference.Spec(3, affine=True, rule="minmax", block="tensor", ridge_lambda=None)
    e = reference.quantize(before["kernel"] * scale, spec).y - before["kernel"] * scale
    x, upstream = np.random.normal(size=(16, 9)), np.random.normal(size=(16, 6))

    # One step of gradient descent shows the gradient, in whatever way a backend finds it.
    model.compile(keras.optimizers.SGD(1.0), lambda y, out: keras.ops.mean(y * out, axis=-1))
    model.train_on_batch(x.astype("float32"), upstream.astype("float32"))
    for name, variable in (("kernel", layer.kernel), ("gamma", norm.gamma), ("beta", norm.beta)):
        expected = np.empty_like(before[name])
        for at in np.ndindex(expected.shape):
            step = np.zeros_like(expected)
            step[at] = 1e-6
            ends = [before | {name: before[name] + sign * step} for sign in (1, -1)]
            high, low = (loss_in_training(state, e, x, upstream) for state in ends)
            expected[at] = (high - low) / 2e-6
        assert relative_error(before[name] - value(variable), expected) < 1e-3, name

    z = x @ ((before["kernel"] * scale + e) / scale)
    expected = 0.5 * before["mean"] + 0.5 * z.mean(axis=0)
    assert relative_error(value(norm.moving_mean), expected) < 1e-5


@pytest.mark.once("torch")
def test_a_gamma_of_zero_can_leave_it():
    model = dense(4)
    layer, norm = model.layers
    norm.gamma.assign(np.zeros(6))
    model.compile(keras.optimizers.SGD(0.1), "mse")
    x = np.random.normal(size=(16, 9)).astype("float32")
    model.fit(x, x[:, :6], epochs=2, verbose=0)
    assert np.all(value(norm.gamma) != 0) and np.all(np.isfinite(value(layer.kernel)))


@pytest.mark.once("torch")
def test_integer_products_take_the_factor_out_again():
    x = np.random.normal(size=(5, 9)).astype("float32")
    outputs = []
    for forward in (None, "int8"):
        keras.utils.set_random_seed(1)
        blocks = rq.quantizers.Ridge(4, block_size=4)
        activations = rq.quantizers.Ridge(8, block_size=4)
        outputs.append(
            to_numpy(compiled(dense(blocks, activations=activations, forward=forward))(x))
        )
    assert relative_error(*outputs) < 2e-6


@pytest.mark.once("torch")
def test_a_learned_step_starts_from_the_folded_kernel():
    model = dense(LearnedStep(4))
    layer = model.layers[0]
    alone = keras.Sequential([keras.Input((9,)), layers.Dense(6, use_bias=False)])
    alone.layers[0].kernel.assign(layer.kernel_to_quantize("kernel"))
    alone.quantize(rq.QuantizationPolicy(weights=LearnedStep(4)), verbose=False)
    steps = [value(one.kernel_parameters("kernel")["step"]) for one in (layer, *alone.layers)]
    np.testing.assert_array_equal(*steps)


# Which normalizations fold.


@keras.saving.register_keras_serializable("test_folding")
class Coded(keras.Model):
    """Calls its layers by itself."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.d = layers.Dense(4, name="d")
        self.n = layers.BatchNormalization(name="coded")

    def call(self, x: Any) -> Any:
        return keras.ops.relu(self.n(self.d(x)))

    def build(self, shape: Any) -> None:
        self.d.build(shape)
        self.n.build((None, 4))


class Own(layers.BatchNormalization):
    """A class of the user's own."""


def network() -> keras.Model:
    x = keras.Input((8,), name="x")
    norm = layers.BatchNormalization
    ends = []
    shared, twice = layers.Dense(4, name="shared"), norm(name="twice")
    ends += [norm(name="a")(shared(x)), norm(name="b")(shared(x))]
    ends += [twice(layers.Dense(4)(x)), twice(layers.Dense(4)(x))]
    together = keras.Sequential([keras.Input((8,)), layers.Dense(4), norm(name="inside")])
    ends += [together(x), together(2.0 * x)]
    ends += [norm(name="active")(layers.Dense(4, "relu", name="relu")(x))]
    ends += [norm(name="first")(x), norm(name="training")(layers.Dense(4)(x), training=True)]
    seen = layers.Dense(4, name="seen")(x)
    ends += [seen, norm(name="of_output")(seen), Own(name="own")(layers.Dense(4)(x))]
    tokens = layers.Reshape((2, 4))(x)
    ends += [layers.Flatten()(norm(axis=1, name="rows")(layers.Dense(4, name="t")(tokens)))]
    ends += [Coded(name="code")(x), norm(name="free")(layers.Dense(4, name="kept")(x))]
    return keras.Model(x, [*ends, norm(name="last")(layers.Dense(4, name="good")(x))], name="net")


REASONS = {
    "a": "what 'shared' before it returns goes to 'b', too",
    "b": "what 'shared' before it returns goes to 'a', too",
    "twice": "it normalizes the outputs of several layers",
    "active": "'relu' before it has an activation",
    "first": "'x' before it is no Dense, EinsumDense or convolution",
    "training": "it is called with training=True",
    "of_output": "what 'seen' before it returns is an output of the model",
    "own": "Own is a subclass and may do more than its parent",
    "rows": "its axis is not that of the channels of 't' before it",
    "coded": "it is called by code, and not in a Sequential or Functional graph alone",
    "free": "the kernel before it stays in float",
}


@pytest.mark.once("torch")
def test_every_normalization_is_folded_or_has_a_reason():
    model = network()
    rules = [rq.Rule("kept", skip=True)]
    policy = rq.QuantizationPolicy("A4W4", fold_batch_norm=True, rules=rules)
    report = model.quantize(policy, verbose=False)
    reasons = {path.split("/")[-1]: reason for path, reason in report.kept_float.items()}
    assert {n: reasons[n] for n in REASONS} == {n: f"not folded: {r}" for n, r in REASONS.items()}
    assert {path.split("/")[-1] for path in report.folded} == {"inside", "last"}
    assert [_folds(model.get_layer(name)) for name in ("good", "kept", "shared")] == [1, 0, 0]
    assert "last into " in str(rq.report(model)) and "last into " in report.summary()


def _folds(layer: layers.Layer) -> bool:
    return getattr(getattr(layer, "quantization", None), "fold_batch_norm", False)


@pytest.mark.once("torch")
def test_a_layer_without_its_normalization_is_refused():
    model = dense(4)
    layer = type(model.layers[0]).from_config(model.layers[0].get_config())
    with pytest.raises(ValueError, match="fold_batch_norm=True\\), and there is none"):
        keras.Sequential([keras.Input((9,)), layer])(np.ones((1, 9), "float32"))
