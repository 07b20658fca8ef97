"""Kills a training at random moments, starts it again, and compares it with one left alone.

    python benchmarks/crash.py --out benchmarks/results/crash.json

A child trains a small model that has every kind of state: quantizers with parameters (`GDNSQ`,
`LearnedStep` on calibrated ranges), a schedule by epochs and one by steps, the GDNSQ callback,
dropout, Adam with averaged weights, batches in another order every epoch. The parent kills it
(SIGKILL) ten times, each at a random moment of the epoch at hand or the next, and lets it finish
then. `differing` counts the elements of final weights and optimizer state that are not, bit for
bit, those of the training that was left alone.

The second part kills a child that does little but write backups, with this package's callback and
with Keras's. `unreadable` counts files that HDF5 cannot read, `mismatched` those that are of
another epoch than the backup says.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

BACKENDS = ("tensorflow", "jax", "torch")
EPOCHS, BATCHES, BATCH = 16, 8, 8
ROOT = Path(__file__).resolve().parent.parent


# The child.


def make_model() -> Any:
    """A quantized and compiled model, the same every time."""
    import keras
    from keras import layers

    import keras_rq as rq

    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((24,)),
            layers.Dense(32, "relu", name="gdnsq"),
            layers.Dropout(0.2, seed=1),
            layers.Dense(32, "relu", name="ridge"),
            layers.Dense(4, name="learned"),
        ]
    )
    gdnsq, learned = rq.quantizers.GDNSQ(6), rq.quantizers.LearnedStep(4)
    rules = [
        rq.Rule("gdnsq", weights=gdnsq, activations=gdnsq),
        rq.Rule("learned", weights=learned, activations=learned),
    ]
    model.quantize(rq.QuantizationPolicy("A8W8-16", rules=rules), verbose=False)
    rq.calibrate(model, rows()[0], verbose=False)
    model.compile(keras.optimizers.Adam(0.03, use_ema=True, ema_momentum=0.9), "mse")
    return model


def rows() -> tuple[np.ndarray, np.ndarray]:
    """All inputs and targets."""
    random = np.random.default_rng(0)
    x = random.normal(size=(BATCHES * BATCH, 24)).astype("float32")
    return x, np.tanh(x[:, :4] * x[:, 4:8])


def batches() -> Any:
    """The rows in an order that follows from the number of the epoch."""
    import keras

    x, y = rows()

    class Batches(keras.utils.PyDataset):
        epoch = 0

        def __len__(self) -> int:
            return BATCHES

        def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
            order = np.random.default_rng([0, self.epoch]).permutation(len(x))
            chosen = order[BATCH * index : BATCH * (index + 1)]
            return x[chosen], y[chosen]

    return Batches()


def train(options: argparse.Namespace) -> None:
    """Trains to the end, tells every batch, and writes what came out."""
    import keras

    import keras_rq as rq

    data, model = batches(), make_model()

    class Teller(keras.callbacks.Callback):
        epoch = 0

        def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
            self.epoch = data.epoch = epoch

        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            print(json.dumps([self.epoch, batch]), flush=True)
            time.sleep(options.pause)

    callbacks = [
        Teller(),
        rq.callbacks.GDNSQ(warmup=BATCHES, growth=10.0, decay=0.99),
        rq.callbacks.GradualBits(weights={0: 8, EPOCHS // 3: 4}, match="ridge"),
        rq.callbacks.RidgeLambda({0: 0.1, 5 * BATCHES // 2: 0.01}, match="ridge", unit="step"),
    ]
    backup = rq.callbacks.BackupAndRestore(options.child / "backup", delete_checkpoint=False)
    callbacks.insert(0 if options.first else len(callbacks), backup)
    model.fit(data, epochs=options.epochs, callbacks=callbacks, verbose=0)
    found = [*model.get_weights(), *(v.numpy() for v in model.optimizer.variables)]
    np.savez(options.child / "final.npz", *[np.asarray(value) for value in found])
    print(json.dumps(["converged", callbacks[1 + options.first].converged]), flush=True)


def write(options: argparse.Namespace) -> None:
    """Trains with epochs of one small batch, each followed by a backup of megabytes."""
    import keras

    import keras_rq as rq

    model = keras.Sequential([keras.Input((512,)), keras.layers.Dense(512)])
    model.compile("adam", "mse")
    kinds = {"keras_rq": rq.callbacks.BackupAndRestore, "keras": keras.callbacks.BackupAndRestore}
    x = np.ones((1, 512), "float32")
    tell = keras.callbacks.LambdaCallback(
        on_epoch_begin=lambda epoch, logs: print(json.dumps([epoch, 0]), flush=True)
    )
    callbacks = [kinds[options.writes](str(options.child / "backup")), tell]
    model.fit(x, x, epochs=10**6, callbacks=callbacks, verbose=0)


# The parent.


class Child:
    """A training in a process of its own.

    Args:
        backend: Keras's backend.
        folder: where it keeps what it writes.
        arguments: of this script.
    """

    def __init__(self, backend: str, folder: Path, arguments: Sequence[str] = ()) -> None:
        command = [sys.executable, str(Path(__file__).resolve()), "--child", str(folder)]
        environment = {
            "TF_CPP_MIN_LOG_LEVEL": "3",
            "OMP_NUM_THREADS": "1",
            **os.environ,
            "KERAS_BACKEND": backend,
            "PYTHONPATH": str(ROOT),
        }
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115 (lives as long as the child)
        self.process = subprocess.Popen(
            [*command, *arguments], stdout=subprocess.PIPE, stderr=self.errors, env=environment
        )

    def wait_for_batch(self) -> list[int]:
        """The first batch that it tells of."""
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"The child ended: {self._said()}")
        return json.loads(line)

    def kill(self) -> list[int] | None:
        """Ends it at once; the last batch that it told of since it was asked."""
        if self.process.poll() is not None:
            raise RuntimeError(f"The child ended by itself: {self._said()}")
        self.process.send_signal(signal.SIGKILL)
        lines = self.process.stdout.read().splitlines()
        self.process.wait()
        return json.loads(lines[-1]) if lines else None

    def finish(self) -> list[Any]:
        """Waits for its end; all that it told of."""
        lines = self.process.stdout.read().splitlines()
        if self.process.wait() != 0:
            raise RuntimeError(f"The child failed: {self._said()}")
        return [json.loads(line) for line in lines]

    def _said(self) -> str:
        self.errors.seek(0)
        return self.errors.read().decode()[-3000:]


def backed_up(folder: Path) -> tuple[int | None, str | None]:
    """The epoch of the backup in a folder, if there is one, and what is wrong with it."""
    import h5py

    of_keras = folder / "training_metadata.json"
    state = of_keras if of_keras.exists() else folder / "backup.json"
    files = sorted(folder.glob("*.weights.h5"))
    if not state.exists():
        return None, None if state != of_keras or not files else "mismatched"
    try:
        epoch = json.loads(state.read_text())["epoch"]
        name = "latest" if state == of_keras else f"epoch-{epoch}"
        with h5py.File(folder / f"{name}.weights.h5") as file:
            arrays: list[np.ndarray] = []
            file.visititems(
                lambda _, one: arrays.append(one[()]) if isinstance(one, h5py.Dataset) else None
            )
            steps = int(file["optimizer/vars/0"][()])
    except (OSError, KeyError, ValueError):
        return None, "unreadable"
    return epoch, (None if steps % epoch == 0 and arrays else "mismatched")


def crash(backend: str, kills: int, seed: int, pause: float) -> dict[str, Any]:
    """One row: a training that is killed `kills` times against one that is not."""
    chance = random.Random(seed)
    common = ["--pause", str(pause), "--epochs", str(EPOCHS)]
    with tempfile.TemporaryDirectory() as folder:
        alone, killed = Path(folder, "alone"), Path(folder, "killed")
        alone.mkdir(), killed.mkdir()
        child = Child(backend, alone, common)
        child.wait_for_batch()
        began = time.perf_counter()
        told = child.finish()
        epoch_seconds = (time.perf_counter() - began) / EPOCHS
        moments = []
        for index in range(kills):
            child = Child(backend, killed, [*common, *(["--first"] if index % 2 else [])])
            first = child.wait_for_batch()
            time.sleep(chance.uniform(0, 1.5 * epoch_seconds))
            last = child.kill() or first
            epoch, problem = backed_up(killed / "backup")
            moments.append({"began": first, "killed": last, "backup": epoch, "problem": problem})
        end = Child(backend, killed, common).finish()
        differing, largest = _difference(alone / "final.npz", killed / "final.npz")
    return {
        "backend": backend,
        "part": "resume",
        "kills": kills,
        "unreadable": sum(m["problem"] is not None for m in moments),
        "differing": differing,
        "largest_difference": largest,
        "converged": [told[-1][1], end[-1][1]],
        "moments": moments,
    }


def _difference(one: Path, other: Path) -> tuple[int, float]:
    """How many elements are not equal, and by how much at most."""
    with np.load(one) as a, np.load(other) as b:
        pairs = [(a[name], b[name]) for name in a.files]
        assert a.files == b.files and all(x.shape == y.shape for x, y in pairs)
        count = sum(int(np.sum(x != y)) for x, y in pairs)
        gaps = [float(np.max(np.abs(x.astype("float64") - y))) for x, y in pairs if x.size]
        return count, max(gaps)


def crash_writes(backend: str, callback: str, kills: int, seed: int) -> dict[str, Any]:
    """One row: what a child that was killed leaves, of many that write all the time."""
    chance = random.Random(seed)
    problems = []
    for _ in range(kills):
        with tempfile.TemporaryDirectory() as folder:
            child = Child(backend, Path(folder), ["--writes", callback])
            while child.wait_for_batch()[0] < 2:
                pass
            time.sleep(chance.uniform(0, 0.5))
            child.kill()
            problems.append(backed_up(Path(folder, "backup"))[1])
    counts = {kind: problems.count(kind) for kind in ("unreadable", "mismatched")}
    return {"backend": backend, "part": "write", "callback": callback, "kills": kills, **counts}


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, default=list(BACKENDS))
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pause", type=float, default=0.02, help="seconds after every batch")
    parser.add_argument("--write-backend", choices=BACKENDS, default="torch")
    parser.add_argument("--out", type=Path, help="JSON file of results")
    parser.add_argument("--epochs", type=int, default=EPOCHS, help=argparse.SUPPRESS)
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--writes", choices=("keras", "keras_rq"), help=argparse.SUPPRESS)
    parser.add_argument("--first", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    """Measures, and returns 1 if anything of this package's was unreadable or differed."""
    options = parse()
    if options.child is not None:
        (write if options.writes else train)(options)
        return 0
    sys.path.insert(0, str(ROOT))
    from rows import RowsFile

    from keras_rq.demo import results

    file = RowsFile(options.out)
    file.provenance, bad = results.provenance(), 0
    jobs = [
        lambda b=b: crash(b, options.kills, options.seed, options.pause) for b in options.backends
    ]
    jobs += [
        lambda c=c: crash_writes(options.write_backend, c, options.kills, options.seed)
        for c in ("keras_rq", "keras")
    ]
    for job in jobs:
        row = job()
        file.rows = [r for r in file.rows if _key(r) != _key(row)] + [row]
        file.write()
        print(json.dumps(row))
        if row.get("callback") != "keras":
            bad += row["unreadable"] + row.get("mismatched", 0) + row.get("differing", 0)
    return int(bad > 0)


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["backend"], row["part"], row.get("callback")


if __name__ == "__main__":
    sys.exit(main())
