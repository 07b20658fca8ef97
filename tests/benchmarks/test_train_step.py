"""The step-time benchmark measures the step that `fit` runs, and its arithmetic is right."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import keras
import numpy as np
import pytest

import keras_rq as rq

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import models
import profiles
import steps
import timing
import train_step

BACKEND = keras.backend.backend()
if BACKEND == "numpy":
    pytest.skip("NumPy does not train", allow_module_level=True)
MODE = steps.MODES[BACKEND][0]  # PyTorch: eager; compiling takes longer than a test may
BATCH = 4


def _model() -> keras.Model:
    dense = keras.layers.Dense
    return keras.Sequential([keras.Input((8,)), dense(16, activation="relu"), dense(3)])


TINY = models.Workload(
    "tiny",
    _model,
    lambda count, random: (
        random.normal(size=(count, 8)).astype("float32"),
        random.integers(0, 3, count, dtype="int32"),
    ),
    {},
    lambda: keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    lambda: keras.optimizers.Adam(1e-2),
)


def _weights(step: steps.Step) -> list[np.ndarray]:
    if BACKEND == "jax":  # the state is outside the model while it trains
        return [np.asarray(value) for value in step.state[0]]
    return [keras.ops.convert_to_numpy(v) for v in step.model.trainable_variables]


def test_the_step_is_the_one_of_fit():
    policy = rq.QuantizationPolicy("A8W8-channel")
    step = steps.make_step(TINY, policy, MODE, steps.on_device(TINY, BATCH))
    for _ in range(3):
        step.wait(step())

    keras.utils.set_random_seed(0)
    model = _model()
    rq.quantize(model, policy, verbose=False)
    model.compile(TINY.optimizer(), TINY.loss(), jit_compile=BACKEND != "torch")
    x, y = TINY.batch(BATCH, np.random.default_rng(0))
    model.fit(x, y, batch_size=BATCH, epochs=3, shuffle=False, verbose=0)

    for ours, fitted in zip(_weights(step), model.get_weights(), strict=True):
        np.testing.assert_allclose(ours, fitted, rtol=1e-4, atol=1e-6)


def test_a_group_has_a_row_per_variant_and_a_failure_is_one_of_them():
    policies: dict[str, Any] = {
        "float": None,
        "A4W4": rq.QuantizationPolicy("A4W4"),
        "wrong": "no policy",
    }
    group = steps.measure(TINY, policies, mode=MODE, batch=BATCH, rounds=2, turn_seconds=1e-3)
    assert list(group.rows) == list(policies)
    assert "no policy" in group.rows["wrong"]["error"]
    assert group.rows["float"]["ratio"] == 1.0
    for setting in ("float", "A4W4"):
        row = group.rows[setting]
        assert 0 < row["ms_q25"] <= row["ms"] <= row["ms_q75"]
        assert row["first_call_s"] > 0
        assert (row["peak_bytes"] or 0) > 0 or row["memory_note"]
        assert train_step.line({"setting": setting, **row}).startswith(setting)
    # Inputs: read and written, and the hidden ones three times more on the way back.
    # Kernels: read and written, and three times on the way back.
    floor = 4 * (BATCH * (2 * 8 + 5 * 16) + 5 * (8 * 16 + 16 * 3))
    assert group.rows["A4W4"]["floor_bytes"] == floor


@pytest.mark.once
def test_turns_are_compared_within_a_round(monkeypatch: pytest.MonkeyPatch):
    clock = SimpleNamespace(now=0.0, calls=0)
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    warm_up, in_a_round = 2 * 6, 6 + 2

    def step(seconds: float) -> None:
        # The machine gets twice as slow with every round, after a first call that compiles.
        round_number = max(0, (clock.calls - warm_up) // in_a_round)
        clock.now += seconds * (10 if clock.calls == 0 else 2**round_number)
        clock.calls += 1

    found = timing.alternate(
        {"float": lambda: step(0.01), "quantized": lambda: step(0.03)},
        lambda result: None,
        rounds=5,
        turn_seconds=0.06,
    )
    assert found["float"]["first_call_s"] == pytest.approx(0.1)
    assert [found[name]["steps_per_turn"] for name in found] == [6, 2]
    assert [found["float"][f"ms{q}"] for q in ("_q25", "", "_q75")] == pytest.approx([20, 40, 80])
    assert found["quantized"]["ms"] == pytest.approx(120)
    for quantile in ("ratio_q25", "ratio", "ratio_q75"):
        assert found["float"][quantile] == 1.0
        assert found["quantized"][quantile] == pytest.approx(3.0)


@pytest.mark.once
def test_results_can_be_resumed(tmp_path: Path):
    path = tmp_path / "steps.json"
    key = train_step.key_of("jax", "jit", "cpu", "mlp", 64)
    results = train_step.Results(path)
    assert results.missing(["float", "A4W4"], **key) == ["float", "A4W4"]
    results.add([{**key, "setting": "float", "ms": 1.0}, {**key, "setting": "A4W4", "error": "!"}])

    resumed = train_step.Results(path)
    assert resumed.missing(["float", "A4W4", "A1W1"], **key) == ["A1W1"]
    assert resumed.missing(["float"], **{**key, "batch": 1024}) == ["float"]
    # The float step is timed again as the new setting's baseline; its row stays the first one.
    added = resumed.add([{**key, "setting": "float", "ms": 2.0}, {**key, "setting": "A1W1"}])
    assert [row["setting"] for row in added] == ["A1W1"]
    rows = json.loads(path.read_text())["rows"]
    assert [(row["setting"], row.get("ms")) for row in rows] == [
        ("float", 1.0),
        ("A4W4", None),
        ("A1W1", None),
    ]
    assert [file.name for file in tmp_path.iterdir()] == ["steps.json"]


@pytest.mark.once
def test_a_trace_of_a_gpu_is_read_from_its_streams_only():
    names = [
        {"name": "process_name", "pid": 1, "args": {"name": "/device:GPU:0"}},
        {"name": "thread_name", "pid": 1, "tid": 1, "args": {"name": "Stream #7(Compute)"}},
        {"name": "thread_name", "pid": 1, "tid": 2, "args": {"name": "XLA Ops"}},
    ]
    kernel = {"ph": "X", "pid": 1, "name": "fusion", "dur": 1.0, "args": {"hlo_op": "fusion"}}
    events = [{**kernel, "tid": 1}, {**kernel, "tid": 2}]
    assert list(profiles._device_events(names + events)) == events[:1]
    assert list(profiles._device_events(events)) == events  # a CPU: whatever XLA ran
