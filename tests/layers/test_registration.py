"""Layers of a user's own, told to keras_rq by `register_layer`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import keras
import numpy as np
import own_layers
import pytest
from gradients import BACKEND, compiled, relative_error, to_numpy, value_and_gradient
from keras import layers, ops
from layer_cases import KINDS, Operand, quantized

import keras_rq as rq
from keras_rq.layers import quantized_class, supported_layers
from keras_rq.layers.registry import products_of
from keras_rq.policy import LayerQuantization
from keras_rq.quantizers import Ridge
from keras_rq.training.surgery import quantized_layers

ROUNDING = 2e-6
A4W4 = rq.QuantizationPolicy("A4W4")
X = np.random.default_rng(0).normal(size=(3, 6, 8)).astype(np.float32)
TOKENS = np.random.default_rng(1).integers(0, 9, (4, 6)).astype(np.int32)


def make(layer: Any, policy: Any = A4W4) -> Any:
    """The layer, built for `X` and quantized."""
    layer.build(X.shape)
    if policy is not None:
        rq.quantize(layer, policy, verbose=False)
    return layer


def run(layer: Any, x: np.ndarray = X) -> np.ndarray:
    # A function of its own: JAX would run again what it compiled for the float layer.
    return to_numpy(compiled(lambda x: layer(x))(ops.convert_to_tensor(x)))


def product(x: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    x = quantized(x, Ridge(4), Operand((-1,))).y
    return x @ quantized(kernel, Ridge(4), Operand((0,))).y


# What the layers compute.


@pytest.mark.forward
def test_a_subclass_computes_what_its_parent_computes():
    plain, dense = make(own_layers.Plain(5)), make(layers.Dense(5))
    dense.set_weights(plain.get_weights())
    np.testing.assert_array_equal(run(plain), run(dense))


@pytest.mark.forward
def test_a_call_around_that_of_the_parent_runs():
    layer = make(own_layers.Scaled(5, 3.0))
    expected = 3 * product(X, layer.get_weights()[0])
    assert relative_error(run(layer), expected) < ROUNDING


@pytest.mark.forward
def test_a_layer_with_kernels_of_its_own():
    layer = make(own_layers.LowRank(4, 4))
    down, up = layer.get_weights()
    between = product(X, down)
    assert relative_error(run(layer), X[..., :4] + product(between, up)) < 1e-4  # a tie may fall
    assert sorted(products_of(layer)) == ["down", "up"]  # and not `gate`, which is None


@pytest.mark.forward
def test_an_einsum():
    layer = make(own_layers.Mixer())
    kernel, inner, bias = layer.get_weights()
    x = quantized(X, Ridge(4), Operand((1,))).y
    mixed = np.einsum("btf,tu->buf", x, quantized(kernel, Ridge(4), Operand((0,))).y)
    assert relative_error(run(layer), product(mixed, inner) + bias) < 1e-4


@pytest.mark.forward
def test_a_kernel_alone():
    layer = make(own_layers.Foreign())
    kernel, bias = layer.get_weights()
    expected = X @ quantized(kernel, Ridge(4), Operand((0,))).y + bias
    assert relative_error(run(layer), expected) < ROUNDING
    np.testing.assert_array_equal(to_numpy(layer.kernel.value), kernel)  # outside of its call


@pytest.mark.forward
def test_a_table_in_reverse():
    table = own_layers.Tied(9, 8)
    table.build((None, 6))
    rq.quantize(table, A4W4, verbose=False)
    rows = quantized(table.get_weights()[0], Ridge(4), Operand((-1,))).y
    assert relative_error(to_numpy(table(TOKENS)), rows[TOKENS]) < ROUNDING
    reverse = compiled(lambda x: table(x, reverse=True))
    assert relative_error(to_numpy(reverse(ops.convert_to_tensor(X))), X @ rows.T) < ROUNDING


def test_a_rotated_kernel_reads_as_it_would_be_multiplied():
    policy = rq.QuantizationPolicy(
        weights=Ridge(8, rotation="hadamard"), activations=Ridge(8, rotation="hadamard")
    )
    for layer in (own_layers.Foreign(), own_layers.LowRank(4, 4)):
        expected = run(make(layer, None))
        rq.quantize(layer, policy, verbose=False)
        assert 0 < relative_error(run(layer), expected) < 0.05


def test_the_gradient_is_that_of_layers_of_keras():
    layer = make(own_layers.LowRank(8, 4))
    dense = [layers.Dense(4, use_bias=False), layers.Dense(8, use_bias=False)]
    stacked = make(keras.Sequential(dense))
    weights, x = layer.get_weights(), ops.convert_to_tensor(X)
    upstream = np.random.default_rng(2).normal(size=X.shape).astype(np.float32)
    for i in range(2):

        def of(model: Any, i: int = i) -> Any:
            return lambda w: model.stateless_call([*weights[:i], w, *weights[i + 1 :]], [], x)[0]

        received = value_and_gradient(of(layer), weights[i], upstream)
        expected = value_and_gradient(of(stacked), weights[i], upstream)
        assert relative_error(received[0], expected[0] + X) < ROUNDING
        assert relative_error(received[1], expected[1]) < 1e-5


def test_the_gradient_of_a_kernel_alone_is_that_of_its_quantizer():
    layer = make(own_layers.Foreign())
    kernel, bias = layer.get_weights()
    upstream = np.random.default_rng(2).normal(size=(3, 6, 4)).astype(np.float32)
    x = ops.convert_to_tensor(X)
    _, received = value_and_gradient(
        lambda k: layer.stateless_call([k, bias], [], x)[0], kernel, upstream
    )
    _, expected = value_and_gradient(
        lambda k: ops.matmul(x, rq.ops.fake_quantize(k, Ridge(4), axis=0)), kernel, upstream
    )
    assert relative_error(received, expected) < 1e-5


@pytest.mark.forward
def test_without_a_policy_the_products_are_in_float():
    layer = make(own_layers.LowRank(4, 4), None)
    down, up = (w.astype(float) for w in layer.get_weights())
    assert relative_error(run(layer), X[..., :4] + X @ down @ up) < ROUNDING


# Models.


def train(model: keras.Model, **arguments: Any) -> list[float]:
    model.compile(keras.optimizers.Adam(1e-2), "mse", **arguments)
    y = np.random.default_rng(2).normal(size=(4, 4))
    return model.fit(TOKENS, y, epochs=8, verbose=0).history["loss"]


@pytest.fixture(scope="module")
def trained() -> keras.Model:
    keras.utils.set_random_seed(0)
    model = own_layers.model()
    report = model.quantize(A4W4, verbose=False)
    assert not report.kept_float
    assert all(row.weight_bits == 4 for row in report.rows)
    losses = train(model, jit_compile=BACKEND == "jax")
    assert losses[-1] < 0.9 * losses[0]
    return model


def test_files(trained: keras.Model, tmp_path: Path):
    trained.save(tmp_path / "m.keras")
    loaded = keras.saving.load_model(tmp_path / "m.keras")
    assert [layer.quantization for layer in quantized_layers(loaded)] == [
        layer.quantization for layer in quantized_layers(trained)
    ]
    expected = trained.predict(TOKENS, verbose=0)
    np.testing.assert_array_equal(loaded.predict(TOKENS, verbose=0), expected)
    clone = keras.models.clone_model(trained)
    clone.set_weights(trained.get_weights())
    np.testing.assert_array_equal(clone.predict(TOKENS, verbose=0), expected)


def test_files_in_a_process_that_imports_the_module_of_the_layers(
    trained: keras.Model, tmp_path: Path
):
    trained.save(tmp_path / "m.keras")
    np.save(tmp_path / "x.npy", TOKENS)
    script = (
        "import sys, keras, numpy as np, own_layers\n"
        "model = keras.saving.load_model(sys.argv[1])\n"
        "np.save(sys.argv[3], model.predict(np.load(sys.argv[2]), verbose=0))\n"
    )
    paths = [str(tmp_path / name) for name in ("m.keras", "x.npy", "y.npy")]
    here = Path(__file__).resolve().parent
    folders = os.pathsep.join(map(str, (here, here.parent.parent)))
    done = subprocess.run(
        [sys.executable, "-c", script, *paths],
        env={**os.environ, "PYTHONPATH": folders, "KERAS_BACKEND": BACKEND},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    np.testing.assert_allclose(np.load(paths[2]), trained.predict(TOKENS, verbose=0), rtol=1e-6)


def test_weights_travel_between_the_float_and_the_quantized_model(
    trained: keras.Model, tmp_path: Path
):
    trained.save_weights(tmp_path / "q.weights.h5")
    fresh = own_layers.model()
    fresh.load_weights(tmp_path / "q.weights.h5")
    for a, b in zip(fresh.get_weights(), trained.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


def test_mixed_precision():
    layer = own_layers.LowRank(4, 4, dtype="mixed_bfloat16")
    same = own_layers.LowRank(4, 4)
    for one in (layer, same):
        make(one)
    same.set_weights(layer.get_weights())
    y = compiled(layer)(ops.convert_to_tensor(X))
    assert keras.backend.standardize_dtype(y.dtype) == "bfloat16"
    assert relative_error(to_numpy(y), run(same)) < 0.1


def test_rematerialised_layers_train():
    with keras.RematScope(mode="full"):
        layer = own_layers.LowRank(4, 4)
    inputs = keras.Input((6, 8))
    model = keras.Model(inputs, layer(inputs))
    model.quantize(A4W4, verbose=False)
    model.compile("sgd", "mse", jit_compile=BACKEND == "jax")
    before = model.get_weights()
    model.train_on_batch(X, np.zeros((3, 6, 4), np.float32))
    assert all(np.any(a != b) for a, b in zip(before, model.get_weights(), strict=True))


# What is said of them.


@pytest.mark.once
def test_a_call_that_keeps_an_input_in_float_is_refused():
    for layer in (own_layers.Unheard(name="u"), own_layers.Selfish(4, name="u")):
        make(layer)
        with pytest.raises(
            ValueError, match=r"'u' \(\w+\) multiplies its 'kernel' by itself.*\(0,\)"
        ):
            layer(X)
    weights_only = make(own_layers.Unheard(), rq.QuantizationPolicy("W4"))
    kernel, bias = weights_only.get_weights()
    expected = X @ quantized(kernel, Ridge(4), Operand((0,))).y + bias
    assert relative_error(run(weights_only), expected) < ROUNDING


@pytest.mark.once
def test_reports():
    model = keras.Sequential([keras.Input((6, 8)), own_layers.LowRank(4, 2, name="low")])
    (row,) = rq.quantize(model, rq.QuantizationPolicy("A4W2"), verbose=False).rows
    assert (row.layer, row.activation_bits, row.weight_bits) == ("LowRank", 4, 2)
    assert row.kernel_elements == 8 * 2 + 2 * 4
    assert row.energy == 4 * 2 * 6 * (8 * 2 + 2 * 4)
    model = keras.Sequential([keras.Input((6, 8)), own_layers.Foreign(name="alone")])
    (row,) = rq.quantize(model, rq.QuantizationPolicy("A4W2"), verbose=False).rows
    assert (row.activation_bits, row.weight_bits) == (None, 2)


@pytest.mark.once
def test_unknown_layers_are_told_what_to_call():
    class MyDense(layers.Dense):
        def call(self, inputs: Any) -> Any:
            return ops.matmul(inputs, self.kernel)

    inputs = keras.Input((8,))
    x = own_layers.Unregistered(name="unknown")(MyDense(4, name="mine")(inputs))
    kept = keras.Model(inputs, x).quantize(A4W4, verbose=False).kept_float
    assert "keras_rq.register_layer(MyDense, like=keras.layers.Dense)" in kept["mine"]
    assert "keras_rq.register_layer(Unregistered, products=...)" in kept["unknown"]


@pytest.mark.once
@pytest.mark.parametrize(
    ("arguments", "kind", "complaint"),
    [
        ((3, {"like": layers.Dense}), TypeError, "Received: 3"),
        ((own_layers.Plain, {}), ValueError, "either `like=`"),
        (
            (own_layers.Plain, {"like": layers.Dense, "products": {"kernel": 0}}),
            ValueError,
            "either `like=`",
        ),
        ((own_layers.Plain, {"like": layers.Dropout}), ValueError, "`like` must be one of"),
        ((own_layers.Plain, {"like": layers.Embedding}), ValueError, "no subclass of Embedding"),
        ((layers.Dense, {"products": {"kernel": 0}}), ValueError, "knows Dense already"),
        ((own_layers.Foreign, {"products": ["kernel"]}), TypeError, "a dictionary"),
        ((own_layers.Foreign, {"products": {}}), TypeError, "a dictionary"),
        ((own_layers.Foreign, {"products": {"kernel": "mul"}}), ValueError, "'mul'"),
        ((own_layers.Foreign, {"products": {"kernel": "...a,ab->...b"}}), ValueError, "ellipsis"),
        ((own_layers.Foreign, {"products": {"kernel": ()}}), ValueError, "whole numbers"),
        ((own_layers.Foreign, {"products": {"kernel": None}}), ValueError, "Received: None"),
    ],
)
def test_wrong_arguments(arguments: Any, kind: type, complaint: str):
    cls, given = arguments
    before = {known: quantized_class(known) for known in supported_layers()}
    with pytest.raises(kind) as error:
        rq.register_layer(cls, **given)
    assert complaint in str(error.value)
    assert {known: quantized_class(known) for known in supported_layers()} == before


@pytest.mark.once
def test_a_product_that_nobody_registered():
    class Eager(own_layers.Unregistered):
        def call(self, x: Any) -> Any:
            return rq.layers.multiply(self, "matrix", x)

    with pytest.raises(ValueError, match=r"register_layer\(Eager, products=\{'matrix': 'matmul'\}"):
        Eager(name="e")(X)


@pytest.mark.once
def test_a_class_may_be_registered_again():
    """As a notebook does whose cell runs twice."""

    def define() -> type:
        @keras.saving.register_keras_serializable("again")
        class Twice(layers.Dense):
            pass

        return rq.register_layer(Twice, like=layers.Dense)

    first, second = define(), define()
    rq.register_layer(second, like=layers.Dense)
    for cls in (first, second):
        layer = make(cls(4))
        assert isinstance(layer, cls) and layer.quantization == LayerQuantization(
            Ridge(4), Ridge(4)
        )
    restored = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(layer))
    assert isinstance(restored, second)


@pytest.mark.once
def test_kernel_names_are_those_of_the_products():
    for case in KINDS:
        assert quantized_class(case.keras_class).kernel_names == tuple(products_of(case.make()))
    for cls, names in ((layers.Embedding, 1), (layers.GRUCell, 2), (own_layers.LowRank, 3)):
        assert len(quantized_class(cls).kernel_names) == names


@pytest.mark.once
def test_export(tmp_path: Path):
    pytest.importorskip("ai_edge_litert")
    inputs = keras.Input((6, 8), name="x")
    x = own_layers.LowRank(8, 4, name="low")(inputs)
    x = own_layers.Scaled(8, 2.0, name="scaled")(x)
    model = keras.Model({"x": inputs}, own_layers.Foreign(name="foreign")(x))
    model.quantize(A4W4, verbose=False)
    result = rq.export(model, tmp_path / "m.tflite", inputs={"x": X}, verbose=False)
    assert {p.path: p.kernel for p in result.products} == {
        "low/down": "integer",
        "low/up": "integer",
        "scaled/kernel": "integer",
    }
