"""The one check that every exported file passes before it reaches its name."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np


class ExportMismatch(ValueError):
    """An exported file does not compute what the model computes; no file was written."""


@dataclass(frozen=True)
class Comparison:
    """Outputs of a file against those of the model.

    Attributes:
        difference: largest absolute difference.
        magnitude: largest magnitude of the model's outputs.
        samples: number of samples compared.
    """

    difference: float
    magnitude: float
    samples: int

    @property
    def relative(self) -> float:
        return self.difference / self.magnitude if self.magnitude else self.difference


def compare(expected: Sequence[np.ndarray], received: Sequence[np.ndarray]) -> Comparison:
    """Compares outputs; a difference of shape or a value that is not finite counts as infinite."""
    difference, magnitude = 0.0, 0.0
    for ours, theirs in zip(expected, received, strict=True):
        if ours.shape != theirs.shape:
            return Comparison(float("inf"), 1.0, len(expected[0]))
        gap = np.abs(ours.astype(np.float64) - theirs.astype(np.float64))
        gap = np.where(np.isfinite(gap), gap, np.inf)
        difference = max(difference, float(gap.max(initial=0.0)))
        magnitude = max(magnitude, float(np.abs(ours.astype(np.float64)).max(initial=0.0)))
    return Comparison(difference, magnitude, len(expected[0]))


def require_match(comparison: Comparison, rtol: float, path: Path) -> None:
    """Raises an `ExportMismatch` if the difference exceeds `rtol` of the largest magnitude."""
    if comparison.relative <= rtol:
        return
    raise ExportMismatch(
        f"The exported file does not match the model: over {comparison.samples} samples the "
        f"largest difference is {comparison.difference:.3g}, {comparison.relative:.3g} of the "
        f"largest output; accepted is rtol={rtol:g}. {path} was not written. A value that falls "
        "on a rounding tie can be the cause: pass `inputs=` of your own to check on real data, or "
        "`rtol=` if the difference is small enough for you."
    )


def check_destination(path: str | os.PathLike[str]) -> Path:
    """The path of the file to be; raises before any work if its folder does not exist."""
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(
            f"The folder {str(path.parent)!r} does not exist, so {path.name!r} cannot be written "
            "there. Create it, or choose another path."
        )
    if path.is_dir():
        raise IsADirectoryError(f"`path` must name a file. Received a folder: {str(path)!r}")
    return path


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Writes beside `path` and moves into place: a reader sees the old file or the whole new one."""
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(descriptor)
    temporary = Path(name)
    try:
        write(temporary)
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
