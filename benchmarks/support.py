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
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rows import Row, RowsFile

BACKENDS = ("tensorflow", "jax", "torch")
CHECKS = ("fit", "save and load", "LiteRT export", "jit", "mixed_bfloat16", "mixed_float16")
LIMIT = 100  # seconds of processor time for one check; the slowest that end take half of it
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
    parser.add_argument("--together", type=int, default=7, help="layers compiled as one model")
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
    failures = [
        run(backend, results, options.layers, options.together) for backend in options.backends
    ]
    return int(any(failures))


def run(backend: str, results: RowsFile, only: Sequence[str] | None, together: int) -> bool:
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
    process.stdin.write(json.dumps({"done": done, "only": only, "together": together}))
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
    return f"{text}\n    absent: {row['absent']}" if row["absent"] else text


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
    asked = [n for n in cases if n not in order["done"] and n in (order["only"] or cases)]
    for start in range(0, len(asked), order["together"]):
        began = time.perf_counter()
        rows = measure({name: cases[name] for name in asked[start : start + order["together"]]})
        seconds = round((time.perf_counter() - began) / len(rows), 1)
        for name, row in rows.items():
            row |= {"spoken": cases[name].spoken, "seconds": seconds, "commit": found["commit"]}
            answer({"layer": name, **row})


def forget() -> None:
    """Frees what compiled steps hold: PyTorch gives up where one function has too many forms."""
    import keras

    keras.utils.clear_session()
    if keras.backend.backend() == "torch":
        import torch

        torch._dynamo.reset()


def measure(cases: dict[str, Any]) -> dict[str, Row]:
    """What becomes of some layers, and the outcome of every check."""
    import keras
    from support_models import Group, Single

    rows: dict[str, Row] = {}
    trained: dict[str, Single] = {}
    for name, case in cases.items():
        rows[name] = {"quantized": None, "absent": None, "checks": {}}
        if keras.backend.backend() not in case.backends:
            rows[name]["absent"] = "Keras lacks it here"
            continue
        try:
            single = trained[name] = Single(name, case)
        except ModuleNotFoundError as error:
            rows[name]["absent"] = f"needs {error.name}, which is not installed"
            continue
        except Exception as error:
            rows[name]["absent"] = said(error)
            continue
        rows[name]["quantized"] = single.quantized
        rows[name]["checks"] = {
            "fit": outcome(single.train),
            "save and load": outcome(single.save_and_load),
            **{d: outcome(partial(train_in, d, name, case)) for d in CHECKS if d[:5] == "mixed"},
        }
        forget()
    for check in ("LiteRT export", "jit"):
        found = together(check, trained, Group, Single)
        for name, result in found.items():
            rows[name]["checks"][check] = result
    return rows


def train_in(dtype: str, name: str, case: Any) -> None:
    """Trains a model of one layer in a dtype policy."""
    from support_models import Single

    Single(name, case, dtype).train()


def together(check: str, trained: dict[str, Any], group: type, single: type) -> dict[str, Row]:
    """A check of several layers in one model; of each by itself where that fails."""
    import keras

    if not trained:
        return {}
    if check == "jit" and keras.backend.backend() == "jax":  # which has been done
        return {name: outcome(one.judge) for name, one in trained.items()}
    run = {
        "LiteRT export": lambda ones: group(ones).export(),
        "jit": lambda ones: group([single(one.name, one.case) for one in ones]).train(),
    }[check]
    if len(trained) > 1:
        found = outcome(lambda: run(list(trained.values())), LIMIT * len(trained))
        forget()
        if found["works"]:
            return {name: {"works": True, "note": found["note"].get(name)} for name in trained}
        print(f"{check} of {list(trained)} together: {found['note']}", file=sys.stderr)
    results = {}
    for name, one in trained.items():
        found = results[name] = outcome(lambda one=one: run([one]), LIMIT)
        found["note"] = found["note"].get(name) if found["works"] else found["note"]
        forget()
    return results


def outcome(check: Callable[[], Any], limit: float = LIMIT) -> Row:
    """Whether a check passes, and what it says: a remark, or why not."""
    signal.signal(signal.SIGPROF, lambda *_: _too_long(limit))
    signal.setitimer(signal.ITIMER_PROF, limit)
    try:
        return {"works": True, "note": check()}
    except Exception as error:
        return {"works": False, "note": said(error)}
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def said(error: Exception) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:600]


def _too_long(limit: float) -> None:
    raise TimeoutError(f"it took more than {limit} s of processor time")


if __name__ == "__main__":
    sys.exit(main())
