"""What another process sees: models older than the import, files of models quantized elsewhere."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from zoo import MAKERS

import keras_rq as rq

pytestmark = pytest.mark.once

HERE = Path(__file__).resolve().parent


def run(script: str, *arguments: str) -> str:
    folders = [str(HERE), str(HERE.parent), str(HERE.parent.parent)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(folders)}
    command = [sys.executable, "-c", script, *arguments]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


OLDER = """
import sys
from zoo import nested, subclassed
members = nested(), subclassed()
before = [m.predict() for m in members]
assert not any(name.startswith("keras_rq") for name in sys.modules)
import keras_rq as rq
for member, old in zip(members, before):
    report = member.model.quantize(rq.QuantizationPolicy("A4W1"), verbose=False)
    assert not report.kept_float
    assert abs(member.predict() - old).max() > 1e-3
    member.compile()
    losses = member.fit(epochs=4)
    assert losses[-1] < losses[0]
print("done")
"""


def test_models_made_before_the_import():
    assert run(OLDER).endswith("done\n")


NEWER = """
import sys
import keras, numpy as np
import keras_rq
names = sys.argv[2:]
if "subclassed" in names:
    import zoo  # registers the class that the file names
for name in names:
    model = keras.saving.load_model(f"{sys.argv[1]}/{name}.keras")
    x = np.load(f"{sys.argv[1]}/{name}.npy")
    np.save(f"{sys.argv[1]}/{name}_loaded.npy", model.predict(x, verbose=0))
"""


def test_a_process_with_a_fresh_registry_loads_everything(tmp_path: Path):
    names = ["tokens", "subclassed"]
    expected = {}
    for name in names:
        member = MAKERS[name]()
        member.model.quantize(rq.QuantizationPolicy("A4W1"), verbose=False)
        member.compile()
        member.model.save(tmp_path / f"{name}.keras")
        np.save(tmp_path / f"{name}.npy", member.x)
        expected[name] = member.predict()
    run(NEWER, str(tmp_path), *names)
    for name in names:
        np.testing.assert_array_equal(np.load(tmp_path / f"{name}_loaded.npy"), expected[name])


WITHOUT = """
import sys, keras
try:
    keras.saving.load_model(sys.argv[1])
except TypeError as error:
    assert "keras_rq" in str(error), error
    print("refused")
"""


def test_without_keras_rq_the_error_names_it(tmp_path: Path):
    member = MAKERS["nested"]()
    member.model.quantize(rq.QuantizationPolicy("A4W1"), verbose=False)
    member.model.save(tmp_path / "m.keras")
    assert run(WITHOUT, str(tmp_path / "m.keras")) == "refused\n"
