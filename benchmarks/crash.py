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
import multiprocessing
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

BACKENDS = ("tensorflow", "jax", "torch")
PARTS = ("resume", "write")
EPOCHS, BATCHES, BATCH = 16, 8, 8
ROOT = Path(__file__).resolve().parent.parent


# The child.


def make_model() -> Any:
    """A quantized and compiled model, the same every time."""
    import keras
    from keras import layers

    import keras_rq as rq

    def dense(units: int, activation: str | None, name: str) -> layers.Layer:
        # Zeros, because JAX compiles its random generator anew for every shape.
        return layers.Dense(units, activation, kernel_initializer="zeros", name=name)

    model = keras.Sequential(
        [
            keras.Input((24,)),
            dense(32, "relu", "gdnsq"),
            layers.Dropout(0.2, seed=1),
            dense(32, "relu", "ridge"),
            dense(4, None, "learned"),
        ]
    )
    random = np.random.default_rng(1)
    for layer in (model.get_layer(name) for name in ("gdnsq", "ridge", "learned")):
        layer.kernel.assign(0.2 * random.normal(size=layer.kernel.shape))
    gdnsq, learned = rq.quantizers.GDNSQ(8), rq.quantizers.LearnedStep(4)
    rules = [
        rq.Rule("gdnsq", weights=gdnsq, activations=gdnsq),
        rq.Rule("learned", weights=learned, activations=learned),
    ]
    model.quantize(rq.QuantizationPolicy("A8W8-16", rules=rules), verbose=False)
    rq.calibrate(model, rows()[0], verbose=False)
    for variable in model.get_layer("gdnsq").weights:
        if "log_step" in variable.path:  # widths reach their targets within the training
            variable.assign(variable + 1.5)
    model.compile(keras.optimizers.Adam(0.01, use_ema=True, ema_momentum=0.9), "mse")
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


def train(
    folder: Path, told: Any, *, epochs: int = EPOCHS, first: bool = False, pause: float = 0.0
) -> None:
    """Trains to the end and writes what came out.

    Args:
        folder: of the backup and of `final.npz`.
        told: its method `send` gets the epoch and the number of every batch, and at the end the
            number of epochs and whether the widths of `gdnsq` have reached their targets.
        epochs: to train for.
        first: whether the backup comes before the other callbacks, or after them.
        pause: seconds to sleep after every batch.
    """
    import keras

    import keras_rq as rq

    data, model = batches(), make_model()

    class Teller(keras.callbacks.Callback):
        epoch = 0

        def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
            self.epoch = data.epoch = epoch

        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            told.send((self.epoch, batch))
            time.sleep(pause)

    gdnsq = rq.callbacks.GDNSQ(warmup=BATCHES, growth=10.0, decay=0.99)
    callbacks = [
        Teller(),
        gdnsq,
        rq.callbacks.GradualBits(weights={0: 8, 3: 4}, match="ridge"),
        rq.callbacks.RidgeLambda({0: 0.1, 5 * BATCHES // 2: 0.01}, match="ridge", unit="step"),
    ]
    backup = rq.callbacks.BackupAndRestore(folder / "backup", delete_checkpoint=False)
    callbacks.insert(0 if first else len(callbacks), backup)
    # Keras would shuffle the batches themselves, from a generator that a new process starts anew.
    model.fit(data, shuffle=False, epochs=epochs, callbacks=callbacks, verbose=0)
    found = [*model.get_weights(), *(v.numpy() for v in model.optimizer.variables)]
    np.savez(folder / "final.npz", *[np.asarray(value) for value in found])
    told.send((epochs, gdnsq.converged))


def write(folder: Path, told: Any, *, callback: str) -> None:
    """Trains with epochs of one small batch, each followed by a backup of megabytes."""
    import keras

    import keras_rq as rq

    model = keras.Sequential([keras.Input((512,)), keras.layers.Dense(512)])
    model.compile("adam", "mse")
    kinds = {"keras_rq": rq.callbacks.BackupAndRestore, "keras": keras.callbacks.BackupAndRestore}
    x = np.ones((1, 512), "float32")
    tell = keras.callbacks.LambdaCallback(on_epoch_begin=lambda epoch, _: told.send((epoch, 0)))
    backup = kinds[callback](str(folder / "backup"))
    model.fit(x, x, epochs=10**6, callbacks=[backup, tell], verbose=0)


# The parent.


class Child:
    """A training in a process of its own.

    Args:
        target: what it runs: `train` or `write`.
        folder: where it keeps what it writes.
        options: the other arguments of `target`.
    """

    def __init__(self, target: Callable[..., Any], folder: Path, **options: Any) -> None:
        # A fork of a process that has imported TensorFlow may wait for a lock forever.
        processes = multiprocessing.get_context("spawn")
        self.received, sent = processes.Pipe(duplex=False)
        self.process = processes.Process(target=target, args=(folder, sent), kwargs=options)
        self.process.start()
        sent.close()
        self.last: Any = None

    def wait(self, until: Any = None) -> Any:
        """Waits for its end, or for something that is not less than `until`; what it told last."""
        while until is None or self.last is None or self.last < until:
            try:
                self.last = self.received.recv()
            except EOFError:
                self.process.join()
                if until is not None or self.process.exitcode != 0:
                    raise RuntimeError(f"The child ended: {self.process.exitcode}") from None
                break
        return self.last

    def kill(self) -> Any:
        """Ends it at once (SIGKILL); what it told last."""
        if not self.process.is_alive():
            raise RuntimeError(f"The child ended by itself: {self.process.exitcode}")
        self.process.kill()
        try:
            while True:
                self.last = self.received.recv()
        except (EOFError, OSError):
            self.process.join()
        return self.last


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
    with tempfile.TemporaryDirectory() as folder:
        alone, killed = Path(folder, "alone"), Path(folder, "killed")
        alone.mkdir(), killed.mkdir()
        child = Child(train, alone, pause=pause)
        child.wait(until=(1, 0))
        began = time.perf_counter()
        converged = [child.wait()[1]]
        batch_seconds = (time.perf_counter() - began) / BATCHES / (EPOCHS - 1)
        moments = []
        for index in range(kills):
            child = Child(train, killed, pause=pause, first=bool(index % 2))
            first = child.wait(until=(0, 0))
            # Counted in batches: where a schedule has a step compiled again, a clock would end all
            # attempts at the same place.
            ahead = first[0] * BATCHES + first[1] + chance.randrange(3 * BATCHES // 2)
            child.wait(until=divmod(ahead, BATCHES))
            time.sleep(chance.uniform(0, 2 * batch_seconds))
            last = child.kill()
            epoch, problem = backed_up(killed / "backup")
            moments.append({"began": first, "killed": last, "backup": epoch, "problem": problem})
        converged.append(Child(train, killed).wait()[1])
        differing, largest = difference(alone / "final.npz", killed / "final.npz")
    return {
        "backend": backend,
        "part": "resume",
        "kills": kills,
        "unreadable": sum(m["problem"] is not None for m in moments),
        "differing": differing,
        "largest_difference": largest,
        "converged": converged,
        "moments": moments,
    }


def crash_writes(backend: str, callback: str, kills: int, seed: int) -> dict[str, Any]:
    """One row: what a child that was killed leaves, of many that write all the time."""
    chance = random.Random(seed)
    problems = []
    for _ in range(kills):
        with tempfile.TemporaryDirectory() as folder:
            child = Child(write, Path(folder), callback=callback)
            child.wait(until=(2, 0))
            time.sleep(chance.uniform(0, 0.5))
            child.kill()
            problems.append(backed_up(Path(folder, "backup"))[1])
    counts = {kind: problems.count(kind) for kind in ("unreadable", "mismatched")}
    return {"backend": backend, "part": "write", "callback": callback, "kills": kills, **counts}


def difference(one: Path, other: Path) -> tuple[int, float]:
    """How many elements are not equal, and by how much at most."""
    with np.load(one) as a, np.load(other) as b:
        pairs = [(a[name], b[name]) for name in a.files]
        assert a.files == b.files and all(x.shape == y.shape for x, y in pairs)
        count = sum(int(np.sum(x != y)) for x, y in pairs)
        gaps = [float(np.max(np.abs(x.astype("float64") - y))) for x, y in pairs if x.size]
        return count, max(gaps)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, default=list(BACKENDS))
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pause", type=float, default=0.02, help="seconds after every batch")
    parser.add_argument("--write-kills", type=int, default=10)
    parser.add_argument("--out", type=Path, help="JSON file of results")
    parser.add_argument("--worker", choices=BACKENDS, help=argparse.SUPPRESS)
    return parser.parse_args()


def work(options: argparse.Namespace) -> int:
    """Measures one backend; returns 1 if a backup of this package's failed, or weights differ."""
    from rows import RowsFile

    file, bad = RowsFile(options.out), 0
    jobs = {
        "resume": [lambda: crash(options.worker, options.kills, options.seed, options.pause)],
        "write": [
            lambda c=c: crash_writes(options.worker, c, options.write_kills, options.seed)
            for c in ("keras_rq", "keras")
        ],
    }
    for job in (job for part in options.parts for job in jobs[part]):
        row = {**job(), "commit": file.provenance["commit"]}
        file.rows = [r for r in file.rows if _key(r) != _key(row)] + [row]
        file.write()
        print(json.dumps(row), flush=True)
        if row.get("callback") != "keras":
            bad += row["unreadable"] + row.get("mismatched", 0) + row.get("differing", 0)
    return int(bad > 0)


def main() -> int:
    """Measures every backend in a process of its own, and returns 1 if any fails."""
    options = parse()
    if options.worker:
        return work(options)
    sys.path.insert(0, str(ROOT))
    from rows import RowsFile

    from keras_rq.demo import results

    file = RowsFile(options.out)
    file.provenance = {k: v for k, v in results.provenance().items() if k != "backend"}
    file.write()
    codes = []
    for backend in options.backends:
        command = [sys.executable, str(Path(__file__).resolve()), *sys.argv[1:]]
        environment = {
            "TF_CPP_MIN_LOG_LEVEL": "3",
            "OMP_NUM_THREADS": "1",
            **os.environ,
            "KERAS_BACKEND": backend,
            "PYTHONPATH": str(ROOT),
        }
        codes.append(subprocess.run([*command, "--worker", backend], env=environment).returncode)
    return int(any(codes))


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["backend"], row["part"], row.get("callback")


if __name__ == "__main__":
    sys.exit(main())
