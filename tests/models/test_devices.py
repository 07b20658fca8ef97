"""Several devices train as one does: what is quantized does not depend on where it lies."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import keras
import pytest

ROOT = Path(__file__).resolve().parents[2]
BACKEND = keras.backend.backend()
PLACES = {"jax": {"data", "model"}, "tensorflow": {"data"}, "torch": {"data"}}
# What is compared is compiled code either way, and compiling takes most of the time.
FAST = (
    "--xla_cpu_use_fusion_emitters=false --xla_backend_optimization_level=0"
    " --xla_llvm_disable_expensive_passes=true"
)


@pytest.fixture(scope="module")
def rows():
    script = [sys.executable, str(ROOT / "benchmarks" / "devices.py"), "--worker", BACKEND]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": FAST}
    done = subprocess.run(
        [*script, "--seeds", "1", "--models", "mlp", "--policies", "A4W4-mixed"],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_steps_are_those_of_one_device(rows: list[dict]):
    found = {row["place"]: row for row in rows if "chain" in row}
    assert found.keys() == PLACES[BACKEND]
    for row in found.values():
        assert row["last_loss"] < 0.5 * row["first_loss"]
        assert row["same"] < 1e-5 and row["update"] < 1e-4
        # The layers are small: no value lies on the border of two codes, where devices, which add
        # up in another order, may part for good (benchmarks/devices.py counts how often).
        assert row["chain"] < 1e-5


def test_blocks_split_across_devices_have_the_statistics_of_one(rows: list[dict]):
    found = {row["place"]: row for row in rows if "codes" in row}
    assert found.keys() == PLACES[BACKEND]
    for row in found.values():
        assert row["codes"] == 320 * 256
        assert row["differing"] == 0 and row["scale"] < 1e-6
