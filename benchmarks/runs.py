"""Hands training runs to one process per GPU and keeps their rows.

The parent imports no framework. A worker serves many runs: it reads one as a line of JSON, trains,
and answers with its row. A run that fails is a row with its error, and a worker that dies is
replaced; every row is in the file as soon as its run has ended.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from rows import Row, RowsFile

DEATHS = 3  # of one worker's processes, in a row: then something else is wrong
CACHE = Path(__file__).parent / ".cache"
Order = Mapping[str, Any]
# What a run is, in its row and in a plan file; the others have these values where left out.
DEFAULTS: dict[str, Any] = {"seed": 0, "fields": {}}
KEY = ("task", "method", "setting", "lr", "steps", "seed", "fields")


def key_of(run: Order) -> str:
    """A text that is the same for equal runs and for their rows."""
    values = {name: run[name] if name in run else DEFAULTS[name] for name in KEY}
    return json.dumps({**values, "lr": float(values["lr"])}, sort_keys=True)


def title(run: Order) -> str:
    """A run in a few words."""
    fields = f" {json.dumps(run['fields'])}" if run.get("fields") else ""
    return (
        f"{run['method']:<12} {run['setting']:<9} lr {run['lr']:<7g} steps {run['steps']:<6} "
        f"seed {run.get('seed', 0)}{fields}"
    )


def find(rows: Sequence[Row], run: Order) -> Row | None:
    """The row of a run, if it ended well."""
    key = key_of(run)
    return next((row for row in rows if key_of(row) == key and not row.get("error")), None)


class Results(RowsFile):
    """The rows of an accuracy benchmark, which several threads add to."""

    def __init__(self, path: Path | None) -> None:
        super().__init__(path)
        self._lock = threading.Lock()

    def missing(self, runs: Sequence[Order]) -> list[Order]:
        """The runs without a row, each once; one that failed counts as missing."""
        unique = {key_of(run): run for run in runs}
        return [run for run in unique.values() if find(self.rows, run) is None]

    def add(self, row: Row) -> None:
        """Writes a row, in place of one of the same run."""
        with self._lock:
            self.rows = [r for r in self.rows if key_of(r) != key_of(row)] + [row]
            self.write()


# The parent.


class Queue:
    """Runs that wait for a worker.

    Args:
        runs: in order.
        deadline: `time.time()` after which none is handed out; nor is one that would take too
            long, judged by the longest run of as many steps so far.
    """

    def __init__(self, runs: Sequence[Order], deadline: float | None = None) -> None:
        self._runs, self.deadline = list(runs), deadline
        self._lock = threading.Lock()
        self._seconds: dict[int, float] = {}

    def take(self) -> Order | None:
        """The next run, or None."""
        with self._lock:
            for index, run in enumerate(self._runs):
                left = float("inf") if self.deadline is None else self.deadline - time.time()
                if left > self._seconds.get(run["steps"], 0.0):
                    return self._runs.pop(index)
            return None

    def took(self, row: Row) -> None:
        """Learns how long runs take."""
        with self._lock:
            steps, seconds = row["steps"], row.get("seconds") or 0.0
            self._seconds[steps] = max(seconds, self._seconds.get(steps, 0.0))

    def __len__(self) -> int:
        return len(self._runs)


class Worker:
    """A process that trains on one device.

    Args:
        command: starts it.
        gpu: index of its GPU, or None for the CPU.
        share: how many workers share the GPU's memory.
        cache: folder of XLA's compilation cache, or None.
    """

    def __init__(
        self, command: Sequence[str], gpu: str | None, share: int, cache: Path | None
    ) -> None:
        environment = {"KERAS_BACKEND": "jax", "TF_CPP_MIN_LOG_LEVEL": "3", **os.environ}
        if gpu is None:
            environment |= {"CUDA_VISIBLE_DEVICES": "", "JAX_PLATFORMS": "cpu"}
        else:
            environment |= {"CUDA_VISIBLE_DEVICES": gpu}
            environment |= {"XLA_PYTHON_CLIENT_MEM_FRACTION": f"{0.9 / share:.3f}"}
        if cache is not None:
            cache.mkdir(parents=True, exist_ok=True)
            environment |= {"JAX_COMPILATION_CACHE_DIR": str(cache)}
            environment |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
        self._process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def do(self, run: Order) -> Row:
        """Trains and returns the row.

        Raises:
            ChildProcessError: the worker died.
        """
        try:
            self._process.stdin.write(json.dumps(run) + "\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            raise ChildProcessError(f"The worker died with code {self._process.wait()}.")
        return json.loads(answer)

    def end(self) -> None:
        """Lets the process finish."""
        self._process.stdin.close()
        self._process.wait()


def run_all(
    queue: Queue,
    results: Results,
    start: Callable[[str | None], Worker],
    gpus: Sequence[str | None],
    tell: Callable[[str], None],
) -> None:
    """Serves a queue with one worker per entry of `gpus` until it is empty or time is up."""

    def serve(gpu: str | None) -> None:
        worker, deaths = None, 0
        while deaths < DEATHS and (run := queue.take()) is not None:
            worker = worker or start(gpu)
            order = {**DEFAULTS, **run, "deadline": queue.deadline}
            try:
                row, deaths = worker.do(order), 0
            except ChildProcessError as error:
                row, worker = {**DEFAULTS, **run, "error": str(error)}, None
                deaths += 1
            row = {**row, "worker": gpu or "cpu"}
            queue.took(row)
            tell(line(row))
            if not row.get("unfinished"):
                results.add(row)
        if worker is not None:
            worker.end()

    with ThreadPoolExecutor(len(gpus)) as pool:
        for future in [pool.submit(serve, gpu) for gpu in gpus]:
            future.result()


def line(row: Row) -> str:
    """What is printed of a run that has ended."""
    if row.get("error"):
        return f"{title(row)}: {row['error']}"
    if row.get("unfinished"):
        return f"{title(row)}: out of time, to be resumed"
    values = [row["val_accuracy"], row["val_loss"]]
    accuracy, loss = ("nan" if v is None else f"{v:.4f}" for v in values)
    speed = "" if row["ms_per_step"] is None else f", {row['ms_per_step']:.2f} ms a step"
    diverged = ", DIVERGED" if row["diverged"] else ""
    return (
        f"{title(row)}: accuracy {accuracy} loss {loss}{diverged} ({row['seconds']:.0f} s{speed})"
    )


# The worker.


def serve(make_task: Callable[[], Any], checkpoints: Path) -> None:
    """Answers every run on the standard input with its row on the standard output."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    task = None
    for text in sys.stdin:
        order = json.loads(text)
        run = {name: order[name] for name in KEY}
        try:
            task = task or make_task()
            row = _attempt(task, order, checkpoints)
        except Exception as error:
            traceback.print_exc()
            said = f"{type(error).__name__}: {' '.join(str(error).split())}"
            row = {**run, "error": said[:500]}
        answers.write(json.dumps(row) + "\n")
        answers.flush()


def _attempt(task: Any, order: Order, checkpoints: Path) -> Row:
    import steps
    import training

    where = _where()
    # Another version of the code starts anew.
    text = f"{key_of(order)} {where['commit']}"
    stem = hashlib.sha256(text.encode()).hexdigest()[:16]
    try:
        row = training.train(
            task,
            training.Run.of(order),
            deadline=order["deadline"],
            checkpoint=training.Checkpoint(checkpoints / f"{stem}.npz"),
        )
    finally:
        steps.forget()
    base = {name: order[name] for name in KEY}
    return {**base, "unfinished": True} if row is None else {**base, **row, **where}


def _where() -> Row:
    import steps
    import train_step

    from keras_rq.demo import results

    found = results.provenance()
    gpu = train_step.gpu_name() if steps.sees_gpu() else None
    return {
        "device": gpu or found["machine"]["cpu"],
        "versions": found["versions"],
        "backend": found["backend"],
        "commit": os.environ.get("KERAS_RQ_COMMIT") or found["commit"],
    }


# The command line.


def add_options(parser: argparse.ArgumentParser, plans: Sequence[str]) -> None:
    """The options that accuracy benchmarks share."""
    parser.add_argument("--plan", nargs="+", default=[], help=f"{', '.join(plans)}, or JSON files")
    parser.add_argument("--method", nargs="+", default=[], help="runs of one's own")
    parser.add_argument("--setting", nargs="+", default=["A1W1"])
    parser.add_argument("--lr", nargs="+", type=float)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--seed", nargs="+", type=int, default=[0])
    for name in ("fields", "weights", "activations", "recipe"):
        parser.add_argument(f"--{name}", nargs="+", default=[], metavar="KEY=VALUE")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--workers", nargs="+", help="GPUs; one may be named several times")
    parser.add_argument("--time-limit", type=float, metavar="SECONDS")
    parser.add_argument("--cache", type=Path, help="of XLA; on GPUs, by default a folder here")
    parser.add_argument("--checkpoints", type=Path, default=CACHE / "runs", help="if interrupted")
    parser.add_argument("--again", action="store_true", help="run what --out has, too")
    parser.add_argument("--dry", action="store_true", help="only say what would run")
    parser.add_argument("--small", action="store_true", help="a model for tests, on a CPU")
    parser.add_argument("--commit", help="what the rows say, where git cannot")
    parser.add_argument("--table", action="store_true", help="print tables of --out and end")
    parser.add_argument("--plot", type=Path, metavar="FOLDER", help="draw --out and end")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)


def chosen(options: argparse.Namespace, plans: Mapping[str, Callable], stock: Order) -> list[Order]:
    """The runs that the command line asks for.

    Args:
        options: the parsed command line.
        plans: by name: from the rows so far to runs.
        stock: the task, and what a run has where nothing else is said.
    """
    rows = RowsFile(options.out).rows
    runs: list[Order] = []
    for plan in options.plan:
        if plan not in plans and not Path(plan).exists():
            raise SystemExit(f"--plan {plan}: no file, and none of {', '.join(plans)}")
        runs += plans[plan](rows) if plan in plans else json.loads(Path(plan).read_text())
    named = {"fields": "both", "weights": "weights", "activations": "activations"}
    fields = {
        named.get(name, name): parsed
        for name in (*named, "recipe")
        if (parsed := _pairs(getattr(options, name)))
    }
    said = {"steps": options.steps} if options.steps else {}
    runs += [
        {**said, **rate, "method": method, "setting": setting, "seed": seed, "fields": fields}
        for method in options.method
        for setting in (["float"] if method == "float" else options.setting)
        for rate in ([{"lr": lr} for lr in options.lr] if options.lr else [{}])
        for seed in options.seed
    ]
    return [{**DEFAULTS, **stock, **said, **run} for run in runs]


def _pairs(texts: Sequence[str]) -> dict[str, Any]:
    pairs = (text.partition("=") for text in texts)
    return {name: _value(value) for name, _, value in pairs}


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def gpus(options: argparse.Namespace) -> list[str | None]:
    """One entry per worker: the GPU it has, or None for the CPU."""
    if options.workers:
        return [None if name == "cpu" else name for name in options.workers]
    return ["0"] if shutil.which("nvidia-smi") and not options.small else [None]


def work(
    options: argparse.Namespace, script: str, runs: Sequence[Order], passed: Sequence[str] = ()
) -> int:
    """Runs what is missing, and returns 1 if anything failed.

    Args:
        options: the command line.
        script: what a worker runs.
        runs: the runs.
        passed: what else a worker is told.
    """
    results = Results(options.out)
    if options.again:
        asked = {key_of(run) for run in runs}
        results.rows = [row for row in results.rows if key_of(row) not in asked]
    missing = results.missing(runs)
    tell(f"{len(missing)} of {len(runs)} runs to do")
    if options.dry:
        print("\n".join(title(run) for run in missing))
        return 0
    devices = gpus(options)
    cache = options.cache or (None if devices == [None] else CACHE)
    if options.commit:
        os.environ["KERAS_RQ_COMMIT"] = options.commit
    command = [sys.executable, script, "--worker", *_passed(options), *passed]
    deadline = None if options.time_limit is None else time.time() + options.time_limit
    queue = Queue(missing, deadline)
    run_all(
        queue,
        results,
        lambda gpu: Worker(command, gpu, devices.count(gpu), cache),
        devices[: max(1, len(missing))],
        lambda text: print(text, flush=True),
    )
    left = results.missing(runs)
    tell(f"{len(runs) - len(left)} of {len(runs)} runs done")
    return int(any(row.get("error") for row in results.rows if key_of(row) in map(key_of, runs)))


def show(options: argparse.Namespace, tables: Any, plans: Any) -> int:
    """Prints the tables and draws the figures of the rows in --out.

    Args:
        options: the command line.
        tables: a module with `tables(rows, plans)` and `figures(rows, plans, folder)`.
        plans: which runs they consist of.
    """
    rows = RowsFile(options.out).rows
    if options.table:
        print(tables.tables(rows, plans))
    if options.plot:
        for path in tables.figures(rows, plans, options.plot):
            tell(f"drew {path}")
    return 0


def _passed(options: argparse.Namespace) -> list[str]:
    """What a worker needs to know of the command line."""
    passed = ["--small"] if options.small else []
    for name in ("data", "checkpoints"):
        if getattr(options, name) is not None:
            passed += [f"--{name}", str(getattr(options, name))]
    return passed


def tell(text: str) -> None:
    """Says what is being done, aside from the results."""
    print(f"# {text}", file=sys.stderr, flush=True)
