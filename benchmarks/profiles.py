"""Where the time of a training step goes: kernels of a GPU, or operations of a CPU."""

from __future__ import annotations

import collections
import gzip
import json
import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

_LINES = 22


class Operation(NamedTuple):
    """A kernel or operation, summed over all that differ in a number at the end of the name."""

    name: str
    ms: float
    count: float


def profile_jax(step: Callable[[], Any], wait: Callable[[Any], Any], steps: int) -> list[Operation]:
    """Traces some steps; the times are per step."""
    import jax

    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(steps):
                result = step()
            wait(result)
        path = next(Path(folder).rglob("*.trace.json.gz"))
        events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    return _summed(((e["name"], e.get("dur", 0.0)) for e in _device_events(events)), steps)


def _device_events(events: list[dict]) -> Iterator[dict]:
    """Kernels on the streams of a GPU; without one, the operations that XLA runs on a CPU."""
    processes, threads = {}, {}
    for event in events:
        if event.get("name") == "process_name":
            processes[event["pid"]] = event["args"]["name"]
        elif event.get("name") == "thread_name":
            threads[event["pid"], event.get("tid")] = event["args"]["name"]
    # Beside its streams, a GPU has lines that show the same time again by module and by operation.
    streams = {
        key
        for key, name in threads.items()
        if "/device:GPU" in processes.get(key[0], "") and "stream" in name.lower()
    }
    for event in events:
        if event.get("ph") != "X":
            continue
        on_stream = (event["pid"], event.get("tid")) in streams
        if on_stream if streams else "hlo_op" in event.get("args", {}):
            yield event


def profile_torch(
    step: Callable[[], Any], wait: Callable[[Any], Any], steps: int
) -> list[Operation]:
    """Traces some steps; the times are per step."""
    import torch
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    cuda = torch.cuda.is_available()
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda
    with profile(activities=activities) as profiler:
        wait([step() for _ in range(steps)])
    device = DeviceType.CUDA if cuda else DeviceType.CPU
    time = "self_device_time_total" if cuda else "self_cpu_time_total"
    return _summed(
        (
            (event.key, getattr(event, time), event.count)
            for event in profiler.key_averages()
            if event.device_type == device
        ),
        steps,
    )


PROFILERS = {"jax": profile_jax, "torch": profile_torch}


def _summed(found: Any, steps: int) -> list[Operation]:
    """Sums (name, microseconds, count = 1) by name, longest first."""
    ms: collections.Counter[str] = collections.Counter()
    counts: collections.Counter[str] = collections.Counter()
    for name, microseconds, *count in found:
        name = re.sub(r"([._]\d+)+$", "", name)
        ms[name] += microseconds / 1e3 / steps
        counts[name] += (count[0] if count else 1) / steps
    return [Operation(name, time, counts[name]) for name, time in ms.most_common()]


def table(title: str, operations: list[Operation], lines: int = _LINES) -> list[str]:
    """The longest operations: time per step, launches per step and share."""
    total = sum(operation.ms for operation in operations)
    launches = sum(operation.count for operation in operations)
    text = [f"{title}: {total:.3f} ms and {launches:.0f} launches a step", _HEADER]
    for name, ms, count in operations[:lines]:
        text.append(f"{ms:10.4f} {count:8.1f} {ms / total:7.1%}  {name[:100]}")
    rest = operations[lines:]
    if rest:
        ms = sum(operation.ms for operation in rest)
        count = sum(operation.count for operation in rest)
        text.append(f"{ms:10.4f} {count:8.1f} {ms / total:7.1%}  ({len(rest)} others)")
    return text


_HEADER = f"{'ms/step':>10} {'launches':>8} {'share':>7}  name, without the number at its end"


def floor_lines(row: dict[str, Any], base: dict[str, Any], copy_rate: float) -> list[str]:
    """What the quantization must move, beside what it took."""
    floor = row["floor_bytes"]
    extra = row["ms"] - base["ms"]
    floor_ms = 1e3 * floor / copy_rate
    text = [
        f"measured: {row['ms']:.3f} ms a step, float {base['ms']:.3f} ms, ratio {row['ratio']:.2f}",
        f"bytes that fake quantization must move: {floor / 1e6:,.1f} MB, {floor_ms:.3f} ms at the "
        f"{copy_rate / 1e9:,.0f} GB/s of an elementwise operation; it took {extra:.3f} ms more "
        "than float",
    ]
    if row.get("accessed_bytes") and base.get("accessed_bytes"):
        more = row["accessed_bytes"] - base["accessed_bytes"]
        text.append(
            f"bytes that XLA's cost analysis counts: {row['accessed_bytes'] / 1e6:,.1f} MB, "
            f"{more / 1e6:,.1f} MB more than float, {more / floor:.1f} x the floor"
        )
    return text


def write(path: Path, lines: list[str]) -> None:
    """Writes a profile's text."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")
