"""A learning rate that decays from some step on, whatever it was before."""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from keras_rq.training.optimizers import inner_optimizer


@keras.saving.register_keras_serializable("keras_rq")
class Annealed(keras.optimizers.schedules.LearningRateSchedule):
    """Another rate, times `decay` to the power of the steps that decay has been in force.

    A function of the step alone, so that it needs no variable and a resumed training has it too.

    Args:
        base: the other rate: a number, or a schedule.
        decay: the factor of one step.
        done: steps that decay was in force before.
        since: the step from which it is in force; None: it is not now.

    Example:

    >>> rate = Annealed(0.5, 0.5, since=2)
    >>> [float(rate(step)) for step in range(5)]
    [0.5, 0.5, 0.5, 0.25, 0.125]
    """

    def __init__(
        self,
        base: float | keras.optimizers.schedules.LearningRateSchedule,
        decay: float,
        done: int = 0,
        since: int | None = None,
    ) -> None:
        self.base, self.decay, self.done, self.since = base, decay, done, since

    def __call__(self, step: Any) -> Any:
        steps = ops.cast(self.done, "float32")
        if self.since is not None:
            steps = steps + ops.maximum(ops.cast(step, "float32") - float(self.since), 0.0)
        base = self.base(step) if callable(self.base) else self.base
        return base * ops.power(ops.cast(self.decay, "float32"), steps)

    def get_config(self) -> dict[str, Any]:
        base = self.base
        if callable(base):
            base = keras.saving.serialize_keras_object(base)
        return {"base": base, "decay": self.decay, "done": self.done, "since": self.since}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Annealed:
        base = config["base"]
        if isinstance(base, dict):
            base = keras.saving.deserialize_keras_object(base)
        return cls(**{**config, "base": base})


def anneal(optimizer: Any, decay: float, done: int, is_on: bool) -> None:
    """Gives an optimizer its rate times the decay of `done` steps, and of all from now on."""
    inner = inner_optimizer(optimizer)
    # What Keras calls a schedule with, which goes on where gradients are only accumulated.
    since = int(ops.convert_to_numpy(inner._iterations)) if is_on else None
    inner.learning_rate = Annealed(rate_of(optimizer), decay, done, since)


def rate_of(optimizer: Any) -> float | keras.optimizers.schedules.LearningRateSchedule:
    """The rate of an optimizer without its annealing.

    Raises:
        ValueError: it has no rate, or one that cannot be replaced.
    """
    rate = getattr(inner_optimizer(optimizer), "_learning_rate", None)
    if isinstance(rate, Annealed):
        return rate.base
    if isinstance(rate, keras.optimizers.schedules.LearningRateSchedule):
        return rate
    if isinstance(rate, keras.Variable):
        return float(ops.convert_to_numpy(rate))
    raise ValueError(
        "The optimizer must have one learning rate, a number or a LearningRateSchedule. "
        f"Received: {optimizer!r} with the rate {rate!r}"
    )


def rate_at(rate: float | keras.optimizers.schedules.LearningRateSchedule, step: int) -> float:
    """A rate at a step, as a number."""
    return float(ops.convert_to_numpy(rate(step))) if callable(rate) else rate
