"""A quantized layer is the float layer on operands that were quantized by hand."""

from __future__ import annotations

import math
from typing import Any

import keras
import numpy as np
import pytest
import reference
from gradients import (
    BACKEND,
    compiled,
    relative_error,
    symbolic,
    to_numpy,
    value_and_gradient,
)
from keras import layers
from keras.src.layers.rnn.conv_lstm import ConvLSTMCell
from layer_cases import (
    GEOMETRIES,
    KINDS,
    SCHEMES,
    LayerCase,
    Operand,
    Scheme,
    away_from_ties,
    quantized,
    spec_of,
)

import keras_rq as rq
from keras_rq.layers import quantized_class, supported_layers
from keras_rq.policy import LayerQuantization

# Sums of a few hundred float32 products, relative to the largest output.
ROUNDING = 2e-6

FLOAT = Scheme("float", None, None)
ATTENTION = {layers.MultiHeadAttention, layers.GroupQueryAttention}
RECURRENT = {layers.SimpleRNNCell, layers.LSTMCell, layers.GRUCell, ConvLSTMCell}


def run(layer: Any, x: np.ndarray) -> np.ndarray:
    return to_numpy(compiled(layer)(keras.ops.convert_to_tensor(x.astype(np.float32))))


def run_if_keras_can(layer: Any, x: np.ndarray) -> np.ndarray:
    """TensorFlow has no channels-first kernels for some convolutions on a CPU."""
    if BACKEND != "tensorflow" or getattr(layer, "data_format", "") != "channels_first":
        return run(layer, x)
    import tensorflow as tf

    try:
        return run(layer, x)
    except (tf.errors.UnimplementedError, tf.errors.InvalidArgumentError) as error:
        pytest.skip(f"the float layer does not run here either: {str(error)[:200]}")


def quantized_layer(case: LayerCase, scheme: Scheme) -> Any:
    """A layer of the quantized class whose kernels lie away from rounding ties."""
    cls = quantized_class(case.keras_class)
    layer = cls(
        **{"bias_initializer": "normal", **case.arguments}, quantization=scheme.quantization
    )
    layer.build((None, *case.shape))
    for name, operand in case.kernels.items():
        variable = getattr(layer, name)
        values = away_from_ties(
            lambda r, v=variable: r.normal(0.1, 0.5, v.shape), scheme.weights, operand
        )
        variable.assign(values)
    return layer


def draw_input(case: LayerCase, scheme: Scheme) -> np.ndarray:
    """Of the layer; padded, it lies away from rounding ties."""
    drawn = []

    def draw(generator: np.random.Generator) -> np.ndarray:
        drawn.append(generator.normal(0.3, 1.0, (2, *case.shape)).astype(np.float32))
        return case.pad(drawn[-1])

    away_from_ties(draw, scheme.activations, case.input)
    return drawn[-1]


def by_hand(case: LayerCase, scheme: Scheme, layer: Any, x: np.ndarray) -> np.ndarray:
    """The float layer on a padded and quantized input and quantized kernels."""
    padding = {"padding": "valid"} if case.pads else {}
    float_layer = case.make(**padding)
    if layer.bias is not None:
        float_layer.bias.assign(layer.bias)
    kernels = {
        name: quantized(to_numpy(getattr(layer, name).value), scheme.weights, operand).y
        for name, operand in case.kernels.items()
    }
    x = quantized(case.pad(x), scheme.activations, case.input).y
    if len(kernels) == 2:
        x = _depthwise_half(float_layer, kernels.pop("depthwise_kernel"), x)
        between = quantized(x, scheme.activations, case.input)
        assert between.tie_distance.min() > 1e-5
        x = between.y
        float_layer = _pointwise_half(float_layer)
        kernels = {"kernel": kernels["pointwise_kernel"]}
    for name, kernel in kernels.items():
        getattr(float_layer, name).assign(kernel.astype(np.float32))
    return run_if_keras_can(float_layer, x)


def _depthwise_half(layer: Any, kernel: np.ndarray, x: np.ndarray) -> np.ndarray:
    cls = {1: layers.DepthwiseConv1D, 2: layers.DepthwiseConv2D}[layer.rank]
    half = cls(
        layer.kernel_size,
        strides=layer.strides,
        dilation_rate=layer.dilation_rate,
        depth_multiplier=layer.depth_multiplier,
        use_bias=False,
    )
    half.build(x.shape)
    half.kernel.assign(kernel.astype(np.float32))
    return run(half, x)


def _pointwise_half(layer: Any) -> Any:
    cls = {1: layers.Conv1D, 2: layers.Conv2D}[layer.rank]
    half = cls(layer.filters, 1)
    half.build((None, *(8,) * layer.rank, layer.pointwise_kernel.shape[-2]))
    half.bias.assign(layer.bias)
    return half


def assert_equals_float_layer_on_quantized_operands(case: LayerCase, scheme: Scheme) -> None:
    layer, x = quantized_layer(case, scheme), draw_input(case, scheme)
    expected = by_hand(case, scheme, layer, x)
    received = run(layer, x)
    assert received.shape == expected.shape
    assert relative_error(received, expected) < ROUNDING


named = {"ids": lambda value: value.name.replace(" ", "-")}


def test_every_supported_layer_has_a_case():
    # Here below, in test_reversible_embedding.py, test_recurrent.py and test_matmuls.py.
    elsewhere = {layers.Embedding, layers.ReversibleEmbedding, *RECURRENT, *ATTENTION}
    of_keras = {c for c in supported_layers() if c.__module__.startswith("keras.")}
    assert {case.keras_class for case in KINDS} | elsewhere == of_keras


@pytest.mark.forward
@pytest.mark.parametrize("scheme", [SCHEMES["A4W1"], SCHEMES["rotated"]], **named)
@pytest.mark.parametrize("case", KINDS, **named)
def test_every_kind(case: LayerCase, scheme: Scheme):
    assert_equals_float_layer_on_quantized_operands(case, scheme)


@pytest.mark.parametrize("case", GEOMETRIES, **named)
def test_geometries(case: LayerCase):
    assert_equals_float_layer_on_quantized_operands(case, SCHEMES["A4W1"])


SCHEMED = ["Dense", "two contraction axes", "groups", "SeparableConv2D"]
# JAX compiles each: there a scheme meets one of the layers, which take turns.
HERE = [
    (name, scheme)
    for turn, scheme in enumerate(SCHEMES.values())
    for name in (SCHEMED[turn % 4 :][:1] if BACKEND == "jax" else SCHEMED)
]


@pytest.mark.parametrize(("name", "scheme"), HERE)
def test_schemes(name: str, scheme: Scheme):
    (case,) = (c for c in (*KINDS, *GEOMETRIES) if c.name == name)
    assert_equals_float_layer_on_quantized_operands(case, scheme)


@pytest.mark.parametrize("case", [case for case in GEOMETRIES if case.pads], **named)
def test_padding_where_zero_lies_between_two_levels(case: LayerCase):
    assert_equals_float_layer_on_quantized_operands(case, SCHEMES["QuEST"])


@pytest.mark.parametrize("case", [*KINDS, *GEOMETRIES], **named)
def test_without_quantizers_it_is_the_keras_layer(case: LayerCase):
    layer, x = quantized_layer(case, FLOAT), draw_input(case, FLOAT)
    float_layer = case.make()
    float_layer.set_weights(layer.get_weights())
    expected = run_if_keras_can(float_layer, x)
    received = run(layer, x)
    if case.pads or len(case.kernels) == 2:
        # Padding first, and two convolutions for a fused one: other kernels, other sums.
        assert received.shape == expected.shape
        assert relative_error(received, expected) < ROUNDING
    else:
        np.testing.assert_array_equal(received, expected)


# Gradients.


@pytest.mark.parametrize("case", [c for c in KINDS if len(c.kernels) == 1], **named)
def test_gradients_are_those_of_the_quantizers(case: LayerCase):
    """The closed form, fed with the float layer's gradient at the quantized operands."""
    scheme = SCHEMES["A4W1"]
    layer, x = quantized_layer(case, scheme), draw_input(case, scheme)
    kernel, bias = layer.get_weights()
    x_hat = quantized(x, scheme.activations, case.input)
    kernel_hat = quantized(kernel, scheme.weights, case.kernels["kernel"])
    upstream = np.random.default_rng(1).normal(size=run(layer, x).shape).astype(np.float32)

    def pull(layer: Any, x: np.ndarray, kernel: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        def of(x: Any, kernel: Any) -> Any:
            return layer.stateless_call([kernel, bias], [], x)[0]

        x, kernel = x.astype(np.float32), kernel.astype(np.float32)
        dx = value_and_gradient(lambda v: of(v, kernel), x, upstream)[1]
        return dx, value_and_gradient(lambda v: of(x, v), kernel, upstream)[1]

    expected = pull(case.make(), x_hat.y, kernel_hat.y)
    received = pull(layer, x, kernel)
    operands = (
        (x, scheme.activations, case.input, x_hat.codes),
        (kernel, scheme.weights, case.kernels["kernel"], kernel_hat.codes),
    )
    for got, outer, (values, quantizer, operand, codes) in zip(
        received, expected, operands, strict=True
    ):
        spec = spec_of(quantizer, operand)
        wanted = reference.gradient(values.astype(float), outer, spec, codes)
        assert relative_error(got, wanted) < 1e-5


# Lookups.


@pytest.mark.forward
@pytest.mark.parametrize(
    "quantizer",
    [
        rq.quantizers.Ridge(4, block_size=4),
        rq.quantizers.Ridge(1.5, block_size="channel"),
        rq.quantizers.Ridge(2, block_size="tensor"),
        rq.quantizers.Ridge(4, sparsity="2:4", rotation="hadamard"),
    ],
    ids=["blocks", "channel", "tensor", "sparse-rotated"],
)
def test_embedding(quantizer: Any):
    layer = rq.layers.QuantizedEmbedding(7, 10, quantization=LayerQuantization(quantizer, None))
    layer.build((None, 3))
    operand = Operand((-1,))
    table = away_from_ties(lambda r: r.normal(size=(7, 10)), quantizer, operand)
    layer.embeddings.assign(table)
    indices = np.array([[0, 3, 3], [6, 1, 0]])
    received = to_numpy(layer(keras.ops.convert_to_tensor(indices, dtype="int32")))
    assert relative_error(received, quantized(table, quantizer, operand).y[indices]) < ROUNDING


def test_unstructured_sparsity_of_an_embedding_looks_at_the_whole_table():
    quantizer = rq.quantizers.Ridge(4, sparsity=0.5)
    layer = rq.layers.QuantizedEmbedding(7, 10, quantization=LayerQuantization(quantizer, None))
    layer.build((None, 3))
    rows = to_numpy(layer(keras.ops.arange(7, dtype="int32")))
    table = np.abs(layer.get_weights()[0])
    np.testing.assert_array_equal(rows == 0, table < np.sort(table.ravel())[35])


@pytest.mark.parametrize("activations", [None, rq.quantizers.Ridge(4)])
def test_embedding_takes_indices_whatever_the_activations(activations: Any):
    quantization = LayerQuantization(None, activations)
    layer = rq.layers.QuantizedEmbedding(7, 4, quantization=quantization)
    layer.build((None, 3))
    (table,) = layer.get_weights()
    received = to_numpy(layer(np.array([[1, 2, 6]])))
    np.testing.assert_array_equal(received[0], table[[1, 2, 6]])


# Attention: its projections are quantized, the products of two activations stay in float.


def _project(x: np.ndarray, layer: Any, scheme: Scheme, axes: int) -> np.ndarray:
    """An EinsumDense without bias that contracts the last `axes` axes of `x`."""
    contracted = Operand(tuple(range(-axes, 0)))
    x = quantized(x, scheme.activations, contracted).y
    kernel = quantized(layer.get_weights()[0], scheme.weights, Operand(tuple(range(axes)))).y
    return np.tensordot(x, kernel, axes)


def _attention(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    scores = np.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(q.shape[-1])
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return np.einsum("bhqk,bkhd->bqhd", weights, v)


@pytest.mark.parametrize("scheme", [SCHEMES["A4W1"], SCHEMES["blocks"], SCHEMES["QuEST"]], **named)
@pytest.mark.parametrize(
    ("attention", "repeats"),
    [
        (lambda: layers.MultiHeadAttention(2, 4, use_bias=False), 1),
        (lambda: layers.GroupQueryAttention(4, 4, 2, use_bias=False), 2),
    ],
    ids=["MultiHeadAttention", "GroupQueryAttention"],
)
def test_attention(attention: Any, repeats: int, scheme: Scheme):
    layer = attention()
    generator = np.random.default_rng(0)
    query, value = (generator.normal(size=(2, n, 8)).astype(np.float32) for n in (3, 5))
    layer(*map(symbolic, (query, value)))
    rq.quantize(
        layer,
        rq.QuantizationPolicy(weights=scheme.weights, activations=scheme.activations),
        verbose=False,
    )

    # Private names of Keras, the same in both classes.
    q = _project(query.astype(float), layer._query_dense, scheme, 1)
    k = _project(value.astype(float), layer._key_dense, scheme, 1).repeat(repeats, axis=2)
    v = _project(value.astype(float), layer._value_dense, scheme, 1).repeat(repeats, axis=2)
    expected = _project(_attention(q, k, v), layer._output_dense, scheme, 2)
    received = to_numpy(compiled(layer)(query, value))
    assert relative_error(received, expected) < ROUNDING


def test_time_distributed():
    model = keras.Sequential([keras.Input((3, 8)), layers.TimeDistributed(layers.Dense(5))])
    scheme = SCHEMES["A4W1"]
    rq.quantize(
        model,
        rq.QuantizationPolicy(weights=scheme.weights, activations=scheme.activations),
        verbose=False,
    )
    x = np.random.default_rng(0).normal(size=(2, 3, 8)).astype(np.float32)
    kernel = quantized(model.get_weights()[0], scheme.weights, Operand((0,))).y
    expected = quantized(x, scheme.activations, Operand((-1,))).y @ kernel
    assert relative_error(to_numpy(model(x)), expected) < ROUNDING
