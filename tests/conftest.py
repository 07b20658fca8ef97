"""Settings shared by all tests: which backend, which tests suit it, and one random seed."""

from __future__ import annotations

import os

os.environ.setdefault("KERAS_BACKEND", "tensorflow")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("MPLBACKEND", "Agg")

import keras
import pytest


def pytest_report_header() -> str:
    return f"keras {keras.version()}, backend {keras.backend.backend()}"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keeps the tests that say something about the backend at hand (see the markers)."""
    kept = [item for item in items if _suits(item, keras.backend.backend())]
    dropped = [item for item in items if item not in set(kept)]
    if dropped:
        config.hook.pytest_deselected(items=dropped)
        items[:] = kept


def _suits(item: pytest.Item, backend: str) -> bool:
    if backend == "numpy":
        return item.get_closest_marker("forward") is not None
    return backend == "tensorflow" or item.get_closest_marker("once") is None


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    """Every test starts from the same random state, in whatever order tests run."""
    keras.utils.set_random_seed(0)
