"""The three backends compute the same values and gradients."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from gradients import relative_error

TESTS = Path(__file__).parent.parent
BACKENDS = ("tensorflow", "jax", "torch")


@pytest.mark.once
def test_backends_agree(tmp_path: Path):
    path = os.pathsep.join([str(TESTS.parent), os.environ.get("PYTHONPATH", "")])
    running = {
        backend: subprocess.Popen(
            [sys.executable, str(TESTS / "agreement.py"), str(tmp_path / f"{backend}.npz")],
            env={**os.environ, "KERAS_BACKEND": backend, "PYTHONPATH": path},
        )
        for backend in BACKENDS
    }
    assert {name: process.wait() for name, process in running.items()} == dict.fromkeys(BACKENDS, 0)
    arrays = {b: dict(np.load(tmp_path / f"{b}.npz")) for b in BACKENDS}
    errors = {
        (one, other, name): relative_error(arrays[one][name], arrays[other][name])
        for one, other in itertools.combinations(BACKENDS, 2)
        for name in arrays[one]
    }
    assert {at: error for at, error in errors.items() if error > 1e-6} == {}
