"""What the demo measured, and where: plain data that becomes `demo.json`."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import platform
import statistics
import subprocess
from pathlib import Path

import keras

import keras_rq as rq

_PACKAGES = (
    "keras",
    "numpy",
    "tensorflow",
    "tensorflow-cpu",
    "jax",
    "torch",
    "ai-edge-litert",
    "scikit-learn",
)


@dataclasses.dataclass(frozen=True)
class FileResult:
    """One .tflite file, run over all test images and compared with the model it came from.

    Attributes:
        name: file name, within the demo's folder.
        size: bytes.
        accuracy: share of the test images that the file puts in their class.
        largest_difference: largest absolute difference between the two sets of logits.
        largest_logit: largest absolute logit of the model, to judge that difference by.
        classes_differ: number of test images whose class differs.
        seconds: median time of one image on one thread; comparable within one run of the demo.
        latency_ratio: that time over the float file's.
    """

    name: str
    size: int
    accuracy: float
    largest_difference: float
    largest_logit: float
    classes_differ: int
    seconds: float
    latency_ratio: float


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table: accuracies by seed, and the file where one was written."""

    setting: str
    method: str
    accuracies: tuple[float, ...]
    bits_per_element: float
    file: FileResult | None = None

    @property
    def mean(self) -> float:
        """Mean accuracy over the seeds."""
        return statistics.mean(self.accuracies)

    @property
    def spread(self) -> float | None:
        """Sample standard deviation over the seeds; None where there is one run only."""
        return statistics.stdev(self.accuracies) if len(self.accuracies) > 1 else None

    def to_dict(self) -> dict:
        """The row as JSON."""
        return {**dataclasses.asdict(self), "mean": self.mean, "spread": self.spread}


@dataclasses.dataclass(frozen=True)
class Results:
    """Everything one run of the demo found. The float model is the first row."""

    rows: tuple[Row, ...]
    recipe: str
    float_recipe: str
    train_images: int
    test_images: int
    parameters: int
    seconds: float

    def row(self, setting: str, method: str) -> Row:
        """The row of a setting and a method."""
        return next(row for row in self.rows if (row.setting, row.method) == (setting, method))

    def to_dict(self) -> dict:
        """The results as JSON, with the versions and the machine they belong to."""
        fields = dataclasses.asdict(self)
        return {
            **fields,
            "rows": [row.to_dict() for row in self.rows],
            **provenance(),
        }


def provenance() -> dict[str, object]:
    """What a measurement belongs to: backend, versions, machine and commit."""
    return {
        "backend": keras.backend.backend(),
        "versions": versions(),
        "machine": machine(),
        "commit": commit(),
    }


def versions() -> dict[str, str]:
    """Installed versions of the packages that matter here."""
    found = {"python": platform.python_version(), "keras-rq": rq.__version__}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def machine() -> dict[str, str | int | None]:
    """Processor, cores and system."""
    return {"cpu": _processor(), "cores": os.cpu_count(), "system": platform.system()}


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.lower().startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def commit() -> str | None:
    """The commit of the source tree this package runs from, `-dirty` if it was changed."""
    tree = Path(__file__).resolve().parents[2]
    if not (tree / ".git").exists():
        return None
    try:
        described = subprocess.run(
            ["git", "-C", str(tree), "describe", "--always", "--dirty", "--abbrev=40"],
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return described.stdout.strip() or None
