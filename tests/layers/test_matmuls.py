"""Products of two activations against NumPy: attention, and drop-ins for matmul and einsum."""

from __future__ import annotations

import math
from typing import Any

import keras
import numpy as np
import pytest
from gradients import compiled, relative_error, symbolic, to_numpy, value_and_gradient
from keras import layers, ops
from layer_cases import Operand, quantized

import keras_rq as rq
from keras_rq.quantizers import Ridge, StraightThrough

ROUNDING = 1e-5
M4 = rq.QuantizationPolicy(matmuls=4)


def draw(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


X, Y = draw(0, 2, 5, 8), draw(1, 2, 7, 8)


def run(layer: Any, *inputs: np.ndarray, **arguments: Any) -> list[np.ndarray]:
    function = compiled(lambda *x: keras.tree.flatten(layer(*x, **arguments)))
    return [to_numpy(y) for y in function(*map(ops.convert_to_tensor, inputs))]


def quantize(layer: Any, policy: Any = M4) -> Any:
    rq.quantize(layer, policy, verbose=False)
    return layer


# Attention against NumPy.


def _operand(x: np.ndarray, quantizer: Any, axis: int, can_block: bool) -> np.ndarray:
    if not can_block and quantizer.rotation is not None:
        quantizer = quantizer.replace(rotation=None)
    result = quantized(x, quantizer, Operand((axis,), can_block=can_block))
    assert result.tie_distance.min() > 2e-6, "draw again"
    return result.y


def attention(
    layer: Any, quantizer: Any, query: np.ndarray, value: np.ndarray, mask: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """Output and scores: float projections, quantized products."""

    def project(x: np.ndarray, dense: Any, axes: int) -> np.ndarray:
        kernel, bias = (w.astype(float) for w in dense.get_weights())
        return np.tensordot(x, kernel, axes) + bias

    repeats = getattr(layer, "num_repeats", 1)
    q = project(query, layer._query_dense, 1)
    k = project(value, layer._key_dense, 1).repeat(repeats, axis=2)
    v = project(value, layer._value_dense, 1).repeat(repeats, axis=2)
    q = _operand(q / math.sqrt(q.shape[-1]), quantizer, 3, True)
    scores = np.einsum("bqhd,bkhd->bhqk", q, _operand(k, quantizer, 3, True))
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    if mask is not None:
        weights = weights * mask
    weights = weights / weights.sum(-1, keepdims=True)
    kept = np.where(weights == 0, 0, _operand(weights, quantizer, 3, False))
    context = np.einsum("bhqk,bkhd->bqhd", kept, _operand(v, quantizer, 1, False))
    return project(context, layer._output_dense, 2), weights


CAUSAL = np.tril(np.ones((5, 5), bool))
PADDED = np.array([[True] * 5 + [False] * 2, [True] * 7])[:, None, None]
ATTENTION = {
    "MultiHeadAttention": lambda **k: layers.MultiHeadAttention(
        2, 4, bias_initializer="normal", **k
    ),
    "GroupQueryAttention": lambda **k: layers.GroupQueryAttention(
        4, 4, 2, bias_initializer="normal", **k
    ),
}
QUANTIZERS = {
    "4 bits": Ridge(4),
    "1 bit": Ridge(1),
    "blocks": StraightThrough(8, block_size=2),
    "tensor": Ridge(4, block_size="tensor"),
    "rotated": Ridge(4, rotation="hadamard"),
}


@pytest.mark.forward
@pytest.mark.parametrize(
    ("kind", "quantizer", "masked"),
    [
        ("MultiHeadAttention", "4 bits", 0),
        ("MultiHeadAttention", "1 bit", 1),
        ("MultiHeadAttention", "blocks", 2),
        ("MultiHeadAttention", "tensor", 0),
        ("MultiHeadAttention", "rotated", 1),
        ("GroupQueryAttention", "4 bits", 0),
        ("GroupQueryAttention", "4 bits", 1),
        ("GroupQueryAttention", "1 bit", 2),
    ],
)
def test_attention(kind: str, quantizer: str, masked: int):
    for seed in range(20):
        try:
            return _check_attention(ATTENTION[kind], QUANTIZERS[quantizer], masked, seed)
        except AssertionError as error:
            if "draw again" not in str(error):
                raise
    raise AssertionError("no draw without a rounding tie")


def _check_attention(make: Any, quantizer: Any, masked: int, seed: int) -> None:
    keras.utils.set_random_seed(seed)
    layer, x, y = make(), draw(seed, 2, 5, 8), draw(100 + seed, 2, 7, 8)
    mask, arguments = None, {}
    if masked == 1:
        y, mask, arguments = x, CAUSAL, {"use_causal_mask": True}
    elif masked == 2:
        mask, arguments = PADDED, {"attention_mask": np.repeat(PADDED[:, 0], 5, axis=1)}
    layer(*map(symbolic, (x, y)))
    quantize(layer, rq.QuantizationPolicy(matmuls=quantizer))
    expected, weights = attention(layer, quantizer, x.astype(float), y.astype(float), mask)
    (received,) = run(layer, x, y, **arguments)
    assert relative_error(received, expected) < ROUNDING
    received, scores = run(layer, x, y, return_attention_scores=True, **arguments)
    assert relative_error(received, expected) < ROUNDING
    assert relative_error(scores, weights) < ROUNDING


@pytest.mark.forward
@pytest.mark.parametrize("kind", ATTENTION)
def test_one_query_at_a_time(kind: str):
    """As in decoding with cached keys and values: those of one query are the same alone."""
    layer = ATTENTION[kind]()
    layer(*map(symbolic, (X, Y)))
    quantize(layer)
    (whole,) = run(layer, X, Y)
    (last,) = run(layer, X[:, -1:], Y)
    assert relative_error(last, whole[:, -1:]) < ROUNDING


@pytest.mark.forward
@pytest.mark.parametrize("kind", ATTENTION)
def test_at_eight_bits_it_is_close_to_float(kind: str):
    layer = ATTENTION[kind]()
    layer(*map(symbolic, (X, Y)))
    expected = run(layer, X, Y)[0]
    quantize(layer, rq.QuantizationPolicy(matmuls=8))
    assert 0 < relative_error(run(layer, X, Y)[0], expected) < 0.03


def test_dropout_drops_in_training():
    layer = layers.MultiHeadAttention(2, 4, dropout=0.5, seed=1)
    layer(*map(symbolic, (X, Y)))
    quantize(layer, rq.QuantizationPolicy(matmuls=8))
    same = layers.MultiHeadAttention(2, 4, dropout=0.5, seed=1)
    same(*map(symbolic, (X, Y)))
    same.set_weights(layer.get_weights())
    dropped, expected = (to_numpy(one(X, Y, training=True)) for one in (layer, same))
    assert relative_error(dropped, expected) < 0.05
    assert relative_error(dropped, to_numpy(layer(X, Y))) > 0.1


def test_image_attention_over_two_axes():
    layer, images = layers.MultiHeadAttention(2, 4, attention_axes=(1, 2)), draw(0, 2, 3, 4, 8)
    layer(*map(symbolic, (images, images)))
    expected = run(layer, images, images)[0]
    quantize(layer, rq.QuantizationPolicy(matmuls=8))
    assert 0 < relative_error(run(layer, images, images)[0], expected) < 0.03


# Subclasses of attention.


class Cached(layers.MultiHeadAttention):
    """A subclass with a call of its own around the attention of its parent; as in KerasHub."""

    def call(self, query: Any, value: Any, key: Any = None, training: bool | None = None) -> Any:
        q, k, v = self._query_dense(query), self._key_dense(value), self._value_dense(value)
        output, _ = self._compute_attention(query=q, key=k, value=v, training=training)
        return self._output_dense(output)


class Different(layers.MultiHeadAttention):
    """A subclass that computes attention otherwise."""

    def _compute_attention(self, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> Any:
        return value, None


rq.register_layer(Cached, like=layers.MultiHeadAttention)
rq.register_layer(Different, like=layers.MultiHeadAttention)


@pytest.mark.once
def test_registered_subclasses_of_attention():
    layer, same = Cached(2, 4), layers.MultiHeadAttention(2, 4)
    for one in (layer, same):
        one(X, Y)
        quantize(one)
    same.set_weights(layer.get_weights())
    np.testing.assert_array_equal(run(layer, X, Y)[0], run(same, X, Y)[0])
    other = Different(2, 4, name="other")
    other(X, X)
    quantize(other)
    with pytest.raises(ValueError, match=r"'other' \(Different\) computes the attention scores"):
        other(X, X)


# The drop-ins.


PAIRS = {
    "matmul": (lambda **k: rq.layers.Matmul(**k), X, draw(2, 2, 8, 3), -1, 1),
    "broadcast": (lambda **k: rq.layers.Matmul(**k), X, draw(2, 8, 3), -1, 0),
    "einsum": (
        lambda **k: rq.layers.Einsum("btnh,bsnh->bnts", **k),
        draw(0, 2, 5, 3, 4),
        draw(1, 2, 6, 3, 4),
        -1,
        -1,
    ),
}
pairs = pytest.mark.parametrize("pair", PAIRS)


def product(pair: str, a: Any, b: Any) -> Any:
    if pair == "einsum":
        return ops.einsum("btnh,bsnh->bnts", a, b)
    return ops.matmul(a, b)


@pytest.mark.forward
@pairs
def test_drop_ins_are_the_operation_until_they_are_quantized(pair: str):
    make, a, b, axis_a, axis_b = PAIRS[pair]
    layer = make()
    (received,) = run(layer, a, b)
    assert relative_error(received, to_numpy(product(pair, a, b))) < 1e-6
    assert not layer.variables
    quantize(layer, rq.QuantizationPolicy(matmuls=Ridge(4, block_size=2, rotation="hadamard")))
    row = Ridge(4, block_size="channel")
    a, b = (
        quantized(x, row, Operand((axis % x.ndim,))).y for x, axis in ((a, axis_a), (b, axis_b))
    )
    expected = np.einsum("btnh,bsnh->bnts", a, b) if pair == "einsum" else a @ b
    assert relative_error(run(layer, *PAIRS[pair][1:3])[0], expected) < ROUNDING


@pairs
def test_gradients_reach_both_operands(pair: str):
    make, a, b, axis_a, axis_b = PAIRS[pair]
    layer, quantizer = make(), Ridge(4, block_size="channel")
    layer(*map(symbolic, (a, b)))
    quantize(layer)
    upstream = draw(3, *product(pair, a, b).shape)

    def by_hand(a: Any, b: Any) -> Any:
        return product(
            pair,
            rq.ops.fake_quantize(a, quantizer, axis=axis_a),
            rq.ops.fake_quantize(b, quantizer, axis=axis_b),
        )

    tensors = ops.convert_to_tensor(a), ops.convert_to_tensor(b)
    for place, x in enumerate((a, b)):

        def of(function: Any, place: int = place) -> Any:
            return lambda t: function(*((t, tensors[1]) if place == 0 else (tensors[0], t)))

        received = value_and_gradient(of(layer), x, upstream)[1]
        expected = value_and_gradient(of(by_hand), x, upstream)[1]
        assert relative_error(received, expected) < ROUNDING
        assert np.abs(expected).max() > 1e-3


@pytest.mark.forward
def test_zeros_are_kept_where_that_is_asked_for():
    a = np.abs(X)
    a[:, :, ::2] = 0
    b = draw(2, 2, 8, 3)
    unseen = b.copy()
    unseen[:, ::2] *= -1
    for keep in (True, False):
        layer = rq.layers.Matmul(keep_zeros=keep)
        layer(a, b)
        quantize(layer, rq.QuantizationPolicy(matmuls=Ridge(2, range="absmax", affine=False)))
        first, second = run(layer, a, b)[0], run(layer, a, unseen)[0]
        assert np.array_equal(first, second) == keep


@pytest.mark.once
@pytest.mark.parametrize("equation", ["ab,bc", "ab,bc,cd->ad", "...b,bc->...c", "ab,cd->abcd", 3])
def test_equations_are_checked(equation: Any):
    with pytest.raises(ValueError, match="must name two operands") as error:
        rq.layers.Einsum(equation)
    assert repr(equation) in str(error.value)
