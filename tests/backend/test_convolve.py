"""A backend's own convolution is the one of Keras without padding."""

from __future__ import annotations

import numpy as np
import pytest
from gradients import BACKEND, relative_error, to_numpy
from keras import ops

from keras_rq import backend
from keras_rq.backend.common import unpadded


@pytest.mark.skipif(BACKEND != "jax", reason="the others use Keras's")
@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
@pytest.mark.parametrize(("stride", "rate", "groups"), [(1, 1, 1), (2, 1, 1), (3, 1, 2), (1, 2, 2)])
def test_convolve(rank: int, data_format: str, stride: int, rate: int, groups: int):
    rng = np.random.default_rng(0)
    sizes = tuple(range(11, 11 + rank))
    shape = (2, *sizes, 4) if data_format == "channels_last" else (2, 4, *sizes)
    x = ops.convert_to_tensor(rng.normal(size=shape).astype("float32"))
    kernel = rng.normal(size=(*(3,) * rank, 4 // groups, 6)).astype("float32")
    arguments = x, ops.convert_to_tensor(kernel), (stride,) * rank, (rate,) * rank, data_format
    received, expected = to_numpy(backend.convolve(*arguments)), to_numpy(unpadded(*arguments))
    assert received.shape == expected.shape
    assert relative_error(received, expected) < 1e-6
