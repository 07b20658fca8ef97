"""What works with which Keras layer on which backend: every cell of the table is a run.

    python benchmarks/support.py --out benchmarks/results/support.json

Every public Keras layer with weights, found by itself, goes into a tiny model, which is quantized
to A4W4 with 8-bit products of activations and then trained step by step, trained compiled, trained
in mixed precision, saved and loaded, and exported. A process for each backend; what --out has
already is not run again, unless --again names it. `benchmarks/summary.py` makes the table.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rows import Row, RowsFile

BACKENDS = ("tensorflow", "jax", "torch")
CHECKS = ("fit", "save and load", "LiteRT export", "jit", "mixed_bfloat16", "mixed_float16")
EPOCHS = 6  # of two steps
LIMIT = 45  # seconds of processor time for one check; the slowest that end take half of it
# Compilers need not optimize what runs for a moment.
HASTY = {
    "XLA_FLAGS": "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true",
    "TORCHINDUCTOR_DEBUG_COMPILE": "1",
    "OMP_NUM_THREADS": "1",
}

# The parent, which imports no framework.


def main() -> int:
    """Runs what is missing."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--backends", nargs="+", default=list(BACKENDS), choices=BACKENDS)
    parser.add_argument("--again", nargs="*", metavar="LAYER", help="these, or all, once more")
    parser.add_argument("--layers", nargs="+", metavar="LAYER", help="only these")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(json.load(sys.stdin))
        return 0
    results = RowsFile(options.out)
    if options.again is not None:
        asked = options.again or [row["layer"] for row in results.rows]
        again = {(b, layer) for b in options.backends for layer in asked}
        results.rows = [r for r in results.rows if (r["backend"], r["layer"]) not in again]
    failures = [run(backend, results, options.layers) for backend in options.backends]
    return int(any(failures))


def run(backend: str, results: RowsFile, only: Sequence[str] | None) -> bool:
    """Lets a process of one backend find the layers and make their rows; whether it failed."""
    done = [row["layer"] for row in results.rows if row["backend"] == backend]
    environment = {**HASTY, "TF_CPP_MIN_LOG_LEVEL": "3", **os.environ, "KERAS_BACKEND": backend}
    process = subprocess.Popen(
        [sys.executable, __file__, "--serve"],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    process.stdin.write(json.dumps({"done": done, "only": only}))
    process.stdin.close()
    for text in process.stdout:
        row = json.loads(text)
        if (found := row.pop("provenance", None)) is not None:
            results.provenance[backend] = found
            continue
        results.rows.append({"backend": backend, **row})
        results.write()
        print(line(results.rows[-1]), flush=True)
    return process.wait() != 0


def line(row: Row) -> str:
    """What is printed of a row."""
    text = f"{row['backend']:10} {row['layer']:22} {row['seconds']:5.1f} s  {row['quantized']}"
    for check, outcome in row["checks"].items():
        note = "" if outcome["note"] is None else f" ({outcome['note']})"
        text += f"\n    {check}: {'yes' if outcome['works'] else 'NO'}{note}"
    return text


# The process of one backend.


def serve(order: dict[str, Any]) -> None:
    """Answers with a line of JSON for each layer that is not done."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer

    import support_layers

    from keras_rq.demo.results import provenance

    cases = support_layers.layers_with_weights()

    def answer(value: dict[str, Any]) -> None:
        answers.write(json.dumps(value) + "\n")
        answers.flush()

    answer({"provenance": (found := provenance())})
    for name, case in cases.items():
        if name not in order["done"] and name in (order["only"] or cases):
            start = time.perf_counter()
            row = measure(case)
            forget()
            seconds = round(time.perf_counter() - start, 1)
            row |= {"spoken": case.spoken, "seconds": seconds, "commit": found["commit"]}
            answer({"layer": name, **row})


def forget() -> None:
    """Frees what compiled steps hold: PyTorch gives up where one function has too many forms."""
    import keras

    keras.utils.clear_session()
    if keras.backend.backend() == "torch":
        import torch

        torch._dynamo.reset()


def measure(case: Any) -> Row:
    """What becomes of a layer, and the outcome of every check."""
    import keras

    if keras.backend.backend() not in case.backends:
        return {"quantized": None, "absent": "Keras lacks it here", "checks": {}}
    try:
        trained = Trained(case)
    except ModuleNotFoundError as error:
        return {"quantized": None, "absent": f"needs {error.name}, not installed", "checks": {}}
    checks: dict[str, Callable[[], str | None]] = {
        "fit": trained.judge,
        "save and load": trained.save_and_load,
        "LiteRT export": trained.export,
        "jit": lambda: (trained if trained.compiled else Trained(case, compiled=True)).judge(),
        "mixed_bfloat16": lambda: Trained(case, dtype="mixed_bfloat16").judge(),
        "mixed_float16": lambda: Trained(case, dtype="mixed_float16").judge(),
    }
    outcomes = {name: outcome(check) for name, check in checks.items()}
    return {"quantized": trained.quantized, "absent": None, "checks": outcomes}


def outcome(check: Callable[[], str | None]) -> Row:
    """Whether a check passes, and what it says: a remark, or why not."""
    signal.signal(signal.SIGPROF, _too_long)
    signal.setitimer(signal.ITIMER_PROF, LIMIT)
    try:
        return {"works": True, "note": check()}
    except Exception as error:
        text = " ".join(str(error).split())
        return {"works": False, "note": f"{type(error).__name__}: {text}"[:600]}
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def _too_long(*_: Any) -> None:
    raise TimeoutError(f"it took more than {LIMIT} s of processor time")


class Trained:
    """A quantized model of a layer after some steps of training.

    Args:
        case: the layer, see `support_layers.Case`.
        dtype: the dtype policy.
        compiled: compile the steps, otherwise run every operation by itself. JAX always compiles
            them, as it does for everybody who does not forbid it.
    """

    def __init__(self, case: Any, dtype: str = "float32", compiled: bool = False) -> None:
        import keras
        import numpy as np

        import keras_rq as rq

        self.compiled = compiled or keras.backend.backend() == "jax"
        policy = rq.QuantizationPolicy("A4W4", matmuls=8, rules=[rq.Rule("head$", skip=True)])
        keras.utils.set_random_seed(0)
        self.x = case.data()
        y = np.random.default_rng(1).normal(size=(len(self.x), 2)).astype(np.float32)
        with dtype_policy(dtype):
            self.model = case.model()
        report = rq.quantize(self.model, policy, verbose=False)
        self.quantized = what_became(self.model.get_layer("layer"), report)
        weights = self.model.get_layer("layer").trainable_variables
        before = [keras.ops.convert_to_numpy(v) for v in weights]
        self.model.compile(
            keras.optimizers.Adam(2e-2),
            "mse",
            run_eagerly=not self.compiled and keras.backend.backend() == "tensorflow",
            jit_compile=self.compiled,
        )
        history = self.model.fit(self.x, y, epochs=EPOCHS, batch_size=8, shuffle=False, verbose=0)
        self.losses = history.history["loss"]
        self.unmoved = [
            variable.path
            for variable, old in zip(weights, before, strict=True)
            if np.array_equal(keras.ops.convert_to_numpy(variable), old)
        ]

    def judge(self) -> None:
        """Raises unless the loss fell and every weight moved."""
        import numpy as np

        if not np.isfinite(self.losses).all():
            raise ArithmeticError(f"the losses are {self.losses}")
        if not self.losses[-1] < self.losses[0]:
            raise ArithmeticError(f"the loss went from {self.losses[0]} to {self.losses[-1]}")
        if self.unmoved:
            raise ArithmeticError(f"these weights did not move: {self.unmoved}")

    def save_and_load(self) -> None:
        """Raises unless a saved and loaded model predicts the same."""
        import keras
        import numpy as np

        with tempfile.TemporaryDirectory() as folder:
            self.model.save(path := Path(folder, "model.keras"))
            loaded = keras.saving.load_model(path)
        expected, received = (m.predict(self.x, verbose=0) for m in (self.model, loaded))
        if not np.array_equal(expected, received):
            raise ArithmeticError(f"predictions differ by {np.abs(expected - received).max()}")

    def export(self) -> str | None:
        """Exports and lets the file be checked; says what of the layer runs as integers."""
        import keras_rq as rq

        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "model.tflite")
            result = rq.export(self.model, path, inputs=self.x, verbose=False)
        reasons = dict.fromkeys(p.reason for p in result.products if p.reason is not None)
        integers = sum(product.kernel == "integer" for product in result.products)
        if not result.products:
            return "float"
        if not reasons:
            return "integer"
        kind = "integer in part" if integers else "float"
        return f"{kind}: {'; '.join(reasons)}"


@contextmanager
def dtype_policy(name: str) -> Iterator[None]:
    """Layers made within compute in this dtype."""
    import keras

    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(name)
    try:
        yield
    finally:
        keras.config.set_dtype_policy(before)


def what_became(layer: Any, report: Any) -> str:
    """The bit widths of a layer, or why it stays in float."""
    from keras_rq.training.surgery import quantized_layers

    labels = dict.fromkeys(one.label for one in quantized_layers(layer))
    inside = {one.path for one in layer._flatten_layers()}
    reasons = dict.fromkeys(why for path, why in report.kept_float.items() if path in inside)
    parts = ["/".join(labels)] * bool(labels) + [f"float: {reason}" for reason in reasons]
    return re.sub(r"\s+", " ", "; ".join(parts))


if __name__ == "__main__":
    sys.exit(main())
