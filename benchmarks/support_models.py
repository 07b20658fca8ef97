"""Tiny quantized models of one layer or several, and what is done with them in `support.py`."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import keras
import numpy as np
from support_layers import Case

import keras_rq as rq
from keras_rq.training.surgery import quantized_layers

EPOCHS = 6  # of two steps
COMPILES = keras.backend.backend() == "jax"  # as JAX does for everybody who does not forbid it


class Single:
    """A quantized model of one layer.

    Args:
        name: of the case, and of the model.
        case: the layer.
        dtype: the dtype policy.
    """

    def __init__(self, name: str, case: Case, dtype: str = "float32") -> None:
        policy = rq.QuantizationPolicy("A4W4", matmuls=8, rules=[rq.Rule("head_", skip=True)])
        keras.utils.set_random_seed(0)
        self.name, self.case = name, case
        self.x = case.data()
        self.y = np.random.default_rng(1).normal(size=(len(self.x), 2)).astype(np.float32)
        with dtype_policy(dtype):
            self.model = case.model(name)
        self.report = rq.quantize(self.model, policy, verbose=False)
        self.losses: list[float] = []
        self.before = [keras.ops.convert_to_numpy(v) for v in self.weights]

    @property
    def layer(self) -> keras.layers.Layer:
        """The layer in question."""
        return self.model.get_layer(f"layer_{self.name}")

    @property
    def weights(self) -> list[Any]:
        """What of the layer is trained."""
        return self.layer.trainable_variables

    @property
    def quantized(self) -> str:
        """The bit widths of the layer, or why it stays in float."""
        labels = dict.fromkeys(one.label for one in quantized_layers(self.layer))
        inside = {one.path for one in self.layer._flatten_layers()}
        kept = self.report.kept_float.items()
        reasons = dict.fromkeys(why for path, why in kept if path in inside)
        return "; ".join(["/".join(labels)] * bool(labels) + [f"float: {r}" for r in reasons])

    def train(self) -> None:
        """Trains without a compiler, unless the backend always has one, and judges."""
        compile_model(self.model, COMPILES)
        history = fit(self.model, self.x, self.y)
        self.losses = history["loss"]
        self.judge()

    def judge(self) -> None:
        """Raises unless the loss fell and every weight moved."""
        if not np.isfinite(self.losses).all():
            raise ArithmeticError(f"the losses are {self.losses}")
        if not self.losses[-1] < self.losses[0]:
            raise ArithmeticError(f"the loss went from {self.losses[0]} to {self.losses[-1]}")
        pairs = zip(self.weights, self.before, strict=True)
        still = [v.path for v, old in pairs if (keras.ops.convert_to_numpy(v) == old).all()]
        if still:
            raise ArithmeticError(f"these weights did not move: {still}")

    def save_and_load(self) -> None:
        """Raises unless a saved and loaded model predicts the same."""
        with tempfile.TemporaryDirectory() as folder:
            self.model.save(path := Path(folder, "model.keras"))
            loaded = keras.saving.load_model(path)
        expected, received = (m.predict(self.x, verbose=0) for m in (self.model, loaded))
        if not np.array_equal(expected, received):
            raise ArithmeticError(f"predictions differ by {np.abs(expected - received).max()}")


class Group:
    """Models of one layer side by side in one model."""

    def __init__(self, singles: Sequence[Single]) -> None:
        self.singles = singles
        names = [f"input_{one.name}" for one in singles]  # other ones than those of the models
        inputs = {
            name: keras.Input(one.case.shape, dtype=one.case.dtype, name=name)
            for name, one in zip(names, singles, strict=True)
        }
        pairs = zip(singles, inputs.values(), strict=True)
        outputs = {one.name: one.model(x) for one, x in pairs}
        self.model = keras.Model(inputs, outputs, name="group")
        self.x = {name: one.x for name, one in zip(names, singles, strict=True)}

    def train(self) -> dict[str, None]:
        """Trains compiled; raises unless every loss fell and every weight moved."""
        compile_model(self.model, jit=True)
        history = fit(self.model, self.x, {one.name: one.y for one in self.singles})
        for one in self.singles:
            one.losses = history[f"{one.name}_loss" if len(self.singles) > 1 else "loss"]
            one.judge()
        return {}

    def export(self) -> dict[str, str]:
        """Exports and lets the file be checked; says what of each layer runs as integers."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "model.tflite")
            result = rq.export(self.model, path, inputs=self.x, verbose=False)
        return {one.name: _kernels(one, result.products) for one in self.singles}


def _kernels(one: Single, products: Sequence[Any]) -> str:
    own = [p for p in products if f"layer_{one.name}" in p.path.split("/")]
    if bool(own) != bool(quantized_layers(one.layer)):
        raise LookupError(f"the products of {one.name} are not found in {products}")
    if not own:
        return "float"
    reasons = dict.fromkeys(p.reason for p in own if p.reason is not None)
    if not reasons:
        return "integer"
    kind = "integer in part" if any(p.kernel == "integer" for p in own) else "float"
    return f"{kind}: {'; '.join(reasons)}"


def compile_model(model: keras.Model, jit: bool) -> None:
    """For training with each step compiled, or with each operation run by itself."""
    step_by_step = not jit and keras.backend.backend() == "tensorflow"
    optimizer = keras.optimizers.Adam(2e-2)
    model.compile(optimizer, "mse", run_eagerly=step_by_step, jit_compile=jit)


def fit(model: keras.Model, x: Any, y: Any) -> dict[str, list[float]]:
    """Trains some epochs; the losses."""
    done = model.fit(x, y, epochs=EPOCHS, batch_size=8, shuffle=False, verbose=0)
    return done.history


@contextmanager
def dtype_policy(name: str) -> Iterator[None]:
    """Layers made within compute in this dtype."""
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(name)
    try:
        yield
    finally:
        keras.config.set_dtype_policy(before)
