"""Weights in a TFLite file: where they lie, how they are packed, and what is refused."""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

import numpy as np
import pytest

tf = pytest.importorskip("tensorflow")
pytest.importorskip("ai_edge_litert")

from litert_cases import (  # noqa: E402
    activations,
    assert_bit_equal,
    assert_integer_kernels,
    build,
    integers,
    scaled,
    scales,
)

from keras_rq.export import _flatbuffer, interpreter  # noqa: E402
from keras_rq.export._litert_checks import storage_bits  # noqa: E402
from keras_rq.export._litert_convert import convert  # noqa: E402
from keras_rq.export._litert_graph import IntegerGraph  # noqa: E402

pytestmark = pytest.mark.once


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


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
