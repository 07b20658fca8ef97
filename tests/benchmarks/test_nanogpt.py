"""The nanoGPT benchmark: its data, its plans, its tables, and a small run of all of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import nanogpt
import nanogpt_tables
import recipes
import runs
import shakespeare
from training import Run

import keras_rq as rq

pytestmark = pytest.mark.once

TEXT = "First Citizen:\nBefore we proceed any further, hear me speak.\n" * 20
ROOT = Path(__file__).resolve().parents[2]
PLANS = nanogpt.Plans()


def _task() -> shakespeare.NanoGPT:
    return shakespeare.NanoGPT(TEXT, recipes.GPT_SMALL)


def _decoded(task: shakespeare.NanoGPT, codes: np.ndarray) -> str:
    return "".join(np.array(sorted(set(TEXT)))[np.asarray(codes)])


def test_batches_are_windows_of_the_training_text_and_depend_on_the_seed_alone():
    task = _task()
    run = Run("ridge", "A1W1", 1e-3, 20, seed=3)
    batches, others = task.batches(run, 0), task.batches(Run("float", "float", 8e-3, 20, 3), 5)
    assert batches.num_batches == 20
    assert others.num_batches == 15
    for x, y in (batches[0], batches[19]):
        assert x.shape == y.shape == (8, 16)
        np.testing.assert_array_equal(x[:, 1:], y[:, :-1])
        texts = [_decoded(task, row) for row in x]
        assert all(text in TEXT[: int(0.9 * len(TEXT))] for text in texts)
    np.testing.assert_array_equal(batches[5][0], others[0][0])
    another = task.batches(Run("ridge", "A1W1", 1e-3, 20, seed=4), 0)
    assert not np.array_equal(batches[5][0], another[5][0])


def test_validation_covers_the_last_tenth():
    task = _task()
    data = task.validation(Run("float", "float", 1e-3, 20), final=False)
    split = int(0.9 * len(TEXT))
    assert data["x"].shape == (16, 16)
    assert _decoded(task, data["x"][0]) == TEXT[split : split + 16]
    assert _decoded(task, data["y"][-1]) == TEXT[-16:]
    final = task.validation(Run("float", "float", 1e-3, 20), final=True)
    assert len(final["x"]) == 4 * len(data["x"])


def test_the_model_is_that_of_nanogpt_and_a_recipe_can_be_changed():
    recipe = recipes.GPT.of({"fields": {}})
    assert (recipe.width, recipe.blocks, recipe.heads, recipe.context) == (384, 6, 6, 256)
    fields = {"recipe": {"width": 16, "dropout": 0.0}}
    model = _task().model(Run("float", "float", 1e-3, 20, fields=fields))
    assert model.get_layer("tokens").output.shape[-1] == 16
    assert model.get_layer("head").compute_dtype == "float32"
    assert not any(isinstance(layer, keras.layers.Dropout) and layer.rate for layer in model.layers)
    with pytest.raises(ValueError, match=r"no \['depth'\]"):
        recipes.GPT.of({"fields": {"recipe": {"depth": 3}}})


def _rows(plan: str, rows=(), accuracy=lambda run: 0.5) -> list[dict]:
    return [
        {
            **run,
            "val_accuracy": accuracy(run),
            "val_loss": 2.0,
            "diverged": False,
            "ms_per_step": 8.0,
            "bits_per_element": 1.25,
            "energy_per_product": 1.0,
            "curve": [{"step": step, "val_accuracy": accuracy(run)} for step in (250, 500)],
        }
        for run in getattr(PLANS, plan)(rows)
    ]


def test_plans_hold_what_the_tables_need():
    first = PLANS.first([])
    assert len(first) == 1 + 4 * 8
    assert {run["steps"] for run in first} == {2000}
    keys = {runs.key_of(run) for run in PLANS.sweep([])}
    assert len(keys) == 4 * 8
    # The stock rate is shared with the first table.
    assert len(keys & {runs.key_of(run) for run in first}) == 8
    assert len(PLANS.sparse([])) == 4 * 2
    assert len({runs.key_of(run) for run in PLANS.knobs([])}) == 2 + 2 + 5 + 4 + 4 + 2 + 4 + 3 - 7


def test_the_base_of_the_knobs_is_the_default():
    default = rq.QuantizationPolicy("A1W1")
    base = rq.quantizers.Ridge(1, **nanogpt.KNOB_BASE)
    assert (base.has_offset, base.range_rule) == (default.weights.has_offset, "rms")
    assert default.weights == default.activations == base.replace(affine="auto", range="auto")


def test_long_runs_take_the_best_rate_of_the_short_ones():
    rows = _rows("sweep", accuracy=lambda run: 0.5 - abs(run["lr"] - 3.9e-3))
    long = PLANS.deciding(rows)
    places = {}
    for run in long:
        places.setdefault((run["method"], run["setting"]), []).append((run["seed"], run["lr"]))
    assert len(places) == 1 + 2 * 3
    for method in ("quest", "ridge", "recommended"):
        assert places[method, "A1W1"] == [(0, 4e-3), (0, 2e-3), (1, 4e-3), (2, 4e-3)]
    # Nothing known: the stock rate.
    assert places["quest", "A4W4"] == places["float", "float"] == [(s, 1e-3) for s in range(3)]
    tried = _rows("deciding", rows, lambda run: 0.5 + 0.1 * (run["lr"] == 2e-3))
    chosen = [r for r in PLANS.deciding([*rows, *tried]) if r["seed"] and r["setting"] == "A1W1"]
    assert {run["lr"] for run in chosen} == {2e-3}


def test_tables_and_figures_are_drawn_from_rows(tmp_path: Path):
    worth = {"recommended": 0.02, "quest": 0.01}
    short = [row for plan in ("first", "sweep", "knobs") for row in _rows(plan)]
    long = _rows(
        "deciding", short, lambda r: 0.45 + worth.get(r["method"], 0.0) + 0.001 * r["seed"]
    )
    extra = {**short[1], "fields": {"both": {"trust": 1.6}}}
    failed = {**runs.DEFAULTS, **PLANS.sparse([])[0], "error": "no such thing"}
    text = nanogpt_tables.tables([*short, *long, extra, failed], PLANS)
    assert "| A1W1 | quest | 0.001 | 3 | 0.4610 ± 0.0010 |" in text
    assert text.count("| +0.0100 |\n") == 2
    assert '"trust": 1.6' in text
    assert "| recommended | fails |" in text
    assert nanogpt_tables.tables([], PLANS) == ""
    drawn = nanogpt_tables.figures(short, PLANS, tmp_path)
    assert sorted(path.name for path in drawn) == [
        "nanogpt_curves.png",
        "nanogpt_energy.png",
        "nanogpt_storage.png",
    ]
    assert all(path.stat().st_size > 10_000 for path in drawn)


def test_a_rate_that_few_seeds_have_decides_nothing():
    rows = _rows("sweep", accuracy=lambda run: 0.4 + run["lr"])
    (best, second), quest = (8e-3, 4e-3), {"method": "quest", "setting": "A1W1"}
    places = [(best, 0, 0.9), *((second, seed, 0.6) for seed in nanogpt.SEEDS)]
    ours = [{**quest, "lr": lr, "seed": seed} for lr, seed, _ in places]
    long = [
        {**rows[0], **run, "val_accuracy": accuracy}
        for run, (_, _, accuracy) in zip(PLANS.runs(ours, PLANS.long), places, strict=True)
    ]
    text = nanogpt_tables.deciding([*rows, *long], PLANS)
    assert "| A1W1 | quest | 0.004 | 3 | 0.6000 ± 0.0000 |" in text
    others = [{**row, "lr": best, "val_accuracy": 0.7} for row in long if row["seed"]]
    text = nanogpt_tables.deciding([*rows, *long, *others], PLANS)
    assert "| A1W1 | quest | 0.008 | 3 |" in text


def _script(*arguments: str | Path) -> subprocess.CompletedProcess:
    environment = {**os.environ, "KERAS_BACKEND": "jax", "PYTHONPATH": str(ROOT)}
    script = ROOT / "benchmarks" / "nanogpt.py"
    command = [sys.executable, str(script), "--small", *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_a_small_plan_runs_and_is_not_run_again(tmp_path: Path):
    text, plan, out = (tmp_path / name for name in ("text.txt", "plan.json", "rows.json"))
    text.write_text(TEXT)
    places = [("float", "float"), ("ridge", "A1W1"), ("nonsense", "A1W1")]
    plan.write_text(json.dumps([{"method": m, "setting": s, "steps": 20} for m, s in places]))
    first = _script("--plan", plan, "--data", text, "--out", out)
    rows = {row["method"]: row for row in json.loads(out.read_text())["rows"]}
    assert first.returncode == 1, first.stderr
    assert "no method 'nonsense'" in rows["nonsense"]["error"]
    for method in ("float", "ridge"):
        row = rows[method]
        assert row["task"] == "nanogpt-small"
        assert [point["step"] for point in row["curve"]] == [10, 20]
        assert row["curve"][1]["loss"] < row["curve"][0]["loss"] < np.log(len(set(TEXT))) + 0.1
        assert row["backend"] == "jax"
        assert row["device"]
    again = _script("--method", "float", "ridge", "--steps", "20", "--data", text, "--out", out)
    assert again.returncode == 0
    assert "0 of 2 runs to do" in again.stderr
    shown = _script("--out", out, "--table", "--plot", tmp_path / "figures")
    assert "| ridge | " in shown.stdout
    assert (tmp_path / "figures" / "nanogpt_curves.png").exists()
