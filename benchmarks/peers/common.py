"""What every worker shares: arguments, data, the race of settings, and rows on stdout.

Imports nothing but NumPy and `benchmarks/timing.py`, so that it runs in every peer's environment.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gc
import json
import os
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import timing

ROW = "PEER-ROW "  # what begins a line that run.py collects
FLOAT = "float"
BATCHES = {"mlp-64": 64, "mlp-1024": 1024, "convnet": 64, "nanogpt": 64}
SMALL_BATCHES = {"nanogpt": 4}  # on a CPU: what two cores need a second or two for
CONTEXT, VOCABULARY, DROPOUT = 256, 65, 0.2
LEARNING_RATE = 1e-3
BLOCK = 128
# Settings of those peers that take any number of bits: activation bits and weight bits, or None.
PACKAGES = (
    *("HGQ2", "quantizers", "qkeras-v3", "pquant-ml", "torchao", "brevitas", "qwix", "aqtp"),
    *("tensorflow-model-optimization", "tf-keras", "keras", "flax", "optax", "numpy"),
    *("jax", "jaxlib", "tensorflow", "torch"),
)
SETTINGS = {FLOAT: (None, None), "A8W8": (8, 8), "A4W4": (4, 4), "A4W1": (4, 1), "A1W1": (1, 1)}


@dataclasses.dataclass(frozen=True)
class Training:
    """A model in training.

    Attributes:
        step: trains on the batch once more and returns what to wait for.
        kernels: copies of the weights that have two or more axes, by name.
    """

    step: Callable[[], Any]
    kernels: Callable[[], dict[str, np.ndarray]]


@dataclasses.dataclass(frozen=True)
class Variant:
    """One way to train the model.

    Attributes:
        setting: our name of it; "float" is the baseline.
        as_set: literally what was set.
        build: makes the model and its step.
    """

    setting: str
    as_set: str
    build: Callable[[], Training]


@dataclasses.dataclass(frozen=True)
class Job:
    """One model to race the settings on.

    Attributes:
        model: its name, a key of `BATCHES`.
        device: "cpu" or "gpu".
        dtype: what the products are computed in; weights are float32 always.
    """

    model: str
    device: str
    dtype: str

    @property
    def batch(self) -> int:
        """How many samples a step trains on."""
        small = SMALL_BATCHES if self.device == "cpu" else {}
        return {**BATCHES, **small}[self.model]

    def data(self) -> tuple[np.ndarray, np.ndarray]:
        """Inputs (channels last) and targets, as `benchmarks/models.py` makes them."""
        random = np.random.default_rng(0)
        if self.model == "nanogpt":
            tokens = random.integers(0, VOCABULARY, (self.batch, CONTEXT + 1), dtype="int32")
            return tokens[:, :-1], tokens[:, 1:]
        shape = (32, 32, 3) if self.model == "convnet" else (784,)
        x = random.normal(size=(self.batch, *shape)).astype("float32")
        return x, random.integers(0, 10, self.batch, dtype="int32")


@dataclasses.dataclass(frozen=True)
class Peer:
    """A package and how to measure it.

    Attributes:
        package: its name on PyPI.
        frameworks: what it runs on; the first is the default. One process serves one.
        modes: how a step is run, by framework.
        variants: the ways to train, given the job, the framework and the mode.
        wait: blocks until what a step returned is computed, given the framework.
        models: what the package can be raced on.
    """

    package: str
    frameworks: tuple[str, ...]
    modes: dict[str, tuple[str, ...]]
    variants: Callable[[Job, str, str], Iterable[Variant]]
    wait: Callable[[str], Callable[[Any], Any]]
    models: tuple[str, ...] = ("mlp-64", "mlp-1024", "convnet")


def arguments(frameworks: tuple[str, ...]) -> argparse.Namespace:
    """What a worker takes on its command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--models", nargs="+", default=list(BATCHES), choices=list(BATCHES))
    parser.add_argument("--device", default="cpu", choices=("cpu", "gpu"))
    parser.add_argument("--framework", default=frameworks[0], choices=frameworks)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"))
    parser.add_argument("--modes", nargs="+")
    parser.add_argument("--settings", nargs="+")
    parser.add_argument("--rounds", type=int, default=21)
    options = parser.parse_args()
    options.dtype = options.dtype or {"cpu": "float32", "gpu": "bfloat16"}[options.device]
    return options


def run(peer: Peer, options: argparse.Namespace) -> None:
    """Races the settings of each model in each mode and prints a row for each."""
    emit({"environment": _environment(options)})
    for model in options.models:
        for mode in peer.modes[options.framework]:
            if options.modes and mode not in options.modes:
                continue
            job = Job(model, options.device, options.dtype)
            about = {
                "package": peer.package,
                "version": _version(peer.package),
                "framework": options.framework,
                "framework_version": _version(options.framework.partition("-")[0]),
                "mode": mode,
                "device": job.device,
                "dtype": job.dtype,
                "model": model.partition("-")[0],
                "batch": job.batch,
            }
            if model not in peer.models:
                emit({**about, "error": f"not measured: {peer.package} runs {peer.models} here"})
                continue
            _race(about, _chosen(peer, job, options, mode), peer, options)
            gc.collect()


def _chosen(peer: Peer, job: Job, options: argparse.Namespace, mode: str) -> list[Variant]:
    variants = peer.variants(job, options.framework, mode)
    wanted = options.settings
    return [v for v in variants if not wanted or v.setting in (FLOAT, *wanted)]


def _race(
    about: dict[str, Any], variants: list[Variant], peer: Peer, options: argparse.Namespace
) -> None:
    wait = peer.wait(options.framework)
    steps, first, as_set = {}, {}, {}
    for variant in variants:
        as_set[variant.setting] = variant.as_set
        row = {**about, "setting": variant.setting, "as_set": variant.as_set}
        try:
            training = variant.build()
            first[variant.setting] = _first_call(training, wait)
            steps[variant.setting] = training.step
        except Exception as error:  # a peer that cannot is a row, not the end
            if os.environ.get("PEERS_DEBUG"):
                traceback.print_exc()
            emit({**row, "error": describe(error)})
    if FLOAT not in steps:
        for setting in steps:
            emit({**about, "setting": setting, "error": "its float baseline failed"})
        return
    for setting, found in timing.alternate(steps, wait, rounds=options.rounds).items():
        found["first_call_s"] = first[setting]  # the warm-up above compiled it
        emit({**about, "setting": setting, "as_set": as_set[setting], **found, "error": None})


def _first_call(training: Training, wait: Callable[[Any], Any]) -> float:
    """Seconds of the first step, which must move every kernel: a step that does not is no peer."""
    before = training.kernels()
    start = time.perf_counter()
    wait(training.step())
    seconds = time.perf_counter() - start
    after = training.kernels()
    still = [name for name, value in before.items() if np.array_equal(value, after[name])]
    if still or not before:
        raise RuntimeError(f"a step does not train: {', '.join(still) or 'no kernels found'}")
    return seconds


def divisor(size: int, most: int) -> int:
    """The largest block of at most `most` elements that divides `size`."""
    return next(n for n in range(min(size, most), 0, -1) if size % n == 0)


def describe(error: BaseException) -> str:
    """One line that names the error and what it says."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = re.sub(r'(-+ )?File "[^"]*", line \d+, in \S+', "", " ".join(lines))
    text = " ".join(f"{type(error).__name__}: {told}".split())
    return text if len(text) <= 600 else f"{text[:300]} ... {text[-295:]}"


def emit(row: dict[str, Any]) -> None:
    """Prints a row for run.py."""
    print(ROW + json.dumps(row), flush=True)


def _environment(options: argparse.Namespace) -> dict[str, Any]:
    """The accelerator and the packages that a time depends on; the wrong device is an error."""
    framework = options.framework.partition("-")[0]
    name = {"jax": _jax_gpu, "tensorflow": _tensorflow_gpu, "torch": _torch_gpu}[framework]()
    if (name is not None) != (options.device == "gpu"):
        raise SystemExit(f"asked for {options.device}, but {framework} computes on {name or 'cpu'}")
    named = {package: _version(package) for package in PACKAGES}
    return {"accelerator": name, **{package: v for package, v in named.items() if v is not None}}


def _jax_gpu() -> str | None:
    import jax

    return None if jax.default_backend() == "cpu" else jax.devices()[0].device_kind


def _tensorflow_gpu() -> str | None:
    import tensorflow as tf

    found = tf.config.list_physical_devices("GPU")
    return tf.config.experimental.get_device_details(found[0])["device_name"] if found else None


def _torch_gpu() -> str | None:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def _version(package: str) -> str | None:
    for name in (package, f"{package}-cpu"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            return metadata.version(name)
    return None
