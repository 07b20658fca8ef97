"""BatchNormalization in a file: a part of the product before it, with nothing left to compute."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from gradients import relative_error, to_numpy
from keras import layers, ops

pytest.importorskip("ai_edge_litert")
pytest.importorskip("tensorflow")

import keras_rq as rq
from keras_rq.export._litert_checks import storage_bits
from keras_rq.export.folding import multiplied
from keras_rq.export.interpreter import load
from keras_rq.numerics.blocks import Blocks
from keras_rq.numerics.dequantizers import Line
from keras_rq.quantizers import Ridge

SHAPES = {"flat": (20,), "series": (3, 12), "image": (4, 4, 4)}
# A layer, and its input. One of each way in which a product is lowered.
KINDS = {
    "dense": (lambda **a: layers.Dense(6, **a), "flat"),
    "einsum": (lambda **a: layers.EinsumDense("abc,cde->abde", (3, 2, 4), **_einsum(a)), "series"),
    "conv2d": (lambda **a: layers.Conv2D(6, 2, padding="same", strides=2, **a), "image"),
    "depthwise": (lambda **a: layers.DepthwiseConv2D(3, depth_multiplier=2, **a), "image"),
    "transposed": (lambda **a: layers.Conv2DTranspose(6, 2, **a), "image"),
}


def _einsum(arguments: dict[str, Any]) -> dict[str, Any]:
    return {"bias_axes": "e" if arguments["use_bias"] else None, "name": arguments["name"]}


def model_of_kinds(normalized: bool) -> keras.Model:
    """With normalizations, behind layers with and without a bias; or with biases in their place."""
    inputs = {name: keras.Input(shape, name=name) for name, shape in SHAPES.items()}
    outputs = {}
    for at, (kind, (make, source)) in enumerate(KINDS.items()):
        layer = make(use_bias=not normalized or at % 2 == 0, name=kind)
        outputs[kind] = layer(inputs[source])
        if normalized:
            norm = layers.BatchNormalization(name=f"{kind}_norm", scale=kind != "einsum")
            outputs[kind] = norm(outputs[kind])
            disturb(norm)
        if layer.bias is not None:
            layer.bias.assign(np.random.normal(size=layer.bias.shape))
    return keras.Model(inputs, outputs, name="kinds")


def disturb(norm: layers.BatchNormalization) -> None:
    """Values of both signs, and a channel that is switched off."""
    size = norm.moving_mean.shape[0]
    if norm.gamma is not None:
        gamma = np.random.uniform(0.3, 3.0, size) * np.where(np.arange(size) % 2, 1.0, -1.0)
        norm.gamma.assign(np.where(np.arange(size) == 3, 0.0, gamma))
    norm.beta.assign(np.random.normal(size=size))
    norm.moving_mean.assign(np.random.normal(size=size))
    norm.moving_variance.assign(np.random.uniform(0.2, 4.0, size))


def operators(path: Path) -> Counter[str]:
    details = load(path.read_bytes(), delegate=False)._get_ops_details()
    return Counter(op["op_name"] for op in details)


def policy(fold: bool) -> rq.QuantizationPolicy:
    """All ways to store a kernel, and grids whose lowest code has a counterpart or has none."""
    rules = [
        rq.Rule("dense", weights=Ridge(1.5)),
        rq.Rule("einsum", weights=4, activations=None),
        rq.Rule("transposed", weights=8),
    ]
    return rq.QuantizationPolicy("A4W2-tensor", fold_batch_norm=fold, rules=rules)


@pytest.mark.once
@pytest.mark.parametrize("fold", [False, True])
def test_the_file_is_that_of_layers_with_biases(fold: bool, tmp_path: Path):
    model = model_of_kinds(normalized=True)
    model.quantize(policy(fold), verbose=False)
    x = {name: np.random.normal(size=(1, *s)).astype("float32") for name, s in SHAPES.items()}
    result = rq.export(model, tmp_path / "m.tflite", inputs=x, verbose=False)
    assert set(result.folded) == {f"{kind}_norm" for kind in KINDS} and not result.not_folded
    assert f"folded: {len(KINDS)} BatchNormalization layers" in result.summary()
    received = load(result.path.read_bytes()).get_signature_runner()(**x)
    expected = model(x, training=False)
    for at, kind in enumerate(sorted(KINDS)):
        assert relative_error(received[f"output_{at}"], to_numpy(expected[kind])) < 1e-5, kind

    if fold:
        plain = model_of_kinds(normalized=False)
        plain.quantize(policy(False), verbose=False)
        other = rq.export(plain, tmp_path / "plain.tflite", inputs=x, verbose=False)
        assert operators(result.path) == operators(other.path)
        assert [k.storage for k in result.kernels] == [k.storage for k in other.kernels]


@keras.saving.register_keras_serializable("test_export_folding")
class Coded(layers.Layer):
    """Calls its layers by itself."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.dense = layers.Dense(6, name="dense")
        self.norm = layers.BatchNormalization(name="norm")

    def build(self, shape: Any) -> None:
        self.dense.build(shape)
        self.norm.build((None, 6))

    def call(self, x: Any) -> Any:
        return ops.tanh(self.norm(self.dense(x)))


@pytest.mark.once
def test_what_cannot_be_folded_stays_and_is_named(tmp_path: Path):
    x = keras.Input((8,), name="x")
    tail = layers.Dense(6, name="seen")(x)
    active = layers.BatchNormalization(name="after")(layers.Dense(6, "relu", name="relu")(x))
    outputs = [active, Coded(name="coded")(x), tail, layers.BatchNormalization(name="of")(tail)]
    model = keras.Model(x, outputs)
    for layer in model._flatten_layers():
        if isinstance(layer, layers.BatchNormalization):
            disturb(layer)
    model.quantize(rq.QuantizationPolicy("A8W8"), verbose=False)
    inputs = np.random.normal(size=(1, 8)).astype("float32")
    result = rq.export(model, tmp_path / "m.tflite", inputs=inputs, verbose=False)
    assert result.folded == ()
    assert set(result.not_folded) == {"after", "coded/norm", "of"}
    assert "not folded: after ('relu' before it has an activation)" in result.summary()


@pytest.mark.once
def test_a_kernel_trained_for_a_normalization_is_exported_without_it(tmp_path: Path):
    model = keras.Sequential([keras.Input((8,)), layers.Dense(6), layers.BatchNormalization()])
    disturb(model.layers[1])
    model.quantize(rq.QuantizationPolicy("A8W4-tensor", fold_batch_norm=True), verbose=False)
    features = keras.Model(model.inputs, model.layers[0].output)
    result = rq.export(features, tmp_path / "m.tflite", verbose=False)
    assert result.folded == () and result.verification.difference < 1e-5


@pytest.mark.once
@pytest.mark.parametrize("bits", [1, 1.5, 2, 8])
@pytest.mark.parametrize("size", ["tensor", "channel", 3])
@pytest.mark.parametrize("affine", [True, "auto"])
def test_a_multiplied_kernel_has_positive_scales(bits: float, size: Any, affine: Any):
    """It is checked where a code is the lowest of its type, which has no negative there."""
    kernel = np.random.normal(size=(7, 4)).astype("float32")
    factor = np.broadcast_to(np.float32([2.0, -0.5, 0.0, -3.0]), kernel.shape)
    quantizer = Ridge(bits, affine=bits != 1.5 and affine, block_size=size)
    tensor = quantizer.quantize(kernel, Blocks((0,), (), size))
    line = [None if part is None else ops.convert_to_numpy(part) for part in tensor.line]
    tensor = replace(tensor, codes=ops.convert_to_numpy(tensor.codes), line=Line(*line))
    expected = to_numpy(tensor.dequantize()) * factor
    result = multiplied(tensor, factor, bits)
    np.testing.assert_allclose(to_numpy(result.dequantize()), expected, rtol=0, atol=1e-6)
    assert np.all(result.line.scale >= 0)
    assert storage_bits(result.codes, bits) == storage_bits(tensor.codes, bits)


@pytest.mark.once
def test_a_model_that_was_trained_folded_is_the_file(tmp_path: Path):
    inputs = keras.Input((6, 6, 3), name="x")
    y = layers.Conv2D(8, 3, use_bias=False, name="conv")(inputs)
    y = layers.ReLU()(layers.BatchNormalization(momentum=0.5, name="conv_norm")(y))
    y = layers.DepthwiseConv2D(3, name="depthwise")(y)
    y = layers.BatchNormalization(momentum=0.5, name="depthwise_norm")(y)
    model = keras.Model(inputs, layers.Dense(4, name="head")(layers.Flatten()(y)))
    setting = rq.QuantizationPolicy("A4W2-tensor", fold_batch_norm=True)
    assert len(model.quantize(setting, verbose=False).folded) == 2
    model.compile(keras.optimizers.SGD(0.05), "mse")
    x = np.random.normal(size=(32, 6, 6, 3)).astype("float32")
    before = [to_numpy(v) for v in model.weights]
    losses = model.fit(x, x[:, 0, :4, 0], epochs=4, batch_size=8, verbose=0).history["loss"]
    assert losses[-1] < losses[0]
    assert all(np.any(to_numpy(v) != old) for v, old in zip(model.weights, before, strict=True))

    result = rq.export(model, tmp_path / "m.tflite", inputs=x, verbose=False)
    assert set(result.folded) == {"conv_norm", "depthwise_norm"} and not result.not_folded
    assert result.verification.product_difference < 1e-5
    run = load(result.path.read_bytes()).get_signature_runner()
    samples = [x[i : i + 1] for i in range(len(x))]  # a range is that of all that is given at once
    received = np.concatenate([run(x=sample)["output_0"] for sample in samples])
    expected = np.concatenate([to_numpy(model(sample, training=False)) for sample in samples])
    accepted = 1e-5 + 2 * result.verification.own_sensitivity
    assert relative_error(received, expected) < accepted < 0.02
