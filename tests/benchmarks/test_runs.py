"""Runs are handed out once, failures are rows, and a file is resumed."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import runs

pytestmark = pytest.mark.once

RUN = {"task": "tiny", "method": "ridge", "setting": "A1W1", "lr": 1e-3, "steps": 10}
# A worker that trains nothing, and dies of one method.
WORKER = """
import json, sys, os
for text in sys.stdin:
    run = json.loads(text)
    if run["method"] == "fatal":
        os._exit(3)
    run |= {"val_accuracy": 0.5, "val_loss": 2.0, "diverged": False, "ms_per_step": None}
    print(json.dumps({**run, "seconds": 1.0, "pid": os.getpid()}), flush=True)
"""


def _row(**changes):
    measured = {"val_accuracy": 0.5, "val_loss": 2.0, "diverged": False, "seconds": 1.0}
    return {**runs.DEFAULTS, **RUN, **measured, **changes}


def _serve(queue, results, workers):
    told = []
    command = [sys.executable, "-c", WORKER]
    runs.run_all(
        queue, results, lambda gpu: runs.Worker(command, gpu, 1, None), workers, told.append
    )
    return told


def test_equal_runs_have_one_key():
    assert runs.key_of(RUN) == runs.key_of({**RUN, "seed": 0, "fields": {}, "val_loss": 1.0})
    assert runs.key_of(RUN) == runs.key_of({**RUN, "lr": 0.001})
    for change in ({"seed": 1}, {"fields": {"both": {"trust": 1}}}, {"steps": 20}, {"lr": 1}):
        assert runs.key_of(RUN) != runs.key_of({**RUN, **change})


def test_a_file_is_resumed_and_failures_are_tried_again(tmp_path: Path):
    path = tmp_path / "rows.json"
    results = runs.Results(path)
    results.add(_row())
    results.add(_row(seed=1, error="broken"))
    wanted = [RUN, {**RUN, "seed": 1}, {**RUN, "seed": 2}, {**RUN, "seed": 2}]
    missing = runs.Results(path).missing(wanted)
    assert [run["seed"] for run in missing] == [1, 2]
    results.add(_row(seed=1))
    assert [row.get("error") for row in json.loads(path.read_text())["rows"]] == [None, None]
    assert [file.name for file in tmp_path.iterdir()] == ["rows.json"]


def test_workers_serve_many_runs_and_are_replaced_when_they_die(tmp_path: Path):
    results = runs.Results(tmp_path / "rows.json")
    methods = ["a", "fatal", "b", "c"]
    told = _serve(runs.Queue([{**RUN, "method": m} for m in methods]), results, [None])
    rows = {row["method"]: row for row in results.rows}
    assert list(rows) == methods
    assert rows["fatal"]["error"] == "The worker died with code 3."
    assert rows["b"]["pid"] == rows["c"]["pid"] != rows["a"]["pid"]
    assert len(told) == 4
    assert "accuracy 0.5000 loss 2.0000" in told[0]


def test_a_worker_that_dies_again_and_again_is_given_up(tmp_path: Path):
    results = runs.Results(tmp_path / "rows.json")
    queue = runs.Queue([{**RUN, "method": "fatal", "seed": seed} for seed in range(8)])
    _serve(queue, results, [None])
    assert len(results.rows) == runs.DEATHS
    assert len(queue) == 8 - runs.DEATHS


def test_every_run_is_handed_out_once(tmp_path: Path):
    results = runs.Results(tmp_path / "rows.json")
    _serve(runs.Queue([{**RUN, "seed": seed} for seed in range(20)]), results, [None, None])
    assert sorted(row["seed"] for row in results.rows) == list(range(20))
    assert len({row["pid"] for row in results.rows}) == 2


def test_no_run_is_handed_out_that_would_end_too_late():
    short, long = {**RUN, "steps": 10}, {**RUN, "steps": 1000}
    queue = runs.Queue([long, short, long], deadline=time.time() + 60)
    queue.took(_row(steps=1000, seconds=100.0))
    assert queue.take() == short
    assert queue.take() is None
    assert runs.Queue([short], deadline=time.time() - 1).take() is None


def test_the_command_line_names_runs(tmp_path: Path):
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps([{"method": "quest", "setting": "A2W2", "steps": 5}]))
    parser = argparse.ArgumentParser()
    runs.add_options(parser, ["named"])
    text = (
        f"--plan named {plan} --method ridge float --lr 1e-3 4e-3 --seed 0 1 --steps 7 "
        "--fields range=rms affine=false --weights trust=1.6 --recipe dropout=0.1"
    )
    options = parser.parse_args(text.split())
    found = runs.chosen(options, {"named": lambda rows: [RUN]}, {"task": "t", "lr": 1, "steps": 3})
    assert found[0] == {**runs.DEFAULTS, **RUN}
    assert (found[1]["method"], found[1]["steps"], found[1]["lr"]) == ("quest", 5, 1)
    mine = found[2:]
    assert [(r["method"], r["setting"], r["lr"], r["seed"]) for r in mine[3:6]] == [
        ("ridge", "A1W1", 4e-3, 1),
        ("float", "float", 1e-3, 0),
        ("float", "float", 1e-3, 1),
    ]
    assert len(mine) == 8
    assert mine[0]["fields"] == {
        "both": {"range": "rms", "affine": False},
        "weights": {"trust": 1.6},
        "recipe": {"dropout": 0.1},
    }
    assert all(run["steps"] == 7 for run in mine)
