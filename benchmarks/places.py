"""Places where a model trains: one device, and several by each backend's own means.

JAX has Keras's `DataParallel` and `ModelParallel`, TensorFlow `MirroredStrategy`, PyTorch
`DistributedDataParallel`, one process per device. On a CPU the devices are virtual, and PyTorch's
processes meet over gloo; on GPUs over NCCL.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

Weights = list[np.ndarray]
Job = Callable[[dict[str, "Trainee"]], list[dict[str, Any]]]
# Kernels by the names of the layers below, split along both axes: their inputs, and so blocks and
# channels, over the devices of "model".
SPLITS = {
    ".*(up|down|head|_qkv|_out|dense[^/]*)/kernel": ("model", "batch"),
    ".*(query|key|value)/kernel": ("model", None, "batch"),
    ".*attention_output/kernel": (None, "model", "batch"),
    ".*embeddings": (None, "batch"),
}


class Trainee:
    """Trains models with Keras's `fit`, under a scope.

    Args:
        scope: makes the context within which models are built and trained.
    """

    def __init__(self, scope: Callable[[], Any] = contextlib.nullcontext) -> None:
        self.scope = scope

    def take(self, make: Callable[[], Any], optimizer: Callable[[], Any], loss: str) -> None:
        """Builds a model here and keeps it."""
        with self.scope():
            self.model = make()
            self.model.compile(optimizer(), loss)
            self.model.optimizer.build(self.model.trainable_variables)
            self.fresh = [np.array(v) for v in self.model.optimizer.variables]

    def weights(self) -> Weights:
        """Those of the model here."""
        return [np.array(value) for value in self.model.get_weights()]

    def train(
        self, start: Weights, x: np.ndarray, y: np.ndarray, steps: int, course: Any = None
    ) -> tuple[list[float], list[Weights]]:
        """Steps on one batch from given weights.

        Returns:
            The loss of each step, and the weights before and after each. With a `course`, which is
            such weights, every step starts from those of the course.
        """
        with self.scope():
            self.model.set_weights(start)
            for variable, value in zip(self.model.optimizer.variables, self.fresh, strict=True):
                variable.assign(value)
            keeper = _keeper(course)
            # Not train_on_batch, which hands the whole batch to every replica of TensorFlow.
            done = self.model.fit(
                x, y, batch_size=len(x), epochs=steps, shuffle=False, verbose=0, callbacks=[keeper]
            )
        return done.history["loss"], [start, *keeper.seen]

    def milliseconds(self, x: np.ndarray, y: np.ndarray, batch: int, epochs: int = 5) -> float:
        """What a step of `fit` takes: the median epoch, the first left out."""
        with self.scope():
            keeper = _keeper(None, clock=True)
            self.model.fit(x, y, batch_size=batch, epochs=epochs, verbose=0, callbacks=[keeper])
        return 1e3 * float(np.median(np.diff(keeper.seen))) * batch / len(x)


def _keeper(course: list[Weights] | None, clock: bool = False) -> Any:
    """A callback that keeps weights after every epoch, or the time, and sets those of a course."""
    import keras

    class Keeper(keras.callbacks.Callback):
        seen: list[Any]

        def on_train_begin(self, logs: Any = None) -> None:
            self.seen = []

        def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
            if course is not None:
                self.model.set_weights(course[epoch])

        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            now = time.perf_counter() if clock else [np.array(w) for w in self.model.get_weights()]
            self.seen.append(now)

    return Keeper()


class TorchTrainee(Trainee):
    """Trains with a loop of PyTorch's own, which is what its users put around a wrapped model.

    Args:
        rank: of this process.
        world: how many processes share each batch; 1: this process trains alone.
        device: "cpu" or "cuda".
    """

    def __init__(self, rank: int = 0, world: int = 1, device: str = "cpu") -> None:
        super().__init__()
        self.rank, self.world, self.device = rank, world, device

    def take(self, make: Callable[[], Any], optimizer: Callable[[], Any], loss: str) -> None:
        import torch

        self.model, self.loss = make(), loss
        of_keras = optimizer()
        kind = {"SGD": torch.optim.SGD, "Adam": torch.optim.Adam}[type(of_keras).__name__]
        self.optimizer = lambda p: kind(p, float(of_keras.learning_rate))
        wrap = torch.nn.parallel.DistributedDataParallel
        self.called = wrap(self.model) if self.world > 1 else self.model

    def train(
        self, start: Weights, x: np.ndarray, y: np.ndarray, steps: int, course: Any = None
    ) -> tuple[list[float], list[Weights]]:
        self.model.set_weights(start)
        step, share = self._step(), self._share(x, y)
        losses, seen = [], [start]
        for index in range(steps):
            if course is not None:
                self.model.set_weights(course[index])
            losses.append(self._mean(step(*share)))
            seen.append(self.weights())
        return losses, seen

    def weights(self) -> Weights:
        return [value.copy() for value in self.model.get_weights()]

    def milliseconds(self, x: np.ndarray, y: np.ndarray, batch: int, epochs: int = 5) -> float:
        import torch

        step, share, stamps = self._step(), self._share(x[:batch], y[:batch]), []
        wait = torch.cuda.synchronize if self.device == "cuda" else lambda: None
        count = len(x) // batch
        for _ in range(epochs):
            for _ in range(count):
                step(*share)
            wait()
            stamps.append(time.perf_counter())
        return 1e3 * float(np.median(np.diff(stamps))) / count

    def _share(self, x: np.ndarray, y: np.ndarray) -> tuple[Any, Any]:
        import torch

        size = len(x) // self.world
        mine = slice(self.rank * size, (self.rank + 1) * size) if self.world > 1 else slice(None)
        given = (torch.from_numpy(a[mine].copy()).to(self.device) for a in (x, y))
        return tuple(given)

    def _step(self) -> Callable[[Any, Any], Any]:
        import torch

        functions = torch.nn.functional
        optimizer = self.optimizer(self.model.parameters())

        def step(x: Any, y: Any) -> Any:
            optimizer.zero_grad()
            made = self.called(x)
            if self.loss == "mse":
                loss = functions.mse_loss(made, y)
            else:
                loss = functions.cross_entropy(made.flatten(0, -2), y.long().flatten())
            loss.backward()
            optimizer.step()
            return loss.detach()

        return step

    def _mean(self, loss: Any) -> float:
        import torch

        if self.world > 1:
            torch.distributed.all_reduce(loss)
        return float(loss) / self.world


# Each backend's places.


def run(backend: str, count: int, device: str, job: Job) -> list[dict[str, Any]]:
    """Gives a job the trainees of a backend, by place, and returns its rows.

    Args:
        backend: Keras's backend; set in the environment before Keras is imported.
        count: of devices.
        device: "cpu" or "gpu".
        job: at the top level of a module, for PyTorch calls it in several processes.
    """
    if backend != "torch":
        return job({"jax": _on_jax, "tensorflow": _on_tensorflow}[backend](count, device))
    import torch

    with tempfile.TemporaryDirectory() as folder:
        arguments = (count, device, folder, job)
        torch.multiprocessing.spawn(_torch_process, arguments, nprocs=count)
        return json.loads(Path(folder, "rows.json").read_text())


def prepare(backend: str, count: int, device: str) -> None:
    """Sets the environment; before Keras is imported."""
    os.environ["KERAS_BACKEND"] = backend
    if device == "cpu":
        os.environ |= {"CUDA_VISIBLE_DEVICES": "", "JAX_PLATFORMS": "cpu"}
        flag = f"--xla_force_host_platform_device_count={count}"
        if backend == "jax":
            os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}"


def _on_jax(count: int, device: str) -> dict[str, Trainee]:
    import jax
    import keras
    from keras.distribution import DataParallel, DeviceMesh, LayoutMap, ModelParallel

    # Else a GPU rounds the operands of float32 products, of several devices differently.
    jax.config.update("jax_default_matmul_precision", "float32")
    devices = keras.distribution.list_devices()[:count]
    assert len(devices) == count, f"{count} devices wanted, {len(devices)} found"
    batch = max(1, count // 4)
    layout = LayoutMap(DeviceMesh((batch, count // batch), ("batch", "model"), devices))
    for name, axes in SPLITS.items():
        layout[name] = axes

    @contextlib.contextmanager
    def under(how: Any) -> Iterator[None]:
        keras.distribution.set_distribution(how)
        try:
            yield
        finally:
            keras.distribution.set_distribution(None)

    data = DataParallel(devices=devices)
    model = ModelParallel(layout_map=layout, batch_dim_name="batch")
    return {
        "one": Trainee(),
        "data": Trainee(lambda: under(data)),
        "model": Trainee(lambda: under(model)),
    }


def _on_tensorflow(count: int, device: str) -> dict[str, Trainee]:
    import tensorflow as tf

    tf.config.experimental.enable_tensor_float_32_execution(False)
    if device == "cpu":
        cpu = tf.config.list_physical_devices("CPU")[0]
        logical = [tf.config.LogicalDeviceConfiguration()] * count
        tf.config.set_logical_device_configuration(cpu, logical)
    # One for all: a second one would count its collective operations from the same number.
    strategy = tf.distribute.MirroredStrategy([f"{device}:{i}" for i in range(count)])
    assert strategy.num_replicas_in_sync == count
    return {"one": Trainee(), "data": Trainee(strategy.scope)}


def _torch_process(rank: int, count: int, device: str, folder: str, job: Job) -> None:
    import torch

    torch.set_num_threads(1)
    kind = "cuda" if device == "gpu" else "cpu"
    if kind == "cuda":
        torch.cuda.set_device(rank)
    network = "nccl" if kind == "cuda" else "gloo"
    meeting = f"file://{folder}/meet"
    torch.distributed.init_process_group(network, meeting, rank=rank, world_size=count)
    rows = job({"one": TorchTrainee(device=kind), "data": TorchTrainee(rank, count, kind)})
    if rank == 0:
        Path(folder, "rows.json").write_text(json.dumps(rows))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
