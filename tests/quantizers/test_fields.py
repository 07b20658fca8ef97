"""Fields: what "auto" comes to, what is refused and how, and what is saved."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest

from keras_rq import quantizers
from keras_rq.numerics.blocks import Blocks
from keras_rq.quantizers import EWGS, BitNet, Quantizer, QuEST, Ridge, StraightThrough

pytestmark = pytest.mark.once
ESTIMATORS = [Ridge, StraightThrough]
EVERY_ESTIMATOR = [*ESTIMATORS, QuEST, BitNet, EWGS]


@pytest.mark.parametrize(
    ("fields", "offset", "rule"),
    [
        ({"bits": 1}, True, "rms"),
        ({"bits": 2}, True, "rms"),
        ({"bits": 3}, True, "minmax"),
        ({"bits": 4}, True, "minmax"),
        ({"bits": 8}, True, "minmax"),
        ({"bits": 1.5}, False, "rms"),
        ({"bits": "fp4"}, False, "absmax"),
        ({"bits": 1, "affine": False}, False, "rms"),
        ({"bits": 4, "affine": False}, False, "absmax"),
        ({"bits": 1, "sparsity": "2:4"}, False, "rms"),
        ({"bits": 4, "sparsity": 0.5}, False, "absmax"),
        ({"bits": 1.5, "affine": True}, True, "rms"),
        ({"bits": 4, "range": "rms"}, True, "rms"),
    ],
)
def test_auto(fields: dict[str, Any], offset: bool, rule: str):
    quantizer = Ridge(**fields)
    assert quantizer.has_offset is offset and quantizer.range_rule == rule
    assert quantizer.grid.affine is offset


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"bits": 9}, ["`bits`", "1.5 is ternary", "bits=9"]),
        ({"affine": "yes"}, ["`affine`", "['auto', True, False]", "affine='yes'"]),
        ({"affine": 1}, ["`affine`", "affine=1"]),
        ({"block_size": 0}, ["`block_size`", "'channel'", "'tensor'", "block_size=0"]),
        ({"conv_block_size": "row"}, ["`conv_block_size`", "conv_block_size='row'"]),
        ({"range": "std"}, ["`range`", "'minmax', 'absmax', 'rms', 'absmean'", "range='std'"]),
        ({"rotation": "fourier"}, ["`rotation`", "'hadamard'", "rotation='fourier'"]),
        ({"trust": -0.1}, ["`trust`", ">= 0", "trust=-0.1"]),
        ({"trust": "1"}, ["`trust`", "finite number", "trust='1'"]),
        ({"trust": float("nan")}, ["`trust`", "trust=nan"]),
        ({"trust": float("inf")}, ["`trust`", "trust=inf"]),
        ({"fade": 0}, ["`fade`", "finite number > 0", "fade=0"]),
        ({"fade": True}, ["`fade`", "fade=True"]),
        ({"sparsity": "4:2"}, ["0 < N < M", "sparsity='4:2'"]),
        ({"sparsity": 1.5}, ["`sparsity`", "'N:M'", "between 0 and 1", "sparsity=1.5"]),
        ({"calibration": "moving"}, ["`calibration`", "'dynamic'", "calibration='moving'"]),
        ({"affine": True, "sparsity": "2:4"}, ["affine=True", "sparsity='2:4'", "affine='auto'"]),
        ({"affine": False, "range": "minmax"}, ["range='minmax'", "'absmax'", "affine=True"]),
        ({"bits": 1.5, "range": "minmax"}, ["range='minmax'", "bits=1.5", "'rms'"]),
    ],
    ids=str,
)
def test_errors_name_argument_value_and_choices(
    estimator: type[Quantizer], fields: dict[str, Any], words: list[str]
):
    with pytest.raises(ValueError) as raised:
        estimator(**{"bits": 4, **fields})
    for word in words:
        assert word in str(raised.value)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"range": "minmax"}, ["`range` of QuEST", "'auto', 'rms', 'absmax'", "range='minmax'"]),
        ({"trust": "full"}, ["`trust`", "finite number >= 0", "trust='full'"]),
        ({"bits": 16}, ["`bits`", "bits=16"]),
        ({"sparsity": "3:8-paired"}, ["must be even", "sparsity='3:8-paired'"]),
    ],
    ids=str,
)
def test_errors_of_quest_name_argument_value_and_choices(fields: dict[str, Any], words: list[str]):
    with pytest.raises(ValueError) as raised:
        QuEST(**{"bits": 4, **fields})
    for word in words:
        assert word in str(raised.value)


@pytest.mark.parametrize("bits", [1, 1.5, 2, 4, 8, "fp4"])
def test_trust_of_quest_is_half_a_step_and_less_at_one_bit(bits: Any):
    assert QuEST(bits).trust_factor == (0.3 if bits == 1 else 1.0)
    assert QuEST(8).replace(bits=bits).trust_factor == QuEST(bits).trust_factor
    assert QuEST(bits, trust=0.5).trust_factor == 0.5
    assert QuEST(bits, trust=None).trust_factor is None


@pytest.mark.parametrize(("estimator", "field"), [(Ridge, "ridge_lambda"), (EWGS, "delta")])
@pytest.mark.parametrize("value", [-1, float("nan"), "0.01", True, None])
def test_weights_of_an_estimator_are_checked(estimator: type, field: str, value: Any):
    with pytest.raises(ValueError, match=f"`{field}` must be a finite number >= 0") as raised:
        estimator(4, **{field: value})
    assert f"{field}={value!r}" in str(raised.value)


@pytest.mark.parametrize(
    ("quantizer", "offset", "rule", "size"),
    [
        (BitNet(1), True, "absmean", "tensor"),
        (BitNet(1, centered=False), False, "absmean", "tensor"),
        (BitNet(1, sparsity="2:4"), False, "absmean", "tensor"),
        (BitNet(1.5), False, "absmean", "tensor"),
        (BitNet(8), False, "absmax", "channel"),
        (BitNet(8).replace(bits=1.5), False, "absmean", "channel"),
        (BitNet("fp4", block_size=32, range="rms"), False, "rms", 32),
    ],
    ids=repr,
)
def test_auto_of_bitnet(quantizer: BitNet, offset: bool, rule: str, size: Any):
    assert quantizer.has_offset is quantizer.grid.affine is offset
    assert quantizer.range_rule == rule and quantizer.block_size == size


@pytest.mark.parametrize("value", [1, None, "auto"])
def test_centered_is_checked(value: Any):
    with pytest.raises(ValueError, match="`centered` must be one of") as raised:
        BitNet(1, centered=value)
    assert f"centered={value!r}" in str(raised.value)


@pytest.mark.parametrize("estimator", EVERY_ESTIMATOR)
def test_numbers_of_numpy_are_numbers(estimator: type[Quantizer]):
    assert estimator(np.int64(4), trust=np.float32(0.5), block_size=np.int32(8)) == estimator(
        4, trust=0.5, block_size=8
    )


QUANTIZERS = [
    Ridge(4),
    Ridge("FP4", ridge_lambda=0.5, trust=0.3, fade=2, rotation="hadamard", range="rms"),
    Ridge(1.5, sparsity=(1, 4), block_size="tensor", conv_block_size=8),
    StraightThrough(8, affine=False, sparsity=0.5, block_size="channel"),
    QuEST(1),
    BitNet(1, centered=False, rotation="hadamard"),
    EWGS(4, delta=0.01, trust=None, affine=False),
    QuEST("fp4", trust=None, rotation=None, range="absmax", sparsity="4:8-paired", block_size=64),
]


@pytest.mark.parametrize("quantizer", QUANTIZERS, ids=repr)
def test_configurations_round_trip(quantizer: Quantizer):
    assert type(quantizer).from_config(quantizer.get_config()) == quantizer
    saved = keras.saving.serialize_keras_object(quantizer)
    again = keras.saving.deserialize_keras_object(saved)
    assert again == quantizer and hash(again) == hash(quantizer) and again is not quantizer
    assert eval(repr(quantizer), {type(quantizer).__name__: type(quantizer)}) == quantizer


def test_replace_and_equality():
    assert Ridge(4).replace(bits=2, trust=1) == Ridge(2, trust=1.0)
    assert Ridge(4) != Ridge(4, ridge_lambda=0.0)
    assert Ridge(4) != StraightThrough(4) and Ridge(4) != "Ridge(4)"


def test_convolutions_have_a_block_size_of_their_own():
    assert Ridge(4).blocks((1,)) == Blocks((1,), (), 128)
    assert Ridge(4).blocks((3,), (1, 2), convolution=True) == Blocks((3,), (1, 2), "channel")
    assert Ridge(4, block_size="tensor").blocks((3,), (1, 2), convolution=True).size == "tensor"
    assert Ridge(4, conv_block_size=8).blocks((3,), convolution=True).size == 8


def test_get():
    assert quantizers.get(4) == Ridge(4) and quantizers.get("fp4") == Ridge("fp4")
    assert quantizers.get(None) is None and quantizers.get(QUANTIZERS[0]) is QUANTIZERS[0]
    with pytest.raises(TypeError, match=r"bit width such as 4, 1\.5 or 'fp4'.*Received: \[4\]"):
        quantizers.get([4])


def test_the_base_class_is_no_estimator():
    with pytest.raises(NotImplementedError, match="Quantizer defines no dequantizer"):
        Quantizer(4).fake_quantize(np.ones((2, 4), "float32"), Blocks((-1,)))
    with pytest.raises(NotImplementedError, match="Quantizer defines no gradient"):
        Quantizer(4).gradient(None, None, None, None)
