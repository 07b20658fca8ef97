"""Executes every notebook in `tutorials/`; fails on the first error of each.

Each runs in a folder that is deleted with what it wrote there.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

TUTORIALS = Path(__file__).resolve().parent.parent / "tutorials"
SECONDS_PER_CELL = 1200


def execute(path: Path) -> str:
    """Runs one notebook without writing it back; returns the error, or an empty string."""
    notebook = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        client = NotebookClient(
            notebook,
            timeout=SECONDS_PER_CELL,
            kernel_name="python3",
            resources={"metadata": {"path": folder}},
        )
        try:
            client.execute()
        except CellExecutionError as error:
            return str(error)
    return ""


def main() -> int:
    """Executes all of them, and returns 1 if any failed."""
    os.environ.setdefault("MPLBACKEND", "Agg")
    paths = sorted(TUTORIALS.glob("*.ipynb"))
    failures = 0
    for path in paths:
        started = time.monotonic()
        error = execute(path)
        failures += bool(error)
        print(f"{path.name}: {'FAILED' if error else 'ok'}, {time.monotonic() - started:.0f} s")
        print(error, end="\n" if error else "")
    print(f"{len(paths)} notebooks, {failures} failed")
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
