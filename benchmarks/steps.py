"""The training step that `fit` runs, by framework: made by Keras, fed from the device, measured.

Nothing here computes a gradient. Keras's own `make_train_function` makes the step, with the state
that `fit` hands it, so what is measured is what a user of `fit` gets; only the data adapters, the
callbacks and the progress bar are left out. One batch stays on the device for all steps.

Keras's defaults decide what is compiled, with two exceptions: TensorFlow's step is compiled by XLA
on a CPU too, where `jit_compile="auto"` would not, and PyTorch's is measured both ways.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import inspect
import itertools
import math
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np
import timing
from keras import ops, tree
from keras.src import backend
from models import Workload

import keras_rq as rq
from keras_rq.layers.base import QuantizedLayer, all_lowered_by

FLOAT = "float"


class Step:
    """One model's training step; calling it trains on the batch once more.

    Args:
        model: compiled model.
        x: inputs, on the device.
        y: targets, on the device.
    """

    def __init__(self, model: keras.Model, x: Any, y: Any) -> None:
        self.model, self.x, self.y = model, x, y
        self.floor_bytes = floor_bytes(model, x)
        model._symbolic_build(data_batch=(x, y))
        model.make_train_function()

    def __call__(self) -> Any:
        raise NotImplementedError

    @staticmethod
    def wait(result: Any) -> None:
        """Blocks until what a call returned is computed."""
        raise NotImplementedError

    def first_call(self) -> dict[str, Any]:
        """Takes the first step, which compiles, and says how long that took."""
        start = time.perf_counter()
        self.wait(self())
        return {"first_call_s": time.perf_counter() - start}

    def costs(self) -> dict[str, Any]:
        """Peak bytes of the step, or why they are not known, and what else the compiler says."""
        raise NotImplementedError


class JaxStep(Step):
    """`jax.jit` of the whole step; the state is donated, as in `fit`."""

    def __init__(self, model: keras.Model, x: Any, y: Any) -> None:
        super().__init__(model, x, y)
        kinds = ("trainable", "non_trainable", "optimizer", "metrics")
        self.state = model._get_jax_state(
            **{f"{kind}_variables": True for kind in kinds}, purge_model_variables=True
        )
        self.batches = itertools.repeat((x, y))

    def __call__(self) -> Any:
        _, self.state = self.model.train_function(self.state, self.batches)
        return self.state

    @staticmethod
    def wait(result: Any) -> None:
        import jax

        jax.block_until_ready(result)

    def costs(self) -> dict[str, Any]:
        # The function under the iterator is the one that has run: lowering it compiles nothing.
        jitted = inspect.getclosurevars(self.model.train_function).nonlocals["step_function"]
        compiled = jitted.lower(self.state, (self.x, self.y)).compile()
        memory, cost = compiled.memory_analysis(), compiled.cost_analysis() or {}
        held = memory.argument_size_in_bytes + memory.output_size_in_bytes
        return {
            "peak_bytes": held + memory.temp_size_in_bytes - memory.alias_size_in_bytes,
            "accessed_bytes": cost.get("bytes accessed"),
            "flops": cost.get("flops"),
        }


class TensorFlowStep(Step):
    """`tf.function(jit_compile=True)` of the whole step."""

    def __init__(self, model: keras.Model, x: Any, y: Any) -> None:
        super().__init__(model, x, y)
        self.batches = itertools.repeat((x, y))

    def __call__(self) -> Any:
        return self.model.train_function(self.batches)

    @staticmethod
    def wait(result: Any) -> None:
        for value in tree.flatten(result):
            value.numpy()

    def costs(self) -> dict[str, Any]:
        import tensorflow as tf

        if not tf.config.list_physical_devices("GPU"):
            return {"peak_bytes": None, "memory_note": "TensorFlow counts memory on GPUs only"}
        variables = [*self.model.variables, *self.model.optimizer.variables]
        own = _nbytes([variable.value for variable in variables])
        self.wait(self())
        tf.config.experimental.reset_memory_stats("GPU:0")
        others = tf.config.experimental.get_memory_info("GPU:0")["current"] - own
        self.wait(self())
        peak = tf.config.experimental.get_memory_info("GPU:0")["peak"]
        return {"peak_bytes": peak - others + _nbytes([self.x, self.y])}


class TorchStep(Step):
    """The step of `TorchTrainer`, as it is or through `torch.compile`."""

    def __init__(self, model: keras.Model, x: Any, y: Any) -> None:
        import torch

        # All layers of all models share functions of Keras. From the ninth version of one on, its
        # default is to run what is left of a model without the compiler.
        torch._dynamo.config.recompile_limit = 256
        super().__init__(model, x, y)
        model.train()

    def __call__(self) -> Any:
        return self.model.train_function([(self.x, self.y)])

    @staticmethod
    def wait(result: Any) -> None:
        import torch

        if torch.cuda.is_available():
            torch.cuda.synchronize()

    def first_call(self) -> dict[str, Any]:
        from torch._dynamo.utils import counters

        if not self.model.jit_compile:
            return super().first_call()
        counters.clear()
        found = super().first_call()
        self.wait([self() for _ in range(2)])  # gradients exist from the second step on
        found["graphs"] = counters["stats"]["unique_graphs"]
        found["graph_breaks"] = sum(counters["graph_break"].values())
        return found

    def costs(self) -> dict[str, Any]:
        import torch

        if not torch.cuda.is_available():
            return {"peak_bytes": None, "memory_note": "PyTorch counts memory on GPUs only"}
        self.wait(self())
        # All that is held now, but for this model's own state, belongs to the other variants.
        others = torch.cuda.memory_allocated() - _nbytes(self._state())
        torch.cuda.reset_peak_memory_stats()
        self.wait([self() for _ in range(2)])
        peak = torch.cuda.max_memory_allocated()
        return {"peak_bytes": peak - others + _nbytes([self.x, self.y])}

    def _state(self) -> list[Any]:
        variables = [*self.model.variables, *self.model.optimizer.variables]
        gradients = [variable.value.grad for variable in self.model.trainable_variables]
        return [v.value for v in variables] + [g for g in gradients if g is not None]


def _nbytes(tensors: list[Any]) -> int:
    return sum(int(np.prod(tensor.shape)) * _item_bytes(tensor.dtype) for tensor in tensors)


def _item_bytes(dtype: Any) -> int:
    name = keras.backend.standardize_dtype(dtype)
    return 2 if name == "bfloat16" else np.dtype(name).itemsize  # NumPy knows no bfloat16


STEPS: dict[str, type[Step]] = {
    "jax": JaxStep,
    "tensorflow": TensorFlowStep,
    "torch": TorchStep,
}
MODES: dict[str, tuple[str, ...]] = {
    "jax": ("jit",),
    "tensorflow": ("jit",),
    "torch": ("eager", "compiled"),
}


def make_step(workload: Workload, policy: Any, mode: str, data: tuple[Any, Any]) -> Step:
    """Builds, quantizes and compiles a model; every one starts from the same seed.

    Args:
        workload: the model and how it is trained.
        policy: a `QuantizationPolicy`, or None for the float model.
        mode: one of the backend's `MODES`.
        data: inputs and targets, on the device.
    """
    keras.utils.set_random_seed(0)
    model = workload.build()
    if policy is not None:
        rq.quantize(model, policy, verbose=False)
    model.compile(workload.optimizer(), workload.loss(), jit_compile=mode != "eager")
    return STEPS[backend.backend()](model, *data)


def on_device(workload: Workload, batch: int) -> tuple[Any, Any]:
    """The batch that all variants train on."""
    x, y = workload.batch(batch, np.random.default_rng(0))
    return ops.convert_to_tensor(x), ops.convert_to_tensor(y)


@dataclasses.dataclass
class Group:
    """What was measured together: a row per variant, and the steps of those that ran."""

    rows: dict[str, dict[str, Any]]
    steps: dict[str, Step]


def measure(
    workload: Workload,
    policies: dict[str, Any],
    *,
    mode: str,
    batch: int,
    dtype: str = "float32",
    rounds: int,
    turn_seconds: float = 0.1,
    tell: Callable[[str], None] = lambda text: None,
) -> Group:
    """Times the steps of a float model and of quantized ones in turns.

    Args:
        workload: the model and how it is trained.
        policies: by setting; None, called "float", is what the others are compared with.
        mode: one of the backend's `MODES`.
        batch: number of samples.
        dtype: Keras's dtype policy.
        rounds: turns that each variant gets.
        turn_seconds: roughly how long a turn lasts.
        tell: is told what is being done.

    Returns:
        Rows by setting. A variant that failed has an `error` in place of numbers.
    """
    group = Group({}, {})
    keras.config.set_dtype_policy(dtype)
    data = on_device(workload, batch)
    for setting, policy in policies.items():
        tell(f"{workload.name} {batch}, {mode}: first call of {setting}")
        with _reported(group, setting):
            step = make_step(workload, policy, mode, data)
            group.rows[setting] = step.first_call() | {"floor_bytes": step.floor_bytes}
            group.steps[setting] = step
    tell(f"{workload.name} {batch}, {mode}: {rounds} rounds of {', '.join(group.steps)}")
    with _reported(group, *group.steps):
        _time(group, rounds, turn_seconds)
    return group


def _time(group: Group, rounds: int, turn_seconds: float) -> None:
    if FLOAT not in group.steps:
        raise RuntimeError("the float step failed, so there is nothing to compare with")
    wait = next(iter(group.steps.values())).wait
    timings = timing.alternate(
        group.steps, wait, baseline=FLOAT, rounds=rounds, turn_seconds=turn_seconds
    )
    costs = {setting: _costs(step) for setting, step in group.steps.items()}
    base = costs[FLOAT]["peak_bytes"]
    for setting, row in group.rows.items():
        if setting not in group.steps:
            continue
        first = row["first_call_s"]  # the one of `alternate` was no longer the first
        row |= timings[setting] | {"first_call_s": first} | costs[setting]
        row["float_ms"] = timings[FLOAT]["ms"]
        row["memory_ratio"] = row["peak_bytes"] / base if base else None


def _costs(step: Step) -> dict[str, Any]:
    try:
        return step.costs()
    except Exception as error:  # times without a memory figure are worth keeping
        traceback.print_exc()
        return {"peak_bytes": None, "memory_note": f"{type(error).__name__}: {error}"[:500]}


@contextlib.contextmanager
def _reported(group: Group, *settings: str) -> Iterator[None]:
    """Makes a failure the row of the variants it befell: a benchmark goes on with the others."""
    try:
        yield
    except Exception as error:
        traceback.print_exc()
        text = f"{type(error).__name__}: {' '.join(str(error).split())}"
        for setting in settings:
            group.rows[setting] = {"error": text[:500]}
            group.steps.pop(setting, None)


def floor_bytes(model: keras.Model, x: Any) -> int:
    """Fewest bytes that the fake quantization of one training step must move.

    Forward, an operand is read once and its quantized version written once; backward, the operand
    and the upstream gradient are read and the gradient is written. Activations have the compute
    dtype. Master kernels and their gradients are float32; the quantized kernel and its upstream
    gradient have the compute dtype. The data themselves need no gradient.

    Args:
        model: a model, quantized or not.
        x: inputs of the step, for their shape and dtype.

    Returns:
        The bytes; 0 of a float model.
    """
    counted: list[int] = []
    first = _first_with_weights(model)

    def count_in(layer: QuantizedLayer) -> Callable[[str, Any, Any], Any]:
        def count(name: str, product: Any, x: Any) -> Any:
            compute = _item_bytes(x.dtype)
            if layer.quantization.activations is not None:
                passes = 2 if layer is first else 5
                counted.append(passes * math.prod(x.shape) * compute)
            if layer.quantization.weights is not None:
                size = math.prod(getattr(layer, name).shape)
                counted.append(size * ((4 + compute) + (4 + compute + 4)))
            return layer.multiply_quantized(name, x)

        return count

    with all_lowered_by(model, count_in):
        spec = keras.KerasTensor(x.shape, keras.backend.standardize_dtype(x.dtype))
        backend.compute_output_spec(model, spec)
    return sum(counted)


def _first_with_weights(model: keras.Model) -> keras.layers.Layer:
    """The layer that data reach through nothing that is trained."""
    layers = model._flatten_layers(include_self=False, recursive=True)
    return next(layer for layer in layers if layer._trainable_variables)


def sees_gpu() -> bool:
    """Whether the framework runs on a GPU, which none of them insists on."""
    if backend.backend() == "jax":
        import jax

        return jax.default_backend() == "gpu"
    if backend.backend() == "torch":
        import torch

        return torch.cuda.is_available()
    import tensorflow as tf

    return bool(tf.config.list_physical_devices("GPU"))


def copy_rate(device: str) -> float:
    """Bytes per second that a large elementwise operation reads and writes, the best of five."""
    count = (1 << 28) if device == "gpu" else (1 << 24)
    wait = STEPS[backend.backend()].wait
    x = ops.ones((count,), "float32")
    seconds = []
    for _ in range(6):
        start = time.perf_counter()
        wait(ops.add(x, 1.0))
        seconds.append(time.perf_counter() - start)
    return 8 * count / min(seconds[1:])


def forget() -> None:
    """Lets go of what the models of a finished group hold."""
    dtype = keras.config.dtype_policy()
    keras.backend.clear_session()
    keras.config.set_dtype_policy(dtype)  # of what is cleared, the one thing that is no model's
    if backend.backend() == "torch":
        import torch

        torch._dynamo.reset()
    if backend.backend() == "jax":
        import jax

        jax.clear_caches()
    gc.collect()
