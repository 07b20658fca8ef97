"""What a quantized tensor stores, and how much of it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from gradients import few, quantize, to_numpy
from hypothesis import given
from hypothesis import strategies as st

from keras_rq.numerics import packing
from keras_rq.quantizers import QuEST, Ridge

pytestmark = pytest.mark.forward
CASES = [
    (1, True, None),
    (1.5, False, None),
    (2, False, None),
    (3, True, None),
    (4, True, None),
    (7, False, None),
    (8, True, None),
    ("fp4", False, None),
    (1, False, "2:4"),
    (4, False, "1:4"),
    (8, False, 0.9),
]


def unpack(arrays: dict[str, np.ndarray], tensor: Any) -> np.ndarray:
    """The codes again, from what `packed` stores."""
    size, levels = math.prod(tensor.shape), len(tensor.grid.codes)
    if "mask" not in arrays:
        index = packing.unpack_indices(arrays["codes"], levels, size)
        return tensor.grid.from_index(index).reshape(tensor.shape)
    mask = np.unpackbits(arrays["mask"], count=size, bitorder="little").astype(bool)
    codes = np.zeros(size, np.int8)
    index = packing.unpack_indices(arrays["codes"], levels, int(mask.sum()))
    codes[mask] = tensor.grid.from_index(index)
    return codes.reshape(tensor.shape)


@few
@given(st.sampled_from(CASES), st.integers(0, 2**32 - 1))
def test_packed_codes_come_back(case: Any, seed: int):
    bits, affine, sparsity = case
    x = np.random.default_rng(seed).normal(size=(3, 44)).astype("float32")
    tensor = quantize(x, Ridge(bits, affine=affine, sparsity=sparsity, block_size=16))
    arrays = tensor.packed()
    assert np.array_equal(unpack(arrays, tensor), to_numpy(tensor.codes))
    assert ("offset" in arrays) == affine and ("mask" in arrays) == (sparsity is not None)
    assert tensor.nbytes == sum(a.nbytes for a in arrays.values())
    assert tensor.bits_per_element == 8 * tensor.nbytes / x.size


@pytest.mark.parametrize(
    ("bits", "affine", "sparsity", "expected"),
    [
        (1, True, None, 1 + 64 / 128),
        (4, True, None, 4 + 64 / 128),
        (1.5, False, None, 1.6 + 32 / 128),
        ("fp4", False, None, 4 + 32 / 128),
        (1, False, "2:4", 1 + 0.5 + 32 / 128),
        (4, True, None, 4 + 64 / 128),
    ],
)
def test_bits_per_element(bits: Any, affine: bool, sparsity: Any, expected: float):
    x = np.random.default_rng(0).normal(size=(16, 640)).astype("float32")
    tensor = quantize(x, Ridge(bits, affine=affine, sparsity=sparsity))
    assert tensor.bits_per_element == pytest.approx(expected, rel=1e-9)
    assert f"bits_per_element={expected:.3f}" in repr(tensor)


@few
@given(
    st.sampled_from([1, 1.5, 2, 4, 8, "fp4"]),
    st.sampled_from([None, "4:8-paired"]),
    st.integers(0, 2**32 - 1),
)
def test_packed_codes_of_quest_come_back(bits: Any, sparsity: Any, seed: int):
    """The offset of a mid-rise grid is half its step, and not stored."""
    x = np.random.default_rng(seed).normal(size=(3, 40)).astype("float32")
    tensor = quantize(x, QuEST(bits, sparsity=sparsity))
    arrays = tensor.packed()
    assert np.array_equal(unpack(arrays, tensor), to_numpy(tensor.codes))
    assert "offset" not in arrays and ("mask" in arrays) == (sparsity is not None)
    _, scale, offset = tensor
    half = 0 if tensor.grid.anchor == 0 else 0.5
    assert np.array_equal(to_numpy(offset), half * to_numpy(scale))


def test_linear_tensors_have_zero_offsets():
    codes, scale, offset = quantize(np.eye(4, 8, dtype="float32"), 1.5)
    assert to_numpy(codes).shape == (4, 8)
    assert to_numpy(offset).shape == to_numpy(scale).shape == (4, 1)
    assert not to_numpy(offset).any()
