"""`fold_batch_norm=True` along the life of a model: training, files, other models, and back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from gradients import relative_error, to_numpy
from keras import layers

import keras_rq as rq

X = np.random.default_rng(0).normal(size=(32, 8)).astype("float32")
# All kernels of one shape: JAX compiles for each.
Y = np.random.default_rng(1).normal(size=(32, 8)).astype("float32")
POLICY = rq.QuantizationPolicy("A8W3-tensor", fold_batch_norm=True)


@keras.saving.register_keras_serializable("test_fold_batch_norm")
class Backbone(keras.Model):
    """A Functional model that is saved by its constructor's arguments, as those of KerasHub."""

    def __init__(self, units: int, **kwargs: Any) -> None:
        inputs = keras.Input((units,))
        y = layers.Dense(units, use_bias=False)(inputs)
        super().__init__(inputs, layers.BatchNormalization(name="inner")(y), **kwargs)
        self.units = units

    def get_config(self) -> dict[str, Any]:
        return {"name": self.name, "units": self.units}


def make() -> keras.Model:
    inputs = keras.Input((8,))
    y = layers.BatchNormalization(momentum=0.8, name="outer")(layers.Dense(8, name="d")(inputs))
    y = Backbone(8, name="backbone")(layers.ReLU()(y))
    return keras.Model(inputs, layers.Dense(8, name="head")(y), name="net")


def folding(model: keras.Model) -> list[str]:
    return [path.split("/")[-1] for path in rq.report(model).folded]


def kernels(model: keras.Model) -> list[np.ndarray]:
    """The quantized ones, with what was folded taken out again."""
    found = [layer for layer in model._flatten_layers() if hasattr(layer, "quantization")]
    return [keras.ops.convert_to_numpy(layer.dequantized_kernel("kernel")) for layer in found]


def test_what_is_trained_is_saved_and_goes_on(tmp_path: Path):
    model = make()
    model.quantize(POLICY, verbose=False)
    model.compile(keras.optimizers.SGD(0.1, momentum=0.9), "mse")
    losses = [model.train_on_batch(X, Y) for _ in range(4)]
    assert losses[-1] < losses[0]
    model.save(tmp_path / "m.keras")
    loaded = keras.saving.load_model(tmp_path / "m.keras")
    assert folding(loaded) == folding(model) == ["outer", "inner"]
    for received, kernel in zip(kernels(loaded), kernels(model), strict=True):
        np.testing.assert_array_equal(received, kernel)


@pytest.mark.once("torch")
def test_the_variables_are_those_of_the_float_model(tmp_path: Path):
    model = make()
    model.get_layer("outer").moving_variance.assign(np.linspace(0.2, 4.0, 8))
    model.quantize(POLICY, verbose=False)
    model.save_weights(tmp_path / "m.weights.h5")
    plain = make()
    plain.load_weights(tmp_path / "m.weights.h5")
    plain.quantize(POLICY, verbose=False)
    expected = kernels(model)
    for received, kernel in zip(kernels(plain), expected, strict=True):
        np.testing.assert_allclose(received, kernel, rtol=0, atol=1e-6)

    rq.dequantize(model, baked=True)
    baked = [model.get_layer("d").kernel, *(model.layers[i].weights[0] for i in (4, 5))]
    for received, kernel in zip(baked, expected, strict=True):
        np.testing.assert_array_equal(keras.ops.convert_to_numpy(received), kernel)
    assert not folding(model)


@pytest.mark.once("torch")
def test_baked_kernels_compute_the_same():
    model = make()
    model.get_layer("outer").moving_variance.assign(np.linspace(0.2, 4.0, 8))
    report = model.quantize(rq.QuantizationPolicy("W3-tensor", fold_batch_norm=True))
    assert [row.layer for row in report.rows if row.folded_into] == ["BatchNormalization"] * 2
    expected = to_numpy(model(X))
    rq.dequantize(model, baked=True)
    assert relative_error(to_numpy(model(X)), expected) < 1e-5


@pytest.mark.once("torch")
@pytest.mark.parametrize("spec", ["W3-channel", "W1-4", "W3-tensor"])
def test_only_statistics_of_the_whole_kernel_show_it(spec: str):
    outputs = []
    for fold in (False, True):
        keras.utils.set_random_seed(0)
        model = make()
        model.get_layer("outer").moving_variance.assign(np.linspace(0.2, 4.0, 8))
        model.quantize(rq.QuantizationPolicy(spec, fold_batch_norm=fold), verbose=False)
        outputs.append(to_numpy(model(X)))
    assert (relative_error(*outputs) < 1e-5) == (spec != "W3-tensor")


@pytest.mark.once("torch")
def test_a_policy_that_folds_nothing_says_so():
    model = keras.Sequential([keras.Input((8,)), layers.Dense(4, "relu", name="d")])
    model.add(layers.BatchNormalization(name="n"))
    with pytest.warns(UserWarning, match="folds nothing in .*The report names the reasons"):
        report = model.quantize(POLICY, verbose=False)
    assert "'d' before it has an activation" in report.kept_float[f"{model.name}/n"]
    assert "not folded" in str(report) and not report.folded


@pytest.mark.once("torch")
def test_schedules_leave_it_as_it_is():
    model = make()
    model.quantize(POLICY, verbose=False)
    model.compile("sgd", "mse")
    schedule = rq.callbacks.QuantizationSchedule({0: None, 1: "A4W2-tensor"})
    schedule.set_model(model)
    schedule.on_train_begin()
    for epoch in range(2):
        schedule.on_epoch_begin(epoch)
    assert folding(model) == ["outer", "inner"]
    assert model.get_layer("d").quantization.weights.bits == 2
