"""`export`: the file computes what the model computes, or there is no file."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from gradients import BACKEND, to_numpy
from keras import layers, ops

pytest.importorskip("ai_edge_litert")
pytest.importorskip("tensorflow")

from export_cases import (
    BRANCHES,
    FEW,
    INTEGER,
    SETTINGS,
    THOROUGH,
    Doubled,
    both,
    branches,
    dense,
    inputs,
    tripled,
)

import keras_rq as rq
from keras_rq.export import lowering, verification
from keras_rq.export.interpreter import load
from keras_rq.quantizers import Ridge

PRECISION = 1e-5  # relative to the largest output of a layer


def run(path: Path, arrays: dict[str, np.ndarray]) -> list[np.ndarray]:
    """The file's outputs for every sample, in the order of the flattened outputs."""
    signature = load(Path(path).read_bytes()).get_signature_runner()
    count = len(next(iter(arrays.values())))
    samples = [signature(**{k: a[i : i + 1] for k, a in arrays.items()}) for i in range(count)]
    return [np.concatenate([s[f"output_{i}"] for s in samples]) for i in range(len(samples[0]))]


def differences(path: Path, model: keras.Model, arrays: dict[str, np.ndarray]) -> list[float]:
    """Of every output, relative to its largest value; sample by sample, as the file runs."""
    count = len(next(iter(arrays.values())))
    samples = [
        keras.tree.flatten(model({k: a[i : i + 1] for k, a in arrays.items()}, training=False))
        for i in range(count)
    ]
    expected = [np.concatenate([to_numpy(y) for y in ys]) for ys in zip(*samples, strict=True)]
    pairs = zip(run(path, arrays), expected, strict=True)
    return [float(np.abs(a - b).max() / np.abs(b).max()) for a, b in pairs]


# Every kind of layer with every setting, each layer compared by itself.


@pytest.mark.once
@pytest.mark.parametrize("name", SETTINGS)
def test_every_layer_computes_what_it_computes_in_training(name: str, tmp_path: Path):
    policy, storage = SETTINGS[name]
    names = BRANCHES if name in THOROUGH else FEW
    model = branches(names)
    report = model.quantize(policy, verbose=False)
    assert not report.kept_float
    arrays = inputs()
    result = rq.export(model, tmp_path / "m.tflite", inputs=arrays, verbose=False)

    apart = dict(zip(sorted(model.output), differences(result.path, model, arrays), strict=True))
    # Its second half quantizes what its first computed, and a last bit may decide on a code. The
    # verification runs the halves apart.
    apart.pop("separable", None)
    assert max(apart.values()) < PRECISION, apart
    assert result.verification.product_difference < PRECISION

    integers = {p.path.split("/")[0] for p in result.products if p.kernel == "integer"}
    assert integers == INTEGER & set(names)
    assert all(p.reason for p in result.products if p.kernel == "float")
    for layer in integers - {"separable"}:
        kernels = [k for k in result.kernels if f"{layer}/" in k.weight]
        assert kernels, layer
        assert {k.storage for k in kernels} == {storage}, layer
        assert all(k.delegated for k in kernels), layer
    assert result.nbytes == result.path.stat().st_size


@pytest.mark.once
@pytest.mark.parametrize(
    ("policy", "storage"),
    [
        (rq.QuantizationPolicy("W4"), "INT4"),
        (rq.QuantizationPolicy("W1.5-32"), "INT2"),
        (rq.QuantizationPolicy(activations=8), None),
        (rq.QuantizationPolicy("A8W4", weights=Ridge(4, rotation="hadamard")), "INT4"),
    ],
    ids=["W4", "W1.5-32", "A8", "half-rotated"],
)
def test_one_operand_alone_runs_in_float(policy: Any, storage: str | None, tmp_path: Path):
    model = branches((*FEW, "separable", "grouped"))
    model.quantize(policy, verbose=False)
    arrays = inputs()
    result = rq.export(model, tmp_path / "m.tflite", inputs=arrays, verbose=False)
    assert max(differences(result.path, model, arrays)) < PRECISION
    assert {p.kernel for p in result.products} == {"float"}
    reasons = {p.reason for p in result.products if "lookup" not in p.path}
    assert reasons <= {
        "only one of its two operands is quantized",
        "its operands are not rotated alike",
    }


@pytest.mark.once
@pytest.mark.parametrize(
    "name", ["dense", "tokens", "conv2d", "depthwise", "separable", "grouped", "lookup"]
)
def test_one_bit_of_both_operands(name: str, tmp_path: Path):
    """Rotated where the products are integer ones; elsewhere the file is that without rotations."""
    arrays = inputs()

    def exported(policy: rq.QuantizationPolicy) -> tuple[keras.Model, Any, bytes]:
        model = branches((name,))
        model.set_weights([np.random.default_rng(3).normal(size=w.shape) for w in model.weights])
        model.quantize(policy, verbose=False)
        result = rq.export(model, tmp_path / "m.tflite", inputs=arrays, verbose=False)
        kernels = [(k.op, k.storage, k.delegated) for k in result.kernels]
        return model, (result.products, kernels), result.path.read_bytes()

    _, how, plain = exported(both(Ridge(1, fade=1.2)))
    model, same, file = exported(rq.QuantizationPolicy("A1W1"))
    assert same == how
    if name in ("dense", "tokens", "conv2d"):
        assert [p.kernel for p in how[0]] == ["integer"] and how[1]
        assert len(load(file)._get_ops_details()) > len(load(plain)._get_ops_details())
        assert max(differences(tmp_path / "m.tflite", model, arrays)) < PRECISION
    else:
        assert file == plain


@pytest.mark.once
def test_a_float_model_is_exported_as_it_is(tmp_path: Path):
    model = branches()
    arrays = inputs()
    result = rq.export(model, tmp_path / "m.tflite", inputs=arrays, verbose=False)
    assert result.products == () and result.kernels == ()
    assert max(differences(result.path, model, arrays)) < PRECISION


@pytest.mark.once
def test_fewer_bits_make_smaller_files(tmp_path: Path):
    sizes = {}
    for spec in ("W8", "W4", "W1"):
        model = keras.Sequential([keras.Input((256,)), layers.Dense(256)])
        model.quantize(rq.QuantizationPolicy("A8" + spec), verbose=False)
        sizes[spec] = rq.export(model, tmp_path / f"{spec}.tflite", verbose=False).nbytes
    assert sizes["W4"] < sizes["W8"] - 30_000
    assert sizes["W1"] < sizes["W4"] - 15_000


@pytest.mark.once
def test_latency_stores_convolutions_as_int8(tmp_path: Path):
    model = keras.Sequential([keras.Input((6, 6, 8)), layers.Conv2D(8, 3)])
    model.quantize(rq.QuantizationPolicy("A8W1"), verbose=False)
    storage = {
        optimize: {
            k.storage
            for k in rq.export(
                model, tmp_path / "m.tflite", optimize=optimize, verbose=False
            ).kernels
        }
        for optimize in ("size", "latency")
    }
    assert storage == {"size": {"INT2"}, "latency": {"INT8"}}


# Structures of inputs and outputs.


@pytest.mark.once
def test_inputs_and_outputs_keep_their_order(tmp_path: Path):
    """Names against the alphabet, and equal shapes: a mix-up would go unnoticed but for values."""
    z, a = keras.Input((8,), name="z"), keras.Input((8,), name="a")
    first = layers.Dense(4, name="y")(z)
    second = layers.Dense(4, name="b")(a)
    model = keras.Model([z, a], [first, second, first - second])
    model.quantize(rq.QuantizationPolicy("A8W8"), verbose=False)
    result = rq.export(model, tmp_path / "m.tflite", verbose=False)
    generator = np.random.default_rng(0)
    x = {n: generator.normal(size=(3, 8)).astype(np.float32) for n in ("z", "a")}
    expected = model([x["z"], x["a"]])
    for received, wanted in zip(run(result.path, x), expected, strict=True):
        np.testing.assert_allclose(received, to_numpy(wanted), rtol=0, atol=1e-5)


@pytest.mark.once
def test_an_open_size_is_taken_from_the_samples(tmp_path: Path):
    model = keras.Sequential([keras.Input((None, 8), name="x"), layers.Dense(4)], name="open")
    model.quantize(rq.QuantizationPolicy("A8W8"), verbose=False)
    with pytest.raises(ValueError, match=r"'open' has the open shape .*Pass `inputs=`"):
        rq.export(model, tmp_path / "m.tflite")
    x = np.random.default_rng(0).normal(size=(3, 5, 8)).astype(np.float32)
    result = rq.export(model, tmp_path / "m.tflite", inputs=x, verbose=False)
    assert result.verification.samples == 3
    np.testing.assert_allclose(run(result.path, {"x": x})[0], model(x), rtol=0, atol=1e-5)


@pytest.mark.once
def test_a_batch_of_several(tmp_path: Path):
    model = dense()
    x = np.random.default_rng(0).normal(size=(7, 16)).astype(np.float32)
    result = rq.export(model, tmp_path / "m.tflite", inputs=x, batch_size=3, verbose=False)
    assert result.verification.samples == 6
    signature = load(result.path.read_bytes()).get_signature_runner()
    np.testing.assert_allclose(signature(x=x[:3])["output_0"], model(x[:3]), rtol=0, atol=1e-5)


@pytest.mark.once
def test_a_whole_network_with_attention(tmp_path: Path):
    index = keras.Input((6,), dtype="int32", name="index")
    x = layers.Embedding(9, 16)(index)
    x = layers.LayerNormalization()(x + layers.MultiHeadAttention(2, 8)(x, x))
    x = x + layers.Dense(16)(layers.Dense(32, "gelu")(x))
    model = keras.Model(index, layers.Dense(3, "softmax")(Doubled()(x[:, 0])))
    model.quantize(rq.QuantizationPolicy("A8W4"), verbose=False)
    result = rq.export(model, tmp_path / "m.tflite", verbose=False)
    check = result.verification
    assert check.product_difference < PRECISION
    assert check.difference <= PRECISION + 2 * check.own_sensitivity
    assert sum(p.kernel == "integer" for p in result.products) == 7
    assert all(k.delegated for k in result.kernels)


# The summary.


@pytest.mark.once
def test_what_does_not_run_as_integers_is_printed(tmp_path: Path, capsys: Any):
    model = branches(("dense", "grouped", "lookup"))
    model.quantize(rq.QuantizationPolicy("A8W4"), verbose=False)
    rq.export(model, tmp_path / "m.tflite", inputs=inputs())
    printed = capsys.readouterr().out
    assert "1 of 3 quantized products in integer arithmetic" in printed
    assert "float: grouped/kernel (LiteRT has no kernel for grouped convolutions)" in printed
    assert "float: lookup/embeddings (a lookup multiplies nothing)" in printed


@pytest.mark.once
def test_the_format_may_be_named_instead_of_the_suffix(tmp_path: Path):
    result = rq.export(dense(), tmp_path / "model", format="litert", verbose=False)
    assert result.path == tmp_path / "model" and result.path.exists()


# Verification.


def _broken(*arguments: Any) -> Any:
    return 1.001 * _CORRECTED(*arguments)


_CORRECTED = lowering._corrected


@pytest.mark.once
def test_a_broken_lowering_is_found_and_named(tmp_path: Path, monkeypatch: Any):
    monkeypatch.setattr(lowering, "_corrected", _broken)
    with pytest.raises(verification.ExportMismatch) as error:
        rq.export(dense(), tmp_path / "m.tflite")
    assert "d/kernel does not survive the export" in str(error.value)
    assert "differs by 0.001" in str(error.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.once
def test_an_existing_file_survives_a_failed_export(tmp_path: Path, monkeypatch: Any):
    path = tmp_path / "m.tflite"
    path.write_bytes(b"the old one")
    monkeypatch.setattr(lowering, "_corrected", _broken)
    with pytest.raises(verification.ExportMismatch):
        rq.export(dense(), path)
    assert [p.name for p in tmp_path.iterdir()] == ["m.tflite"]
    assert path.read_bytes() == b"the old one"


@keras.saving.register_keras_serializable("test_export")
class Fickle(layers.Layer):
    """Computes something else when it is traced: a float layer that does not survive."""

    def call(self, x: Any) -> Any:
        import tensorflow as tf

        return x * (1.0 if tf.executing_eagerly() else 1.01)


@pytest.mark.once
def test_a_float_layer_that_differs_is_found_in_the_whole(tmp_path: Path):
    model = keras.Sequential([keras.Input((16,)), layers.Dense(8), Fickle()])
    model.quantize(rq.QuantizationPolicy("A8W8"), verbose=False)
    with pytest.raises(verification.ExportMismatch, match="a float layer in between is not"):
        rq.export(model, tmp_path / "m.tflite")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.once
@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_an_interrupted_write_leaves_the_old_file(step: str, tmp_path: Path, monkeypatch: Any):
    path = tmp_path / "m.tflite"
    path.write_bytes(b"the old one")
    model = dense()

    def fail(*_: Any) -> None:
        raise OSError("disk full")

    owner = {"fsync": os, "replace": Path}[step]
    with monkeypatch.context() as patch:
        patch.setattr(owner, step, fail)
        with pytest.raises(OSError, match="disk full"):
            rq.export(model, path, verbose=False)
    assert [p.name for p in tmp_path.iterdir()] == ["m.tflite"]
    assert path.read_bytes() == b"the old one"
    rq.export(model, path, verbose=False)
    assert path.read_bytes() != b"the old one"
    assert path.stat().st_mode & 0o777 == 0o666 & ~_umask()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@pytest.mark.once
def test_exporting_does_not_touch_the_model(tmp_path: Path):
    model = dense()
    before = model.to_json(), [w.tobytes() for w in model.get_weights()]
    rq.export(model, tmp_path / "m.tflite", verbose=False)
    assert (model.to_json(), [w.tobytes() for w in model.get_weights()]) == before
    assert all(layer.lowered is None for layer in model.layers)


# Other backends, through a child process with TensorFlow.


@pytest.mark.skipif(BACKEND == "tensorflow", reason="converts in this process")
def test_a_child_process_converts_for_the_other_backends(tmp_path: Path):
    x = keras.Input((16,), name="x")
    y = keras.Input((6, 6, 8), name="y")
    flat = layers.Dense(8, "relu", name="first")(x)
    image = layers.Conv2D(8, 3, padding="same", name="conv")(y)
    image = layers.GlobalAveragePooling2D()(layers.BatchNormalization(name="norm")(image))
    model = keras.Model({"x": x, "y": y}, layers.Dense(3, name="head")(Doubled()(flat + image)))
    model.quantize(rq.QuantizationPolicy("A8W4-tensor", fold_batch_norm=True), verbose=False)
    model.get_layer("norm").gamma.assign(np.linspace(-1, 2, 8))
    model.get_layer("norm").moving_variance.assign(np.linspace(0.2, 4, 8))
    result = rq.export(model, tmp_path / "m.tflite", verbose=False)
    assert result.verification.product_difference < PRECISION
    assert [p.kernel for p in result.products] == ["integer"] * 3
    assert {k.storage for k in result.kernels} == {"INT4"}
    assert all(k.delegated for k in result.kernels)
    assert result.folded == ("norm",)
    generator = np.random.default_rng(0)
    arrays = {"x": generator.normal(size=(4, 16)), "y": generator.normal(size=(4, 6, 6, 8))}
    arrays = {name: array.astype(np.float32) for name, array in arrays.items()}
    check = result.verification
    assert differences(result.path, model, arrays)[0] < PRECISION + 2 * check.own_sensitivity


@pytest.mark.skipif(BACKEND != "torch", reason="the child is the same for all; PyTorch is quickest")
def test_a_child_process_knows_registered_functions(tmp_path: Path):
    model = keras.Sequential([keras.Input((16,)), layers.Dense(8, tripled)])
    model.quantize(rq.QuantizationPolicy("A8W8"), verbose=False)
    result = rq.export(model, tmp_path / "m.tflite", verbose=False)
    assert [p.kernel for p in result.products] == ["integer"]


@pytest.mark.skipif(BACKEND != "torch", reason="the child is the same for all; PyTorch is quickest")
def test_what_a_child_process_fails_at_is_said(tmp_path: Path):
    """TensorFlow takes no such name."""
    model = keras.Sequential([keras.Input((16,)), layers.Dense(8, name="größe")])
    with pytest.raises(ValueError, match=r"(?s)'torch' backend. ValueError: .*größe") as error:
        rq.export(model, tmp_path / "m.tflite")
    assert "must be registered" not in str(error.value)


class InScript(layers.Layer):
    def call(self, x: Any) -> Any:
        return ops.abs(x)


InScript.__module__ = "__main__"  # as in a script or a notebook


@pytest.mark.skipif(BACKEND == "tensorflow", reason="converts in this process")
def test_a_class_of_the_running_script_cannot_follow_into_a_child(tmp_path: Path):
    model = keras.Sequential([keras.Input((16,)), layers.Dense(8), InScript(name="mine")])
    model.quantize(rq.QuantizationPolicy("A8W8"), verbose=False)
    with pytest.raises(ValueError) as error:
        rq.export(model, tmp_path / "m.tflite")
    assert "Layer 'mine' is of class InScript" in str(error.value)
    assert "move the class to a module of its own" in str(error.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.once
def test_a_class_of_the_running_script_is_no_matter_here(tmp_path: Path):
    model = keras.Sequential([keras.Input((16,)), layers.Dense(8), InScript()])
    model.quantize(rq.QuantizationPolicy("A8W8"), verbose=False)
    assert rq.export(model, tmp_path / "m.tflite", verbose=False).path.exists()


# Loops over time.


@pytest.mark.parametrize("unroll", [False, True])
def test_products_inside_loops_run_in_float_and_are_named(unroll: bool, tmp_path: Path):
    if BACKEND == "jax" or (unroll and BACKEND != "tensorflow"):
        pytest.skip("the converting process sees the same layers")
    gru = layers.GRU(4, unroll=unroll, dropout=0.2, recurrent_dropout=0.2)
    recurrent = layers.Bidirectional(gru, name="both")
    inputs = keras.Input((5, 8), name="x")
    model = keras.Model({"x": inputs}, layers.Dense(3)(recurrent(inputs)))
    model.quantize(rq.QuantizationPolicy("A8W4"), verbose=False)
    arrays = {"x": np.random.default_rng(0).normal(size=(4, 5, 8)).astype(np.float32)}
    result = rq.export(model, tmp_path / "m.tflite", inputs=arrays, verbose=False)
    assert max(differences(result.path, model, arrays)) < PRECISION
    assert [p.kernel for p in result.products] == ["float"] * 4 + ["integer"]
    assert all(p.path.startswith("both/") for p in result.products[:4])
    assert {p.reason for p in result.products[:4]} == {
        "it lies in a loop over time steps; its weights are stored as float32"
    }
