"""Optimizers of a model whose variables have become others."""

from __future__ import annotations

import warnings
from collections.abc import Collection
from typing import Any

import keras


def renew(model: keras.layers.Layer, dropped: Collection[Any]) -> None:
    """Gives a model, and the models inside it, optimizers for the variables that they have now.

    Args:
        model: any Keras model or layer.
        dropped: variables that it had until now.
    """
    for one in model._flatten_layers():
        if isinstance(one, keras.Model) and (new := renewed(one, dropped)) is not None:
            one.optimizer = new


def renewed(model: keras.Model, dropped: Collection[Any] = ()) -> Any:
    """An optimizer for the variables that a model has now, if the one it has knows other ones.

    A new object of the same configuration: Keras optimizers know the variables that they were
    built with and no others. What the old one remembers of a variable (moments, the number of
    steps) is copied by name; new variables start without.

    Args:
        model: a compiled model, or one that was never compiled.
        dropped: variables that it had until now.

    Returns:
        The new optimizer, or None where the model needs none.
    """
    old = getattr(model, "optimizer", None)
    if old is None or not old.built:
        return None
    known = {id(variable) for variable in inner_optimizer(old)._trainable_variables}
    wanted = {id(variable) for variable in model.trainable_variables}
    if wanted <= known and known.isdisjoint(id(variable) for variable in dropped):
        return None
    new = type(old).from_config(old.get_config())
    new.build(model.trainable_variables)
    remembered = _by_name(old)
    for name, variables in _by_name(new).items():
        sources = remembered.get(name, ())
        if len(sources) == len(variables):
            for variable, source in zip(variables, sources, strict=True):
                variable.assign(source)
    warnings.warn(
        f"Model {model.name!r} has other variables to train, so it has got a new optimizer of the "
        f"same configuration ({type(new).__name__}). What the old one remembered of the other "
        "variables is kept; `model.optimizer` is another object.",
        stacklevel=5,
    )
    return new


def _by_name(optimizer: Any) -> dict[str, list[Any]]:
    """Its variables by the last part of their path, which says whose they are and what.

    What comes before depends on the scope that an optimizer was built in.
    """
    found: dict[str, list[Any]] = {}
    for variable in optimizer.variables:
        found.setdefault(variable.path.rsplit("/", 1)[-1], []).append(variable)
    return found


def inner_optimizer(optimizer: Any) -> Any:
    """The optimizer that a LossScaleOptimizer wraps."""
    return getattr(optimizer, "inner_optimizer", optimizer)
