"""`calibrate`: what it sees, from every kind of data, and what it says when it cannot."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from gradients import to_numpy
from keras import layers, ops

import keras_rq as rq
from keras_rq.quantizers import LearnedStep, Ridge, StraightThrough

X = np.random.default_rng(0).normal(0.3, 1.0, (40, 8)).astype("float32")
Y = X[:, :2]
STATIC = StraightThrough(4, calibration="static")


def make(activations: Any = STATIC, **fields: Any) -> keras.Model:
    keras.utils.set_random_seed(0)
    inputs = keras.Input((8,), name="x")
    x = layers.Dense(16, "relu", name="first")(inputs)
    model = keras.Model(inputs, layers.Dense(2, name="head")(x), name="net")
    policy = rq.QuantizationPolicy("W4", activations=activations, **fields)
    model.quantize(policy, verbose=False)
    return model


def calibrate(model: keras.Model, data: Any = X, **arguments: Any) -> dict[str, dict[str, float]]:
    return rq.calibrate(model, data, verbose=False, **arguments)


def hidden(model: keras.Model, x: np.ndarray = X) -> np.ndarray:
    """The input of the second layer in float64, with float kernels."""
    first = model.get_layer("first")
    kernel, bias = (to_numpy(ops.convert_to_tensor(v)) for v in (first.kernel, first.bias))
    return np.maximum(x.astype(float) @ kernel + bias, 0)


# What it sees.


@pytest.mark.forward
def test_ranges_are_those_of_the_float_model():
    model = make()
    found = calibrate(model)
    for key, seen in (("first/kernel", X.astype(float)), ("head/kernel", hidden(model))):
        low, high = seen.min(), seen.max()
        assert found[key]["range_origin"] == pytest.approx(low, rel=1e-5, abs=1e-6)
        assert found[key]["range_scale"] == pytest.approx((high - low) / 15, rel=1e-5)
        assert found[key]["scale"] == found[key]["range_scale"]
    for layer in (model.get_layer("first"), model.get_layer("head")):
        given = {k: float(to_numpy(v)) for k, v in layer.input_parameters("kernel").items()}
        assert given == pytest.approx(found[f"{layer.name}/kernel"])


@pytest.mark.once("torch")
def test_a_learned_step_starts_as_the_paper_says():
    model = make(LearnedStep(4))
    found = calibrate(model)
    mean = np.abs(X.astype(float)).mean()
    assert found["first/kernel"] == pytest.approx({"step": 2 * mean / np.sqrt(7), "shift": 0.0})
    mean = hidden(model).mean()
    assert found["head/kernel"] == pytest.approx({"step": 2 * mean / np.sqrt(15), "shift": 8.0})


@pytest.mark.once("torch")
def test_a_rule_of_the_quantizer_s_own_is_over_all_data():
    """One bit lays its range by the root mean square, around the mean."""
    found = calibrate(make(StraightThrough(1, calibration="static")))["first/kernel"]
    reach = 0.7978845587140913 * X.astype(float).std()
    assert found["range_scale"] == pytest.approx(2 * reach, rel=1e-5)
    assert found["range_origin"] == pytest.approx(X.astype(float).mean() - reach, rel=1e-4)


@pytest.mark.once("torch")
def test_methods():
    low, high = X.min(axis=1).astype(float), X.max(axis=1).astype(float)  # batches of one
    smooth_low, smooth_high = low[0], high[0]
    for a, b in zip(low[1:], high[1:], strict=True):
        smooth_low, smooth_high = 0.9 * smooth_low + 0.1 * a, 0.9 * smooth_high + 0.1 * b
    intervals = {
        "minmax": (low.min(), high.max()),
        "moving_average": (smooth_low, smooth_high),
        "percentile": tuple(np.percentile(X.astype(float), [0.01, 99.99])),
    }
    for method, (start, stop) in intervals.items():
        found = calibrate(make(), method=method, batch_size=1)["first/kernel"]
        assert found["range_origin"] == pytest.approx(start, rel=1e-5), method
        assert found["range_scale"] == pytest.approx((stop - start) / 15, rel=1e-5), method


@pytest.mark.once("torch")
@pytest.mark.parametrize("quantizer", [STATIC, Ridge(2, calibration="static"), LearnedStep(3)])
def test_the_least_squared_error_is_found(quantizer: Any):
    x = np.random.default_rng(0).laplace(size=(500, 8)).astype("float32")

    def error(method: str) -> float:
        model = make(quantizer)
        calibrate(model, x, method=method)
        given = model.get_layer("first").input_parameters("kernel")
        y = quantizer.fake_quantize(x, quantizer.input_blocks((-1,)), given)
        return float(np.square(to_numpy(y) - x).mean())

    assert error("mse") < 0.8 * error("minmax")


@pytest.mark.once("torch")
def test_a_layer_that_is_called_twice_sees_both_inputs():
    inputs, shared = keras.Input((8,)), layers.Dense(8, name="shared")
    model = keras.Model(inputs, shared(10 * shared(inputs)))
    model.quantize(rq.QuantizationPolicy("W4", activations=STATIC), verbose=False)
    found = calibrate(model)["shared/kernel"]
    kernel = to_numpy(ops.convert_to_tensor(shared.kernel))
    seen = np.concatenate([X, 10 * (X @ kernel)])
    assert found["range_scale"] == pytest.approx((seen.max() - seen.min()) / 15, rel=1e-5)


@pytest.mark.once("torch")
def test_padding_counts_as_in_training():
    x = 1 + np.random.default_rng(0).random((4, 5, 5, 2)).astype("float32")
    model = keras.Sequential([keras.Input((5, 5, 2)), layers.Conv2D(3, 3, padding="same")])
    model.quantize(rq.QuantizationPolicy("W4", activations=STATIC), verbose=False)
    (found,) = calibrate(model, x).values()
    assert found["range_origin"] == 0
    assert found["range_scale"] == pytest.approx(x.max() / 15)


@pytest.mark.once("torch")
def test_rotated_and_sparse_inputs_are_seen_as_they_are_quantized():
    linear = {"calibration": "static", "affine": False, "range": "absmax"}
    found = calibrate(make(StraightThrough(4, rotation="hadamard", **linear)))["first/kernel"]
    i = np.arange(8)
    signs = np.array([[(-1) ** bin(a & b).count("1") for b in i] for a in i]) / np.sqrt(8)
    assert found["range_scale"] == pytest.approx(np.abs(X @ signs).max() / 7, rel=1e-5)
    found = calibrate(make(Ridge(1, sparsity="2:4", calibration="static")))["first/kernel"]
    kept = np.sort(np.abs(X.astype(float)).reshape(-1, 4), axis=1)[:, 2:]
    assert found["scale"] == pytest.approx(kept.mean() / 1.01, rel=1e-5)


@pytest.mark.once("torch")
def test_large_inputs_are_sampled_evenly():
    x = np.concatenate([np.zeros((100, 8)), np.ones((300, 8))]).repeat(64, axis=0)
    found = calibrate(make(LearnedStep(4)), x, batch_size=1000)["first/kernel"]
    assert found["step"] == pytest.approx(0.75 * 2 / np.sqrt(15), rel=0.02)


@pytest.mark.once("torch")
def test_calibrating_again_starts_anew():
    model = make()
    calibrate(model, 10 * X)
    assert calibrate(model) == calibrate(make())


def test_rematerialized_layers_are_seen_too():
    with keras.RematScope(mode="full"):
        model = make()
    modes = [layer._remat_mode for layer in model.layers]
    assert calibrate(model) == calibrate(make())
    assert [layer._remat_mode for layer in model.layers] == modes
    assert modes[1] is not None


# Data.


class Batches(keras.utils.PyDataset):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        return X[10 * index : 10 * index + 10], Y[10 * index : 10 * index + 10]


def _generator(*, with_targets: bool) -> Iterator[Any]:
    for start in range(0, 40, 10):
        x, y = X[start : start + 10], Y[start : start + 10]
        yield (x, y) if with_targets else x


def _dataset() -> Any:
    import tensorflow as tf

    return tf.data.Dataset.from_tensor_slices((X, Y)).batch(10)


def _loader() -> Any:
    import torch

    tensors = torch.utils.data.TensorDataset(torch.tensor(X), torch.tensor(Y))
    return torch.utils.data.DataLoader(tensors, batch_size=10)


KINDS: dict[str, Callable[[], Any]] = {
    "array": lambda: X,
    "tensor": lambda: ops.convert_to_tensor(X),
    "list of batches": lambda: list(_generator(with_targets=False)),
    "list of pairs": lambda: list(_generator(with_targets=True)),
    "generator": lambda: _generator(with_targets=False),
    "generator of pairs": lambda: _generator(with_targets=True),
    "PyDataset": Batches,
    "tf.data": _dataset,
    "DataLoader": _loader,
}
NEEDS = {"tf.data": "tensorflow", "DataLoader": "torch"}


@pytest.mark.forward
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_data(kind: str):
    if kind in NEEDS and importlib.util.find_spec(NEEDS[kind]) is None:
        pytest.skip(f"needs {NEEDS[kind]}")
    expected = calibrate(make(), X, batch_size=10)
    found = calibrate(make(), KINDS[kind]())
    for key, given in expected.items():
        assert found[key] == pytest.approx(given, rel=1e-6)


@pytest.mark.once("torch")
@pytest.mark.parametrize("kind", ["array", "generator", "PyDataset", "tf.data"])
def test_as_many_batches_as_asked_for(kind: str):
    data = X[:20] if kind == "array" else KINDS[kind]()
    arguments = {"batch_size": 5} if kind == "array" else {}
    count = 4 if kind == "array" else 2
    found = calibrate(make(), X if kind == "array" else data, batches=count, **arguments)
    assert found == calibrate(make(), X[:20])


@pytest.mark.once("torch")
@pytest.mark.parametrize("structure", ["list", "tuple", "dict"])
def test_models_with_several_inputs(structure: str):
    inputs = {"a": keras.Input((8,), name="a"), "b": keras.Input((8,), name="b")}
    x = [layers.Dense(4, name=f"of_{name}")(one) for name, one in inputs.items()]
    model = keras.Model(inputs if structure == "dict" else list(inputs.values()), layers.add(x))
    model.quantize(rq.QuantizationPolicy("W4", activations=STATIC), verbose=False)
    data = {"list": [X, 2 * X], "tuple": (X, 2 * X), "dict": {"a": X, "b": 2 * X}}[structure]
    found = calibrate(model, data)
    assert found["of_b/kernel"]["scale"] == pytest.approx(2 * found["of_a/kernel"]["scale"])


@pytest.mark.once("torch")
def test_a_progress_bar_unless_it_is_not_wanted(capsys: Any):
    rq.calibrate(make(), X, batch_size=10)
    assert "4/4" in capsys.readouterr().out
    calibrate(make())
    assert capsys.readouterr().out == ""


# Before it.


@pytest.mark.parametrize("quantizer", [STATIC, LearnedStep(4)])
def test_a_layer_without_a_range_says_what_to_do(quantizer: Any):
    model = make(quantizer)
    words = r"Layer 'first' has no range for its input.*keras_rq\.calibrate\(model, data\)"
    model.compile("sgd", "mse", jit_compile=False)
    for call in (
        lambda: model(X),
        lambda: model.predict(X, verbose=0),
        lambda: model.fit(X, Y, verbose=0),
    ):
        with pytest.raises(ValueError, match=words):
            call()
    calibrate(model)
    assert np.isfinite(model.predict(X, verbose=0)).all()
    assert np.isfinite(model.fit(X, Y, verbose=0).history["loss"]).all()


def test_symbolic_calls_need_no_range():
    model = make()
    inputs = keras.Input((8,))
    assert model(inputs).shape == (None, 2)
    assert model.compute_output_shape((3, 8)) == (3, 2)
    assert model.compute_output_spec(keras.KerasTensor((3, 8))).shape == (3, 2)


@pytest.mark.once("torch")
@pytest.mark.parametrize("is_calibrated", [False, True])
def test_a_file_says_whether_the_model_was_calibrated(is_calibrated: bool, tmp_path: Path):
    model = make()
    if is_calibrated:
        calibrate(model)
    model.save(tmp_path / "m.keras")
    loaded = keras.saving.load_model(tmp_path / "m.keras")
    if is_calibrated:
        np.testing.assert_array_equal(to_numpy(loaded(X)), to_numpy(model(X)))
    else:
        with pytest.raises(ValueError, match=r"calibrate\(model, data\)"):
            loaded(X)


# Failure.


class Partial(keras.Model):
    """Has a layer that it does not call."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = layers.Dense(4, name="used"), layers.Dense(4, name="unused")

    def build(self, shape: Any) -> None:
        self.used.build(shape)
        self.unused.build(shape)

    def call(self, x: Any) -> Any:
        return self.used(x)


@pytest.mark.once("torch")
@pytest.mark.parametrize(
    ("data", "arguments", "error", "words"),
    [
        (X, {"method": "max"}, ValueError, ["`method`", "'max'", "'mse'"]),
        (X, {"batches": 0}, ValueError, ["`batches`", "batches=0"]),
        (X, {"batches": True}, ValueError, ["`batches`", "batches=True"]),
        ((X, Y), {}, TypeError, ["tuple", "inputs alone"]),
        (iter(()), {}, ValueError, ["`data`", "at least one batch"]),
        ("images", {}, ValueError, ["`data` must hold arrays", "str"]),
        (np.full((4, 8), np.nan), {}, ValueError, ["'first'", "not finite", "nothing was"]),
    ],
)
def test_wrong_arguments(data: Any, arguments: Any, error: type[Exception], words: list[str]):
    model = make()
    with pytest.raises(error) as caught:
        calibrate(model, data, **arguments)
    assert all(word in str(caught.value) for word in words), caught.value
    assert not any(layer.quantization.is_calibrated for layer in model.layers[1:])
    assert not any(hasattr(layer, "_rq_lowered") for layer in model.layers)


@pytest.mark.once("torch")
@pytest.mark.parametrize("policy", [None, rq.QuantizationPolicy("A4W4")])
def test_nothing_to_calibrate(policy: Any):
    model = keras.Sequential([keras.Input((8,)), layers.Dense(4)], name="net")
    if policy is not None:
        model.quantize(policy, verbose=False)
    with pytest.raises(ValueError, match=r"'net' has nothing to calibrate.*calibration='static'"):
        calibrate(model)
    with pytest.raises(TypeError, match="`model` must be a Keras model"):
        calibrate("model")


@pytest.mark.once("torch")
def test_a_layer_that_the_data_does_not_reach_is_named():
    model = Partial()
    model.build((None, 8))
    model.quantize(rq.QuantizationPolicy("W4", activations=STATIC), verbose=False)
    with pytest.raises(ValueError, match=r"unused' has seen no data.*Nothing was calibrated"):
        calibrate(model)
    assert not model.used.quantization.is_calibrated
