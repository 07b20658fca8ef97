"""The ResNet benchmark: crops, the network, and runs that start from the float weights."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import keras
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import cifar
import models
import resnet20
import resnet20_tables
import runs
import training
from training import Run

pytestmark = pytest.mark.once("torch")

RANDOM = np.random.default_rng(0)
IMAGES = RANDOM.integers(0, 256, (60, 16, 16, 3), dtype="uint8")
LABELS = RANDOM.integers(0, 10, (60, 1))
DATA = (IMAGES[:40], LABELS[:40], IMAGES[40:], LABELS[40:])


def test_crops_are_shifted_and_mirrored_images():
    padded = np.pad(IMAGES, ((0, 0), (4, 4), (4, 4), (0, 0)))
    index, top, left = np.array([7, 3, 3]), np.array([0, 8, 4]), np.array([5, 0, 4])
    flip = np.array([0, 1, 0])
    found, labels = cifar.cropped(padded, LABELS[:, 0], index, top, left, flip, size=16)
    assert found.dtype == np.float32
    for place, (i, t, x, f) in enumerate(zip(index, top, left, flip, strict=True)):
        crop = padded[i, t : t + 16, x : x + 16]
        expected = cifar.normalized(crop[:, ::-1] if f else crop)
        np.testing.assert_array_equal(found[place], expected)
    np.testing.assert_array_equal(found[2], cifar.normalized(IMAGES[3]))
    np.testing.assert_array_equal(labels, LABELS[[7, 3, 3], 0])


def test_an_epoch_holds_every_image_once(tmp_path: Path):
    task = cifar.ResNet20(DATA, tmp_path / "none", small=True)
    batches = task.batches(Run("float", "float", 0.1, 8), 0)
    chosen = [batches.choose(step)[0] for step in range(8)]
    for epoch in (chosen[:4], chosen[4:]):
        np.testing.assert_array_equal(np.sort(np.concatenate(epoch)), np.arange(40))
    assert not np.array_equal(chosen[0], chosen[4])
    resumed = task.batches(Run("float", "float", 0.1, 8), 6)
    for ours, theirs in zip(resumed[0], batches[6], strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_the_network_has_twenty_layers_and_no_weights_in_its_shortcuts():
    model = models.resnet20()
    kinds = [type(layer).__name__ for layer in model.layers]
    assert kinds.count("Conv2D") + kinds.count("Dense") == 20
    assert model.count_params() == 271_098  # and 1,376 of these are moving statistics
    shortcut = models.Shortcut(4)
    x = np.arange(2 * 4 * 4 * 2, dtype="float32").reshape(2, 4, 4, 2)
    found = keras.ops.convert_to_numpy(shortcut(x))
    assert found.shape == shortcut.compute_output_shape(x.shape) == (2, 2, 2, 4)
    np.testing.assert_array_equal(found[..., 1:3], x[:, ::2, ::2])
    assert not found[..., [0, 3]].any()


def test_quantized_runs_start_from_the_weights_of_the_float_run(tmp_path: Path):
    start = tmp_path / "weights" / "float.weights.h5"
    task = cifar.ResNet20(DATA, start, small=True)
    quantized = Run("ridge", "A4W4", 1e-3, 4)
    with pytest.raises(FileNotFoundError, match="--plan float"):
        task.model(quantized)
    row = training.train(task, Run("float", "float", 0.01, 4))
    assert row["val_loss"] < 10
    first, second = (training.prepare(task, quantized).model for _ in range(2))
    for ours, theirs in zip(first.get_weights(), second.get_weights(), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert not hasattr(first.get_layer("stem"), "quantization")
    assert first.get_layer("stage0_block0_conv1").quantization.weights.bits == 4
    assert training.train(task, quantized)["val_accuracy"] is not None


def test_gdnsq_is_trained_on_the_logits_of_the_float_model(tmp_path: Path):
    task = cifar.ResNet20(DATA, tmp_path / "float.weights.h5", small=True)
    training.train(task, Run("float", "float", 0.01, 4))
    gdnsq = Run("gdnsq", "A4W4", 1e-3, 8)
    prepared = training.prepare(task, gdnsq)
    assert isinstance(prepared.trained, keras.distillation.Distiller)
    assert prepared.trained.student is prepared.model
    (callback,) = prepared.callbacks
    assert callback.warmup == 2
    row = training.train(task, gdnsq)
    assert row["val_accuracy"] is not None and row["val_loss"] > 0.0
    assert [{"base_loss", "bits_weights", "temperature"} <= set(p) for p in row["curve"]] == [
        True
    ] * len(row["curve"])
    by_labels = Run("gdnsq", "A4W4", 1e-3, 4, fields={"recipe": {"distil": False}})
    assert not _distils(task, by_labels)
    ridge = Run("ridge", "A4W4", 1e-3, 4)
    assert not _distils(task, ridge)
    assert _distils(task, dataclasses.replace(ridge, fields={"recipe": {"distil": True}}))


def test_students_are_not_judged_by_the_loss_of_the_labels(tmp_path: Path, monkeypatch):
    task = cifar.ResNet20(DATA, tmp_path / "float.weights.h5", small=True)
    training.train(task, Run("float", "float", 0.01, 4))
    monkeypatch.setattr(task, "uniform_loss", lambda: 0.0)
    ridge = Run("ridge", "A4W4", 1e-3, 4)
    assert training.train(task, ridge)["diverged"]
    distilled = dataclasses.replace(ridge, fields={"recipe": {"distil": True}})
    assert not training.train(task, distilled)["diverged"]


def _distils(task: cifar.ResNet20, run: Run) -> bool:
    prepared = training.prepare(task, run)
    return prepared.trained is not prepared.model


def test_the_table_gives_epochs_beside_accuracies():
    plans = resnet20.Plans(epochs=100)
    rows = [
        {**run, "val_accuracy": 0.91, "val_loss": 0.3, "diverged": False, "ms_per_step": 2.0}
        for run in [*plans.float([]), *plans.table([])]
        if run["method"] != "gdnsq"
    ]
    longer = {**rows[1], "steps": 2 * rows[1]["steps"], "val_accuracy": 0.92}
    text = resnet20_tables.tables([*rows, longer], plans)
    assert "| float | 92.82 | 91.00 (100) |  |  |" in text
    assert "| A4W4 | 92.78 | 92.00 (200) |  | 91.00 (100) |" in text
    assert "Other runs" not in text
    assert {run["steps"] for run in plans.table([])} == {20_000}
    assert runs.title(rows[0]).startswith("float")
