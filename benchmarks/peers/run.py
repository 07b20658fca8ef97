"""The same training step in other quantization libraries, each beside its own float model.

    python benchmarks/peers/run.py [--peers hgq2 torchao_qat ...] [--models mlp-1024 ...] [--out F]

Each peer gets an environment of its own, made from `requirements/` on first use, and one process
per framework. What a peer cannot do is a row that says why. See README.md beside this file.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import threading
import venv
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROW = "PEER-ROW "
# The worker of each peer, and the frameworks it is run on.
PEERS: dict[str, tuple[str, tuple[str, ...]]] = {
    "hgq2": ("hgq2", ("jax", "tensorflow")),
    "qkeras_v3": ("qkeras_v3", ("jax", "tensorflow")),
    "pquantml": ("pquantml", ("jax", "tensorflow")),
    "torchao": ("torchao_qat", ("torch",)),
    "brevitas": ("brevitas_", ("torch", "torch-jit")),
    "qwix": ("qwix_", ("jax",)),
    "aqt": ("aqt_", ("jax",)),
    "tfmot": ("tfmot", ("tensorflow",)),
}


def main() -> None:
    """Runs the workers one after the other; the file is complete after each."""
    options = _arguments()
    rows: list[dict[str, Any]] = []
    environments: dict[str, Any] = {}
    for peer in options.peers:
        worker, frameworks = PEERS[peer]
        for framework in frameworks:
            if options.frameworks and framework not in options.frameworks:
                continue
            for row in _run(worker, framework, options):
                if "environment" in row:
                    environments[f"{peer} {framework}"] = row["environment"]
                    continue
                row = {"peer": peer, "framework": framework, "device": options.device, **row}
                rows.append(row)
                print(_line(row), flush=True)
            if options.out is not None:
                provenance = {**_provenance(), "packages": environments}
                provenance["commit"] = options.commit or provenance["commit"]
                _write(options.out, {"provenance": provenance, "rows": rows})


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peers", nargs="+", default=list(PEERS), choices=list(PEERS))
    parser.add_argument("--models", nargs="+", default=["mlp-64", "mlp-1024", "convnet"])
    parser.add_argument("--frameworks", nargs="+", help="jax, tensorflow, torch, torch-jit")
    parser.add_argument("--modes", nargs="+", help="jit, eager, compiled, ...")
    parser.add_argument("--settings", nargs="+", help="only these, and the float baseline")
    parser.add_argument("--device", default="cpu", choices=("cpu", "gpu"))
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: by device")
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--timeout", type=float, default=3600, help="seconds for one process")
    parser.add_argument("--venvs", type=Path, default=HERE / ".venvs", help="one folder per peer")
    parser.add_argument("--current", action="store_true", help="this Python; make no environment")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--commit", help="the commit, where the sources are no git checkout")
    return parser.parse_args()


def _run(worker: str, framework: str, options: argparse.Namespace) -> Any:
    """Yields a worker's rows as it prints them, and one more if it does not end well."""
    try:
        python = sys.executable if options.current else _python(worker, options.venvs)
    except subprocess.CalledProcessError as error:
        yield {"error": f"not installed: {error.stderr.strip()[-500:]}"}
        return
    command = [python, "-u", str(HERE / f"{worker}.py"), "--framework", framework]
    for name in ("models", "modes", "settings"):
        command += [f"--{name}", *getattr(options, name)] if getattr(options, name) else []
    command += ["--device", options.device, "--rounds", str(options.rounds)]
    command += ["--dtype", options.dtype] if options.dtype else []
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process = subprocess.Popen(command, env=_environment(options.device), **pipe)
    timer = threading.Timer(options.timeout, process.kill)
    timer.start()
    last = ""
    for line in process.stdout:
        if line.startswith(ROW):
            yield json.loads(line.removeprefix(ROW))
        elif line.strip():
            last = line.strip()
    in_time = timer.is_alive()
    timer.cancel()
    if process.wait() != 0:
        limit = f"stopped after {options.timeout:.0f} s"
        yield {"error": f"exit status {process.returncode}: {last[-500:]}" if in_time else limit}


def _python(worker: str, folder: Path) -> str:
    """The interpreter of a peer's environment, which is made if it is not there."""
    home = folder.resolve() / worker
    python = home / "bin" / "python"
    if not (home / "installed").exists():
        print(f"installing {worker} into {home}", flush=True)
        venv.create(home, with_pip=True)
        install = [python, "-m", "pip", "install", "-q"]
        wanted = HERE / "requirements" / f"{worker}.txt"
        subprocess.run([*install, "-r", wanted], check=True, capture_output=True, text=True)
        alone = wanted.with_name(f"{worker}-alone.txt")  # what would ask for a second TensorFlow
        if alone.exists():
            install += ["--no-deps", "-r", alone]
            subprocess.run(install, check=True, capture_output=True, text=True)
        (home / "installed").touch()
    return str(python)


def _environment(device: str) -> dict[str, str]:
    """On a machine that has both, a CPU run must not see the GPU."""
    quiet = {"TF_CPP_MIN_LOG_LEVEL": "3", "PYTHONWARNINGS": "ignore"}
    cpu = {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {}
    return {**os.environ, **quiet, **cpu}


def _line(row: dict[str, Any]) -> str:
    """One row of the table."""
    where = f"{row['peer']:10} {row['framework']:10} {row.get('mode', ''):20} "
    what = f"{row.get('model', ''):8} {row.get('batch', ''):>4} {row.get('setting', ''):20} "
    if row["error"]:
        return where + what + row["error"][:120]
    spread = f"({row['ratio_q25']:.2f} to {row['ratio_q75']:.2f})"
    return f"{where}{what}{row['ms']:9.3f} ms {row['ratio']:6.2f}x {spread}"


def _provenance() -> dict[str, Any]:
    """When and where this ran, and what code it was."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "python": platform.python_version(),
        "machine": {
            "system": platform.platform(),
            "processor": _processor(),
            "cores": len(os.sched_getaffinity(0)),
        },
    }


def _commit() -> str | None:
    """The commit, with `-dirty` if files differ from it; None where there is no git."""
    git = ["git", "-C", str(HERE), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        found = subprocess.run(git, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip()


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())


def _write(path: Path, content: dict[str, Any]) -> None:
    """Replaces the file in one step: a reader sees the old or the new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f"{path.name}.tmp")
    draft.write_text(json.dumps(content, indent=1) + "\n")
    draft.replace(path)


if __name__ == "__main__":
    main()
