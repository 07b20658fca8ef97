"""The demo, one seed and one epoch: its files exist and agree with each other.

Two settings on TensorFlow, of which `make demo` runs all; one on the others, which write the same.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from gradients import BACKEND

from keras_rq import cli, demo
from keras_rq.demo import digits, files, methods, table, training
from keras_rq.demo.results import Results, Row

# One process runs the demo for all tests here, and compiles seven models to do so.
pytestmark = pytest.mark.timeout(900)


SETTINGS = methods.SETTINGS[:2] if BACKEND == "tensorflow" else ("A4W1",)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("demo") / "new" / "folder"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "SETTINGS", SETTINGS)
        assert cli.main(["demo", "--quick", "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def found(folder: Path) -> dict:
    return json.loads((folder / "demo.json").read_text())


@pytest.fixture(scope="module")
def rows(found: dict) -> dict[tuple[str, str], dict]:
    return {(row["setting"], row["method"]): row for row in found["rows"]}


def test_every_setting_by_every_method(rows: dict) -> None:
    quantized = {key for key in rows if key[0] != files.FLOAT}
    expected = {(s, method.name) for s in SETTINGS for method in methods.METHODS}
    assert quantized == expected
    assert all(0 < row["mean"] <= 1 for row in rows.values())


@pytest.mark.once
def test_fewer_bits_make_a_smaller_element(rows: dict) -> None:
    bits = [rows[setting, "ridge"]["bits_per_element"] for setting in SETTINGS]
    assert bits[0] > 8 > bits[1] > 1


def test_the_table_speaks_of_the_files_that_were_written(folder: Path, found: dict) -> None:
    written = {row["file"]["name"]: row["file"]["size"] for row in found["rows"] if row["file"]}
    assert written == {path.name: path.stat().st_size for path in folder.glob("*.tflite")}
    assert len(written) == 1 + len(SETTINGS)


def test_integer_files_are_smaller_than_the_float_file(found: dict) -> None:
    sizes = {row["setting"]: row["file"]["size"] for row in found["rows"] if row["file"]}
    assert all(sizes[setting] < sizes[files.FLOAT] for setting in SETTINGS)


def test_files_answer_as_the_table_says(folder: Path, found: dict) -> None:
    data = digits.load()
    for row in found["rows"]:
        if row["file"] is None:
            continue
        buffer = (folder / row["file"]["name"]).read_bytes()
        classes = files.logits(buffer, data.test_images).argmax(-1)
        assert np.mean(classes == data.test_labels) == row["file"]["accuracy"]
        # The file is the model: it cannot be off by more images than differ in class.
        errors = abs(row["file"]["accuracy"] - max(row["accuracies"])) * found["test_images"]
        assert round(errors) <= row["file"]["classes_differ"]


def test_files_agree_with_their_models(found: dict) -> None:
    for row in found["rows"]:
        if row["file"]:
            assert row["file"]["classes_differ"] <= 0.01 * found["test_images"]


def test_chart_is_a_png(folder: Path) -> None:
    assert (folder / "demo.png").read_bytes().startswith(b"\x89PNG\r\n")


def test_markdown_has_one_line_for_each_row(folder: Path, found: dict) -> None:
    lines = [x for x in (folder / "demo.md").read_text().splitlines() if x.startswith("|")]
    assert len(lines) == 2 + len(found["rows"])


def test_json_says_where_it_was_measured(found: dict) -> None:
    assert found["machine"]["cpu"] and found["machine"]["cores"]
    assert found["versions"]["keras"] and found["versions"]["ai-edge-litert"]
    assert found["seconds"] > 0


@pytest.mark.once
def test_split_is_stratified_and_complete() -> None:
    data = digits.load()
    assert len(data.train_images) + len(data.test_images) == 1797
    assert len(data.test_images) == 360
    shares = np.bincount(data.test_labels) / np.bincount(data.train_labels)
    np.testing.assert_allclose(shares, 0.25, atol=0.01)


def test_the_same_seed_trains_the_same_model() -> None:
    data = digits.load()
    trainer = training.Trainer(digits.network(), training.Recipe(1, 1e-3), data)
    accuracies = [trainer.run(seed, lambda: None) for seed in (0, 1, 0)]
    assert accuracies[0] == pytest.approx(accuracies[2], abs=2 / 360)


@pytest.mark.once
def test_spread_is_the_standard_deviation_and_absent_for_one_run() -> None:
    several, one = Row("A1W1", "ridge", (0.9, 0.92, 0.94), 1.0), Row("float", "", (0.99,), 32.0)
    results = Results((one, several), "", "", 1437, 360, 0, 0.0)
    assert several.spread == pytest.approx(0.02)
    assert table.cells(several, results)[2] == "92.00 ± 2.00"
    assert table.cells(one, results)[2] == "99.00"
