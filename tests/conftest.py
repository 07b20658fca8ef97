"""Settings shared by all tests: which backend, which tests suit it, and one random seed."""

from __future__ import annotations

import functools
import os
import shutil
from collections.abc import Iterator
from typing import Any

os.environ.setdefault("KERAS_BACKEND", "tensorflow")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("MPLBACKEND", "Agg")
if os.environ["KERAS_BACKEND"] == "jax" and shutil.which("nvidia-smi") is None:
    # Tests compile far longer than they compute: twice as long with what XLA does by default for
    # speed. XLA as users have it compiles steps in the TensorFlow pass. (For a GPU it then takes
    # minutes for a kernel.)
    _FLAGS = (
        "--xla_cpu_use_fusion_emitters=false",
        "--xla_backend_optimization_level=0",
        "--xla_llvm_disable_expensive_passes=true",
    )
    os.environ.setdefault("XLA_FLAGS", " ".join(_FLAGS))

import keras
import numpy as np
import pytest

LONGEST = (
    "test_compiled.py",
    "test_demo.py",
    "test_fit_and_save.py",
    "test_learned.py",
    "test_layer_outputs.py",
    "test_across_backends.py",
)


def pytest_report_header() -> str:
    return f"keras {keras.version()}, backend {keras.backend.backend()}"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keeps the tests that say something about the backend at hand (see the markers)."""
    kept = [item for item in items if _suits(item, keras.backend.backend())]
    dropped = [item for item in items if item not in set(kept)]
    if dropped:
        config.hook.pytest_deselected(items=dropped)
    items[:] = sorted(kept, key=_turn)


def _turn(item: pytest.Item) -> int:
    """Files that take minutes come first: last, one worker would wait for another."""
    name = item.path.name
    return LONGEST.index(name) if name in LONGEST else len(LONGEST)


def _suits(item: pytest.Item, backend: str) -> bool:
    if backend == "numpy":
        return item.get_closest_marker("forward") is not None
    once = item.get_closest_marker("once")
    if once is None:
        return True
    (chosen,) = once.args or ("tensorflow",)
    if chosen not in ("tensorflow", "jax", "torch"):
        raise pytest.UsageError(f"{item.nodeid}: once({chosen!r}) names no backend.")
    return backend == chosen


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    """Every test starts from the same random state, in whatever order tests run."""
    keras.utils.set_random_seed(0)


@pytest.fixture(scope="session", autouse=True)
def initial_weights_of_numpy() -> Iterator[None]:
    """JAX compiles its random generator anew for every shape, which takes longer than the tests."""
    if keras.backend.backend() != "jax":
        yield
        return
    from keras.src.backend.jax import random

    def uniform(shape: Any, minval: float = 0.0, maxval: float = 1.0, dtype: Any = None, **_: Any):
        return np.random.uniform(minval, maxval, shape).astype(dtype or "float32")

    def normal(shape: Any, mean: float = 0.0, stddev: float = 1.0, dtype: Any = None, **_: Any):
        return np.random.normal(mean, stddev, shape).astype(dtype or "float32")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(random, "uniform", uniform)
        patch.setattr(random, "normal", normal)
        patch.setattr(random, "truncated_normal", normal)
        yield


@pytest.fixture(scope="module", autouse=True)
def optimizer_before_the_first_step(request: pytest.FixtureRequest) -> Iterator[None]:
    """TensorFlow traces a step twice if the first trace makes the optimizer's variables.

    Keras builds optimizers ahead on JAX only. In test_compiled.py they are left to the step.
    """
    if keras.backend.backend() != "tensorflow" or request.path.name == "test_compiled.py":
        yield
        return
    from keras.src.backend.tensorflow.trainer import TensorFlowTrainer

    make = TensorFlowTrainer.make_train_function

    @functools.wraps(make)
    def make_train_function(model: Any, force: bool = False) -> None:
        known = model.train_function
        make(model, force)
        made = model.train_function
        if made is known:
            return

        def train(iterator: Any) -> Any:
            optimizer = model.optimizer
            if optimizer is not None and not optimizer.built:
                with keras.name_scope(optimizer.name, caller=optimizer):
                    optimizer.build(model.trainable_variables)
            return made(iterator)

        model.train_function = train

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TensorFlowTrainer, "make_train_function", make_train_function)
        yield
