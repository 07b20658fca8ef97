"""Keras's own tests, with `keras_rq` imported first and without: does the import leave Keras alone?

    make keras-tests
    python benchmarks/keras_tests.py --backends jax torch --out benchmarks/results/keras_tests.json

Keras's wheel holds its tests, so those of the release that is installed run, each folder in a
process of its own, once per arm: without the package, and with `pytest -p keras_rq`, which imports
it before any test module. A test that passes without and does not with is run again, alone, in both
arms; if it differs again, it is listed under `differs`, and the exit code is 1. One that agrees the
second time is listed under `unsteady`.

Settings are Keras's (its `pyproject.toml` and `conftest.py`, which the wheel leaves out): see `INI`
and the hooks below, which pytest calls, as this file is the plugin of both arms. Tests of
preprocessing layers import `grain`, which `--with-packages DIR` can provide.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

FOLDERS = ("layers", "quantizers", "saving", "dtype_policies", "models")
ARMS = ("without", "with")
INI = """[pytest]
filterwarnings =
    error
    ignore::DeprecationWarning
    ignore::ImportWarning
    ignore::RuntimeWarning
    ignore::PendingDeprecationWarning
    ignore::FutureWarning
    ignore::UserWarning
    ignore:Custom mask layers require a config
markers =
    requires_trainable_backend: for backends that train
    multi_device: for several devices
"""
HERE = Path(__file__).resolve().parent
OUTCOMES = "KERAS_TESTS_OUTCOMES"

Outcomes = dict[str, str]


# The plugin.


def pytest_configure(config: pytest.Config) -> None:
    """As Keras's `conftest.py`: torch must be imported before TensorFlow."""
    sys.modules["conftest"] = sys.modules[__name__]  # tests import from it what is below
    if importlib.util.find_spec("torch") is not None:
        importlib.import_module("torch")


def skip_if_backend(given: str, reason: str) -> pytest.MarkDecorator:
    """Of Keras's `conftest.py`."""
    return pytest.mark.skipif(os.environ["KERAS_BACKEND"] == given, reason=reason)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """As Keras's `conftest.py`, on one device."""
    for item in items:
        if "multi_device" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="Requires multiple devices"))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Writes the outcome of a test as soon as it is known, for tests that end the process."""
    if report.when == "call" or not report.passed:
        outcome = report.outcome if report.when == "call" else f"{report.when} {report.outcome}"
        _write(report.nodeid, "skipped" if report.skipped else outcome)


def pytest_collectreport(report: pytest.CollectReport) -> None:
    """A file that cannot be collected is an outcome too."""
    if report.failed:
        _write(report.nodeid, "not collected")


def _write(node: str, outcome: str) -> None:
    if path := os.environ.get(OUTCOMES):
        with Path(path).open("a") as file:
            file.write(json.dumps([re.sub(r" at 0x[0-9a-f]+", "", node), outcome]) + "\n")


# The comparison.


def site() -> Path:
    """The folder that holds the package `keras`."""
    return Path(importlib.util.find_spec("keras").submodule_search_locations[0]).parent


def tests_of(folder: str) -> list[str]:
    """The test files of a folder of `keras/src`, or the one that is named."""
    place = site() / "keras/src" / folder
    return [str(place)] if place.is_file() else sorted(map(str, place.rglob("*_test.py")))


def run(backend: str, arm: str, tests: list[str], options: argparse.Namespace) -> Outcomes:
    """Outcomes by test, of one process."""
    with tempfile.TemporaryDirectory() as folder:
        outcomes, ini = Path(folder, "outcomes"), Path(folder, "pytest.ini")
        outcomes.touch()
        ini.write_text(INI)
        paths = [str(HERE), str(HERE.parent), *options.with_packages]
        environment = {
            "TF_CPP_MIN_LOG_LEVEL": "3",
            **os.environ,
            "KERAS_BACKEND": backend,
            "PYTHONPATH": os.pathsep.join(paths),
            "PYTHONDONTWRITEBYTECODE": "1",
            OUTCOMES: str(outcomes),
        }
        command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider"]
        command += ["--continue-on-collection-errors"]
        command += ["-c", str(ini), "--rootdir", str(site()), "-p", "keras_tests"]
        command += ["--timeout=600", *(["-p", "keras_rq"] if arm == "with" else []), *tests]
        done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True)
        if options.log is not None:
            with options.log.open("a") as log:
                log.write(f"{backend} {arm}\n{done.stdout}{done.stderr[-3000:]}\n")
        return dict(json.loads(line) for line in outcomes.read_text().splitlines())


def differing(found: dict[str, Outcomes]) -> list[str]:
    """The tests that pass without the package and do not with it."""
    passed = [node for node, outcome in found["without"].items() if outcome == "passed"]
    return [node for node in passed if found["with"].get(node) != "passed"]


def compare(backend: str, folder: str, options: argparse.Namespace) -> dict[str, Any]:
    """One row of results."""
    tests = tests_of(folder)
    found = {arm: run(backend, arm, tests, options) for arm in ARMS}
    suspects = differing(found)
    alone = [str(site() / node) for node in suspects]
    again = {arm: run(backend, arm, alone, options) if alone else {} for arm in ARMS}
    differs = [node for node in suspects if node in differing(again)]
    return {
        "backend": backend,
        "folder": folder,
        "files": len(tests),
        **{arm: dict(Counter(found[arm].values())) for arm in ARMS},
        "same": sum(found["with"].get(node) == o for node, o in found["without"].items()),
        "differs": differs,
        "unsteady": [node for node in suspects if node not in differs],
        "not passed without": sorted(
            node for node, o in found["without"].items() if o not in ("passed", "skipped")
        ),
    }


def provenance() -> dict[str, Any]:
    """What the outcomes belong to."""
    from keras_rq.demo import results

    return {name: one for name, one in results.provenance().items() if name != "backend"}


def main() -> int:
    """Compares all folders on all backends; returns 1 if a test differs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backends", nargs="+", default=["tensorflow", "jax", "torch"])
    parser.add_argument(
        "--folders", nargs="+", default=list(FOLDERS), help="of keras/src; or files"
    )
    parser.add_argument("--with-packages", nargs="+", default=[], metavar="DIR")
    parser.add_argument("--out", type=Path, help="JSON file of results")
    parser.add_argument("--log", type=Path, help="what pytest says")
    options = parser.parse_args()
    sys.path.insert(0, str(HERE.parent))
    from rows import RowsFile

    file = RowsFile(options.out)
    file.provenance = provenance()
    failed = False
    for backend in options.backends:
        for folder in options.folders:
            row = compare(backend, folder, options) | {"commit": file.provenance["commit"]}
            failed = failed or bool(row["differs"])
            print(json.dumps({k: v for k, v in row.items() if k != "not passed without"}))
            same = [r for r in file.rows if (r["backend"], r["folder"]) == (backend, folder)]
            file.rows = [r for r in file.rows if r not in same] + [row]
            file.write()
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
