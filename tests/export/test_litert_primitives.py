"""The integer products of a TFLite file equal integer arithmetic, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest

tf = pytest.importorskip("tensorflow")
pytest.importorskip("ai_edge_litert")

from litert_cases import (  # noqa: E402
    RANGE,
    activations,
    assert_bit_equal,
    assert_integer_kernels,
    build,
    integers,
    scaled,
    scales,
)

from keras_rq.export import interpreter  # noqa: E402

pytestmark = pytest.mark.once


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


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
