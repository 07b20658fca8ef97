"""The methods that accuracy benchmarks compare: from a name and a setting to a policy.

A setting is the shorthand of a policy ("A1W1", "A4W1-2:4") or "float". A method says which
quantizer each operand gets; `fields` of a run then replace single fields of it, for research:

    {"both": {"range": "rms"}, "weights": {"trust": 1.6}, "activations": {"class": "QuEST"}}

`calibrate` is true where such a change needs `rq.calibrate`. `stages` change fields while the model
trains, as `rq.callbacks.QuantizationSchedule` does, by the step at which they begin:

    {"stages": {"0": {"weights": {"ridge_lambda": 1}}, "500": {"weights": {"ridge_lambda": 0.01}}}}

Estimators are looked up when a run asks for them, so that a version of keras_rq without one of
them still runs the others.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras

import keras_rq as rq

OPERANDS = ("weights", "activations")
Fields = Mapping[str, Mapping[str, Any]]


@dataclasses.dataclass(frozen=True)
class Method:
    """How a float model is quantized and made ready for `fit`.

    Attributes:
        quantizer: the method's own, from the one that a setting's shorthand gives an operand, and
            the operand's name.
        calibrates: whether its variables start from data, by `rq.calibrate`.
        callbacks: makes what `fit` has to call, for that many warm-up steps.
        distils: whether its authors train it on the logits of the float model.
        within: the quantizer as it suits how far the optimizer can move a parameter.
    """

    quantizer: Callable[[Any, str], Any]
    calibrates: bool = False
    callbacks: Callable[[int], list[keras.callbacks.Callback]] = lambda warmup: []
    distils: bool = False
    within: Callable[[Any, float], Any] = lambda quantizer, reach: quantizer


def estimator(name: str) -> type:
    """A class of `keras_rq.quantizers`.

    Raises:
        LookupError: this version of keras_rq has none of that name.
    """
    found = getattr(rq.quantizers, name, None)
    if not inspect.isclass(found):
        known = [n for n in dir(rq.quantizers) if inspect.isclass(getattr(rq.quantizers, n))]
        raise LookupError(
            f"This version of keras_rq has no quantizer {name!r}. It has {', '.join(known)}."
        )
    return found


def _estimator(name: str) -> Callable[[Any, str], Any]:
    """An estimator as its class has it by default, at a setting's bits and sparsity."""
    return lambda base, operand: estimator(name)(base.bits, **_sparsity(base))


def _gdnsq_within(quantizer: Any, reach: float) -> Any:
    """From ten bits, or from what a short run can shed at an eighth of the optimizer's pace."""
    return quantizer.replace(start_bits=min(10.0, quantizer.target + reach / 8))


def _bitnet(base: Any, operand: str) -> Any:
    """The papers' weights; activations of few bits, which they leave open, have a mean a token."""
    own = {"centered": False, "block_size": "channel"} if operand == "activations" else {}
    return estimator("BitNet")(base.bits, **own, **_sparsity(base))


def _ridge_linear(base: Any, operand: str) -> Any:
    return rq.quantizers.Ridge(base.bits, affine=False, range="absmax", **_sparsity(base))


def _ridge_paper(base: Any, operand: str) -> Any:
    """Affine where the paper is, over the whole range of the data."""
    affine = rq.quantizers.Ridge(base.bits, **_sparsity(base)).has_offset
    extremes = "minmax" if affine else "absmax"
    return rq.quantizers.Ridge(base.bits, affine=affine, range=extremes, **_sparsity(base))


def _sparsity(base: Any) -> dict[str, Any]:
    return {} if base.sparsity is None else {"sparsity": base.sparsity}


METHODS: dict[str, Method] = {
    "ste": Method(_estimator("StraightThrough")),
    "bitnet": Method(_bitnet),
    "lsq": Method(_estimator("LearnedStep"), calibrates=True),
    "quest": Method(_estimator("QuEST")),
    "ridge_linear": Method(_ridge_linear),
    "ridge": Method(_ridge_paper),
    "gdnsq": Method(
        _estimator("GDNSQ"),
        calibrates=True,
        callbacks=lambda warmup: [rq.callbacks.GDNSQ(warmup=warmup)],
        distils=True,
        within=_gdnsq_within,
    ),
    "recommended": Method(lambda base, operand: base),
}
FLOAT = "float"


def policy(
    method: str,
    setting: str,
    fields: Fields,
    rules: Sequence[rq.Rule] = (),
    reach: float = math.inf,
) -> Any:
    """The policy of a run, or None where the model stays in float.

    Args:
        method: a name of `METHODS`, or "float".
        setting: the shorthand of a policy.
        fields: by "both", "weights" and "activations": values that replace single fields of the
            method's quantizers. `class` is the name of another estimator.
        rules: what stays in float.
        reach: the learning rate times the steps: how far the optimizer can move a parameter.

    Raises:
        LookupError: an unknown method, or an estimator that this version lacks.
        ValueError: fields that a quantizer does not have or accept.
    """
    if method == FLOAT:
        return None
    if method not in METHODS:
        raise LookupError(f"There is no method {method!r}. Known: {', '.join((FLOAT, *METHODS))}")
    base = rq.QuantizationPolicy(setting, rules=rules)
    quantizers = {}
    for operand in OPERANDS:
        found = getattr(base, operand)
        changes = {**fields.get("both", {}), **fields.get(operand, {})}
        if found is not None:
            own = METHODS[method].within(METHODS[method].quantizer(found, operand), reach)
            quantizers[operand] = _changed(own, changes, operand)
    return rq.QuantizationPolicy(**quantizers, rules=rules)


def _changed(quantizer: Any, changes: Mapping[str, Any], operand: str) -> Any:
    changes = dict(changes)
    kind = changes.pop("class", None)
    if kind is not None:
        quantizer = _estimator(kind)(quantizer, operand)
    unknown = set(changes) - set(quantizer.get_config())
    if unknown:
        raise ValueError(
            f"{type(quantizer).__name__} has no field {', '.join(sorted(unknown))}. "
            f"It has {', '.join(quantizer.get_config())}."
        )
    return quantizer.replace(**changes) if changes else quantizer


def prepare(
    method: str, fields: Fields, model: keras.Model, data: Callable[[], Any], warmup: int = 0
) -> list[keras.callbacks.Callback]:
    """Makes a quantized model ready for `fit` and returns what `fit` has to call.

    Args:
        method: as in `policy`.
        fields: as in `policy`.
        model: the quantized model.
        data: makes batches of inputs for `rq.calibrate`.
        warmup: steps in which the learning rate rises.
    """
    if method == FLOAT:
        return []
    found = METHODS[method]
    if found.calibrates or fields.get("calibrate"):
        rq.calibrate(model, data(), verbose=False)
    stages = {int(step): stage for step, stage in fields.get("stages", {}).items()}
    schedules = [rq.callbacks.QuantizationSchedule(stages, unit="step")] if stages else []
    return [*found.callbacks(warmup), *schedules]
