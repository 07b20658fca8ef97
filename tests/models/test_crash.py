"""A training that is killed and started again ends with the weights of one left alone."""

from __future__ import annotations

import sys
from pathlib import Path

import keras
import numpy as np
import pytest

import keras_rq as rq

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import crash

EPOCHS = 6


def model(optimizer: str = "adam") -> keras.Model:
    made = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    made.compile(optimizer, "mse")
    return made


def fit(of: keras.Model, folder: Path, epochs: int, **options: bool) -> list[float]:
    x = np.linspace(-1, 1, 32, dtype="float32").reshape(8, 4)
    backup = rq.callbacks.BackupAndRestore(folder, **options)
    done = of.fit(x, x[:, :1], shuffle=False, epochs=epochs, callbacks=[backup], verbose=0)
    return done.history["loss"]


class Told(list):
    """What a training in this process tells."""

    send = list.append


def test_killed_within_an_epoch_and_started_again(tmp_path: Path):
    alone, killed = tmp_path / "alone", tmp_path / "killed"
    alone.mkdir(), killed.mkdir()
    child = crash.Child(crash.train, killed, pause=0.01)
    child.wait(until=(3, 4))
    child.kill()
    epoch, problem = crash.backed_up(killed / "backup")
    assert 3 <= epoch < EPOCHS and problem is None
    straight, resumed = Told(), Told()
    crash.train(alone, straight, epochs=EPOCHS)
    crash.train(killed, resumed, epochs=EPOCHS, first=True)
    assert resumed == straight[epoch * crash.BATCHES :]
    assert crash.difference(alone / "final.npz", killed / "final.npz") == (0, 0.0)


@pytest.mark.once
def test_a_kill_while_a_backup_is_written_leaves_the_one_before(tmp_path: Path, monkeypatch):
    def killed(*_: object, **__: object) -> None:
        raise SystemExit

    fit(model(), tmp_path, 2, delete_checkpoint=False)
    for at in ("keras.Model.save_weights", "keras_rq.training.backup.write_atomically"):
        with monkeypatch.context() as patch:
            patch.setattr(at, killed)
            with pytest.raises(SystemExit):
                fit(model(), tmp_path, 3)
        assert crash.backed_up(tmp_path) == (2, None)
    assert len(fit(model(), tmp_path, 3)) == 1
    assert not tmp_path.exists()


@pytest.mark.once
def test_kills_of_a_process_that_writes_all_the_time():
    row = crash.crash_writes(keras.backend.backend(), "keras_rq", kills=1, seed=0)
    assert (row["kills"], row["unreadable"], row["mismatched"]) == (1, 0, 0)


@pytest.mark.once
def test_the_next_fit_begins_at_its_first_epoch(tmp_path: Path):
    fit(model(), tmp_path / "backup", 2, delete_checkpoint=False)
    resumed = model()
    assert len(fit(resumed, tmp_path / "backup", 3)) == 1
    assert len(fit(resumed, tmp_path / "backup", 2)) == 2


@pytest.mark.once
def test_backups_of_another_training_are_refused(tmp_path: Path):
    fit(model(), tmp_path, 1, delete_checkpoint=False)
    with pytest.raises(ValueError, match="another optimizer"):
        fit(model("sgd"), tmp_path, 2)
    (tmp_path / "latest.weights.h5").touch()
    with pytest.raises(ValueError, match=r"keras\.callbacks\.BackupAndRestore"):
        fit(model(), tmp_path, 2)
    unbuilt = keras.Sequential([keras.layers.Dense(1)])
    unbuilt.compile("sgd", "mse")
    callback = rq.callbacks.BackupAndRestore(tmp_path)
    callback.set_model(unbuilt)
    with pytest.raises(ValueError, match="not built"):
        callback.on_train_begin()
