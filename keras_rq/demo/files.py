"""Writing .tflite files, and holding them against the models they came from."""

from __future__ import annotations

from pathlib import Path

import keras
import numpy as np

import keras_rq as rq
from keras_rq.demo import training
from keras_rq.demo.digits import Digits
from keras_rq.demo.results import FileResult
from keras_rq.export import interpreter

FLOAT = "float"


def write(model: keras.Model, name: str, folder: Path, images: np.ndarray) -> Path:
    """Exports a model as `<folder>/<name>.tflite`, checked on the images before it is written."""
    path = folder / f"{name}.tflite"
    rq.export(model, path, inputs=images, verbose=False)
    return path


def compare(
    models: dict[str, keras.Model], paths: dict[str, Path], digits: Digits
) -> dict[str, FileResult]:
    """Runs every file over all test images and times them in turns.

    Args:
        models: the models, by the name of their file; one of them is called `FLOAT`.
        paths: where each was written.
        digits: holds the test images.

    Returns:
        One result for each name.
    """
    buffers = {name: path.read_bytes() for name, path in paths.items()}
    seconds = interpreter.time_buffers(buffers, [digits.test_images[:1]])
    return {
        name: _compare(
            paths[name],
            training.predict(model, digits),
            logits(buffers[name], digits.test_images),
            digits.test_labels,
            seconds[name],
            seconds[FLOAT],
        )
        for name, model in models.items()
    }


def logits(buffer: bytes, images: np.ndarray) -> np.ndarray:
    """What the file answers to each image, one image at a time, as on a phone."""
    loaded = interpreter.load(buffer)
    source, target = loaded.get_input_details()[0], loaded.get_output_details()[0]
    answers = []
    for image in images:
        loaded.set_tensor(source["index"], image[None])
        loaded.invoke()
        answers.append(loaded.get_tensor(target["index"])[0])
    return np.stack(answers)


def _compare(
    path: Path,
    expected: np.ndarray,
    received: np.ndarray,
    labels: np.ndarray,
    seconds: float,
    float_seconds: float,
) -> FileResult:
    return FileResult(
        name=path.name,
        size=path.stat().st_size,
        accuracy=float(np.mean(received.argmax(-1) == labels)),
        largest_difference=float(np.abs(received - expected).max()),
        largest_logit=float(np.abs(expected).max()),
        classes_differ=int(np.sum(received.argmax(-1) != expected.argmax(-1))),
        seconds=seconds,
        latency_ratio=seconds / float_seconds,
    )
