"""What calibration keeps of the inputs of layers, in float64 NumPy.

An observer sees a tensor batch by batch and gives one interval. All of them rest on the same two
things: the extremes of every batch, and a uniform sample of all elements.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from keras import ops

from keras_rq.numerics.blocks import Blocks
from keras_rq.quantizers import Quantizer
from keras_rq.quantizers.parameters import Observation

METHODS = ("minmax", "moving_average", "percentile", "mse")
_CAPACITY = 2**16
_MOMENTUM = 0.9
_PERCENTILE = 99.99
_SHARES = np.geomspace(0.01, 1.0, 128)


@dataclass
class Observer:
    """Watches one tensor.

    Attributes:
        lows: the smallest element of every batch.
        highs: the largest.
    """

    lows: list[float] = field(default_factory=list)
    highs: list[float] = field(default_factory=list)
    _sample: np.ndarray = field(default_factory=lambda: np.zeros(0))
    _keys: np.ndarray = field(default_factory=lambda: np.zeros(0))
    _generator: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))

    def see(self, values: np.ndarray) -> None:
        """Takes note of a batch: finite numbers of any shape, at least one."""
        values = np.asarray(values, np.float64).reshape(-1)
        self.lows.append(float(values.min()))
        self.highs.append(float(values.max()))
        # Every element gets a random key, and those with the smallest are the sample: uniform over
        # all batches together. A batch needs no more than its smallest keys, which are order
        # statistics of exponential variables and can be drawn one after the other.
        count, size = min(values.size, _CAPACITY), values.size
        keys = np.cumsum(self._generator.exponential(size=count) / (size - np.arange(count)))
        chosen = values[self._generator.choice(size, count, replace=False)]
        sample, keys = np.append(self._sample, chosen), np.append(self._keys, keys)
        if keys.size > _CAPACITY:
            smallest = np.argpartition(keys, _CAPACITY)[:_CAPACITY]
            sample, keys = sample[smallest], keys[smallest]
        self._sample, self._keys = sample, keys

    def observation(self, quantizer: Quantizer, method: str | None) -> Observation:
        """What was seen, with the interval that `method` (None: the extremes) makes of it."""
        seen = Observation(min(self.lows), max(self.highs), self._sample, method is not None)
        return seen if method is None else _INTERVALS[method](self, seen, quantizer)


def _minmax(observer: Observer, seen: Observation, quantizer: Quantizer) -> Observation:
    return seen


def _moving_average(observer: Observer, seen: Observation, quantizer: Quantizer) -> Observation:
    return replace(seen, low=_smoothed(observer.lows), high=_smoothed(observer.highs))


def _smoothed(values: list[float]) -> float:
    mean = values[0]
    for value in values[1:]:
        mean = _MOMENTUM * mean + (1 - _MOMENTUM) * value
    return mean


def _percentile(observer: Observer, seen: Observation, quantizer: Quantizer) -> Observation:
    low, high = np.percentile(seen.sample, [100 - _PERCENTILE, _PERCENTILE])
    return replace(seen, low=float(low), high=float(high))


def _mse(observer: Observer, seen: Observation, quantizer: Quantizer) -> Observation:
    """The interval, a share of the extremes, that the quantizer itself reproduces best."""
    candidates = [replace(seen, low=seen.low * s, high=seen.high * s) for s in _SHARES]
    return min(candidates, key=lambda one: _error(one, quantizer))


def _error(seen: Observation, quantizer: Quantizer) -> float:
    sample = ops.convert_to_tensor(seen.sample, dtype="float32")
    view = Blocks(size="tensor").view(tuple(sample.shape))
    given = {
        name: ops.convert_to_tensor(value, dtype="float32")
        for name, value in quantizer.calibrated(seen).items()
    }
    codes, line = quantizer.encode_with(sample, view, given)
    made = ops.convert_to_numpy(line(codes)).astype(np.float64)
    return float(np.square(made - seen.sample).mean())


_INTERVALS: dict[str, Callable[[Observer, Observation, Quantizer], Observation]] = {
    "minmax": _minmax,
    "moving_average": _moving_average,
    "percentile": _percentile,
    "mse": _mse,
}


def observable(quantizer: Quantizer, x: Any, blocks: Blocks) -> np.ndarray:
    """The elements of an input that the quantizer's range is over: rotated, and not pruned."""
    x = quantizer.rotate(ops.cast(x, "float32"), blocks)
    values = ops.convert_to_numpy(x)
    mask = quantizer.keep_mask(x, blocks)
    return values if mask is None else values[ops.convert_to_numpy(mask) != 0]
