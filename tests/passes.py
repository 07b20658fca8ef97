"""Runs the test-suite once per Keras backend and ends with pytest's summary line of each pass.

python tests/passes.py --workers 2 --backends tensorflow jax torch numpy -- [pytest arguments]

A backend is chosen when Keras is imported, so each pass is a process of its own. The NumPy pass
runs the tests marked `forward`: that backend has no gradients. `tests/conftest.py` selects.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
NOTHING_COLLECTED = 5
SUMMARY = re.compile(r"=+ .* in \d[\d.]*s\b.* =+")


class Pass(NamedTuple):
    """Outcome of one run of pytest."""

    backend: str
    ok: bool
    summary: str


def run(backend: str, workers: int, extra: list[str]) -> Pass:
    """Runs pytest under `backend`, shows its output, and keeps its summary line."""
    command = [sys.executable, "-m", "pytest", "-n", str(workers), "--dist", "loadfile"]
    command += ["--no-loadscope-reorder"]  # tests/conftest.py orders
    command += ["--durations", "15", "--durations-min", "5", *extra]
    environment = {**os.environ, "KERAS_BACKEND": backend}
    # Workers share the cores; a thread pool as wide as the machine in each would make them fight.
    environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))
    with tempfile.TemporaryDirectory() as cache:
        # What tests have in common, and what a loaded model does again, is compiled once.
        environment.setdefault("JAX_COMPILATION_CACHE_DIR", cache)
        environment.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
        environment.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
        return _run(backend, command, environment, may_be_empty=backend == "numpy" or bool(extra))


def _run(backend: str, command: list[str], environment: dict[str, str], may_be_empty: bool) -> Pass:
    print(f"\nKERAS_BACKEND={backend} python {' '.join(command[1:])}", flush=True)
    summary = ""
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True
    ) as process:
        for line in process.stdout or ():
            print(line, end="", flush=True)
            if SUMMARY.fullmatch(line.strip()):
                summary = line.strip()
    code = process.returncode
    # A pass may find nothing to run where tests are selected: by NumPy's marker or by the caller.
    ok = code == 0 or (code == NOTHING_COLLECTED and may_be_empty)
    return Pass(backend, ok, summary or f"pytest ended with exit code {code} and no summary")


def main() -> int:
    """Runs every pass, even after one failed, and returns 1 if any did."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backends", nargs="+", default=["tensorflow", "jax", "torch", "numpy"])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("pytest", nargs="*", help="arguments for pytest, after --")
    options = parser.parse_args()
    outcomes = [run(backend, options.workers, options.pytest) for backend in options.backends]
    print("\nAll passes:")
    for outcome in outcomes:
        print(f"{outcome.backend} {'passed' if outcome.ok else 'FAILED'}\n{outcome.summary}")
    return int(not all(outcome.ok for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
