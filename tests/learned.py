"""Value and gradients of a quantizer with parameters, on the active backend, as NumPy arrays."""

from __future__ import annotations

from typing import Any

import numpy as np
from gradients import BACKEND, to_numpy
from keras import ops


def value_and_gradients(
    quantizer: Any, x: np.ndarray, parameters: dict[str, Any], upstream: np.ndarray, blocks: Any
) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    """`fake_quantize(x)`, and the gradients to `x` and to every parameter, from `upstream`."""
    names = list(parameters)

    def function(x: Any, *values: Any) -> Any:
        return quantizer.fake_quantize(x, blocks, dict(zip(names, values, strict=True)))

    tensors = [ops.convert_to_tensor(v, dtype="float32") for v in (x, *parameters.values())]
    y, (to_x, *rest) = _RUN[BACKEND](function, tensors, ops.convert_to_tensor(upstream))
    found = [np.zeros(()) if g is None else to_numpy(g) for g in rest]
    return to_numpy(y), to_numpy(to_x), dict(zip(names, found, strict=True))


def _jax(function: Any, tensors: list[Any], upstream: Any) -> tuple[Any, Any]:
    import jax

    @jax.jit
    def run(*tensors: Any) -> tuple[Any, Any]:
        y, pull = jax.vjp(function, *tensors)
        return y, pull(upstream)

    return run(*tensors)


def _tensorflow(function: Any, tensors: list[Any], upstream: Any) -> tuple[Any, Any]:
    import tensorflow as tf

    with tf.GradientTape() as tape:
        tape.watch(tensors)
        y = function(*tensors)
    return y, tape.gradient(y, tensors, output_gradients=upstream)


def _torch(function: Any, tensors: list[Any], upstream: Any) -> tuple[Any, Any]:
    tensors = [tensor.detach().clone().requires_grad_(True) for tensor in tensors]
    y = function(*tensors)
    y.backward(upstream)
    return y, [tensor.grad for tensor in tensors]


_RUN = {"jax": _jax, "tensorflow": _tensorflow, "torch": _torch}
