"""Quantization that changes while a model is trained.

What is in force follows from the epoch (or step of the optimizer) alone, so that training resumed
with `initial_epoch` goes on as if it had never stopped. Steps that loss scaling skips are noticed
when an epoch ends.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import keras

from keras_rq.layers import paths
from keras_rq.layers.base import QuantizedLayer
from keras_rq.policy import LayerQuantization, QuantizationPolicy, Rule
from keras_rq.quantizers import Quantizer
from keras_rq.training import surgery
from keras_rq.training.optimizers import inner_optimizer

_OPERANDS = ("weights", "activations")
_FLOAT = LayerQuantization(None, None)

Stage = QuantizationPolicy | Mapping[str, Mapping[str, Any]] | None


class QuantizationSchedule(keras.callbacks.Callback):
    """Changes the quantization of a model at given epochs or steps of `fit`.

    Stages are applied one after the other, up to the one that has begun last: a policy and None say
    all that a layer does, fields change some of what the stage before left, or the model if it is
    the first. At every change the model's compiled functions are made anew, which takes as long as
    at the start of `fit`. A model that is saved carries the quantization in force. Layers that
    `quantize` left in float stay in float. Schedules that change different fields may run beside
    each other.

    Args:
        stages: by the epoch or step (from 0) at which they begin. A `QuantizationPolicy` or its
            shorthand; None for float; or fields by operand, such as
            `{"weights": {"bits": 4}, "activations": {"bits": 8}}`. Fields go to the quantizers that
            have them, and an operand in float stays in float. What a shorthand has for few bits
            (fading gradients, rotations) comes with the shorthand, and not with fewer bits alone.
        match: the layers to change, as in `Rule`: a regular expression, a layer class or a
            callable. None: all quantized layers.
        unit: "epoch", or "step" for steps of the optimizer, counted from its first.

    Raises:
        TypeError, ValueError: name the argument, the value received and what is accepted; when
            `fit` begins, also for a model that is not quantized, for fields that no layer has, and
            for quantizers that a layer cannot have.

    Example:

    >>> import keras, keras_rq as rq
    >>> model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(2)])
    >>> _ = model.quantize(rq.QuantizationPolicy("A8W8"), verbose=False)
    >>> model.compile("sgd", "mse")
    >>> stages = {0: "A8W8", 2: {"weights": {"bits": 1}}}
    >>> x, y = keras.ops.ones((4, 8)), keras.ops.ones((4, 2))
    >>> schedule = rq.callbacks.QuantizationSchedule(stages)
    >>> _ = model.fit(x, y, epochs=3, callbacks=[schedule], verbose=0)
    >>> model.layers[0].quantization.weights.bits
    1
    """

    def __init__(
        self,
        stages: Mapping[int, Stage | str],
        *,
        match: str | type | Callable[[keras.layers.Layer], bool] | None = None,
        unit: str = "epoch",
    ) -> None:
        super().__init__()
        self.stages = _check_stages(stages)
        self.rule = None if match is None else Rule(match)
        if unit not in ("epoch", "step"):
            raise ValueError(f"`unit` must be 'epoch' or 'step'. Received: unit={unit!r}")
        self.unit = unit
        self._in_force: int | None = None
        self._first_batch, self._batches_of_step = 0, 1

    def on_train_begin(self, logs: Any = None) -> None:
        # All of them now: what a layer cannot have should not end a training that ran for days.
        for start, stage, state in _resolve(self.model, self.stages, self.rule):
            _check_fields(self.model, start, stage, state)
        self._in_force = None

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        if self.unit == "epoch":
            self._reach(epoch)
        else:
            # Read here: within an epoch the variables are not always up to date.
            inner = inner_optimizer(self.model.optimizer)
            self._first_batch = int(keras.ops.convert_to_numpy(inner._iterations))
            self._batches_of_step = inner.gradient_accumulation_steps or 1

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        if self.unit == "step":
            self._reach((self._first_batch + batch) // self._batches_of_step)

    def _reach(self, now: int) -> None:
        begun = {start: stage for start, stage in self.stages.items() if start <= now}
        if not begun:
            return
        # Never back: a step that loss scaling has skipped is counted until the epoch ends.
        if self._in_force is not None and max(begun) <= self._in_force:
            return
        self._in_force = max(begun)
        # From what the layers do now, which another schedule may have changed meanwhile.
        *_, (_, _, wanted) = _resolve(self.model, begun, self.rule)
        layers = surgery.quantized_layers(self.model)
        if wanted != [layer.quantization for layer in layers]:
            surgery.change(self.model, wanted)
            self.model.make_train_function()


class DelayedStart(QuantizationSchedule):
    """Trains in float first.

    Args:
        start: epoch or step (from 0) at which quantization begins.
        policy: what it is then, usually the policy that the model was quantized with; shorthand
            will do.
        unit: see `QuantizationSchedule`.

    Raises:
        TypeError, ValueError: see `QuantizationSchedule`.

    Example:

    >>> import keras_rq as rq
    >>> callback = rq.callbacks.DelayedStart(1000, "A4W1", unit="step")
    """

    def __init__(
        self, start: int, policy: QuantizationPolicy | str, *, unit: str = "epoch"
    ) -> None:
        super().__init__({0: None, start: policy}, unit=unit)


class GradualBits(QuantizationSchedule):
    """Changes bit widths step by step.

    Args:
        weights: bits by the epoch or step (from 0) at which they begin. None: as they are.
        activations: likewise.
        match: see `QuantizationSchedule`; layers with bits of their own, such as a head, are best
            left out.
        unit: see `QuantizationSchedule`.

    Raises:
        TypeError, ValueError: see `QuantizationSchedule`.

    Example:

    >>> import keras_rq as rq
    >>> callback = rq.callbacks.GradualBits(weights={0: 8, 5: 4, 10: 1}, activations={0: 8, 5: 4})
    """

    def __init__(
        self,
        *,
        weights: Mapping[int, Any] | None = None,
        activations: Mapping[int, Any] | None = None,
        match: Any = None,
        unit: str = "epoch",
    ) -> None:
        stages = _stages_of("bits", weights=weights, activations=activations)
        super().__init__(stages, match=match, unit=unit)


class GradualSparsity(QuantizationSchedule):
    """Prunes weights step by step.

    Args:
        sparsity: what the field of that name takes (None for dense), by the epoch or step (from 0)
            at which it begins.
        match: see `QuantizationSchedule`.
        unit: see `QuantizationSchedule`.

    Raises:
        TypeError, ValueError: see `QuantizationSchedule`.

    Example:

    >>> import keras_rq as rq
    >>> callback = rq.callbacks.GradualSparsity({0: None, 5: "2:4", 10: "1:4"})
    """

    def __init__(
        self, sparsity: Mapping[int, Any], *, match: Any = None, unit: str = "epoch"
    ) -> None:
        super().__init__(_stages_of("sparsity", weights=sparsity), match=match, unit=unit)


class RidgeLambda(QuantizationSchedule):
    """Changes the penalty of the `Ridge` quantizers, of weights and activations.

    Args:
        ridge_lambda: the penalty, by the epoch or step (from 0) at which it begins.
        match: see `QuantizationSchedule`.
        unit: see `QuantizationSchedule`.

    Raises:
        TypeError, ValueError: see `QuantizationSchedule`.

    Example:

    >>> import keras_rq as rq
    >>> callback = rq.callbacks.RidgeLambda({0: 1.0, 5: 0.1, 10: 0.01})
    """

    def __init__(
        self, ridge_lambda: Mapping[int, float], *, match: Any = None, unit: str = "epoch"
    ) -> None:
        operands = dict.fromkeys(_OPERANDS, ridge_lambda)
        super().__init__(_stages_of("ridge_lambda", **operands), match=match, unit=unit)


def _stages_of(field: str, **operands: Mapping[int, Any] | None) -> dict[int, Stage]:
    """One field of each operand, as stages."""
    stages: dict[int, dict[str, dict[str, Any]]] = {}
    for operand, values in operands.items():
        if values is not None and not isinstance(values, Mapping):
            raise TypeError(
                f"`{field}` of a schedule must be given by the epoch or step at which it begins, "
                f"as in {{0: ..., 5: ...}}. Received: {values!r}"
            )
        for start, value in (values or {}).items():
            stages.setdefault(start, {})[operand] = {field: value}
    return stages


def _check_stages(stages: Any) -> dict[int, Stage]:
    if not isinstance(stages, Mapping) or not stages:
        raise TypeError(
            "`stages` must map the epoch or step at which each begins to what begins then. "
            f"Received: stages={stages!r}"
        )
    for start in stages:
        if not isinstance(start, int) or isinstance(start, bool) or start < 0:
            raise ValueError(
                f"A stage begins at an epoch or step, an integer >= 0. Received: {start!r}"
            )
    return {start: _check_stage(stages[start]) for start in sorted(stages)}


def _check_stage(stage: Any) -> Stage:
    if stage is None or isinstance(stage, QuantizationPolicy):
        return stage
    if isinstance(stage, str):
        return QuantizationPolicy(stage)
    is_fields = isinstance(stage, Mapping) and bool(stage) and set(stage) <= set(_OPERANDS)
    if is_fields and all(isinstance(fields, Mapping) and fields for fields in stage.values()):
        return {operand: dict(fields) for operand, fields in stage.items()}
    raise TypeError(
        "A stage must be a keras_rq.QuantizationPolicy, its shorthand, None for float, or fields "
        f"by operand, as in {{'weights': {{'bits': 4}}}}. Received: {stage!r}"
    )


def _resolve(
    model: keras.Model, stages: dict[int, Stage], rule: Rule | None
) -> Iterator[tuple[int, Stage, list[LayerQuantization]]]:
    """Each stage, with what every quantized layer does from it on."""
    layers = surgery.quantized_layers(model)
    if not layers:
        raise ValueError(
            f"Model {model.name!r} has no quantized layer to change. Call "
            "`model.quantize(policy)` before `fit`."
        )
    paths.complete(model)
    containers = surgery.containers_around(model)
    around = [containers.get(id(layer), []) for layer in layers]
    matched = [rule is None or rule.matches(*pair) for pair in zip(layers, around, strict=True)]
    if not any(matched):
        raise ValueError(f"No quantized layer of {model.name!r} matches {rule!r}.")
    current = [layer.quantization for layer in layers]
    for start, stage in stages.items():
        current = [
            _checked(layer, quantization, _apply(stage, layer, outer, quantization))
            if is_in
            else quantization
            for layer, outer, is_in, quantization in zip(
                layers, around, matched, current, strict=True
            )
        ]
        yield start, stage, current


def _apply(
    stage: Stage,
    layer: QuantizedLayer,
    around: list[keras.layers.Layer],
    before: LayerQuantization,
) -> LayerQuantization:
    if stage is None:
        return _FLOAT
    if isinstance(stage, QuantizationPolicy):
        after = stage.resolve(layer, around)
    else:
        try:
            changed = {
                operand: _replaced(getattr(before, operand), fields)
                for operand, fields in stage.items()
            }
        except ValueError as error:
            raise ValueError(f"Layer {layer.path!r}: {error}") from error
        after = replace(before, **changed)
    after = surgery.suited(layer, after)
    surgery.check_fit(layer, after)
    return after


def _checked(
    layer: QuantizedLayer, before: LayerQuantization, after: LayerQuantization
) -> LayerQuantization:
    """Raises where a change would need variables that the layer has or lacks."""
    for operand in _OPERANDS:
        change = getattr(before, operand), getattr(after, operand)
        if change[0] != change[1] and any(q is not None and q.has_parameters for q in change):
            raise ValueError(
                f"Layer {layer.path!r}: the quantizer of its {operand} cannot become another one "
                f"while `fit` runs, because one of them has variables: {change[0]!r}, then "
                f"{change[1]!r}. Leave the layer out with `match=`."
            )
    return replace(
        after, is_calibrated=before.is_calibrated, fold_batch_norm=before.fold_batch_norm
    )


def _replaced(quantizer: Quantizer | None, fields: dict[str, Any]) -> Quantizer | None:
    if quantizer is None:
        return None
    own = quantizer.get_config()
    return quantizer.replace(**{name: v for name, v in fields.items() if name in own})


def _check_fields(
    model: keras.Model, start: int, stage: Stage, state: list[LayerQuantization]
) -> None:
    if stage is None or isinstance(stage, QuantizationPolicy):
        return
    quantizers = [getattr(q, operand) for q in state for operand in stage]
    known = {name for quantizer in quantizers if quantizer for name in quantizer.get_config()}
    wanted = {name for fields in stage.values() for name in fields}
    if missing := sorted(wanted - known):
        raise ValueError(
            f"Stage {start} changes the field {missing[0]!r}, which no quantizer of the "
            f"{' or '.join(stage)} of {model.name!r} has. Known there: {sorted(known)}"
        )
