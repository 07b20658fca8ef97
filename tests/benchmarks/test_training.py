"""A benchmark's training run: its rate, its batches, what decays, and how it is resumed."""

from __future__ import annotations

import dataclasses
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import keras
import numpy as np
import pytest
from keras import layers

import keras_rq as rq

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import methods
import steps
import training
from batches import Gathered, resident
from training import Run

if keras.backend.backend() == "numpy":
    pytest.skip("NumPy does not train", allow_module_level=True)

# PyTorch draws dropout from a generator of its own, whose state no variable holds: a run that is
# resumed has other masks there.
DROPOUT = 0.0 if keras.backend.backend() == "torch" else 0.3
RUN = Run("ridge", "A4W4", 1e-2, 12)


class Tiny(training.Task):
    """Which of eight inputs is largest, by a network with dropout and a norm."""

    def __init__(self) -> None:
        random = np.random.default_rng(0)
        self.x = random.normal(size=(64, 8)).astype("float32")
        self.y = self.x.argmax(1).astype("int32")

    def rules(self):
        return [rq.Rule("head", skip=True)]

    def model(self, run):
        inputs = keras.Input((8,))
        x = layers.LayerNormalization()(layers.Dense(16, name="hidden")(inputs))
        x = layers.Dropout(DROPOUT)(layers.Activation("relu")(x))
        return keras.Model(inputs, layers.Dense(8, name="head")(x))

    def optimizer(self, run):
        schedule = training.WarmupCosine(run.lr, run.steps, warmup=2, final=0.1)
        return schedule.attach(keras.optimizers.AdamW(schedule, weight_decay=0.1))

    def batches(self, run, start):
        data = resident(self.x), resident(self.y)
        picks = np.random.default_rng(run.seed).integers(0, 64, (run.steps, 8), dtype="int32")

        def gather(x, y, index):
            return x[index], y[index]

        return Gathered(gather, data, lambda step: (picks[step],), start, run.steps)

    def interval(self, run):
        return 4

    def validation(self, run, final):
        return {"x": self.x, "y": self.y, "batch_size": 32}

    def uniform_loss(self):
        return math.log(8)


def test_the_rate_is_that_of_nanogpt():
    peak, total, warmup, final = 3e-3, 50, 10, 0.1

    def expected(step: int) -> float:  # get_lr of train.py, with min_lr = final * peak
        if step < warmup:
            return peak * (step + 1) / (warmup + 1)
        ratio = (step - warmup) / (total - warmup)
        return final * peak + 0.5 * (1 + math.cos(math.pi * ratio)) * (peak - final * peak)

    schedule = training.WarmupCosine(peak, total, warmup, final)
    attached = training.WarmupCosine(peak, total, warmup, final)
    optimizer = attached.attach(keras.optimizers.SGD(attached))
    for step in (0, 1, 9, 10, 11, 30, 49, 50):
        for found in (schedule, attached):
            rate = float(keras.ops.convert_to_numpy(found(step)))
            assert rate == pytest.approx(expected(step), rel=1e-5)
    # What differs between runs is state, not part of the compiled step.
    peak_variable = next(v for v in optimizer.variables if v.name == "peak")
    peak_variable.assign(2 * peak)
    doubled = float(keras.ops.convert_to_numpy(optimizer.learning_rate))
    assert doubled == pytest.approx(2 * expected(0), rel=1e-5)


def test_only_matrices_of_the_float_model_decay():
    prepared = training.prepare(Tiny(), RUN)
    optimizer = prepared.model.optimizer
    decays = {v.path for v in prepared.model.trainable_variables if optimizer._use_weight_decay(v)}
    assert decays == {"hidden/kernel", "head/kernel"}


def test_an_interrupted_run_ends_like_an_uninterrupted_one(tmp_path: Path):
    whole = training.train(Tiny(), RUN)
    checkpoint = training.Checkpoint(tmp_path / "run.npz")
    parts = []
    while not parts or parts[-1] is None:
        assert len(parts) < 3, "a run of three intervals was interrupted three times"
        parts.append(training.train(Tiny(), RUN, deadline=0.0, checkpoint=checkpoint))
    assert len(parts) == 3
    assert [point["step"] for point in parts[-1]["curve"]] == [4, 8, 12]
    for name in ("val_loss", "val_accuracy"):
        assert parts[-1][name] == pytest.approx(whole[name], rel=1e-6)
        for ours, theirs in zip(parts[-1]["curve"], whole["curve"], strict=True):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-6)
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_ended_leaves_the_dtype_to_the_next_one():
    before = keras.config.dtype_policy().name
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        steps.forget()
        assert keras.config.dtype_policy().name == "mixed_bfloat16"
    finally:
        keras.config.set_dtype_policy(before)


def test_steps_that_are_one_program_train_as_steps_one_by_one(monkeypatch: pytest.MonkeyPatch):
    # Under JAX a loop over batches with an axis in front; elsewhere Keras's own executions.
    class Anew(keras.callbacks.Callback):  # as some do where a step is to be another one
        def on_epoch_end(self, epoch, logs=None):
            self.model.make_train_function(force=True)

    monkeypatch.setattr(methods, "prepare", lambda *args: [Anew()])
    found = []
    for together in (1, 4):
        monkeypatch.setattr(training, "STEPS_PER_EXECUTION", together)
        found.append(training.train(Tiny(), RUN))
    one, four = ([point["loss"] for point in row["curve"]] for row in found)
    assert four == pytest.approx(one, rel=1e-5)
    assert found[1]["val_loss"] == pytest.approx(found[0]["val_loss"], rel=1e-5)


def test_a_row_says_what_the_run_was_and_what_it_costs():
    row = training.train(Tiny(), RUN)
    assert (row["method"], row["setting"], row["lr"], row["steps"]) == ("ridge", "A4W4", 1e-2, 12)
    assert row["ms_per_step"] > 0
    assert row["energy_per_product"] == 16
    # A block of eight 4-bit codes holds a float32 scale and offset, too.
    assert row["bits_per_element"] == 4 + 64 / 8
    assert row["energy_total"] > row["energy_per_product"] * 8 * 16  # the head is float
    assert rq.QuantizationPolicy.from_config(row["policy"]).weights.bits == 4
    assert not row["diverged"]
    float_row = training.train(Tiny(), Run("float", "float", 1e-2, 4))
    assert (float_row["bits_per_element"], float_row["energy_per_product"]) == (32, 1024)


def test_a_run_whose_loss_is_nan_ends_early_and_says_so():
    row = training.train(Tiny(), Run("float", "float", float("inf"), 12))
    assert row["diverged"]
    assert row["val_loss"] is None
    assert [point["step"] for point in row["curve"]] == [4]


@pytest.mark.once
def test_divergence_is_a_rise_of_the_training_loss_or_a_loss_beyond_hope():
    assert not training._has_diverged([2.0, 1.9, 2.1], 3.0)
    assert training._has_diverged([2.0, 1.0, 1.4], 3.0)
    assert training._has_diverged([3.1], 3.0)
    assert training._has_diverged([2.0, None], 3.0)


@pytest.mark.once
def test_methods_are_quantizers_at_a_setting():
    def quantizers(method: str, setting: str, fields: dict | None = None):
        policy = methods.policy(method, setting, fields or {})
        return policy.weights, policy.activations

    assert methods.policy("float", "float", {}) is None
    default = rq.QuantizationPolicy("A4W1-2:4")
    assert quantizers("recommended", "A4W1-2:4") == (default.weights, default.activations)
    weights, activations = quantizers("ridge", "A4W1")
    assert (weights.range, weights.affine, weights.bits) == ("minmax", True, 1)
    assert (activations.range, activations.affine, activations.bits) == ("minmax", True, 4)
    weights, activations = quantizers("ridge", "A1.5W1-2:4")
    assert (weights.range, weights.affine, weights.sparsity) == ("absmax", False, "2:4")
    assert (activations.range, activations.affine, activations.sparsity) == ("absmax", False, None)
    assert not quantizers("ridge_linear", "A1W1")[0].has_offset
    assert quantizers("ste", "A2W2")[0] == rq.quantizers.StraightThrough(2)
    assert methods.policy("ridge", "W4", {}).activations is None
    starts = [methods.policy("gdnsq", "A4W1", {}, reach=r).weights.start_bits for r in (2, 100)]
    assert starts == [1.25, 10]
    with pytest.raises(ValueError, match="sparsity"):
        methods.policy("gdnsq", "A4W1-2:4", {})


@pytest.mark.once
def test_fields_replace_those_of_a_method():
    fields = {
        "both": {"range": "rms", "trust": 1.0},
        "weights": {"trust": 1.6, "block_size": "channel"},
        "activations": {"class": "StraightThrough"},
    }
    policy = methods.policy("ridge", "A1W1", fields, [rq.Rule("head", skip=True)])
    assert (policy.weights.trust, policy.weights.block_size) == (1.6, "channel")
    assert policy.activations == rq.quantizers.StraightThrough(1, range="rms", trust=1.0)
    assert len(policy.rules) == 1
    with pytest.raises(ValueError, match="Ridge has no field width"):
        methods.policy("ridge", "A1W1", {"both": {"width": 3}})
    with pytest.raises(LookupError, match="no method 'rigde'"):
        methods.policy("rigde", "A1W1", {})
    with pytest.raises(LookupError, match="no quantizer 'Nothing'"):
        methods.policy("ridge", "A1W1", {"weights": {"class": "Nothing"}})


@pytest.mark.once
def test_a_method_is_made_ready_by_calibration_and_callbacks(monkeypatch: pytest.MonkeyPatch):
    calibrated, scheduled = [], []

    def schedule(stages, *, unit):
        scheduled.append((stages, unit))
        return keras.callbacks.Callback()

    callbacks = SimpleNamespace(QuantizationSchedule=schedule)
    monkeypatch.setattr(rq, "callbacks", callbacks, raising=False)
    monkeypatch.setattr(
        rq, "calibrate", lambda model, data, verbose: calibrated.append(data), raising=False
    )
    training.prepare(Tiny(), RUN)
    assert not calibrated
    assert not scheduled
    fields = {"calibrate": True, "stages": {"0": None, "8": {"weights": {"bits": 1}}}}
    prepared = training.prepare(Tiny(), dataclasses.replace(RUN, fields=fields))
    assert len(prepared.callbacks) == 1
    assert scheduled == [({0: None, 8: {"weights": {"bits": 1}}}, "step")]
    assert [batch.shape for batch in calibrated[0]] == [(8, 8)] * training.CALIBRATED
    # A callback may count batches: none are run together.
    assert prepared.model.steps_per_execution == 1
