"""Compilation, vectorization, memory and mixed precision of the custom gradient."""

from __future__ import annotations

import functools
import gc
from typing import Any

import keras
import numpy as np
import pytest
from gradients import BACKEND, fake_quantizer, relative_error, to_numpy, value_and_gradient
from keras import ops

import keras_rq as rq
from keras_rq.quantizers import QuEST, Ridge, StraightThrough

RNG = np.random.default_rng(0)
X = RNG.normal(size=(6, 80)).astype("float32")
UPSTREAM = RNG.normal(size=X.shape).astype("float32")
BLOCKS = 6 * 3
QUANTIZERS = [
    Ridge(4, block_size=32),
    Ridge(1, block_size=32, range="rms", trust=0.3),
    Ridge(1.5, block_size=32, sparsity="2:4"),
    Ridge(4, block_size=32, rotation="hadamard"),
    StraightThrough("fp4", block_size=32, trust=1.0),
    QuEST(4),
]
quantizers = pytest.mark.parametrize("quantizer", QUANTIZERS, ids=lambda q: repr(q)[:24])
on_jax = pytest.mark.skipif(BACKEND != "jax", reason="JAX only")
on_tensorflow = pytest.mark.skipif(BACKEND != "tensorflow", reason="TensorFlow only")
on_torch = pytest.mark.skipif(BACKEND != "torch", reason="PyTorch only")


@functools.cache
def eager(quantizer: Any) -> tuple[np.ndarray, np.ndarray]:
    """Value and gradient, uncompiled."""
    if BACKEND != "jax":
        return value_and_gradient(fake_quantizer(quantizer), X, UPSTREAM)
    import jax

    y, pull = jax.vjp(lambda x: rq.ops.fake_quantize(x, quantizer), ops.convert_to_tensor(X))
    return to_numpy(y), to_numpy(pull(ops.convert_to_tensor(UPSTREAM))[0])


def check(received: Any, quantizer: Any) -> None:
    y, gradient = eager(quantizer)
    assert relative_error(to_numpy(received[0]), y) < 1e-6
    assert relative_error(to_numpy(received[1]), gradient) < 2e-6


# Compilation.


@on_jax
@quantizers
def test_jax_jit(quantizer: Any):
    import jax

    def loss(x: Any) -> Any:
        y = rq.ops.fake_quantize(x, quantizer)
        return (y * UPSTREAM).sum(), y

    (_, y), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(X)
    check((y, gradient), quantizer)


@on_tensorflow
@quantizers
@pytest.mark.parametrize("xla", [True, False])
def test_tf_function(quantizer: Any, xla: bool):
    import tensorflow as tf

    @tf.function(jit_compile=xla)
    def run(x: Any) -> Any:
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = rq.ops.fake_quantize(x, quantizer)
        return y, tape.gradient(y, x, output_gradients=tf.constant(UPSTREAM))

    check(run(tf.constant(X)), quantizer)


@on_tensorflow
@pytest.mark.parametrize("xla", [False, True])
def test_several_statistics_are_one_reduction_for_xla(xla: bool):
    import tensorflow as tf

    kernel = tf.constant(RNG.normal(size=(256, 48)).astype("float32"))
    quantizer = Ridge(8, block_size="channel")

    @tf.function(jit_compile=xla)
    def run(x: Any) -> Any:
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = rq.ops.fake_quantize(x, quantizer, axis=0)
        return y, tape.gradient(y, x, output_gradients=x)

    if tf.config.list_physical_devices("GPU"):
        pytest.skip("the way of XLA's CPU backend")
    nodes = run.get_concrete_function(kernel).graph.as_graph_def().node
    assert any(node.op == "XlaVariadicReduceV2" for node in nodes) == xla
    received, expected = run(kernel), run.python_function(kernel)
    assert relative_error(received[0].numpy(), expected[0].numpy()) < 1e-6
    assert relative_error(received[1].numpy(), expected[1].numpy()) < 2e-6


@on_tensorflow
def test_tf_function_with_an_unknown_batch():
    import tensorflow as tf

    @tf.function(input_signature=[tf.TensorSpec((None, 80))])
    def run(x: Any) -> Any:
        return rq.ops.fake_quantize(x, QUANTIZERS[0])

    assert relative_error(run(tf.constant(X)).numpy(), eager(QUANTIZERS[0])[0]) < 1e-6


@on_torch
@pytest.mark.parametrize("quantizer", QUANTIZERS[1:3], ids=lambda q: repr(q)[:24])
def test_torch_compile(quantizer: Any):
    """All that Inductor does but code, which takes a minute; models/test_compiled.py has that."""
    import torch

    function = torch.compile(
        lambda x: rq.ops.fake_quantize(x, quantizer), backend="aot_eager_decomp_partition"
    )
    x = torch.tensor(X, requires_grad=True)
    y = function(x)
    y.backward(torch.tensor(UPSTREAM))
    check((y, x.grad), quantizer)


# Vectorization.


@quantizers
def test_a_vectorized_function_is_the_loop_over_its_slices(quantizer: Any):
    y, gradient = value_and_gradient(_vectorized(quantizer), X, UPSTREAM)
    expected_y, expected = eager(quantizer)
    assert relative_error(y, expected_y) < 1e-6
    if BACKEND != "tensorflow":
        assert relative_error(gradient, expected) < 2e-6


def _vectorized(quantizer: Any) -> Any:
    def function(row: Any) -> Any:
        return rq.ops.fake_quantize(row, quantizer)

    if BACKEND == "jax":
        import jax

        return jax.vmap(function)
    if BACKEND == "torch":
        import torch

        return torch.func.vmap(function)
    import tensorflow as tf

    return lambda x: tf.vectorized_map(function, x)


@on_tensorflow
@quantizers
def test_tensorflow_gradients_of_slices(quantizer: Any):
    """Inside the mapped function: `tf.vectorized_map` itself forgets every custom gradient."""
    import tensorflow as tf

    def gradient(slices: Any) -> Any:
        row, weight = slices
        with tf.GradientTape() as tape:
            tape.watch(row)
            y = rq.ops.fake_quantize(row, quantizer)
        return tape.gradient(y, row, output_gradients=weight)

    received = tf.vectorized_map(gradient, (tf.constant(X), tf.constant(UPSTREAM)))
    assert relative_error(to_numpy(received), eager(quantizer)[1]) < 2e-6


@on_jax
def test_jax_gradients_of_slices():
    import jax

    def loss(row: Any, weight: Any) -> Any:
        return (rq.ops.fake_quantize(row, QUANTIZERS[0]) * weight).sum()

    gradient = jax.jit(jax.vmap(jax.grad(loss)))(X, UPSTREAM)
    assert relative_error(to_numpy(gradient), eager(QUANTIZERS[0])[1]) < 2e-6


@on_torch
def test_torch_gradients_of_slices():
    import torch

    def loss(row: Any, weight: Any) -> Any:
        return (rq.ops.fake_quantize(row, QUANTIZERS[0]) * weight).sum()

    gradient = torch.func.vmap(torch.func.grad(loss))(torch.tensor(X), torch.tensor(UPSTREAM))
    assert relative_error(to_numpy(gradient), eager(QUANTIZERS[0])[1]) < 2e-6


# Memory: x and a few numbers per block wait for the backward pass, and nothing else.


def check_saved(shapes: list[tuple[int, ...]]) -> None:
    sizes = [int(np.prod(s)) for s in shapes]
    assert sum(size >= X.size for size in sizes) <= 1
    assert all(size <= BLOCKS for size in sizes if size < X.size)
    # x, two numbers for the range, four for the fit; scalars are constants of the graph.
    assert sum(size > 1 for size in sizes) <= 7


@on_jax
@quantizers
def test_jax_saves_x_and_statistics(quantizer: Any):
    import jax

    def pulled(x: Any) -> Any:
        return jax.vjp(lambda x: rq.ops.fake_quantize(x, quantizer), x)[1]

    saved = jax.tree.leaves(jax.eval_shape(pulled, X))
    check_saved([s.shape for s in saved])


@on_torch
@quantizers
def test_torch_saves_x_and_statistics(quantizer: Any):
    import torch

    shapes = []
    hooks = torch.autograd.graph.saved_tensors_hooks(
        lambda t: (shapes.append(tuple(t.shape)), t)[1], lambda t: t
    )
    with hooks:
        rq.ops.fake_quantize(torch.tensor(X, requires_grad=True), quantizer)
    check_saved(shapes)


@on_tensorflow
@pytest.mark.parametrize("quantizer", [q for q in QUANTIZERS if not q.rotation], ids=repr)
def test_tensorflow_tape_holds_no_intermediates(quantizer: Any):
    """Eagerly, a tape keeps what it has recorded; the forward pass must not be part of it."""
    import tensorflow as tf

    def held() -> int:
        gc.collect()
        sizes = (o.shape.num_elements() for o in gc.get_objects() if isinstance(o, tf.Tensor))
        return sum((size or 0) >= X.size for size in sizes)

    x, before = tf.constant(X), held()
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = rq.ops.fake_quantize(x, quantizer)
        assert held() - before <= 3  # x, x cut from the tape, y
    del tape, y


# Mixed precision.


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@quantizers
def test_narrow_floats_are_quantized_in_float32(quantizer: Any, dtype: str):
    """Statistics, codes and gradients are float32; only the result is rounded."""
    narrow = ops.cast(ops.convert_to_tensor(X), dtype)
    wide = to_numpy(narrow).astype("float32")
    upstream = to_numpy(ops.cast(ops.convert_to_tensor(UPSTREAM), dtype)).astype("float32")

    def function(x: Any) -> Any:
        y = rq.ops.fake_quantize(x, quantizer)
        assert keras.backend.standardize_dtype(y.dtype) == keras.backend.standardize_dtype(x.dtype)
        return y

    y, gradient = value_and_gradient(function, wide, upstream, dtype=dtype)
    expected = value_and_gradient(function, wide, upstream)
    digits = {"float16": 11, "bfloat16": 8}[dtype]
    for received, exact in zip((y, gradient), expected, strict=True):
        half_ulp = 2.0**-digits * np.maximum(np.abs(exact), 2.0**-14)
        assert (np.abs(received - exact) <= 1.001 * half_ulp + 1e-6).all()


def test_double_precision_is_accepted():
    if BACKEND == "jax":
        pytest.skip("JAX has no float64 unless told so")
    y, gradient = value_and_gradient(
        lambda x: rq.ops.fake_quantize(x, QUANTIZERS[0]), X, UPSTREAM, dtype="float64"
    )
    expected_y, expected = eager(QUANTIZERS[0])
    assert relative_error(y, expected_y) < 1e-6 and relative_error(gradient, expected) < 1e-6
