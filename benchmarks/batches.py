"""Batches that are gathered on the device, and what is kept there for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import ops


class Gathered(keras.utils.PyDataset):
    """Batches that are picked from data on the device.

    Under JAX all choices are on the device before the first step: a copy from the host in every
    step would wait for the step before it, and steps would no longer be queued.

    Args:
        gather: makes inputs and targets from the data and what `choose` returns; it may only index
            and calculate, so that it works on NumPy and on JAX arrays.
        data: arrays, `resident`.
        choose: from a step to arrays that say what its batch consists of.
        start: the first step.
        stop: the one after the last.
        together: batches that are handed out as one, with an axis in front; JAX alone has more
            than one.
    """

    def __init__(
        self,
        gather: Callable[..., tuple[Any, Any]],
        data: tuple[Any, ...],
        choose: Callable[[int], tuple[np.ndarray, ...]],
        start: int,
        stop: int,
        together: int = 1,
    ) -> None:
        super().__init__()
        self.gather, self.data, self.choose = gather, data, choose
        self._steps, self._together = range(start, stop), together
        if keras.backend.backend() == "jax":
            choices = [choose(step) for step in self._steps]
            self._batch = _on_device(gather, data, choices, together)
        else:
            self._batch = lambda index: gather(*data, *choose(self._steps[index]))

    def joined(self, together: int) -> Gathered:
        """The same batches, some of them as one."""
        start, stop = self._steps.start, self._steps.stop
        return Gathered(self.gather, self.data, self.choose, start, stop, together)

    @property
    def num_batches(self) -> int:
        return len(self._steps) // self._together

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        return self._batch(index)


def _on_device(
    gather: Callable[..., tuple[Any, Any]],
    data: tuple[Any, ...],
    choices: list[tuple[np.ndarray, ...]],
    together: int,
) -> Callable[[int], tuple[Any, Any]]:
    import jax

    count = len(choices) // together
    parts = (np.stack(part[: count * together]) for part in zip(*choices, strict=True))
    plan = jax.device_put([part.reshape(count, together, *part.shape[1:]) for part in parts])
    # Parts of one array: each transfer of its own would leave a thread behind.
    places = list(jax.numpy.arange(count, dtype="int32"))

    @jax.jit
    def batch(data: tuple[Any, ...], plan: list[Any], place: Any) -> tuple[Any, Any]:
        chosen = [part[place] for part in plan]
        if together == 1:
            return gather(*data, *(part[0] for part in chosen))
        return jax.vmap(lambda *part: gather(*data, *part))(*chosen)

    return lambda index: batch(data, plan, places[index])


def resident(array: np.ndarray) -> Any:
    """The array on the device under JAX; elsewhere as it is."""
    return ops.convert_to_tensor(array) if keras.backend.backend() == "jax" else array


def divisor(number: int, most: int) -> int:
    """The largest divisor of a number that is not above `most`."""
    return next(n for n in range(min(number, most), 0, -1) if number % n == 0)
