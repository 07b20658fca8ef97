"""The same training on one device and on several: does the loss agree, and what does a step take?

    python benchmarks/devices.py --out benchmarks/results/devices.json
    python benchmarks/devices.py --device gpu --count 2 --time --out devices_gpu.json

For every backend, model, policy and seed, 20 steps in one place and in others (see `places.py`),

- `same`: each step from the weights that one device had before it. What differs is what several
  devices compute from equal weights;
- `chain`: each place goes on from its own weights.

Devices add up in another order, so that sums come to differ in their last digit. A value that then
lies on the border of two codes may get the other code, and from there on two chains differ visibly,
whatever the quantizer. A row holds the largest relative difference of the losses (`same`,
`chain`), that of the last (`chain_last`), the first step of the chain beyond 1e-5 (`beyond`), and
the largest difference of an update relative to its size (`update`). Other rows tell how many codes
of the kernel of the layer `up` are `differing`, and the largest relative difference of a `scale`;
under `ModelParallel` on JAX its blocks are split across devices.

`--time` adds what a step of `fit` takes with a batch that several devices share (`strong`) and with
a batch for each (`weak`).
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import places

BATCH, STEPS = 16, 20
BOUND = 1e-5
POLICIES = ("A4W4-channel", "A4W4-128")
MIXED = "A4W4-mixed"  # both in one model, which takes half the time: for tests
OPTIMIZERS = {"sgd": ("SGD", 0.01), "adam": ("Adam", 1e-3)}
COUNTS = {"jax": 8, "tensorflow": 2, "torch": 2}
TIMED = {"nanogpt": 32, "mlp": 1024}  # and the batch of one device


def mlp() -> Any:
    """Contractions of 320 (two blocks and a half) and 256 features."""
    from keras import Input, Sequential

    return Sequential([Input((320,)), _dense(256, "up", "relu"), _dense(8, "down")])


def transformer() -> Any:
    """An embedding of 320, attention, a normalization, a hidden layer and a head."""
    from keras import Input, Model, layers

    inputs = Input((4,), dtype="int32")
    x = layers.Embedding(11, 320, "zeros", name="table")(inputs)
    attention = layers.MultiHeadAttention(2, 32, kernel_initializer="zeros", name="attention")
    x = layers.LayerNormalization()(x + attention(x, x))
    x = _dense(128, "up", "relu")(layers.GlobalAveragePooling1D()(x))
    return Model(inputs, _dense(8, "head")(x))


def _dense(units: int, name: str, activation: str | None = None) -> Any:
    # Zeros, because JAX compiles its random generator anew for every shape; see `weights_of`.
    from keras import layers

    return layers.Dense(units, activation, kernel_initializer="zeros", name=name)


MODELS = {"mlp": mlp, "transformer": transformer}


def data_of(model: str, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """One batch."""
    random = np.random.default_rng(seed)
    x = random.normal(size=(BATCH, 320)).astype("float32")
    if model == "transformer":
        x = random.integers(0, 11, (BATCH, 4)).astype("int32")
    return x, random.normal(size=(BATCH, 8)).astype("float32")


def weights_of(like: places.Weights, seed: int) -> places.Weights:
    """Kernels that keep the size of what they multiply, and vectors as they are."""
    random = np.random.default_rng(seed)
    return [
        random.normal(size=w.shape, scale=w.shape[0] ** -0.5).astype("float32") if w.ndim > 1 else w
        for w in like
    ]


def made(make: Callable[[], Any], policy: str) -> Any:
    """A quantized model."""
    import keras_rq as rq

    model = make()
    if policy == MIXED:
        blocks = rq.quantizers.Ridge(4, block_size=128)
        up = rq.Rule("up", weights=blocks, activations=blocks)
        model.quantize(rq.QuantizationPolicy("A4W4-channel", rules=[up]), verbose=False)
    elif policy != "float":
        model.quantize(rq.QuantizationPolicy(policy), verbose=False)
    return model


def optimizer_of(name: str) -> Any:
    """By the name of a row."""
    import keras

    kind, rate = OPTIMIZERS[name]
    return getattr(keras.optimizers, kind)(rate)


def compare(options: argparse.Namespace, trainees: dict[str, places.Trainee]) -> list[dict]:
    """Rows: every other place against one device."""
    rows = []
    for model in options.models:
        for policy in options.policies:
            for optimizer in options.optimizers:
                for trainee in trainees.values():
                    make = functools.partial(made, MODELS[model], policy)
                    trainee.take(make, functools.partial(optimizer_of, optimizer), "mse")
                key = {"model": model, "policy": policy, "optimizer": optimizer}
                for seed in range(options.seeds):
                    start = weights_of(trainees["one"].weights(), seed)
                    data = data_of(model, seed)
                    rows += [key | row | {"seed": seed} for row in _rows(trainees, start, *data)]
                if policy != "float":
                    rows += [key | row for row in _statistics(trainees, start)]
    return rows


def _statistics(trainees: dict[str, places.Trainee], start: Any) -> list[dict]:
    """Rows: how many codes of kernels, and by how much their scales, differ from one device's."""
    import keras

    import keras_rq as rq

    def quantized(trainee: places.Trainee) -> tuple[np.ndarray, np.ndarray]:
        with trainee.scope():
            trainee.model.set_weights(start)
            layer = trainee.model.get_layer("up")
            made = rq.ops.quantize(layer.kernel, layer.quantization.weights, axis=0)
            arrays = keras.ops.convert_to_numpy(made.codes), keras.ops.convert_to_numpy(made.scale)
            return arrays[0].reshape(-1), arrays[1].reshape(-1)

    wanted, rows = quantized(trainees["one"]), []
    for place in trainees.keys() - {"one"}:
        codes, scales = quantized(trainees[place])
        error = float(np.max(np.abs(scales / wanted[1] - 1)))
        differing = int(np.sum(codes != wanted[0]))
        rows.append({"place": place, "codes": len(codes), "differing": differing, "scale": error})
    return rows


def _rows(trainees: dict[str, places.Trainee], start: Any, x: Any, y: Any) -> list[dict]:
    losses, course = trainees["one"].train(start, x, y, STEPS)
    rows = []
    for place in trainees.keys() - {"one"}:
        same, updated = trainees[place].train(start, x, y, STEPS, course)
        chain, _ = trainees[place].train(start, x, y, STEPS)
        errors = np.abs(np.array([same, chain]) / np.array(losses) - 1)
        beyond = np.flatnonzero(errors[1] > BOUND)
        row = {"place": place, "first_loss": losses[0], "last_loss": losses[-1]}
        row |= {"same": errors[0].max(), "chain": errors[1].max(), "chain_last": errors[1][-1]}
        row |= {"beyond": int(beyond[0]) if len(beyond) else None}
        row["update"] = max(map(_difference, updated[1:], course[1:], course))
        rows.append({k: float(v) if isinstance(v, np.floating) else v for k, v in row.items()})
    return rows


def _difference(received: Any, wanted: Any, before: Any) -> float:
    """Of an update from that on one device, relative to the size of that."""
    pairs = list(zip(received, wanted, before, strict=True))
    size = sum(float(np.sum((w - b) ** 2)) for _, w, b in pairs)
    return float(np.sqrt(sum(float(np.sum((r - w) ** 2)) for r, w, _ in pairs) / size))


def time_steps(options: argparse.Namespace, trainees: dict[str, places.Trainee]) -> list[dict]:
    """Rows: milliseconds of a step, on one device and on several."""
    import models

    rows = []
    for name in options.timed:
        batch = TIMED[name]
        workload = models.MODELS[name]
        for policy in ("float", *options.policies):
            row = {"model": name, "policy": policy, "batch": batch, "count": options.count}
            for trainee in trainees.values():
                make = functools.partial(made, workload.build, policy)
                trainee.take(make, functools.partial(optimizer_of, "adam"), _LOSS)
            for place, trainee in trainees.items():
                for kind, size in (("strong", batch), ("weak", batch * options.count)):
                    if place == "one" and kind == "weak":
                        continue
                    x, y = workload.batch(size * options.timed_steps, np.random.default_rng(0))
                    taken = {f"ms_{kind}_{place}": trainee.milliseconds(x, y, size)}
                    row |= taken
            rows.append(row)
    return rows


_LOSS = "sparse_categorical_crossentropy"


def work(options: argparse.Namespace) -> None:
    """Measures one backend and prints its rows."""
    backend = options.worker
    options.count = options.count or COUNTS[backend]
    places.prepare(backend, options.count, options.device)
    jobs = [compare, *([time_steps] if options.time else [])]
    rows = []
    for job in jobs:
        found = places.run(backend, options.count, options.device, functools.partial(job, options))
        rows += [{"backend": backend, "job": job.__name__, **row} for row in found]
    print(json.dumps(rows))


def summarize(rows: list[dict[str, Any]]) -> list[str]:
    """A line for every backend, place, model, policy and optimizer."""
    names = ("backend", "place", "model", "policy", "optimizer")
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in rows:
        if "chain" in row:
            groups.setdefault(tuple(row[name] for name in names), []).append(row)
    lines = []
    for key, of in groups.items():
        held = sum(row["chain_last"] < BOUND for row in of)
        worst = {name: max(row[name] for row in of) for name in ("same", "chain", "update")}
        lines.append(
            f"{' '.join(key):<48} after {STEPS} steps within {BOUND:g}: {held}/{len(of)}; largest "
            f"same {worst['same']:.1e}, chain {worst['chain']:.1e}, update {worst['update']:.1e}"
        )
    return lines


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backends", nargs="+", choices=list(COUNTS), default=list(COUNTS))
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--policies", nargs="+", default=list(POLICIES))
    parser.add_argument("--optimizers", nargs="+", choices=list(OPTIMIZERS), default=["sgd"])
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--count", type=int, help="of devices")
    parser.add_argument("--time", action="store_true", help="measure steps, too")
    parser.add_argument("--timed", nargs="+", choices=list(TIMED), default=list(TIMED))
    parser.add_argument("--timed-steps", type=int, default=20, help="in an epoch")
    parser.add_argument("--out", type=Path, help="JSON file of results")
    parser.add_argument("--commit", help="the commit, where the sources are no git checkout")
    parser.add_argument("--worker", choices=list(COUNTS), help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    """Measures every backend in a process of its own, and returns 1 if any fails."""
    options = parse()
    if options.worker:
        work(options)
        return 0
    from rows import RowsFile
    from train_step import provenance

    root = str(Path(__file__).resolve().parent.parent)
    sys.path.insert(0, root)
    os.environ.setdefault("KERAS_BACKEND", options.backends[0])
    file, failed = RowsFile(options.out), False
    options.rounds = options.seeds
    file.provenance = provenance(options)
    for backend in options.backends:
        command = [sys.executable, str(Path(__file__).resolve()), *sys.argv[1:]]
        paths = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
        environment = {"TF_CPP_MIN_LOG_LEVEL": "3", **os.environ, "PYTHONPATH": paths}
        done = subprocess.run(
            [*command, "--worker", backend], env=environment, stdout=subprocess.PIPE, text=True
        )
        failed = failed or done.returncode != 0
        if done.returncode == 0:
            about = {"commit": file.provenance["commit"]}
            rows = [row | about for row in json.loads(done.stdout.splitlines()[-1])]
            file.rows = [row for row in file.rows if row["backend"] != backend] + rows
            file.write()
            print("\n".join(summarize(rows)))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
