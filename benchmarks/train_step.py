"""Time and memory of a training step: quantized models against the float ones they were made of.

    python benchmarks/train_step.py --frameworks jax torch --models mlp nanogpt --out steps.json

One process per framework. In it the variants of a model take turns, and ratios are of times of the
same round. What runs is the step of `fit`, with one batch that stays on the device (`steps.py`).
`--resume` measures only what the file lacks; `--profile` writes where the time goes.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from rows import RowsFile

PACKAGE = "keras_rq"
FRAMEWORKS = ("jax", "tensorflow", "torch")
MODELS = ("mlp", "convnet", "nanogpt", "vit_tiny", "wide_block")
MODES = ("jit", "eager", "compiled")
# `rq` is keras_rq: it is not imported here, where no backend is chosen yet.
SETTINGS: dict[str, Callable[[ModuleType, Sequence[Any]], Any]] = {
    "A8W8-channel": lambda rq, rules: rq.QuantizationPolicy("A8W8-channel", rules=rules),
    "A4W4-128": lambda rq, rules: rq.QuantizationPolicy("A4W4-128", rules=rules),
    "A1W1-128": lambda rq, rules: rq.QuantizationPolicy("A1W1-128", rules=rules),
    # What the rotations of "A1W1" cost.
    "A1W1-128 unrotated": lambda rq, rules: rq.QuantizationPolicy(
        weights=rq.quantizers.Ridge(1, fade=1.6),
        activations=rq.quantizers.Ridge(1, fade=1.6),
        rules=rules,
    ),
    "A4W1-128-2:4": lambda rq, rules: rq.QuantizationPolicy("A4W1-128-2:4", rules=rules),
    "A8W8-channel int8": lambda rq, rules: rq.QuantizationPolicy(
        "A8W8-channel", rules=rules, forward="int8"
    ),
}
DEFAULT_SETTINGS = tuple(SETTINGS)[:5]
# By model: what stays in float. Embeddings and heads, as the literature does with transformers.
RULES: dict[str, Callable[[ModuleType], list[Any]]] = {
    "nanogpt": lambda rq: [rq.Rule("tokens", skip=True), rq.Rule("head", skip=True)],
    "vit_tiny": lambda rq: [rq.Rule("patches", skip=True), rq.Rule("head", skip=True)],
}
KEY = ("framework", "mode", "device", "model", "batch", "package", "setting")


def key_of(framework: str, mode: str, device: str, model: str, batch: int) -> dict[str, Any]:
    """What the rows of one model have in common."""
    values = (framework, mode, device, model, batch, PACKAGE)
    return dict(zip(KEY, values, strict=False))


def tell(text: str) -> None:
    """Says what is being done, aside from the tables."""
    print(f"# {text}", file=sys.stderr, flush=True)


def policies(model: str, settings: Sequence[str]) -> dict[str, Any]:
    """Policies by setting, with None for the float model first."""
    import keras_rq as rq

    rules = RULES[model](rq) if model in RULES else []
    return {"float": None} | {name: SETTINGS[name](rq, rules) for name in settings}


class Results(RowsFile):
    """The rows measured so far, in a JSON file that is whole at any time."""

    def missing(self, settings: Sequence[str], **key: Any) -> list[str]:
        """The settings that have no row; a row that says why it failed counts as one."""
        known = {tuple(row.get(name) for name in KEY) for row in self.rows}
        wanted = {name: tuple(({**key, "setting": name})[k] for k in KEY) for name in settings}
        return [name for name in settings if wanted[name] not in known]

    def add(self, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Adds rows and writes the file; a row that stands in it already stays as it is."""
        added = [row for row in rows if self.missing([row["setting"]], **row)]
        self.rows += added
        self.write()
        return added


HEADER = (
    f"{'setting':<18} {'ms':>9} {'quartiles':>19} {'ratio':>6} {'quartiles':>13} "
    f"{'memory':>7} {'floor MB':>9} {'first s':>8}"
)


def line(row: dict[str, Any]) -> str:
    """A row of the printed table."""
    if row.get("error"):
        return f"{row['setting']:<18} {row['error']}"
    memory, floor = row.get("memory_ratio"), row.get("floor_bytes")
    quartiles = f"{row['ms_q25']:9.3f}-{row['ms_q75']:9.3f}"
    ratios = f"{row['ratio_q25']:6.2f}-{row['ratio_q75']:6.2f}"
    graphs = f"  {row['graphs']} graphs" if row.get("graphs") else ""
    return (
        f"{row['setting']:<18} {row['ms']:9.3f} {quartiles:>19} {row['ratio']:6.2f} {ratios:>13} "
        f"{f'{memory:.2f}x' if memory else '-':>7} {f'{floor / 1e6:,.1f}' if floor else '-':>9} "
        f"{row['first_call_s']:8.1f}{graphs}"
    )


# What runs in the process of one framework.


def work(options: argparse.Namespace) -> None:
    """Measures the chosen models in the framework that Keras was told to use."""
    import keras
    import models
    import steps

    results = begin(options)
    for name in options.models:
        workload = models.MODELS[name]
        for batch in workload.batches[options.device]:
            for mode in steps.MODES[keras.backend.backend()]:
                if mode in options.modes:
                    measure(options, results, workload, batch, mode)


def begin(options: argparse.Namespace) -> Results:
    """Opens the file and says in it what the rows of this framework belong to.

    Raises:
        RuntimeError: the device is not the one asked for, or not the one of the rows in the file.
    """
    import keras
    import steps

    if steps.sees_gpu() != (options.device == "gpu"):
        raise RuntimeError(f"--device {options.device}, but a GPU is seen: {steps.sees_gpu()}")
    results = Results(options.out)
    found = provenance(options) | {"copy_bytes_per_second": steps.copy_rate(options.device)}
    before = results.provenance.get(keras.backend.backend(), found)
    devices = [one["machine"]["gpu"] or one["machine"]["cpu"] for one in (before, found)]
    if devices[0] != devices[1]:
        raise RuntimeError(
            f"{options.out} has rows of {devices[0]}, and this is {devices[1]}: the two do "
            "not compare. Write to another file, or leave out --resume."
        )
    results.provenance[keras.backend.backend()] = found
    results.write()
    return results


def measure(
    options: argparse.Namespace,
    results: Results,
    workload: Any,
    batch: int,
    mode: str,
    about: dict[str, Any] | None = None,
) -> None:
    """Times the settings of one model that the file lacks, and adds their rows.

    Args:
        options: the command line.
        results: the file.
        workload: a `models.Workload`.
        batch: number of samples.
        mode: one of `steps.MODES`.
        about: what else the rows say.
    """
    import keras
    import steps

    framework = keras.backend.backend()
    key = key_of(framework, mode, options.device, workload.name, batch)
    missing = results.missing(["float", *options.settings], **key)
    key |= {"dtype": workload.dtypes[options.device], **(about or {})}
    key["commit"] = results.provenance[framework]["commit"]
    for settings in _groups(missing, mode):
        group = steps.measure(
            workload,
            policies(workload.name, settings),
            mode=mode,
            batch=batch,
            dtype=key["dtype"],
            rounds=options.rounds,
            turn_seconds=options.turn_seconds,
            tell=tell,
        )
        rows = [{**key, "setting": name, **row} for name, row in group.rows.items()]
        print(f"\n{workload.name}, batch {batch}, {key['dtype']}: {framework} {mode}\n{HEADER}")
        for row in rows:
            print(line(row), flush=True)
        results.add(rows)
        if options.profile is not None:
            try:
                _profile(options.profile, group, rows, results.provenance[framework])
            except Exception:  # the times are in the file already, and other models wait
                traceback.print_exc()
        del group
        steps.forget()


def _groups(settings: list[str], mode: str) -> list[list[str]]:
    """Which settings take turns with one float model.

    `torch.compile` gives up on a function that it has compiled eight times, and the functions of
    Keras and keras_rq are the same for all models: there each setting is alone with float.
    """
    quantized = [name for name in settings if name != "float"]
    if mode == "compiled" and quantized:
        return [[name] for name in quantized]
    return [quantized] if settings else []


def _profile(folder: Path, group: Any, rows: list[dict[str, Any]], provenance: dict) -> None:
    import profiles

    run = profiles.PROFILERS.get(rows[0]["framework"])
    if run is None or "float" not in group.steps:
        print(f"# no profile: {rows[0]['framework']} has no trace to read", file=sys.stderr)
        return
    base = next(row for row in rows if row["setting"] == "float")
    found = {name: run(step, step.wait, 5) for name, step in group.steps.items()}
    for row in rows:
        name = row["setting"]
        if name == "float" or name not in found:
            continue
        rate = provenance["copy_bytes_per_second"]
        where = f"{row['model']} batch {row['batch']}, {row['framework']} {row['mode']}"
        lines = [f"{where}, {row['device']}, {row['dtype']}, commit {row['commit']}", ""]
        lines += [*profiles.floor_lines(row, base, rate), "", *profiles.table(name, found[name])]
        lines += ["", *profiles.table("float", found["float"])]
        parts = [row[k] for k in ("framework", "mode", "model", "batch", "setting")]
        stem = "-".join(str(part).replace(":", "of").replace(" ", "-") for part in parts)
        profiles.write(folder / f"{stem}.txt", lines)


def provenance(options: argparse.Namespace) -> dict[str, Any]:
    """What the numbers belong to: versions, machine, commit."""
    from keras_rq.demo import results

    found = results.provenance()
    found["commit"] = options.commit or found["commit"]
    found["machine"] = {**found["machine"], "gpu": gpu_name() if options.device == "gpu" else None}
    return found | {"device": options.device, "rounds": options.rounds}


def gpu_name() -> str | None:
    """Name and driver of the first GPU, as the driver tells it."""
    if shutil.which("nvidia-smi") is None:
        return None
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    found = subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip()
    return found.splitlines()[0] if found else None


# What starts those processes.


def run_peers(options: argparse.Namespace) -> int:
    """Has `benchmarks/peers/run.py` measure other packages, into a file beside --out."""
    # There, a batch size belongs to the name of a model.
    theirs = {"mlp": ["mlp-64", "mlp-1024"], "vit_tiny": []}
    models = [one for model in options.models for one in theirs.get(model, [model])]
    command = [sys.executable, str(Path(__file__).parent / "peers" / "run.py")]
    command += ["--peers", *options.peers, "--models", *models]
    command += ["--device", options.device, "--rounds", str(options.rounds)]
    if options.out is not None:
        command += ["--out", str(options.out.with_stem(f"{options.out.stem}_peers"))]
    return subprocess.run(command, check=False).returncode


def start(framework: str, arguments: list[str], device: str) -> int:
    """Runs this script for one framework and returns its exit code."""
    environment = {"TF_CPP_MIN_LOG_LEVEL": "3", **os.environ, "KERAS_BACKEND": framework}
    if device == "cpu":
        environment |= {"CUDA_VISIBLE_DEVICES": "", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, str(Path(__file__).resolve()), *arguments, "--worker", framework]
    return subprocess.run(command, env=environment, check=False).returncode


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options that all measurements share."""
    has_gpu = shutil.which("nvidia-smi") is not None
    parser.add_argument("--settings", nargs="+", choices=list(SETTINGS), default=DEFAULT_SETTINGS)
    parser.add_argument("--device", choices=("cpu", "gpu"), default="gpu" if has_gpu else "cpu")
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--turn-seconds", type=float, default=0.1, help="length of one turn")
    parser.add_argument("--out", type=Path, help="JSON file of results")
    parser.add_argument("--resume", action="store_true", help="add what --out lacks")
    parser.add_argument("--profile", type=Path, metavar="DIR", help="write where the time goes")
    parser.add_argument("--commit", help="the commit, where the sources are no git checkout")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_options(parser)
    parser.add_argument("--frameworks", nargs="+", choices=FRAMEWORKS, default=list(FRAMEWORKS))
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--peers", nargs="+", default=[], help="see benchmarks/peers/run.py")
    parser.add_argument("--worker", choices=FRAMEWORKS, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main() -> int:
    """Measures every framework, also after one failed, and returns 1 if any did."""
    options = parse()
    if options.worker:
        work(options)
        return 0
    if options.out is not None and not options.resume:
        options.out.unlink(missing_ok=True)
    codes = [start(name, sys.argv[1:], options.device) for name in options.frameworks]
    if options.peers:
        codes.append(run_peers(options))
    return int(any(codes))


if __name__ == "__main__":
    sys.exit(main())
