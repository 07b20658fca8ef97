"""A model saved on one backend predicts the same on the other two."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import across
import pytest

HERE = Path(__file__).resolve().parent
OTHERS = ("jax", "torch")


def start(backend: str, folder: Path) -> subprocess.Popen:
    paths = [str(HERE), str(HERE.parent.parent)]
    environment = {
        **os.environ,
        "KERAS_BACKEND": backend,
        "PYTHONPATH": os.pathsep.join(paths),
        "XLA_FLAGS": "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false",
    }
    return subprocess.Popen(
        [sys.executable, str(HERE / "across.py"), str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )


# A code may differ where a value lies within rounding of the middle between two; none does here.
@pytest.mark.once
def test_models_travel_between_backends(tmp_path: Path):
    processes = {backend: start(backend, tmp_path) for backend in OTHERS}
    across.save(tmp_path)
    for process in processes.values():
        assert process.stdout.readline() == "saved\n"
    everyone = (across.BACKEND, *OTHERS)
    for backend, process in processes.items():
        process.stdin.write(json.dumps([b for b in everyone if b != backend]) + "\n")
        process.stdin.flush()
    found = {across.BACKEND: {other: across.differences(tmp_path, other) for other in OTHERS}}
    for backend, process in processes.items():
        found[backend] = json.loads(process.communicate()[0])
        assert process.returncode == 0
    different = {
        f"{output}: saved by {saved}, loaded by {loaded}": difference
        for loaded, of in found.items()
        for saved, outputs in of.items()
        for output, difference in outputs.items()
        if not difference < 1e-5
    }
    assert not different
    assert sum(len(outputs) for of in found.values() for outputs in of.values()) == 6 * 8
