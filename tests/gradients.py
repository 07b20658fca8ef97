"""Value and gradient of a function of one tensor, on the active backend, as NumPy arrays."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import keras
import numpy as np
from hypothesis import settings
from keras import ops

import keras_rq as rq

BACKEND = keras.backend.backend()

# JAX compiles anew for every shape that Hypothesis thinks of.
few = settings(max_examples=8 if BACKEND == "jax" else 30, deadline=None)


def value_and_gradient(
    function: Callable[[Any], Any], x: np.ndarray, upstream: np.ndarray, dtype: str | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """`function(x)` and its vector-Jacobian product with `upstream`, in their own dtypes."""
    x = ops.convert_to_tensor(x, dtype=dtype)
    y, dx = _RUN[BACKEND](function, x, ops.convert_to_tensor(upstream, dtype="float32"))
    return to_numpy(y), to_numpy(dx)


@functools.cache
def fake_quantizer(quantizer: Any) -> Callable[[Any], Any]:
    """`rq.ops.fake_quantize` with the quantizer filled in; the same function every time."""
    return lambda x: rq.ops.fake_quantize(x, quantizer)


def to_numpy(tensor: Any) -> np.ndarray:
    """float64 for float tensors of any width, so that bfloat16 needs no special case."""
    if BACKEND == "torch":
        tensor = tensor.detach()
    if "float" in keras.backend.standardize_dtype(tensor.dtype):
        tensor = ops.cast(tensor, "float32")
    array = ops.convert_to_numpy(tensor)
    return array.astype(np.float64) if array.dtype.kind == "f" else array


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`jax.jit` on JAX, which compiles every operation of every shape by itself without it."""
    if BACKEND != "jax":
        return function
    import jax

    return jax.jit(function)


def symbolic(x: np.ndarray) -> keras.KerasTensor:
    """What a layer can be called on to be built, which is all that happens then."""
    return keras.KerasTensor(x.shape, str(x.dtype))


def quantize(x: np.ndarray, quantizer: Any, axis: Any = -1) -> rq.QuantizedTensor:
    """`rq.ops.quantize`, compiled."""
    made = []

    def arrays(x: Any) -> tuple[Any, Any]:
        made.append(rq.ops.quantize(x, quantizer, axis))
        return made[0].codes, made[0].line

    codes, line = compiled(arrays)(x)
    return replace(made[0], codes=codes, line=line)


def relative_error(received: np.ndarray, expected: np.ndarray) -> float:
    """Largest difference over the largest magnitude."""
    return float(np.abs(received - expected).max() / np.abs(expected).max())


def _jax(function: Callable[[Any], Any], x: Any, upstream: Any) -> tuple[Any, Any]:
    return _jax_run(function)(x, upstream)


@functools.cache
def _jax_run(function: Callable[[Any], Any]) -> Callable[..., tuple[Any, Any]]:
    import jax

    @jax.jit  # see `compiled`
    def run(x: Any, upstream: Any) -> tuple[Any, Any]:
        y, pull = jax.vjp(function, x)
        return y, pull(upstream.astype(y.dtype))[0]

    return run


def _tensorflow(function: Callable[[Any], Any], x: Any, upstream: Any) -> tuple[Any, Any]:
    import tensorflow as tf

    with tf.GradientTape() as tape:
        tape.watch(x)
        y = function(x)
    return y, tape.gradient(y, x, output_gradients=ops.cast(upstream, y.dtype))


def _torch(function: Callable[[Any], Any], x: Any, upstream: Any) -> tuple[Any, Any]:
    x = x.detach().clone().requires_grad_(True)
    y = function(x)
    y.backward(ops.cast(upstream, y.dtype))
    return y, x.grad


_RUN = {"jax": _jax, "tensorflow": _tensorflow, "torch": _torch}
