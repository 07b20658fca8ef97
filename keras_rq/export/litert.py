"""LiteRT (.tflite) files from any Keras backend.

TensorFlow traces the model. On another backend a child process does, on a copy of the model that
travels as a .keras file; the result is compared with the user's own model all the same.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import keras
import numpy as np

from keras_rq.export import folding, interpreter, signatures
from keras_rq.export._litert_convert import convert
from keras_rq.export._litert_graph import IntegerGraph
from keras_rq.export.lowering import Call, Lowered, Lowering
from keras_rq.layers.base import QuantizedLayer, all_lowered_by, is_quantized

_OWN_PACKAGES = ("keras", "keras_rq")


@dataclass(frozen=True)
class LiteRTFile:
    """A converted model, not yet written.

    Attributes:
        content: the bytes of the file.
        parts: the bytes of a second file that holds every product of a quantized layer by itself,
            one input and one output each, in the order of the model's calls. Empty without any.
        products: how each of these products runs.
    """

    content: bytes
    parts: bytes
    products: tuple[Lowered, ...]

    @property
    def part_names(self) -> list[str]:
        """What the inputs of `parts` are called, in order."""
        return _part_names(sum(1 for product in self.products if product.alone))


def build(model: keras.Model, specs: Any, optimize: str) -> LiteRTFile:
    """Converts a model to LiteRT.

    Args:
        model: any Keras model.
        specs: structure of `signatures.InputSpec` with fixed shapes.
        optimize: "size" or "latency", see `IntegerGraph`.

    Returns:
        A `LiteRTFile`.

    Raises:
        ImportError: without TensorFlow.
        ValueError: if the model cannot be traced or converted.
    """
    if keras.backend.backend() == "tensorflow":
        return _build_here(model, specs, optimize)
    return _build_in_child(model, specs, optimize)


def _build_here(model: keras.Model, specs: Any, optimize: str) -> LiteRTFile:
    tf = interpreter.require("tensorflow")
    graph, calls = IntegerGraph(optimize), []
    flat = signatures.flatten(specs)

    def serve(*arrays: Any) -> Any:
        outputs = model(signatures.pack_like(specs, arrays), training=False)
        return tuple(signatures.flatten(outputs))

    signature = [tf.TensorSpec(spec.shape, spec.dtype, name=spec.name) for spec in flat]
    folds = folding.folds_of(model)
    lower = all_lowered_by(model, lambda layer: Lowering(graph, layer, calls, folds.get(id(layer))))
    with lower, folding.without_norms(folds):
        content = _convert(serve, signature, graph)
    apart = [call for call in calls if call.lowered.alone]
    parts = _build_parts(apart, optimize) if apart else b""
    return LiteRTFile(content, parts, (*(call.lowered for call in calls), *_pairs(model)))


def _pairs(model: keras.Model) -> Iterator[Lowered]:
    """The products of two activations, which the trace holds as they are trained."""
    for layer in _quantized(model):
        for name in layer.pairs():
            reason = "it is a product of two activations"
            yield Lowered(f"{layer.path}/{name}", "float", reason, alone=False)


def _quantized(model: keras.Model) -> list[QuantizedLayer]:
    return [layer for layer in model._flatten_layers() if is_quantized(layer)]


def _convert(function: Callable[..., Any], signature: list[Any], graph: IntegerGraph) -> bytes:
    tf = interpreter.require("tensorflow")
    traced = tf.function(function, input_signature=signature, autograph=False)
    return convert(graph, traced.get_concrete_function())


def _build_parts(calls: list[Call], optimize: str) -> bytes:
    tf = interpreter.require("tensorflow")
    graph = IntegerGraph(optimize)

    def serve(*arrays: Any) -> Any:
        return tuple(
            Lowering(graph, call.layer, [], call.fold)(call.name, call.product, x)
            for call, x in zip(calls, arrays, strict=True)
        )

    named = zip(calls, _part_names(len(calls)), strict=True)
    signature = [tf.TensorSpec(call.shape, call.dtype, name=name) for call, name in named]
    return _convert(serve, signature, graph)


def _part_names(count: int) -> list[str]:
    return [f"input_{i}" for i in range(count)]


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
            "paths": [layer.path for layer in _quantized(model)],
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
                f"Model {model.name!r} could not be converted by the TensorFlow process that "
                f"exports from the {keras.backend.backend()!r} backend. "
                + _last_words(child.stderr.splitlines())
            )
        products = json.loads(child.stdout.splitlines()[-1])
        parts = target.with_suffix(".parts").read_bytes()
        return LiteRTFile(target.read_bytes(), parts, tuple(Lowered(**p) for p in products))


def _last_words(lines: list[str]) -> str:
    """The exception that ended a process, from its traceback on the standard error."""
    ends = [i for i, line in enumerate(lines) if line.startswith("Traceback (")]
    said = lines[-12:]
    if ends:
        after = lines[ends[-1] + 1 :]
        said = itertools.dropwhile(lambda line: not re.match(r"[A-Za-z_][\w.]*(:|$)", line), after)
    text = "\n".join(said).split("\n\nArguments received by")[0] or "It said nothing."
    if "register_keras_serializable" in text or "ModuleNotFoundError" in text:
        text += (
            "\nWhat the model uses of your own code (layers, activations, functions) must be "
            "registered with Keras in a module that the process can import."
        )
    return text


def _modules_of(model: keras.Model) -> list[str]:
    """Modules that a child process must import to know the model's own classes and functions."""
    modules = _registering(keras.saving.serialize_keras_object(model))
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


def _registering(config: Any) -> set[str]:
    """Modules that registered with Keras what a configuration names, by either of its names."""
    names = set(_strings(config))
    return {
        made.__module__
        for name, made in keras.saving.get_custom_objects().items()
        if {name, name.rpartition(">")[2]} & names
        and made.__module__.split(".")[0] not in (*_OWN_PACKAGES, "__main__")
    }


def _strings(config: Any) -> Iterator[str]:
    if isinstance(config, str):
        yield config
    elif isinstance(config, (dict, list, tuple)):
        for part in config.values() if isinstance(config, dict) else config:
            yield from _strings(part)


def child_main(request: dict[str, Any]) -> list[dict[str, Any]]:
    """The other end of the child process: loads, converts, and writes the file."""
    for module in request["modules"]:
        __import__(module)
    model = keras.saving.load_model(request["source"], compile=False)
    # Keras builds what a wrapper holds before the wrapper, when it loads: without its name around.
    for layer, path in zip(_quantized(model), request["paths"], strict=True):
        layer._path = path
    built = _build_here(model, signatures.from_json(request["specs"]), request["optimize"])
    target = Path(request["target"])
    target.write_bytes(built.content)
    target.with_suffix(".parts").write_bytes(built.parts)
    return [asdict(product) for product in built.products]


def runner(
    content: bytes, names: Sequence[str]
) -> Callable[[Sequence[np.ndarray]], list[np.ndarray]]:
    """A function from the flat inputs of a file to its outputs, both in the model's order.

    Args:
        content: the bytes of the file.
        names: of its inputs, in that order; the file itself lists them by the alphabet.
    """
    signature = interpreter.load(content).get_signature_runner()

    def run(arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
        outputs = signature(**dict(zip(names, arrays, strict=True)))
        return [outputs[f"output_{i}"] for i in range(len(outputs))]

    return run
