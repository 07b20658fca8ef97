"""The examples in the docstrings of the numeric rooms run as printed, on every backend."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest

import keras_rq

ROOMS = (
    "keras_rq.ops",
    "keras_rq.numerics",
    "keras_rq.quantizers",
    "keras_rq.training.annealing",
    "keras_rq.layers.registration",
    "keras_rq.layers.matmuls",
)
MODULES = [
    module.name
    for module in pkgutil.walk_packages(keras_rq.__path__, "keras_rq.")
    if module.name.startswith(ROOMS)
]


@pytest.mark.forward
@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name: str):
    assert doctest.testmod(importlib.import_module(name)).failed == 0


@pytest.mark.once
@pytest.mark.parametrize(
    "name",
    [
        "ops",
        "quantizers.ridge",
        "quantizers.straight_through",
        "layers.registration",
        "layers.matmuls",
    ],
)
def test_public_modules_have_examples(name: str):
    assert doctest.testmod(importlib.import_module(f"keras_rq.{name}")).attempted > 0
