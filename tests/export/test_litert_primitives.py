"""The integer products of a TFLite file equal integer arithmetic, bit for bit."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

tf = pytest.importorskip("tensorflow")
pytest.importorskip("ai_edge_litert")

from keras_rq.export import _flatbuffer, interpreter  # noqa: E402
from keras_rq.export._litert_checks import storage_bits  # noqa: E402
from keras_rq.export._litert_convert import convert  # noqa: E402
from keras_rq.export._litert_graph import IntegerGraph  # noqa: E402

pytestmark = pytest.mark.once

RANGE = {8: (-128, 127), 4: (-8, 7), 2: (-2, 1), 1: (-1, 1)}


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def integers(rng: np.random.Generator, shape: tuple[int, ...], bits: int) -> np.ndarray:
    """Random codes of which the first two are the extremes."""
    low, high = RANGE[bits]
    codes = rng.choice([-1, 1], shape) if bits == 1 else rng.integers(low, high + 1, shape)
    codes.reshape(-1)[:2] = low, high
    return codes.astype(np.int8)


def activations(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return integers(rng, shape, 8).astype(np.float32)


def scales(rng: np.random.Generator, count: int) -> np.ndarray:
    return rng.uniform(1e-3, 1e-1, count).astype(np.float32)


def build(
    shape: tuple[int, ...], function: Callable[[IntegerGraph, Any], Any], optimize: str = "size"
) -> tuple[IntegerGraph, bytes]:
    graph = IntegerGraph(optimize)
    signature = [tf.TensorSpec(shape, tf.float32, name="x")]
    traced = tf.function(lambda x: function(graph, x), input_signature=signature)
    return graph, convert(graph, traced.get_concrete_function())


def scaled(accumulator: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """`accumulator` must come from int64 arithmetic: this is where it becomes float32."""
    assert accumulator.dtype == np.int64
    return accumulator.astype(np.float32) * scale


def convolution(
    x: np.ndarray, w: np.ndarray, strides: tuple[int, int], dilation: tuple[int, int]
) -> np.ndarray:
    """Sums every kernel position's int64 outer product: (batch, h, w, channels, outputs)."""
    x, w = x.astype(np.int64), w.astype(np.int64)
    height, width = (
        (x.shape[a + 1] - dilation[a] * (w.shape[a] - 1) - 1) // strides[a] + 1 for a in (0, 1)
    )
    total = np.zeros((x.shape[0], height, width, *w.shape[2:]), np.int64)
    for i in range(w.shape[0]):
        for j in range(w.shape[1]):
            seen = x[:, i * dilation[0] :: strides[0], j * dilation[1] :: strides[1]]
            total += seen[:, :height, :width, :, None] * w[i, j]
    return total


def assert_bit_equal(buffer: bytes, x: np.ndarray, expected: np.ndarray) -> None:
    (result,) = interpreter.run(buffer, [x])
    np.testing.assert_array_equal(result, expected)


def assert_integer_kernels(buffer: bytes, *storage: str) -> None:
    kernels = interpreter.integer_kernels(buffer)
    assert [kernel.storage for kernel in kernels] == list(storage)
    assert all(kernel.delegated for kernel in kernels)
    assert interpreter.op_names(buffer) == ["DELEGATE"]


# Matrix products.


@pytest.mark.parametrize("bits", [8, 4, 2, 1])
@pytest.mark.parametrize(
    ("shape", "outputs"),
    [
        ((1, 6), 1),
        ((4, 33), 17),
        ((128, 40), 32),
        ((1, 511), 10),
        ((2, 3, 7), 9),
        ((2, 2, 2, 5), 3),
    ],
)
def test_matmul_is_exact(rng, bits, shape, outputs):
    weight, scale = integers(rng, (shape[-1], outputs), bits), scales(rng, outputs)
    x = activations(rng, shape)
    _, buffer = build(shape, lambda g, x: g.matmul(x, weight, scale, bits, "m"))
    expected = scaled(x.astype(np.int64) @ weight.astype(np.int64), scale)
    assert_bit_equal(buffer, x, expected)
    assert_integer_kernels(buffer, f"INT{max(bits, 2)}")


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_matmul_rounds_once_above_2_to_the_24(rng, bits):
    depth = {8: 4000, 4: 20000, 2: 80000}[bits]
    weight = np.full((depth, 2), RANGE[bits][0], np.int8)
    weight[:, 1] = integers(rng, (depth,), bits)
    x = np.full((1, depth), -127.0, np.float32)
    x[0, :100] = rng.integers(-128, 128, 100)
    accumulator = x.astype(np.int64) @ weight.astype(np.int64)
    assert accumulator.max() > 2**24
    scale = scales(rng, 2)
    _, buffer = build(x.shape, lambda g, x: g.matmul(x, weight, scale, bits, "m"))
    assert_bit_equal(buffer, x, scaled(accumulator, scale))


@pytest.mark.parametrize("codes", [-128.0, 127.0, 0.0, 3.0])
def test_rows_without_any_range_of_their_own_are_exact(rng, codes):
    weight, scale = integers(rng, (16, 8), 4), scales(rng, 8)
    x = np.full((4, 16), codes, np.float32)
    _, buffer = build((4, 16), lambda g, x: g.matmul(x, weight, scale, 4, "m"))
    assert_bit_equal(buffer, x, scaled(x.astype(np.int64) @ weight.astype(np.int64), scale))


def test_what_surrounds_a_product_is_not_folded_into_its_weight(rng):
    weight, scale = integers(rng, (40, 24), 4), scales(rng, 24)
    gain, bias = scales(rng, 24), rng.standard_normal(24).astype(np.float32)
    x = activations(rng, (4, 40))
    _, buffer = build(
        (4, 40), lambda g, x: tf.nn.relu(g.matmul(x, weight, scale, 4, "m") * gain + bias)
    )
    product = scaled(x.astype(np.int64) @ weight.astype(np.int64), scale)
    assert_bit_equal(buffer, x, np.maximum(product * gain + bias, 0))
    assert_integer_kernels(buffer, "INT4")


def test_a_dead_channel_is_zero(rng):
    weight, scale = integers(rng, (16, 8), 4), scales(rng, 8)
    scale[3] = 0
    x = activations(rng, (4, 16))
    _, buffer = build((4, 16), lambda g, x: g.matmul(x, weight, scale, 4, "m"))
    assert_bit_equal(buffer, x, scaled(x.astype(np.int64) @ weight.astype(np.int64), scale))


# Which built-in kernels are exact without XNNPACK, as the module's table says.


@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("full", [True, False])
def test_builtin_kernels_do_what_the_table_says(rng, bits, full):
    weight = integers(rng, (300, 16), bits)
    weight = weight if full else np.maximum(weight, -RANGE[bits][1])
    scale, x = scales(rng, 16), activations(rng, (4, 300))
    _, buffer = build((4, 300), lambda g, x: g.matmul(x, weight, scale, bits, "m"))
    expected = scaled(x.astype(np.int64) @ weight.astype(np.int64), scale)
    (result,) = interpreter.run(buffer, [x], delegate=False)
    exact = bits == 2 or (bits == 8 and not full)
    assert np.array_equal(result, expected) == exact


# Convolutions.

CONVOLUTIONS = [
    # kernel, strides, dilation
    ((3, 3), (1, 1), (1, 1)),
    ((3, 3), (2, 2), (1, 1)),
    ((3, 3), (1, 1), (2, 2)),
    ((1, 1), (1, 1), (1, 1)),
    ((1, 1), (2, 2), (1, 1)),
    ((3, 2), (1, 2), (2, 1)),
    ((2, 2), (3, 3), (1, 1)),
    ((7, 7), (2, 2), (1, 1)),
]


@pytest.mark.parametrize(
    ("bits", "optimize"), [(8, "size"), (4, "size"), (1, "size"), (4, "latency")]
)
@pytest.mark.parametrize(("kernel", "strides", "dilation"), CONVOLUTIONS)
def test_conv2d_is_exact(rng, kernel, strides, dilation, bits, optimize):
    shape = (2, 9, 10, 3)
    weight, scale = integers(rng, (*kernel, 3, 5), bits), scales(rng, 5)
    x = activations(rng, shape)

    def product(g, x):
        return g.conv2d(x, weight, scale, bits, strides=strides, dilation=dilation, name="c")

    graph, buffer = build(shape, product, optimize)
    expected = scaled(convolution(x, weight, strides, dilation).sum(axis=3), scale)
    assert_bit_equal(buffer, x, expected)
    wide = bits == 8 or (optimize == "latency" and kernel != (1, 1))
    assert_integer_kernels(buffer, "INT8" if wide else f"INT{max(bits, 2)}")
    assert [patch.kernel for patch in graph.patches] == ["integer"]


@pytest.mark.parametrize("optimize", ["size", "latency"])
@pytest.mark.parametrize("shape", [(1, 4, 4, 1), (3, 1, 1, 1), (2, 1, 5, 1), (1, 17, 17, 40)])
def test_conv2d_is_exact_for_unusual_images(rng, shape, optimize):
    kernel = (min(2, shape[1]), min(2, shape[2]))
    weight, scale = integers(rng, (*kernel, shape[3], 4), 8), scales(rng, 4)
    x = activations(rng, shape) if np.prod(shape) > 2 * shape[0] else np.float32([[[[-128]]]] * 3)
    strides = (2, 1)
    _, buffer = build(
        shape, lambda g, x: g.conv2d(x, weight, scale, 8, strides=strides, name="c"), optimize
    )
    assert_bit_equal(buffer, x, scaled(convolution(x, weight, strides, (1, 1)).sum(axis=3), scale))


def test_samples_of_a_batch_do_not_share_their_range(rng):
    weight, scale = integers(rng, (3, 3, 4, 5), 8), scales(rng, 5)
    x = rng.integers(-2, 3, (4, 6, 6, 4)).astype(np.float32)
    x[1] = 127
    _, buffer = build(x.shape, lambda g, x: g.conv2d(x, weight, scale, 8, name="c"))
    assert_bit_equal(buffer, x, scaled(convolution(x, weight, (1, 1), (1, 1)).sum(axis=3), scale))


@pytest.mark.parametrize("bits", [8, 4, 1])
@pytest.mark.parametrize(
    ("channels", "multiplier", "strides", "dilation"),
    [
        (6, 1, (1, 1), (1, 1)),
        (6, 2, (2, 2), (1, 1)),
        (1, 4, (1, 1), (1, 1)),
        (5, 1, (1, 1), (2, 2)),
        (5, 1, (1, 2), (1, 1)),
    ],
)
def test_depthwise_is_exact_in_float(rng, channels, multiplier, strides, dilation, bits):
    shape = (2, 9, 10, channels)
    weight = integers(rng, (3, 3, channels, multiplier), bits)
    scale, x = scales(rng, channels * multiplier), activations(rng, shape)

    def product(g, x):
        return g.depthwise_conv2d(
            x, weight, scale, bits, strides=strides, dilation=dilation, name="d"
        )

    graph, buffer = build(shape, product)
    total = convolution(x, weight, strides, dilation)
    assert_bit_equal(buffer, x, scaled(total.reshape(*total.shape[:3], -1), scale))
    assert interpreter.op_names(buffer) == ["DELEGATE"]
    assert interpreter.tensor_types(buffer)["d/codes"] == "INT8"
    assert [(patch.kernel, patch.op) for patch in graph.patches] == [("float", "DEPTHWISE_CONV_2D")]


# Weights for float activations.


@pytest.mark.parametrize("optimize", ["size", "latency"])
@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("axis", [0, 1, -1])
def test_constant_is_dequantized_exactly(rng, axis, bits, optimize):
    weight = integers(rng, (12, 7), bits)
    scale = scales(rng, weight.shape[axis])
    offset = rng.standard_normal(weight.shape[axis]).astype(np.float32)
    along = (-1, 1) if axis == 0 else (1, -1)
    expected = weight * scale.reshape(along)
    for given, value in ((None, expected), (offset, expected + offset.reshape(along))):
        graph, buffer = build(
            (12, 12),
            lambda g, x, given=given: x @ g.constant(weight, scale, given, bits, axis, "k"),
            optimize,
        )
        assert_bit_equal(buffer, np.eye(12, dtype=np.float32), value)
        storage = "INT8" if optimize == "latency" else f"INT{bits}"
        assert interpreter.tensor_types(buffer)["k/codes"] == storage
        assert [patch.kernel for patch in graph.patches] == ["float"]


def test_int8_constant_of_a_convolution_stays_in_xnnpack(rng):
    weight, scale = integers(rng, (3, 3, 4, 5), 8), scales(rng, 5)
    x = rng.standard_normal((1, 8, 8, 4)).astype(np.float32)
    _, buffer = build(
        x.shape, lambda g, x: tf.nn.conv2d(x, g.constant(weight, scale, None, 8, 3, "k"), 1, "SAME")
    )
    expected = tf.nn.conv2d(x, weight * scale, 1, "SAME")
    np.testing.assert_allclose(interpreter.run(buffer, [x])[0], expected, rtol=1e-5, atol=1e-4)
    assert interpreter.op_names(buffer) == ["DELEGATE"]


# Finding weights.


def test_shared_and_identical_weights_are_stored_once(rng):
    weight, scale = integers(rng, (128, 128), 4), scales(rng, 128)
    other = scales(rng, 128)
    x = np.maximum(activations(rng, (4, 128)), -127)  # so that -x holds codes too

    def once(g, x):
        return g.matmul(x, weight, scale, 4, "a")

    def thrice(g, x):
        again = g.matmul(-x, weight, scale, 4, "a")
        return once(g, x) + again + g.matmul(x, weight, other, 4, "b")

    product = x.astype(np.int64) @ weight.astype(np.int64)
    _, buffer = build((4, 128), thrice)
    expected = scaled(product, scale) + scaled(-product, scale) + scaled(product, other)
    assert_bit_equal(buffer, x, expected)
    assert_integer_kernels(buffer, "INT4", "INT4", "INT4")
    _, single = build((4, 128), once)
    assert len(buffer) - len(single) < weight.size // 2


def test_products_inside_nested_functions_and_name_scopes(rng):
    weight, scale = integers(rng, (8, 8), 2), scales(rng, 8)
    x = rng.integers(-9, 9, (4, 8)).astype(np.float32)

    def both(g, x):
        @tf.function
        def inner(value):
            with tf.name_scope("some/scope"):
                return g.matmul(value, weight, scale, 2, "m")

        return inner(x) * 2.0 + inner(x + 1.0)

    _, buffer = build((4, 8), both)
    first, second = (
        scaled(v.astype(np.int64) @ weight.astype(np.int64), scale) for v in (x, x + 1)
    )
    assert_bit_equal(buffer, x, first * np.float32(2) + second)
    assert_integer_kernels(buffer, "INT2", "INT2")


def test_signature_names_inputs_and_outputs(rng):
    weight, scale = integers(rng, (8, 3), 4), scales(rng, 3)
    graph = IntegerGraph()

    @tf.function(
        input_signature=[
            tf.TensorSpec((2, 8), tf.float32, name="codes"),
            tf.TensorSpec((5,), tf.float32, name="unused"),
        ]
    )
    def serve(codes, unused):
        return {"z": graph.matmul(codes, weight, scale, 4, "m"), "a": codes + 1.0}

    buffer = convert(graph, serve.get_concrete_function())
    x = activations(rng, (2, 8))
    inputs = {"codes": x, "unused": np.zeros(5, np.float32)}
    outputs = interpreter.load(buffer).get_signature_runner()(**inputs)
    np.testing.assert_array_equal(outputs["a"], x + 1)
    np.testing.assert_allclose(outputs["z"], serve(**inputs)["z"], rtol=1e-5, atol=1e-4)
    assert len(interpreter.run(buffer, inputs)) == 2
    with pytest.raises(ValueError, match=r"names \['x'\]; the file's inputs are"):
        interpreter.run(buffer, {"x": x})


def test_file_size_follows_the_storage(rng):
    depth, sizes = 512, {}
    for bits in (8, 4, 2):
        weight, scale = integers(rng, (depth, depth), bits), scales(rng, depth)
        _, buffer = build(
            (1, depth), lambda g, x, w=weight, s=scale, b=bits: g.matmul(x, w, s, b, "m")
        )
        sizes[bits] = len(buffer)
        # Weights with the pins, a scale and a zero point per channel, and what a graph takes.
        assert sizes[bits] < (depth + 8) * depth * bits // 8 + 12 * depth + 2000
    assert sizes[8] > sizes[4] > sizes[2]


def test_constants_are_aligned_as_the_schema_demands(rng):
    schema = pytest.importorskip("ai_edge_litert.schema_py_generated")
    weight, scale = integers(rng, (13, 5), 8), scales(rng, 5)
    _, buffer = build((1, 13), lambda g, x: g.matmul(x, weight, scale, 8, "m") * scale)
    model = schema.Model.GetRootAs(buffer, 0)
    buffers = [model.Buffers(i) for i in range(model.BuffersLength())]
    starts = [b._tab.Vector(b._tab.Offset(4)) for b in buffers if b.DataLength()]
    assert starts
    assert all(start % 16 == 0 for start in starts)


# Storage.


@pytest.mark.parametrize(
    ("codes", "bits", "width"),
    [
        ([-1, 1], 1, 2),
        ([0, 1], 1, 2),
        ([-1, 0, 1], 1.5, 2),
        ([-2, 1], 2, 2),
        ([-1, 2], 2, 4),
        ([-2, 1], 3, 4),
        ([-8, 7], 4, 4),
        ([0, 15], 4, 8),
        ([-1, 1], 8, 8),
        ([-128, 127], 8, 8),
    ],
)
def test_storage_follows_bits_and_codes(codes, bits, width):
    assert storage_bits(np.array(codes), bits) == width


@pytest.mark.parametrize(("codes", "bits"), [([-129, 0], 8), ([0, 128], 8), ([0, 1], 9)])
def test_storage_rejects_what_int8_cannot_hold(codes, bits):
    with pytest.raises(ValueError, match="Received: codes from"):
        storage_bits(np.array(codes), bits)


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_pack_bits_puts_the_first_code_lowest(bits):
    codes = np.array([1, -2, 0, 1, -1])
    packed = _flatbuffer.pack_bits(codes, bits)
    assert packed.size == -(-codes.size * bits // 8)
    stream = int.from_bytes(packed.tobytes(), "little")
    fields = [(stream >> (bits * i)) & (2**bits - 1) for i in range(codes.size)]
    assert [f - 2**bits if f >= 2 ** (bits - 1) else f for f in fields] == codes.tolist()


# What cannot work says so.


def emit(method: str, shape: tuple[int | None, ...], weight: np.ndarray, scale: Any, **options):
    function = tf.function(
        lambda x: getattr(IntegerGraph(), method)(x, weight, scale, 8, name="layer", **options),
        input_signature=[tf.TensorSpec(shape, options.pop("dtype", tf.float32))],
    )
    return function.get_concrete_function()


ONES = np.ones((4, 2), np.int8)
KERNEL = np.ones((3, 3, 4, 2), np.int8)


@pytest.mark.parametrize(
    ("method", "shape", "weight", "scale", "options", "message"),
    [
        ("matmul", (None, 4), ONES, 1.0, {}, "static shape, batch included"),
        ("matmul", (1, 5), ONES, 1.0, {}, "last axis of `codes`"),
        ("matmul", (1, 4), ONES.astype(float), 1.0, {}, "array of integers with 2 axes"),
        ("matmul", (1, 4), ONES, [1.0] * 3, {}, "one for each of 2 channels"),
        ("matmul", (1, 4), ONES, -1.0, {}, "Negate the codes"),
        ("matmul", (1, 4), ONES, np.nan, {}, "finite and positive"),
        ("matmul", (1, 4), ONES, 1.0, {"dtype": tf.int8}, "must be float32"),
        ("matmul", (1, 4), np.full((4, 2), 1000), 1.0, {}, "-128..127"),
        ("matmul", (1, 2**18), np.full((2**18, 1), 127), 1.0, {}, "Split the product"),
        ("conv2d", (1, 2, 8, 4), KERNEL, 1.0, {}, "padding is always VALID"),
        ("conv2d", (1, 8, 8, 3), KERNEL, 1.0, {}, "height, width, 4"),
        ("conv2d", (1, 8, 8, 4), KERNEL, 1.0, {"strides": 0}, "`strides` of 'layer'"),
        ("depthwise_conv2d", (1, 8, 8, 4), KERNEL, [1.0] * 4, {}, "one for each of 8 channels"),
        ("depthwise_conv2d", (1, 64, 64, 1), np.full((33, 33, 1, 1), 127), 1.0, {}, "16777216"),
    ],
)
def test_errors_name_the_layer_and_what_was_received(
    method, shape, weight, scale, options, message
):
    with pytest.raises(ValueError, match=message):
        emit(method, shape, weight, scale, **options)


def test_unknown_optimize_is_an_error():
    with pytest.raises(ValueError, match="Received: optimize='speed'"):
        IntegerGraph("speed")


def test_an_unused_product_is_an_error(rng):
    def unused(g, x):
        g.matmul(x, ONES, 1.0, 8, "forgotten")
        return x + 1.0

    with pytest.raises(ValueError, match=r"The weights of \['forgotten'\] are not in the traced"):
        build((1, 4), unused)


def test_a_product_inside_a_loop_is_an_error(rng):
    square = np.ones((4, 4), np.int8)

    def loop(g, x):
        return tf.while_loop(
            lambda i, v: i < 3, lambda i, v: (i + 1, g.matmul(v, square, 1.0, 8, "m")), [0, x]
        )[1]

    with pytest.raises(ValueError, match="outside of loops"):
        build((1, 4), loop)


def test_a_weight_that_feeds_another_operator_is_an_error():
    graph = IntegerGraph()
    signature = [tf.TensorSpec((1, 4), tf.float32)]
    traced = tf.function(lambda x: graph.matmul(x, ONES, 1.0, 8, "m"), input_signature=signature)
    function = traced.get_concrete_function()
    graph.patches[0] = dataclasses.replace(graph.patches[0], op="CONV_2D")
    with pytest.raises(ValueError, match=r"exactly one CONV_2D.*Received: \['FULLY_CONNECTED'\]"):
        convert(graph, function)


@pytest.mark.parametrize(
    ("module", "extra"), [("ai_edge_litert.interpreter", "litert"), ("tensorflow", "tensorflow")]
)
def test_a_missing_package_names_its_extra(monkeypatch, module, extra):
    monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf"keras-rq\[{extra}\]"):
        interpreter.require(module)


def test_timing_compares_buffers(rng):
    weight, scale = integers(rng, (64, 64), 4), scales(rng, 64)
    _, buffer = build((1, 64), lambda g, x: g.matmul(x, weight, scale, 4, "m"))
    x = activations(rng, (1, 64))
    times = interpreter.time_buffers({"a": buffer, "b": buffer}, [x], repeats=3)
    assert set(times) == {"a", "b"}
    assert all(value > 0 for value in times.values())


def test_an_operator_outside_the_delegate_is_reported(rng):
    weight, scale = integers(rng, (3, 3, 4, 5), 4), scales(rng, 5)
    x = activations(rng, (1, 8, 8, 4))
    graph = IntegerGraph("latency")
    traced = tf.function(
        lambda x: graph.conv2d(x, weight, scale, 4, name="c"),
        input_signature=[tf.TensorSpec(x.shape, tf.float32)],
    ).get_concrete_function()
    graph.patches[0] = dataclasses.replace(graph.patches[0], bits=4)
    (kernel,) = interpreter.integer_kernels(convert(graph, traced))
    assert (kernel.op, kernel.storage, kernel.delegated) == ("CONV_2D", "INT4", False)
