"""Times training steps that take turns, so that whatever else a machine does hits all alike.

Imports nothing but NumPy: a peer's environment runs the same code as ours.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np


def alternate(
    steps: dict[str, Callable[[], Any]],
    wait: Callable[[Any], Any],
    *,
    baseline: str = "float",
    rounds: int = 21,
    turn_seconds: float = 0.1,
) -> dict[str, dict[str, Any]]:
    """Times each step in short turns.

    Args:
        steps: runs one training step; by name. The results are handed to `wait`.
        wait: blocks until what a step returned is computed.
        baseline: the name that the others are compared with, round by round.
        rounds: turns that each step gets.
        turn_seconds: roughly how long a turn lasts; a turn is at least one step.

    Returns:
        By name: `first_call_s` (compilation included), `ms` per step (median of rounds) with its
        quartiles `ms_q25` and `ms_q75`, `ratio` to the baseline (median of the ratios of each
        round) with `ratio_q25` and `ratio_q75`, and `steps_per_turn`.
    """
    results: dict[str, dict[str, Any]] = {}
    for name, step in steps.items():
        first = _seconds(step, wait, 1)
        _seconds(step, wait, 2)  # a second compilation, lazy allocations
        once = _seconds(step, wait, 3) / 3
        count = max(1, round(turn_seconds / once))
        results[name] = {"first_call_s": first, "steps_per_turn": count}
    taken = {name: np.empty(rounds) for name in steps}
    for turn in range(rounds):
        for name, step in steps.items():
            count = results[name]["steps_per_turn"]
            taken[name][turn] = 1e3 * _seconds(step, wait, count) / count
    for name, ms in taken.items():
        results[name] |= _quartiles("ms", ms) | _quartiles("ratio", ms / taken[baseline])
    return results


def _seconds(step: Callable[[], Any], wait: Callable[[Any], Any], count: int) -> float:
    start = time.perf_counter()
    for _ in range(count):
        result = step()
    wait(result)
    return time.perf_counter() - start


def _quartiles(name: str, values: np.ndarray) -> dict[str, float]:
    low, middle, high = (float(v) for v in np.quantile(values, (0.25, 0.5, 0.75)))
    return {name: middle, f"{name}_q25": low, f"{name}_q75": high}
