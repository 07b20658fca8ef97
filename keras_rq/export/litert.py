"""LiteRT (.tflite) files from any Keras backend.

TensorFlow traces the model. On another backend a child process does, on a copy of the model that
travels as a .keras file; the result is compared with the user's own model all the same.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import keras
import numpy as np

from keras_rq.export import _interpreter, signatures
from keras_rq.export._flatbuffer import WeightPatch
from keras_rq.export._litert_graph import IntegerGraph, convert
from keras_rq.export.lowering import Lowered, Lowering
from keras_rq.layers.base import QuantizedLayer, lowered_by

_OWN_PACKAGES = ("keras", "keras_rq")


@dataclass(frozen=True)
class LiteRTFile:
    """A converted model, not yet written.

    Attributes:
        content: the bytes of the file.
        products: how each product of a quantized layer runs.
    """

    content: bytes
    products: tuple[Lowered, ...]


def build(model: keras.Model, shapes: Any, optimize: str) -> LiteRTFile:
    """Converts a model to LiteRT.

    Args:
        model: any Keras model.
        shapes: structure of `signatures.InputSpec` with fixed shapes.
        optimize: "size" or "latency", see `IntegerGraph`.

    Returns:
        A `LiteRTFile`.

    Raises:
        ImportError: without TensorFlow.
        ValueError: if the model cannot be traced or converted.
    """
    if keras.backend.backend() == "tensorflow":
        return _build_here(model, shapes, optimize)
    return _build_in_child(model, shapes, optimize)


def _build_here(model: keras.Model, specs: Any, optimize: str) -> LiteRTFile:
    tf = _interpreter.require("tensorflow")
    graph, log = IntegerGraph(optimize), []
    flat = signatures.flatten(specs)

    def serve(*arrays: Any) -> Any:
        return model(signatures.pack_like(specs, arrays), training=False)

    signature = [tf.TensorSpec(spec.shape, spec.dtype, name=spec.name) for spec in flat]
    with contextlib.ExitStack() as stack:
        for layer in model._flatten_layers():
            if isinstance(layer, QuantizedLayer):
                stack.enter_context(lowered_by(layer, Lowering(graph, layer, log)))
        function = tf.function(serve, input_signature=signature, autograph=False)
        concrete = function.get_concrete_function()
    return LiteRTFile(convert(graph, concrete), tuple(log))


def _build_in_child(model: keras.Model, specs: Any, optimize: str) -> LiteRTFile:
    with tempfile.TemporaryDirectory(prefix="keras_rq_") as folder:
        source, target = Path(folder, "model.keras"), Path(folder, "model.tflite")
        model.save(source)
        request = {
            "source": str(source),
            "target": str(target),
            "optimize": optimize,
            "specs": signatures.to_json(specs),
            "modules": _modules_of(model),
            "path": sys.path,
        }
        environment = {**os.environ, "KERAS_BACKEND": "tensorflow", "TF_CPP_MIN_LOG_LEVEL": "3"}
        command = [sys.executable, "-m", "keras_rq.export.litert_child"]
        child = subprocess.run(
            command,
            input=json.dumps(request),
            capture_output=True,
            text=True,
            env=environment | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
            check=False,
        )
        if child.returncode:
            raise ValueError(
                f"Converting model {model.name!r} with TensorFlow failed:\n{child.stderr[-3000:]}"
            )
        products = json.loads(child.stdout.splitlines()[-1])
        return LiteRTFile(target.read_bytes(), tuple(Lowered(**p) for p in products))


def _modules_of(model: keras.Model) -> list[str]:
    """Modules that a child process must import to know the model's own layer classes."""
    modules = set()
    for layer in model._flatten_layers():
        for cls in type(layer).__mro__:
            module = cls.__module__
            if module == "__main__":
                raise ValueError(
                    f"Layer {layer.name!r} is of class {cls.__name__}, which is defined in the "
                    "running script. Export from the "
                    f"{keras.backend.backend()!r} backend goes through a TensorFlow process, which "
                    "cannot import it: move the class to a module of its own."
                )
            if issubclass(cls, keras.layers.Layer) and module.split(".")[0] not in _OWN_PACKAGES:
                modules.add(module)
    return sorted(modules)


def child_main(request: dict[str, Any]) -> list[dict[str, Any]]:
    """The other end of the child process: loads, converts, and writes the file."""
    for module in request["modules"]:
        __import__(module)
    model = keras.saving.load_model(request["source"], compile=False)
    built = _build_here(model, signatures.from_json(request["specs"]), request["optimize"])
    Path(request["target"]).write_bytes(built.content)
    return [asdict(product) for product in built.products]


def runner(content: bytes, specs: Any) -> Any:
    """A function from model inputs to the list of the file's outputs, in the file's order."""
    interpreter = _interpreter.load(content)
    details = {d["name"]: d for d in interpreter.get_input_details()}
    by_name = _interpreter.input_order(interpreter, [s.name for s in signatures.flatten(specs)])
    del details

    def run(inputs: Any) -> list[np.ndarray]:
        for index, array in zip(by_name, signatures.flatten(inputs), strict=True):
            interpreter.set_tensor(index, array)
        interpreter.invoke()
        return [interpreter.get_tensor(d["index"]) for d in interpreter.get_output_details()]

    return run


def stored_types(patches: Sequence[WeightPatch]) -> list[str]:
    return [patch.storage for patch in patches]
