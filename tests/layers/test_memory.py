"""Between forward and backward pass a quantized product keeps what a float one keeps."""

from __future__ import annotations

import gc
from typing import Any

import keras
import numpy as np
import pytest
from gradients import BACKEND, symbolic

import keras_rq as rq

TOKENS, WIDTH = 512, 96
X = np.random.default_rng(0).normal(size=(TOKENS, WIDTH)).astype("float32")
IMAGES = np.random.default_rng(0).normal(size=(4, 16, 16, 48)).astype("float32")
CASES = {
    "dense": (lambda: keras.layers.Dense(16), X),
    "einsum": (lambda: keras.layers.EinsumDense("tk,kn->tn", 16), X),
    "convolution": (lambda: keras.layers.Conv2D(4, 3, padding="valid"), IMAGES),
}
cases = pytest.mark.parametrize("case", CASES)


def layer_and_data(case: str) -> tuple[keras.layers.Layer, np.ndarray]:
    make, x = CASES[case]
    layer = make()
    layer(symbolic(x))
    rq.quantize(layer, rq.QuantizationPolicy("A4W4-32"), verbose=False)
    return layer, x


@pytest.mark.skipif(BACKEND != "jax", reason="JAX only")
@cases
def test_jax_keeps_the_input_alone(case: str):
    import jax

    layer, x = layer_and_data(case)

    def pulled(x: Any, weights: Any) -> Any:
        def product(x: Any, weights: Any) -> Any:
            return layer.stateless_call(weights, [], x)[0]

        return jax.vjp(product, x, weights)[1]

    weights = [v.value for v in layer.trainable_variables]
    kept = jax.tree.leaves(jax.eval_shape(pulled, x, weights))
    assert sum(k.size >= x.size for k in kept) == 1


# Keras's convolution makes a copy of its input on PyTorch and keeps that, float or quantized.
@pytest.mark.skipif(BACKEND != "torch", reason="PyTorch only")
@pytest.mark.parametrize("case", ["dense", "einsum"])
def test_torch_keeps_no_copy_of_the_input(case: str):
    """What the product's graph saves passes through the hooks that pack it."""
    import torch

    layer, x = layer_and_data(case)
    x = torch.tensor(x, requires_grad=True)
    saved: list[int] = []
    original = torch.autograd.graph.saved_tensors_hooks

    class Counted(original):
        def __init__(self, pack: Any, unpack: Any) -> None:
            def counted(tensor: Any) -> Any:
                packed = pack(tensor)
                saved.append(packed.numel() if isinstance(packed, torch.Tensor) else 0)
                return packed

            super().__init__(counted, unpack)

    torch.autograd.graph.saved_tensors_hooks = Counted
    try:
        output = layer(x)
    finally:
        torch.autograd.graph.saved_tensors_hooks = original
    assert saved and max(saved) < x.numel()
    output.sum().backward()
    assert torch.isfinite(x.grad).all()


@pytest.mark.skipif(BACKEND != "tensorflow", reason="TensorFlow only")
@cases
def test_tensorflow_keeps_the_input_alone(case: str):
    import tensorflow as tf

    def alive() -> int:
        gc.collect()
        sizes = (o.shape.num_elements() for o in gc.get_objects() if isinstance(o, tf.Tensor))
        return sum((size or 0) >= X.size for size in sizes)

    layer, x = layer_and_data(case)
    x = tf.constant(x)
    before = alive()
    with tf.GradientTape() as tape:
        tape.watch(x)
        output = tf.reduce_sum(layer(x))
    assert alive() - before <= 1  # a name for the input that the gradient function keeps
    assert tape.gradient(output, x).shape == x.shape
