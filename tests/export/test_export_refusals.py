"""What `export` refuses, and what it says then; none of it leaves a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from export_cases import dense
from keras import layers

import keras_rq as rq

pytest.importorskip("ai_edge_litert")
pytest.importorskip("tensorflow")

pytestmark = pytest.mark.once


@pytest.mark.parametrize(
    ("arguments", "kind", "complaint"),
    [
        ({"path": "no/such/m.tflite"}, FileNotFoundError, "does not exist"),
        ({"path": "."}, IsADirectoryError, "Received a folder"),
        ({"path": "m.onnx"}, ValueError, "path='{folder}/m.onnx'"),
        ({"path": "m"}, ValueError, "must end in .tflite"),
        ({"format": "onnx"}, ValueError, "format='onnx'"),
        ({"batch_size": 0}, ValueError, "batch_size=0"),
        ({"batch_size": True}, ValueError, "batch_size=True"),
        ({"rtol": -1}, ValueError, "rtol=-1"),
        ({"optimize": "speed"}, ValueError, "speed"),
        ({"inputs": np.zeros((0, 16), np.float32)}, ValueError, "at least one batch of 1"),
        ({"model": "m.keras"}, TypeError, "Received: 'm.keras'"),
    ],
)
def test_wrong_arguments(arguments: Any, kind: type, complaint: str, tmp_path: Path):
    path = tmp_path / arguments.pop("path", "m.tflite")
    model = arguments.pop("model", None) or dense()
    with pytest.raises(kind) as error:
        rq.export(model, path, **arguments)
    assert complaint.format(folder=tmp_path) in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_an_unbuilt_model_is_told_to_be_built(tmp_path: Path):
    with pytest.raises(ValueError, match="'late' is not built"):
        rq.export(keras.Sequential([layers.Dense(2)], name="late"), tmp_path / "m.tflite")


def test_half_precision_is_refused_with_the_layer(tmp_path: Path):
    model = keras.Sequential(
        [keras.Input((8,)), layers.Dense(4, dtype="mixed_bfloat16", name="half")]
    )
    with pytest.raises(ValueError, match="'half' computes in bfloat16"):
        rq.export(model, tmp_path / "m.tflite")


def test_keras_own_quantization_is_refused_with_the_layer(tmp_path: Path):
    model = keras.Sequential([keras.Input((8,)), layers.Dense(4, name="own")])
    model.quantize("int8")
    with pytest.raises(ValueError, match=r"own' carries Keras's own quantization \('int8'\)"):
        rq.export(model, tmp_path / "m.tflite")


@pytest.mark.parametrize("policy", [None, "A4W4"])
def test_a_stateful_layer_is_refused(policy: str | None, tmp_path: Path):
    recurrent = layers.LSTM(4, stateful=True, name="keeps")
    model = keras.Sequential([keras.Input(batch_shape=(4, 5, 3)), recurrent])
    if policy is not None:
        model.quantize(rq.QuantizationPolicy(policy), verbose=False)
    with pytest.raises(ValueError, match=r"keeps' is stateful.*stateful=False"):
        rq.export(model, tmp_path / "m.tflite", batch_size=4)


class Spectrum(layers.Layer):
    """Of rows and columns, for which LiteRT has no operator."""

    def call(self, x: Any) -> Any:
        return keras.ops.fft2((x, keras.ops.zeros_like(x)))[0]


def test_operators_that_litert_lacks_are_named(tmp_path: Path):
    model = keras.Sequential([keras.Input((8, 8)), layers.Dense(8), Spectrum()])
    with pytest.raises(ValueError, match=r"computes tf\.Complex, tf\.FFT2D, which LiteRT has no"):
        rq.export(model, tmp_path / "m.tflite")
    assert list(tmp_path.iterdir()) == []
