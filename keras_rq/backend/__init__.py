"""What keras.ops does not offer, once per framework. The active Keras backend decides."""

from __future__ import annotations

import importlib

import keras

_SUPPORTED = ("tensorflow", "jax", "torch", "numpy")


def _active():
    name = keras.backend.backend()
    if name not in _SUPPORTED:
        raise ImportError(
            f"keras_rq runs on the Keras backends {', '.join(_SUPPORTED)}. "
            f"Received: KERAS_BACKEND={name!r}"
        )
    return importlib.import_module(f"keras_rq.backend.{name}")


_backend = _active()
as_it_is_now = _backend.as_it_is_now
call_in_graph = _backend.call_in_graph
compiled = _backend.compiled
convolve = _backend.convolve
eagerly = _backend.eagerly
float32_matmul = _backend.float32_matmul
forget_traces = _backend.forget_traces
integer_codes = _backend.integer_codes
make_known = _backend.make_known
product_with_gradient = _backend.product_with_gradient
reduce_at_once = _backend.reduce_at_once
rotation_side = _backend.rotation_side
where_traced = _backend.where_traced
with_gradient = _backend.with_gradient

__all__ = [
    "as_it_is_now",
    "call_in_graph",
    "compiled",
    "convolve",
    "eagerly",
    "float32_matmul",
    "forget_traces",
    "integer_codes",
    "make_known",
    "product_with_gradient",
    "reduce_at_once",
    "rotation_side",
    "where_traced",
    "with_gradient",
]
