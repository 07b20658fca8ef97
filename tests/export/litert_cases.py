"""TFLite files of one product, and what they are compared with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

tf = pytest.importorskip("tensorflow")
pytest.importorskip("ai_edge_litert")

from keras_rq.export import interpreter  # noqa: E402
from keras_rq.export._litert_convert import convert  # noqa: E402
from keras_rq.export._litert_graph import IntegerGraph  # noqa: E402

RANGE = {8: (-128, 127), 4: (-8, 7), 2: (-2, 1), 1: (-1, 1)}


def integers(rng: np.random.Generator, shape: tuple[int, ...], bits: int) -> np.ndarray:
    """Random codes of which the first two are the extremes."""
    low, high = RANGE[bits]
    codes = rng.choice([-1, 1], shape) if bits == 1 else rng.integers(low, high + 1, shape)
    codes.reshape(-1)[:2] = low, high
    return codes.astype(np.int8)


def activations(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return integers(rng, shape, 8).astype(np.float32)


def scales(rng: np.random.Generator, count: int) -> np.ndarray:
    return rng.uniform(1e-3, 1e-1, count).astype(np.float32)


def build(
    shape: tuple[int, ...], function: Callable[[IntegerGraph, Any], Any], optimize: str = "size"
) -> tuple[IntegerGraph, bytes]:
    graph = IntegerGraph(optimize)
    signature = [tf.TensorSpec(shape, tf.float32, name="x")]
    traced = tf.function(lambda x: function(graph, x), input_signature=signature)
    return graph, convert(graph, traced.get_concrete_function())


def scaled(accumulator: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """`accumulator` must come from int64 arithmetic: this is where it becomes float32."""
    assert accumulator.dtype == np.int64
    return accumulator.astype(np.float32) * scale


def assert_bit_equal(buffer: bytes, x: np.ndarray, expected: np.ndarray) -> None:
    (result,) = interpreter.run(buffer, [x])
    np.testing.assert_array_equal(result, expected)


def assert_integer_kernels(buffer: bytes, *storage: str) -> None:
    kernels = interpreter.integer_kernels(buffer)
    assert [kernel.storage for kernel in kernels] == list(storage)
    assert all(kernel.delegated for kernel in kernels)
    assert interpreter.op_names(buffer) == ["DELEGATE"]
