"""Running and inspecting TFLite buffers with LiteRT.

Small helpers over ``ai_edge_litert``'s interpreter: run a buffer, time several buffers
against each other, and say which integer products XNNPACK really took.
"""

from __future__ import annotations

import dataclasses
import importlib
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

import numpy as np

_EXTRAS = {
    "ai_edge_litert": "litert",
    "flatbuffers": "litert",
    "tensorflow": "tensorflow",
    "absl": "tensorflow",
}
_INTEGER_PRODUCTS = ("FULLY_CONNECTED", "CONV_2D", "DEPTHWISE_CONV_2D", "BATCH_MATMUL")
_INTEGER_TYPES = ("INT8", "INT4", "INT2")


def require(module: str) -> ModuleType:
    """Imports `module` on first use, or says which extra of this package brings it.

    Args:
        module: dotted name of a module of, or brought by, `ai_edge_litert` or `tensorflow`.
    """
    package = module.partition(".")[0]
    loaded = sys.modules.get(module)
    if loaded is not None:  # AutoGraph, which may be watching, cannot follow an import.
        return loaded
    try:
        return importlib.import_module(module)
    except ImportError as error:
        extra = _EXTRAS.get(package, package)
        raise ImportError(
            f"Exporting to TFLite needs the package `{package}`, which could not be imported "
            f"({error}). Install it with `pip install keras-rq[{extra}]`."
        ) from error


@dataclasses.dataclass(frozen=True)
class IntegerKernel:
    """One product of a TFLite file whose weights are stored as integers.

    Attributes:
        op: the TFLite operator, e.g. `"FULLY_CONNECTED"`.
        weight: name of the weight tensor.
        storage: its type in the file: `"INT8"`, `"INT4"` or `"INT2"`.
        shape: its shape in the file.
        delegated: whether XNNPACK took the operator. An operator outside the delegate runs the
            built-in reference kernel, which is slow.
    """

    op: str
    weight: str
    storage: str
    shape: tuple[int, ...]
    delegated: bool


def load(buffer: bytes, threads: int = 1, delegate: bool = True) -> Any:
    """Returns a LiteRT interpreter for `buffer` with its tensors allocated.

    Args:
        buffer: a TFLite flatbuffer.
        threads: number of CPU threads.
        delegate: whether XNNPACK may be used. Without it every operator runs its built-in
            kernel.
    """
    litert = require("ai_edge_litert.interpreter")
    resolver = litert.OpResolverType
    interpreter = litert.Interpreter(
        model_content=buffer,
        num_threads=threads,
        experimental_op_resolver_type=(
            resolver.AUTO if delegate else resolver.BUILTIN_WITHOUT_DEFAULT_DELEGATES
        ),
    )
    interpreter.allocate_tensors()
    return interpreter


def run(
    buffer: bytes,
    inputs: Mapping[str, np.ndarray] | Sequence[np.ndarray],
    threads: int = 1,
    delegate: bool = True,
) -> list[np.ndarray]:
    """Runs `buffer` once.

    Args:
        buffer: a TFLite flatbuffer.
        inputs: arrays in the order of the file's inputs, or keyed by input name.
        threads: number of CPU threads.
        delegate: whether XNNPACK may be used.

    Returns:
        The outputs, in the order of the file's outputs.
    """
    interpreter = load(buffer, threads, delegate)
    _set_inputs(interpreter, inputs)
    interpreter.invoke()
    return [interpreter.get_tensor(d["index"]) for d in interpreter.get_output_details()]


def time_buffers(
    buffers: Mapping[str, bytes],
    inputs: Mapping[str, np.ndarray] | Sequence[np.ndarray],
    threads: int = 1,
    repeats: int = 15,
    seconds_per_sample: float = 0.004,
) -> dict[str, float]:
    """Times several files on the same inputs and returns their median seconds per run.

    The files take turns, so that a machine that slows down slows all of them alike: compare
    the numbers of one call with each other, not with those of another call.
    """
    interpreters, inner = {}, {}
    for name, buffer in buffers.items():
        interpreter = interpreters[name] = load(buffer, threads)
        _set_inputs(interpreter, inputs)
        interpreter.invoke()
        once = _seconds(interpreter, 1)
        inner[name] = max(1, int(seconds_per_sample / max(once, 1e-7)))
    samples: dict[str, list[float]] = {name: [] for name in buffers}
    for _ in range(repeats):
        for name, interpreter in interpreters.items():
            samples[name].append(_seconds(interpreter, inner[name]) / inner[name])
    return {name: statistics.median(values) for name, values in samples.items()}


def tensor_types(buffer: bytes) -> dict[str, str]:
    """Returns the storage type of every tensor of the file, by tensor name."""
    schema = require("ai_edge_litert.schema_py_generated")
    types = _enum_names(schema.TensorType)
    model = schema.ModelT.InitFromPackedBuf(buffer, 0)
    return {
        _text(tensor.name): types[tensor.type]
        for graph in model.subgraphs
        for tensor in graph.tensors
    }


def op_names(buffer: bytes) -> list[str]:
    """Returns the operators that really run, with `"DELEGATE"` for each XNNPACK region."""
    ops = load(buffer)._get_ops_details()
    taken = _delegated_ops(ops)
    return [op["op_name"] for op in ops if op["index"] not in taken]


def integer_kernels(buffer: bytes) -> list[IntegerKernel]:
    """Lists the products whose weights are stored as integers, and whether XNNPACK took them."""
    schema = require("ai_edge_litert.schema_py_generated")
    graph = schema.ModelT.InitFromPackedBuf(buffer, 0).subgraphs[0]
    types = _enum_names(schema.TensorType)
    ops = load(buffer)._get_ops_details()
    taken = _delegated_ops(ops)
    found = []
    for op in ops:
        if op["op_name"] not in _INTEGER_PRODUCTS or len(op["inputs"]) < 2:
            continue
        weight = graph.tensors[op["inputs"][1]]
        if types[weight.type] in _INTEGER_TYPES:
            found.append(
                IntegerKernel(
                    op=op["op_name"],
                    weight=_text(weight.name),
                    storage=types[weight.type],
                    shape=tuple(int(d) for d in weight.shape),
                    delegated=op["index"] in taken,
                )
            )
    return found


def _delegated_ops(ops: Sequence[dict[str, Any]]) -> set[int]:
    """Finds which of the file's operators now run inside a delegate.

    LiteRT keeps the operators that a delegate replaced in its list and appends one `DELEGATE`
    per region, without saying which operators a region holds. But a region's inputs (constants
    included) and outputs are listed, and they enclose it: the operators met on the way back
    from its outputs to its inputs are the ones it replaced.
    """
    producers = {
        int(output): op for op in ops if op["op_name"] != "DELEGATE" for output in op["outputs"]
    }
    taken: set[int] = set()
    for region in (op for op in ops if op["op_name"] == "DELEGATE"):
        border = {int(i) for i in region["inputs"]}
        pending = [int(o) for o in region["outputs"]]
        while pending:
            op = producers.get(pending.pop())
            if op is None or op["index"] in taken:
                continue
            taken.add(op["index"])
            pending += [int(i) for i in op["inputs"] if i >= 0 and int(i) not in border]
    return taken


def _set_inputs(interpreter: Any, inputs: Mapping[str, np.ndarray] | Sequence[np.ndarray]) -> None:
    details = interpreter.get_input_details()
    names = [detail["name"] for detail in details]
    if isinstance(inputs, Mapping):
        if sorted(inputs) != sorted(names):
            raise ValueError(
                f"`inputs` must have one array for each input of the file. Received the names "
                f"{sorted(inputs)}; the file's inputs are {names}."
            )
        inputs = [inputs[name] for name in names]
    if len(inputs) != len(details):
        raise ValueError(
            f"`inputs` must have one array for each input of the file. Received {len(inputs)} "
            f"arrays; the file's inputs are {names}."
        )
    for detail, value in zip(details, inputs, strict=True):
        interpreter.set_tensor(detail["index"], np.asarray(value, detail["dtype"]))


def _seconds(interpreter: Any, runs: int) -> float:
    start = time.perf_counter()
    for _ in range(runs):
        interpreter.invoke()
    return time.perf_counter() - start


def _enum_names(enum: type) -> dict[int, str]:
    """Inverts one of the schema's enumerations, which are classes of plain integers."""
    return {value: name for name, value in vars(enum).items() if isinstance(value, int)}


def _text(name: bytes | str | None) -> str:
    return name.decode() if isinstance(name, bytes) else name or ""
