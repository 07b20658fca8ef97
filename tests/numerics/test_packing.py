"""What is packed comes back, at the promised size."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keras_rq.numerics import packing

pytestmark = pytest.mark.once
few = settings(max_examples=50, deadline=None)


@few
@given(st.integers(1, 8), st.data())
def test_bit_fields_round_trip(bits: int, data: st.DataObject):
    indices = np.array(data.draw(st.lists(st.integers(0, 2**bits - 1), max_size=70)), np.uint8)
    packed = packing.pack_bits(indices, bits)
    assert packed.dtype == np.uint8 and packed.size == math.ceil(indices.size * bits / 8)
    assert np.array_equal(packing.unpack_bits(packed, bits, indices.size), indices)


@few
@given(st.lists(st.integers(0, 2), max_size=70))
def test_ternary_digits_round_trip(digits: list[int]):
    indices = np.array(digits, np.uint8)
    packed = packing.pack_trits(indices)
    assert packed.dtype == np.uint8 and packed.size == math.ceil(indices.size / 5)
    assert np.array_equal(packing.unpack_trits(packed, indices.size), indices)


@few
@given(st.integers(2, 256), st.data())
def test_any_number_of_levels_round_trips(levels: int, data: st.DataObject):
    indices = np.array(data.draw(st.lists(st.integers(0, levels - 1), max_size=40)), np.uint8)
    packed = packing.pack_indices(indices, levels)
    bits = 1.6 if levels == 3 else math.ceil(math.log2(levels))
    assert packed.size == math.ceil(round(indices.size * bits, 6) / 8)
    assert np.array_equal(packing.unpack_indices(packed, levels, indices.size), indices)


def test_element_zero_is_in_the_lowest_bits_of_byte_zero():
    assert packing.pack_bits(np.array([1, 0, 0, 0, 0, 0, 0, 0, 1]), 1).tolist() == [1, 1]
    assert packing.pack_bits(np.array([3, 0, 1, 2, 1]), 2).tolist() == [0b10010011, 1]
    assert packing.pack_bits(np.array([0x5, 0xA, 0xF]), 4).tolist() == [0xA5, 0x0F]


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="index 4 does not fit into 2 bits"):
        packing.pack_bits(np.array([0, 4]), 2)
    with pytest.raises(ValueError, match=r"0, 1 or 2\. Received: 3"):
        packing.pack_trits(np.array([3]))
