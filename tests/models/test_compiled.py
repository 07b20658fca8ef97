"""Training steps that the backend compiles: XLA with TensorFlow and JAX, Inductor with PyTorch."""

from __future__ import annotations

import shutil

import pytest
from gradients import BACKEND
from zoo import MAKERS

import keras_rq as rq

# JAX compiles every step of every journey in test_fit_and_save.py too.
NAMES = {"tensorflow": ["images", "subclassed"], "torch": ["nested"], "jax": ["nested"]}


@pytest.mark.skipif(
    BACKEND == "torch" and shutil.which("g++") is None, reason="torch.compile needs g++ on a CPU"
)
@pytest.mark.parametrize("name", NAMES.get(BACKEND, []))
def test_fit(name: str):
    member = MAKERS[name]()
    member.model.quantize(rq.QuantizationPolicy("A4W1"), verbose=False)
    member.compile(jit_compile=True)
    losses = member.fit(epochs=20)
    assert losses[-1] < 0.9 * losses[0]
