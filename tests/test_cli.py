"""The command line: what it prints, and that mistakes end in a sentence and exit code 2."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import keras
import pytest

import keras_rq as rq
from keras_rq import cli


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A small float model on disk."""
    model = keras.Sequential(
        [
            keras.Input((16,)),
            keras.layers.Dense(8, activation="relu", name="first"),
            keras.layers.Dense(3, name="second"),
        ]
    )
    path = tmp_path / "float.keras"
    model.save(path)
    return path


def _mistake(capsys: pytest.CaptureFixture, *arguments: object) -> str:
    """Runs a command that must fail, and returns what it says."""
    assert cli.main([str(argument) for argument in arguments]) == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    return said


def test_report_names_every_layer(saved: Path, capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["report", str(saved)]) == 0
    printed = capsys.readouterr().out
    assert "first" in printed and "second" in printed


def test_report_as_json_is_the_report(saved: Path, capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["report", str(saved), "--policy", "A4W1", "--json"]) == 0
    printed = capsys.readouterr().out
    model = keras.saving.load_model(saved)
    rq.quantize(model, rq.QuantizationPolicy("A4W1"))
    expected = json.loads(json.dumps(rq.report(model).to_dict()))
    assert json.loads(printed[printed.index("{") :]) == expected


def test_export_writes_a_file_and_says_its_size(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "model.tflite"
    assert cli.main(["export", str(saved), str(out), "--policy", "A8W8"]) == 0
    assert f"{out.stat().st_size:,} bytes" in capsys.readouterr().out


@pytest.mark.once
@pytest.mark.parametrize("command", ["report", "export"])
def test_missing_model(command: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    missing = tmp_path / "missing.keras"
    arguments = [command, missing] + [tmp_path / "out.tflite"] * (command == "export")
    assert str(missing) in _mistake(capsys, *arguments)


@pytest.mark.once
def test_model_of_another_kind(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    other = tmp_path / "model.h5"
    other.touch()
    assert "expected a .keras file" in _mistake(capsys, "report", other)


@pytest.mark.once
def test_model_that_is_no_model(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    broken = tmp_path / "broken.keras"
    broken.write_bytes(b"not a zip file")
    assert f"cannot load {broken}" in _mistake(capsys, "report", broken)


@pytest.mark.once
def test_policy_that_cannot_be_read(saved: Path, capsys: pytest.CaptureFixture) -> None:
    said = _mistake(capsys, "report", saved, "--policy", "A4X1")
    assert "cannot apply --policy A4X1" in said


@pytest.mark.once
def test_policy_on_a_model_that_has_one(saved: Path, capsys: pytest.CaptureFixture) -> None:
    model = keras.saving.load_model(saved)
    rq.quantize(model, rq.QuantizationPolicy("A4W1"))
    model.save(saved)
    assert "quantized" in _mistake(capsys, "report", saved, "--policy", "A4W1")


@pytest.mark.once
def test_export_to_a_format_nobody_knows(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "model.xyz"
    assert f"cannot export {saved}" in _mistake(capsys, "export", saved, out)
    assert not out.exists()


@pytest.mark.once
@pytest.mark.parametrize(
    "arguments",
    [[], ["nonsense"], ["report"], ["demo", "--epochs", "0"], ["demo", "--epochs", "many"]],
    ids=lambda arguments: " ".join(arguments) or "nothing",
)
def test_arguments_that_make_no_command(
    arguments: list[str], capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    assert stopped.value.code == 2
    assert "usage: keras-rq" in capsys.readouterr().err


@pytest.mark.once
def test_demo_where_nothing_can_be_written(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    taken = tmp_path / "a_file"
    taken.touch()
    assert f"cannot write to {taken}" in _mistake(capsys, "demo", "--out", taken)


@pytest.mark.once
def test_the_module_is_the_command() -> None:
    shown = subprocess.run(
        [sys.executable, "-m", "keras_rq", "--help"], capture_output=True, text=True, check=True
    )
    assert all(command in shown.stdout for command in ("demo", "report", "export"))
