"""Theorem 1: one integer product and two corrections are the product of the float operands."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from gradients import BACKEND, compiled, quantize, relative_error, to_numpy
from keras import ops

import keras_rq as rq
from keras_rq.quantizers import Ridge, StraightThrough

LENGTH = 70


def dequantized(tensor: Any) -> np.ndarray:
    """Scale and offset of the tensor applied to its codes in float64."""
    view = tensor.view
    codes = to_numpy(compiled(lambda c: view.split(ops.cast(c, "float32")))(tensor.codes))
    values = codes * to_numpy(tensor.line.scale)
    if tensor.line.offset is not None:
        values = values + to_numpy(tensor.line.offset)
    # `merge` only moves elements: two float32 halves pass it unharmed and add up to the float64.
    upper = values.astype("float32")
    lower = (values - upper).astype("float32")
    return sum(to_numpy(compiled(view.merge)(ops.convert_to_tensor(h))) for h in (upper, lower))


def operands(
    x_quantizer: Any, w_quantizer: Any, batch: tuple[int, ...] = (5,), seed: int = 0
) -> Any:
    rng = np.random.default_rng(seed)
    x = (rng.normal(size=(*batch, LENGTH)) + 0.5).astype("float32")
    w = (0.1 * rng.normal(size=(LENGTH, 6)) - 0.02).astype("float32")
    return quantize(x, x_quantizer), quantize(w, w_quantizer, 0)


def multiply(x: Any, w: Any) -> np.ndarray:
    def product(cx: Any, lx: Any, cw: Any, lw: Any) -> Any:
        return rq.ops.affine_matmul(replace(x, codes=cx, line=lx), replace(w, codes=cw, line=lw))

    return to_numpy(compiled(product)(x.codes, x.line, w.codes, w.line))


def error(x: Any, w: Any) -> float:
    expected = dequantized(x) @ dequantized(w)
    received = multiply(x, w)
    assert received.shape == expected.shape
    return relative_error(received, expected)


PAIRS = [(1, 1), (2, 2), (4, 1), (8, 8), ("fp4", 4), (1.5, 1.5), (8, 1.5), (4, "fp4")]
SIZES = itertools.cycle(["channel", 16, "tensor", 35])
AFFINE = itertools.cycle([(True, True), (False, True), (True, False), (False, False), (True, True)])


@pytest.mark.forward
@pytest.mark.parametrize(
    ("bits", "affine", "size"),
    [(b, next(AFFINE), next(SIZES)) for b in PAIRS for _ in range(2)],
    ids=str,
)
def test_product_of_the_dequantized_operands(bits: Any, affine: Any, size: Any):
    quantizers = [Ridge(b, affine=a, block_size=size) for b, a in zip(bits, affine, strict=True)]
    assert error(*operands(*quantizers)) < 1e-6


@pytest.mark.forward
@pytest.mark.parametrize("batch", [(), (1,), (2, 3)])
@pytest.mark.parametrize("size", ["channel", 16])
def test_leading_axes(batch: tuple[int, ...], size: Any):
    assert error(*operands(Ridge(4, block_size=size), Ridge(1, block_size=size), batch)) < 1e-6


@pytest.mark.forward
def test_blocks_of_one_operand_alone():
    for sizes in (("channel", 16), (16, "channel"), ("tensor", 16), (16, "tensor")):
        assert error(*operands(*(Ridge(4, block_size=s) for s in sizes))) < 1e-6


@pytest.mark.forward
def test_other_estimators_and_fields():
    assert error(*operands(StraightThrough(4), StraightThrough(8, range="rms"))) < 1e-6
    assert error(*operands(Ridge(4), Ridge(4, sparsity="2:4"))) < 1e-6


@pytest.mark.forward
def test_rotated_operands_need_no_way_back():
    x, w = operands(Ridge(8, rotation="hadamard"), Ridge(8, rotation="hadamard"))
    expected = to_numpy(x.dequantize()) @ to_numpy(w.dequantize())
    assert relative_error(multiply(x, w), expected) < 2e-6


@pytest.mark.forward
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_an_outlier_does_not_drown_the_product(bits: int):
    """The other codes of its row lie at one end, where the terms of the theorem nearly cancel."""
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=(5, 1024)), rng.normal(size=(1024, 6)) + 3
    x[:, 3] = 100
    quantizer = Ridge(bits, block_size="channel")
    x, w = quantize(x.astype("float32"), quantizer), quantize(w.astype("float32"), quantizer, 0)
    assert error(x, w) < 1e-6


@pytest.mark.skipif(BACKEND != "jax", reason="jaxpr")
@pytest.mark.parametrize("size", ["channel", 16])
def test_the_product_is_one_of_int8_into_int32(size: Any):
    import jax

    x, w = operands(Ridge(4, block_size=size), Ridge(1, block_size=size))

    def product(cx: Any, cw: Any) -> Any:
        return rq.ops.affine_matmul(replace(x, codes=cx), replace(w, codes=cw))

    jaxpr = str(jax.make_jaxpr(product)(x.codes, w.codes))
    products = [line for line in jaxpr.splitlines() if "dot_general" in line]
    blocks = 1 if size == "channel" else -(-LENGTH // size)
    assert len(products) == blocks
    assert all("i32[" in line.split("=")[0] for line in products)
    assert "preferred_element_type=int32" in jaxpr
    lowered = jax.jit(product).lower(x.codes, w.codes).as_text()
    dots = [line for line in lowered.splitlines() if "dot_general" in line]
    assert len(dots) == blocks
    assert all(dot.count("xi8>") == 2 and dot.count("xi32>") == 1 for dot in dots)


@pytest.mark.forward
def test_operands_that_do_not_belong_together_are_refused():
    x, w = operands(Ridge(4), Ridge(4))
    plain = np.zeros((5, LENGTH), "float32")
    with pytest.raises(
        TypeError, match=r"`x` must be a QuantizedTensor.*rq\.ops\.quantize.*x=ndarray"
    ):
        rq.ops.affine_matmul(plain, w)
    with pytest.raises(TypeError, match=r"`w` must be a QuantizedTensor.*w=ndarray"):
        rq.ops.affine_matmul(x, plain)
    short = quantize(np.ones((5, 8), "float32"), 4)
    across = quantize(np.ones((5, LENGTH), "float32"), 4, axis=0)
    for left, right in ((short, w), (across, w), (x, across), (x, x)):
        with pytest.raises(ValueError, match=r"axis=-1.*axis=0.*Received: x of shape \(5, "):
            rq.ops.affine_matmul(left, right)
    with pytest.raises(ValueError, match=r"one size\. Received: \[16, 32\]"):
        rq.ops.affine_matmul(*operands(Ridge(4, block_size=16), Ridge(4, block_size=32)))
    with pytest.raises(ValueError, match="Either both operands are rotated or neither"):
        rq.ops.affine_matmul(*operands(Ridge(4), Ridge(4, rotation="hadamard")))
