"""Products of two activations: attention, and the drop-ins for matmul and einsum."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from gradients import BACKEND, compiled, relative_error, to_numpy, value_and_gradient
from keras import layers, ops
from layer_cases import Operand, quantized

import keras_rq as rq
from keras_rq.policy import LayerQuantization
from keras_rq.quantizers import Ridge, StraightThrough
from keras_rq.training.surgery import quantized_layers

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
    layer(x, y)
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
    layer(X, Y)
    quantize(layer)
    (whole,) = run(layer, X, Y)
    (last,) = run(layer, X[:, -1:], Y)
    assert relative_error(last, whole[:, -1:]) < ROUNDING


@pytest.mark.forward
@pytest.mark.parametrize("kind", ATTENTION)
def test_at_eight_bits_it_is_close_to_float(kind: str):
    layer = ATTENTION[kind]()
    layer(X, Y)
    expected = run(layer, X, Y)[0]
    quantize(layer, rq.QuantizationPolicy(matmuls=8))
    assert 0 < relative_error(run(layer, X, Y)[0], expected) < 0.03


def test_dropout_drops_in_training():
    layer = layers.MultiHeadAttention(2, 4, dropout=0.5, seed=1)
    layer(X, Y)
    quantize(layer, rq.QuantizationPolicy(matmuls=8))
    same = layers.MultiHeadAttention(2, 4, dropout=0.5, seed=1)
    same(X, Y)
    same.set_weights(layer.get_weights())
    dropped, expected = (to_numpy(one(X, Y, training=True)) for one in (layer, same))
    assert relative_error(dropped, expected) < 0.05
    assert relative_error(dropped, to_numpy(layer(X, Y))) > 0.1


def test_image_attention_over_two_axes():
    layer, images = layers.MultiHeadAttention(2, 4, attention_axes=(1, 2)), draw(0, 2, 3, 4, 8)
    layer(images, images)
    expected = run(layer, images, images)[0]
    quantize(layer, rq.QuantizationPolicy(matmuls=8))
    assert 0 < relative_error(run(layer, images, images)[0], expected) < 0.03


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
    layer(a, b)
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


# Models.


@keras.saving.register_keras_serializable("matmuls")
class Attend(layers.Layer):
    """Attention as users write it, on drop-ins."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.scores = rq.layers.Einsum("btnh,bsnh->bnts", name="scores")
        self.mix = rq.layers.Einsum("bnts,bsnh->btnh", keep_zeros=True, name="mix")

    def build(self, shape: Any) -> None:
        self.qkv = layers.EinsumDense("btf,fkh->btkh", (None, 6, 4), name="qkv")
        self.qkv.build(shape)
        self.scores.build((shape[0], shape[1], 2, 4), (shape[0], shape[1], 2, 4))
        self.mix.build((shape[0], 2, shape[1], shape[1]), (shape[0], shape[1], 2, 4))

    def call(self, x: Any) -> Any:
        q, k, v = ops.split(self.qkv(x), 3, axis=2)
        weights = ops.softmax(self.scores(q, k))
        return ops.reshape(self.mix(weights, v), (-1, ops.shape(x)[1], 8))

    def compute_output_shape(self, shape: Any) -> Any:
        return (*shape[:2], 8)


def model(length: int | None = 5) -> keras.Model:
    inputs = keras.Input((length, 8))
    x = layers.MultiHeadAttention(2, 4, name="mha")(inputs, inputs, use_causal_mask=True)
    x = layers.GroupQueryAttention(4, 4, 2, name="gqa")(x, inputs)
    x = Attend(name="attend")(x)
    return keras.Model(inputs, layers.Dense(2, name="head")(x), name="net")


POLICY = rq.QuantizationPolicy("A8W4", matmuls=4)


def fit(one: keras.Model, epochs: int = 8, jit_compile: bool = BACKEND == "jax") -> list[float]:
    one.compile(keras.optimizers.Adam(1e-2), "mse", jit_compile=jit_compile)
    return one.fit(X, draw(2, 2, 5, 2), epochs=epochs, verbose=0).history["loss"]


@pytest.fixture(scope="module")
def trained() -> keras.Model:
    keras.utils.set_random_seed(0)
    one = model()
    report = one.quantize(POLICY, verbose=False)
    assert not report.kept_float
    before = [w.copy() for w in one.get_weights()]
    losses = fit(one)
    assert losses[-1] < 0.9 * losses[0]
    moved = [np.any(a != b) for a, b in zip(before, one.get_weights(), strict=True)]
    # The bias of keys shifts the scores of a query alike, and with them nothing.
    assert sum(moved) >= len(moved) - 2
    return one


def test_files(trained: keras.Model, tmp_path: Path):
    trained.save(tmp_path / "m.keras")
    loaded = keras.saving.load_model(tmp_path / "m.keras")
    saved = [layer.quantization for layer in quantized_layers(trained)]
    assert [layer.quantization for layer in quantized_layers(loaded)] == saved
    assert sum(q.matmuls is not None for q in saved) == 4
    np.testing.assert_array_equal(loaded.predict(X, verbose=0), trained.predict(X, verbose=0))
    clone = keras.models.clone_model(trained)
    clone.set_weights(trained.get_weights())
    np.testing.assert_array_equal(clone.predict(X, verbose=0), trained.predict(X, verbose=0))
    fresh = model()
    trained.save_weights(tmp_path / "q.weights.h5")
    fresh.load_weights(tmp_path / "q.weights.h5")
    for a, b in zip(fresh.get_weights(), trained.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


def test_products_alone_are_saved_too(tmp_path: Path):
    one = model()
    one.quantize(M4, verbose=False)
    one.save(tmp_path / "m.keras")
    loaded = keras.saving.load_model(tmp_path / "m.keras")
    assert len(quantized_layers(loaded)) == 4
    np.testing.assert_array_equal(loaded.predict(X, verbose=0), one.predict(X, verbose=0))


def test_unknown_lengths():
    one = model(length=None)
    one.quantize(POLICY, verbose=False)
    assert np.isfinite(fit(one, epochs=1)).all()
    longer = draw(3, 2, 9, 8)
    assert one.predict(longer, verbose=0).shape == (2, 9, 2)
    same = model()
    same.set_weights(one.get_weights())
    same.quantize(POLICY, verbose=False)
    assert relative_error(one.predict(X, verbose=0), same.predict(X, verbose=0)) < ROUNDING


def test_mixed_precision():
    previous = keras.config.dtype_policy()
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        one = model()
        one.quantize(POLICY, verbose=False)
        losses = fit(one)
    finally:
        keras.config.set_dtype_policy(previous)
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.once
def test_compiled_by_xla():
    one = model()
    one.quantize(POLICY, verbose=False)
    losses = fit(one, jit_compile=True)
    assert losses[-1] < 0.9 * losses[0]


# Policies and reports.


@pytest.mark.once
def test_reports():
    one = model()
    report = one.quantize(POLICY, verbose=False)
    rows = {row.path: row for row in report.rows if row.weight_bits is None}
    assert {path: row.activation_bits for path, row in rows.items()} == {
        "mha": 4,
        "gqa": 4,
        "attend/scores": 4,
        "attend/mix": 4,
    }
    assert rows["mha"].energy == 4 * 4 * 2 * (2 * 5 * 5 * 4)
    assert rows["gqa"].energy == 4 * 4 * 2 * (4 * 5 * 5 * 4)
    assert rows["attend/scores"].energy == rows["attend/mix"].energy == 4 * 4 * 2 * 5 * 5 * 4
    assert all(row.kernel_elements == row.nbytes == 0 for row in rows.values())
    assert "mha" in str(report) and report.summary().startswith("net: 14 of 14")
    assert rq.report(one).to_dict() == report.to_dict()


@pytest.mark.once
def test_unknown_sizes_have_no_energy():
    report = model(length=None).quantize(M4, verbose=False)
    assert {row.energy for row in report.rows if row.activation_bits == 4} == {None}


@pytest.mark.once
def test_rules_and_filters():
    rules = [rq.Rule("mha", matmuls=8), rq.Rule("gqa", skip=True), rq.Rule("scores", matmuls=None)]
    one = model()
    policy = rq.QuantizationPolicy("W4", matmuls=4, rules=rules)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = one.quantize(policy, filters=lambda layer: layer.name != "mix", verbose=False)
    assert one.get_layer("mha").quantization == LayerQuantization(None, None, matmuls=Ridge(8))
    kept = report.kept_float
    assert kept["gqa"] == "Rule('gqa') leaves its products of activations in float"
    assert kept["attend/scores"].startswith("Rule('scores') leaves its products")
    assert kept["attend/mix"] == "excluded by `filters`"
    assert one.get_layer("mha").query_dense.quantization.matmuls is None


@pytest.mark.once
def test_a_rule_alone_may_quantize_products():
    one = model()
    rules = [rq.Rule(layers.MultiHeadAttention, matmuls=8)]
    report = one.quantize(rq.QuantizationPolicy("W4", rules=rules), verbose=False)
    assert [row.path for row in report.rows if row.activation_bits == 8] == ["mha"]


@pytest.mark.once
def test_without_matmuls_attention_is_as_it_was():
    one = model()
    one.quantize(rq.QuantizationPolicy("W4"), verbose=False)
    assert not isinstance(one.get_layer("mha"), rq.layers.QuantizedLayer)


@pytest.mark.once
def test_flash_attention_is_not_used_and_that_is_said():
    inputs = keras.Input((5, 8))
    x = layers.MultiHeadAttention(2, 4, flash_attention=True, name="fused")(inputs, inputs)
    one = keras.Model(inputs, x)
    with pytest.warns(UserWarning, match=r"Flash attention.*not used in 1 layers: fused"):
        one.quantize(M4, verbose=False)
    assert np.isfinite(one.predict(X, verbose=0)).all()


class Fused(layers.Layer):
    """Attention on Keras's fused operation."""

    def call(self, x: Any) -> Any:
        heads = ops.expand_dims(x, 2)
        return ops.dot_product_attention(heads, heads, heads)[:, :, 0]


class Operators(layers.Layer):
    """A product in a helper, by the operator; and drop-ins whose names are those of operations."""

    def __init__(self) -> None:
        super().__init__(name="operators")
        self.matmul = rq.layers.Matmul(name="known")

    def call(self, x: Any) -> Any:
        return self._mixed(self.matmul(x, ops.transpose(x, (0, 2, 1))), x)

    def _mixed(self, weights: Any, x: Any) -> Any:
        return weights @ x


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
def test_products_that_are_out_of_reach_are_named():
    inputs = keras.Input((5, 8))
    x = Operators()(Fused(name="fused")(inputs))

    class Unsaid(layers.MultiHeadAttention):
        def _masked_softmax(self, *args: Any) -> Any:
            return super()._masked_softmax(*args)

    x = Unsaid(2, 4, name="unsaid")(x, x)
    x = layers.Dot((2, 2), name="dot")([x, layers.Attention(name="attention")([x, x])])
    one = keras.Model(inputs, x)
    kept = one.quantize(M4, verbose=False).kept_float
    assert "Fused calls ops.dot_product_attention itself" in kept["fused"]
    assert "Operators calls @ itself" in kept["operators"] and "matmul," not in kept["operators"]
    assert "register_layer(Unsaid, like=keras.layers.MultiHeadAttention)" in kept["unsaid"]
    assert all("no quantized counterpart" in kept[name] for name in ("dot", "attention"))
    assert not model().quantize(rq.QuantizationPolicy("W4"), verbose=False).kept_float


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


@pytest.mark.once
def test_export(tmp_path: Path):
    pytest.importorskip("ai_edge_litert")
    inputs = keras.Input((5, 8), name="x")
    x = layers.MultiHeadAttention(2, 4, name="mha")(inputs, inputs)
    one = keras.Model({"x": inputs}, x)
    one.quantize(rq.QuantizationPolicy("A8W4", matmuls=8), verbose=False)
    result = rq.export(one, tmp_path / "m.tflite", inputs={"x": X}, verbose=False)
    reasons = {p.path: p.reason for p in result.products if p.kernel == "float"}
    assert set(reasons) == {"mha/scores", "mha/outputs"}
    assert set(reasons.values()) == {"it is a product of two activations"}
