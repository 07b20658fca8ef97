"""One training run through `compile` and `fit`, and the row it leaves.

Nothing waits for the device between evaluations, nor the device for Python: batches are gathered on
it, several steps are one execution (under JAX one program, a loop over steps), and the learning
rate's peak and length are state of the optimizer, so that all rates, lengths and seeds of a policy
share one compiled step.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import keras
import methods
import numpy as np
from batches import Gathered
from keras import ops

import keras_rq as rq

STEPS_PER_EXECUTION = 25
CALIBRATED = 2  # batches that give learned ranges their start
DIVERGED = 0.3  # nats that the training loss may climb above its lowest interval


@dataclasses.dataclass(frozen=True)
class Run:
    """What is trained how; equal runs leave equal rows.

    Attributes:
        method: a name of `methods.METHODS`, or "float".
        setting: the shorthand of a policy; "float" for the float model.
        lr: peak learning rate.
        steps: optimizer steps.
        seed: of the weights, the batches and dropout.
        fields: see `methods.policy`; "recipe" holds replaced fields of the task's recipe.
    """

    method: str
    setting: str
    lr: float
    steps: int
    seed: int = 0
    fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> Run:
        """The run of a row."""
        return cls(**{field.name: row[field.name] for field in dataclasses.fields(cls)})


class Task:
    """What is trained, on what: everything of a benchmark that is not the method."""

    name: str

    def rules(self) -> list[rq.Rule]:
        """What stays in float."""
        raise NotImplementedError

    def model(self, run: Run) -> keras.Model:
        """The float model that a run starts from, after the seeds have been set."""
        raise NotImplementedError

    def optimizer(self, run: Run) -> keras.optimizers.Optimizer:
        """The optimizer; its weight decay falls on the matrices of the float model alone."""
        raise NotImplementedError

    def batches(self, run: Run, start: int) -> Gathered:
        """The training batches from step `start` on: `run.steps` altogether."""
        raise NotImplementedError

    def interval(self, run: Run) -> int:
        """Steps between evaluations; divides `run.steps`."""
        raise NotImplementedError

    def validation(self, run: Run, final: bool) -> dict[str, Any]:
        """Arguments of `evaluate`: `x`, `y` and `batch_size`."""
        raise NotImplementedError

    def uniform_loss(self) -> float:
        """The loss of a model that knows nothing."""
        raise NotImplementedError

    def teacher(self, run: Run) -> keras.Model | None:
        """The float model whose logits the run is trained on; None: labels."""
        return None

    def warmup(self, run: Run) -> int:
        """Steps in which the learning rate rises."""
        return 0

    def finished(self, run: Run, model: keras.Model) -> None:
        """Is handed every trained model."""


@keras.saving.register_keras_serializable("benchmarks")
class WarmupCosine(keras.optimizers.schedules.LearningRateSchedule):
    """A linear warm-up to `peak`, then a cosine to `final * peak` at step `total`.

    `attach` makes the peak and the total variables of an optimizer: a compiled step then serves
    other ones as well.

    Args:
        peak: highest rate.
        total: steps of the training.
        warmup: steps of the warm-up.
        final: the last rate over the highest.
    """

    def __init__(self, peak: float, total: int, warmup: int = 0, final: float = 0.0) -> None:
        self.peak, self.total, self.warmup, self.final = peak, total, warmup, final
        self._state: tuple[Any, Any] = (peak, float(total))

    def attach(self, optimizer: keras.optimizers.Optimizer) -> keras.optimizers.Optimizer:
        """Makes what differs from run to run state of the optimizer, and returns that."""
        constant = keras.initializers.Constant
        self._state = (
            optimizer.add_variable((), constant(self.peak), "float32", name="peak"),
            optimizer.add_variable((), constant(self.total), "float32", name="total"),
        )
        return optimizer

    def __call__(self, step: Any) -> Any:
        peak, total = (ops.convert_to_tensor(value, "float32") for value in self._state)
        step = ops.cast(step, "float32")
        rising = (step + 1.0) / (self.warmup + 1.0)
        done = ops.clip((step - self.warmup) / ops.maximum(total - self.warmup, 1.0), 0.0, 1.0)
        falling = self.final + (1.0 - self.final) * 0.5 * (1.0 + ops.cos(math.pi * done))
        return peak * ops.where(step < self.warmup, rising, falling)

    def get_config(self) -> dict[str, Any]:
        names = ("peak", "total", "warmup", "final")
        return {name: getattr(self, name) for name in names}


class Progress(keras.callbacks.Callback):
    """Times the steps, keeps the curve, and ends a run that has diverged or is out of time.

    Args:
        interval: steps of an epoch, which is what lies between two evaluations.
        hopeless: a loss that no training step should exceed in the mean of an interval.
        deadline: `time.time()` to stop at.
        checkpoint: where to save the state from time to time.
        every: seconds between two checkpoints.
    """

    def __init__(
        self,
        interval: int,
        hopeless: float,
        deadline: float | None = None,
        checkpoint: Checkpoint | None = None,
        every: float = 60.0,
    ) -> None:
        super().__init__()
        self.interval, self.hopeless, self.deadline = interval, hopeless, deadline
        self.checkpoint, self.every = checkpoint, every
        self.curve: list[dict[str, Any]] = []
        self.step_ms: list[float] = []
        self.diverged = self.stopped = False

    def on_train_begin(self, logs: dict | None = None) -> None:
        self._saved = time.time()

    def on_epoch_begin(self, epoch: int, logs: dict | None = None) -> None:
        self._began = time.perf_counter()

    def on_test_begin(self, logs: dict | None = None) -> None:
        ops.convert_to_numpy(self.model.optimizer.iterations)  # waits for the last step
        self.step_ms.append(1e3 * (time.perf_counter() - self._began) / self.interval)

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        step = (epoch + 1) * self.interval
        logs = dict(logs or {})
        if "base_loss" in logs:  # without the penalty that a method adds
            logs["loss"] = logs["base_loss"]
        self.curve.append({"step": step, **{k: finite(v) for k, v in logs.items()}})
        losses = [point["loss"] for point in self.curve]
        self.diverged = _has_diverged(losses, self.hopeless)
        if losses[-1] is None:  # NaN stays NaN
            self.model.stop_training = True
        elif self.deadline is not None and time.time() > self.deadline:
            self.stopped = self.model.stop_training = True
        if self.checkpoint is not None and (self.stopped or time.time() - self._saved > self.every):
            self.checkpoint.save(self.model, epoch + 1, self.curve)
            self._saved = time.time()


def _has_diverged(losses: list[float | None], hopeless: float) -> bool:
    last = losses[-1]
    if last is None:
        return True
    return last > min(x for x in losses if x is not None) + DIVERGED or last > hopeless


def finite(value: Any) -> Any:
    """A number for JSON, which knows no NaN."""
    value = float(value)
    return value if math.isfinite(value) else None


class Checkpoint:
    """The state of an interrupted run in one file: every variable, and the curve so far.

    Under JAX and TensorFlow that is all there is: a resumed run ends like an uninterrupted one.
    PyTorch's dropout has a state of its own.

    Args:
        path: the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def save(self, model: keras.Model, epochs: int, curve: list[dict[str, Any]]) -> None:
        """Writes the state after some epochs, replacing the last one in one move."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        new = self.path.with_name(self.path.name + ".new")
        about = json.dumps({"epochs": epochs, "curve": curve})
        arrays = [ops.convert_to_numpy(variable) for variable in _state(model)]
        with new.open("wb") as file:
            np.savez(file, *arrays, about=np.array(about))
        new.replace(self.path)

    def restore(self, model: keras.Model) -> tuple[int, list[dict[str, Any]]]:
        """Gives a compiled model the saved state; returns epochs and curve, (0, []) without one."""
        if not self.path.exists():
            return 0, []
        with np.load(self.path) as saved:
            about = json.loads(str(saved["about"]))
            for index, variable in enumerate(_state(model)):
                variable.assign(saved[f"arr_{index}"])
        return about["epochs"], about["curve"]

    def remove(self) -> None:
        """Deletes the file of a run that has ended."""
        self.path.unlink(missing_ok=True)


def _state(model: keras.Model) -> list[Any]:
    return [*model.variables, *model.optimizer.variables]


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A quantized model, compiled, and what belongs to it.

    Attributes:
        model: what is evaluated.
        trained: what `fit` trains: the model, or the distiller that it is the student of.
        policy: None for the float model.
        callbacks: what `fit` has to call.
        together: steps that are one batch to `fit`.
    """

    model: keras.Model
    trained: keras.Model
    policy: rq.QuantizationPolicy | None
    callbacks: list[keras.callbacks.Callback]
    together: int


def prepare(task: Task, run: Run) -> Prepared:
    """Builds, quantizes and compiles the model of a run."""
    keras.utils.set_random_seed(run.seed)
    model = task.model(run)
    decayed = {id(v) for v in model.trainable_variables if len(v.shape) > 1}
    policy = methods.policy(
        run.method, run.setting, run.fields, task.rules(), reach=run.lr * run.steps
    )
    if policy is not None:
        rq.quantize(model, policy, verbose=False)
    batches = task.batches(run, 0)
    callbacks = methods.prepare(
        run.method,
        run.fields,
        model,
        lambda: [batches[i][0] for i in range(CALIBRATED)],
        task.warmup(run),
    )
    for callback in callbacks:
        callback.set_model(model)  # what a callback keeps with the model is of its state
    optimizer = task.optimizer(run)
    optimizer.exclude_from_weight_decay(
        [variable for variable in model.trainable_variables if id(variable) not in decayed]
    )
    trained = _distiller(task, run, model) or model
    together = _steps_per_execution(callbacks, task.interval(run))
    loops = keras.backend.backend() == "jax" and together > 1
    for one in {id(one): one for one in (model, trained)}.values():
        one.compile(
            optimizer if one is trained else None,
            keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            metrics=[keras.metrics.SparseCategoricalAccuracy(name="accuracy")],
            steps_per_execution=1 if loops else together,
        )
    optimizer.build(trained.trainable_variables)
    if loops:
        _loop(trained, batches[0])
    return Prepared(model, trained, policy, callbacks, together if loops else 1)


def _loop(model: keras.Model, batch: tuple[Any, Any]) -> None:
    """Makes `fit` take a step for every element of a batch's first axis.

    Keras runs the steps of an execution one after the other from Python under JAX, which costs a
    small model more time than the steps do.
    """
    import jax

    model.evaluate(*batch, batch_size=len(batch[0]), verbose=0)  # builds losses and metrics

    def step(state: Any, batch: Any) -> tuple[Any, Any]:
        logs, state = model.train_step(state, batch)
        return state, logs

    def make(force: bool = False) -> None:
        """In place of the model's own; callbacks force it where a step is to be another one."""
        if model.train_function is not None and not force:
            return

        @functools.partial(jax.jit, donate_argnums=0)
        def steps(state: Any, batches: Any) -> tuple[Any, Any]:
            state, logs = jax.lax.scan(step, state, batches)
            return jax.tree.map(lambda value: value[-1], logs), state

        model.train_function = lambda state, iterator: steps(state, next(iterator))

    model.make_train_function = make


def _distiller(task: Task, run: Run, model: keras.Model) -> keras.Model | None:
    teacher = None if run.method == methods.FLOAT else task.teacher(run)
    if teacher is None:
        return None
    divergence = rq.distillation.Jeffreys()
    return keras.distillation.Distiller(teacher, model, divergence, student_loss_weight=0.0)


def _steps_per_execution(callbacks: list[keras.callbacks.Callback], interval: int) -> int:
    """What is called at every batch needs every batch to be an execution, and so does PyTorch."""
    if keras.backend.backend() == "torch":
        return 1
    plain = keras.callbacks.Callback
    names = ("on_train_batch_begin", "on_train_batch_end")
    if any(getattr(type(c), name) is not getattr(plain, name) for c in callbacks for name in names):
        return 1
    return math.gcd(STEPS_PER_EXECUTION, interval)


def train(
    task: Task,
    run: Run,
    *,
    deadline: float | None = None,
    checkpoint: Checkpoint | None = None,
) -> dict[str, Any] | None:
    """Trains one model and returns its row, or None if the deadline came first.

    Args:
        task: what is trained.
        run: how.
        deadline: `time.time()` after which no further interval begins.
        checkpoint: where an interrupted run is resumed from.
    """
    began = time.perf_counter()
    prepared, interval = prepare(task, run), task.interval(run)
    model, trained = prepared.model, prepared.trained
    # What a teacher's student minimizes is not the loss of a model that knows nothing.
    hopeless = task.uniform_loss() if trained is model else math.inf
    progress = Progress(interval, hopeless, deadline, checkpoint)
    epoch, progress.curve = checkpoint.restore(trained) if checkpoint else (0, [])
    between = task.validation(run, final=False)
    trained.fit(
        task.batches(run, epoch * interval).joined(prepared.together),
        epochs=run.steps // interval,
        initial_epoch=epoch,
        steps_per_epoch=interval // prepared.together,
        shuffle=False,
        validation_data=(between["x"], between["y"]),
        validation_batch_size=between["batch_size"],
        callbacks=[*prepared.callbacks, progress],
        verbose=0,
    )
    if progress.stopped and progress.curve[-1]["step"] < run.steps:
        return None
    found = model.evaluate(**task.validation(run, final=True), return_dict=True, verbose=0)
    if checkpoint is not None:
        checkpoint.remove()
    task.finished(run, model)
    return {
        **dataclasses.asdict(run),
        "val_loss": finite(found["loss"]),
        "val_accuracy": finite(found["accuracy"]),
        "diverged": progress.diverged or finite(found["loss"]) is None,
        "curve": progress.curve,
        "ms_per_step": _median(progress.step_ms[1:]),
        "seconds": time.perf_counter() - began,
        **costs(model),
        "policy": None if prepared.policy is None else prepared.policy.get_config(),
        "dtype": keras.config.dtype_policy().name,
    }


def _median(values: list[float]) -> float | None:
    return float(np.median(values)) if values else None  # the first interval compiles


def costs(model: keras.Model) -> dict[str, Any]:
    """Storage and energy of the model, and of its quantized layers alone.

    `energy_per_product` is activation bits x weight bits x density, averaged over the products of
    the quantized layers (of all layers in a float model, then 32 x 32).
    """
    report = rq.report(model)
    total = report.total
    kernels = [row for row in report.rows if row.kernel_elements and row.energy]
    quantized = [row for row in kernels if _per_product(row) < 32 * 32] or kernels
    elements = sum(row.kernel_elements for row in quantized)
    bits = sum(row.bits_per_element * row.kernel_elements for row in quantized)
    products = sum(row.energy / _per_product(row) for row in quantized)
    return {
        "bits_per_element": bits / elements,
        "energy_per_product": sum(row.energy for row in quantized) / products,
        "bits_per_element_total": total.bits_per_element,
        "energy_total": total.energy,
        "nbytes": total.nbytes,
        "parameters": total.parameters,
    }


def _per_product(row: Any) -> float:
    widths = [4.0 if b == "fp4" else float(b) for b in (row.activation_bits, row.weight_bits)]
    return widths[0] * widths[1] * (1.0 - row.sparsity)
