"""The rotation is the Hadamard matrix of the reference, orthonormal and its own inverse."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import reference
from gradients import relative_error, to_numpy
from keras import ops

from keras_rq import backend
from keras_rq.numerics.rotations import check_rotation, hadamard, rotation_size

pytestmark = pytest.mark.forward


@pytest.mark.parametrize(
    ("shape", "axes"),
    [
        ((3, 64), (-1,)),
        ((64, 3), (0,)),
        ((2, 12, 5), (1,)),
        ((4, 3, 6), (2, 0)),
        ((256,), (0,)),
        ((2, 7), (1,)),
    ],
)
@pytest.mark.parametrize(
    "ways",
    [(), (backend.float32_matmul,), (backend.float32_matmul, 4)],
    ids=["sums", "product", "both"],
)
def test_rotation(shape: tuple[int, ...], axes: tuple[int, ...], ways: tuple[Any, ...]):
    x = np.random.default_rng(0).normal(size=shape).astype("float32")
    rotated = hadamard(ops.convert_to_tensor(x), axes, *ways)
    assert relative_error(to_numpy(rotated), reference.hadamard(x.astype(float), axes)) < 1e-6
    assert relative_error(to_numpy(hadamard(rotated, axes, *ways)), x) < 1e-6
    norms = np.linalg.norm(to_numpy(rotated)), np.linalg.norm(x)
    assert np.isclose(*norms, rtol=1e-6)


def test_a_product_of_operands_rotated_alike_is_unchanged():
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=(5, 96)).astype("float32"), rng.normal(size=(96, 4)).astype("float32")
    product = ops.matmul(
        hadamard(ops.convert_to_tensor(x), (-1,)), hadamard(ops.convert_to_tensor(w), (0,))
    )
    assert relative_error(to_numpy(product), x.astype(float) @ w) < 1e-6


def test_size_is_the_largest_power_of_two_that_divides():
    assert [rotation_size(n) for n in (1, 2, 12, 96, 128, 384, 1024, 77)] == [
        1,
        2,
        4,
        32,
        128,
        128,
        128,
        1,
    ]


@pytest.mark.once
def test_other_rotations_are_named_in_the_error():
    with pytest.raises(
        ValueError, match=r"`rotation` must be None or 'hadamard'\..*rotation='dct'"
    ):
        check_rotation("dct")
