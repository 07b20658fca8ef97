"""GDNSQ: the numbers of its authors' code, and what follows from its formulas."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gradients import few, to_numpy
from hypothesis import given
from hypothesis import strategies as st
from keras import ops
from learned import value_and_gradients

import keras_rq as rq
from keras_rq.numerics.blocks import Blocks
from keras_rq.numerics.dither import random_halves
from keras_rq.quantizers import GDNSQ, gdnsq
from keras_rq.quantizers.parameters import Observation
from keras_rq.quantizers.parametric import forward_only

RECORD = json.loads((Path(__file__).parent / "fixtures" / "gdnsq.json").read_text())
NOISES = {"STE": "dithered", "LSQ": "residual"}
BITS = (1, 1.5, 2, 3, 4, 8)

X = (np.random.default_rng(0).normal(size=(3, 40)) + 0.2).astype("float32")
G = np.random.default_rng(1).normal(size=X.shape).astype("float32")


def assert_close(received: Any, expected: Any, rtol: float = 2e-6) -> None:
    expected = np.asarray(expected, float)
    np.testing.assert_allclose(
        np.asarray(received).reshape(expected.shape),
        expected,
        rtol=rtol,
        atol=rtol * np.abs(expected).max(),
    )


# The authors' numbers.


@pytest.mark.parametrize("record", RECORD["activations"], ids=lambda r: r["method"])
def test_inputs_are_those_of_the_authors_code(record: dict[str, Any], monkeypatch: Any):
    halves = np.array(record["halves"], "float32")
    monkeypatch.setattr(gdnsq, "random_halves", lambda values, key: ops.convert_to_tensor(halves))
    quantizer = GDNSQ(4, noise=NOISES[record["method"]])
    parameters = {**record["parameters"], "is_signed": float(record["is_signed"])}
    y, to_x, given = value_and_gradients(
        quantizer,
        np.array(record["x"], "float32"),
        {name: np.float32(value) for name, value in parameters.items()},
        np.array(record["upstream"], "float32"),
        quantizer.input_blocks((-1,)),
    )
    assert_close(y, record["y"])
    expected = record["gradients"]
    np.testing.assert_array_equal(to_x, np.array(expected["x"], "float32"))
    for name in ("log_step", "log_range"):
        assert_close(given[name], expected[name][0], 1e-5)
    assert_close(given["origin"], expected["origin"][0] if record["is_signed"] else 0.0, 1e-5)


@pytest.mark.parametrize("record", RECORD["weights"], ids=lambda r: r["method"])
def test_kernels_are_those_of_the_authors_code(record: dict[str, Any], monkeypatch: Any):
    """Their layout is (outputs, inputs, height, width)."""

    def ours(array: Any) -> np.ndarray:
        return np.array(array, "float32").transpose(2, 3, 1, 0)

    halves = ours(record["halves"])
    monkeypatch.setattr(gdnsq, "random_halves", lambda values, key: ops.convert_to_tensor(halves))
    quantizer = GDNSQ(2, noise=NOISES[record["method"]])
    y, to_x, given = value_and_gradients(
        quantizer,
        ours(record["x"]),
        {"log_step": ours(record["parameters"]["log_step"])},
        ours(record["upstream"]),
        quantizer.blocks((2,), (0, 1), convolution=True),
    )
    expected = record["gradients"]
    assert_close(y, ours(record["y"]))
    assert_close(to_x, ours(expected["x"]))
    assert_close(given["log_step"], ours(expected["log_step"]), 1e-5)


# The formulas.


def gradient_of_step(
    x: np.ndarray, step: np.ndarray, noise: str, halves: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(y, dy/d log2 s) of a kernel whose rows are blocks; float64."""
    low = x.min(axis=1, keepdims=True)
    v = (x - low) / step
    residual = np.round(v) - v
    noises = {"dithered": halves / math.sqrt(3), "residual": residual, "none": 0.0}
    return step * np.round(v) + low, math.log(2) * step * (residual + step * noises[noise])


def reference_halves(values: np.ndarray, key: np.ndarray) -> np.ndarray:
    """The hash of `numerics.dither`, on unsigned integers."""

    def mixed(bits: np.ndarray) -> np.ndarray:
        bits = (bits ^ (bits >> np.uint32(16))) * np.uint32(0x7FEB352D)
        bits = (bits ^ (bits >> np.uint32(15))) * np.uint32(0x846CA68B)
        return bits ^ (bits >> np.uint32(16))

    with np.errstate(over="ignore"):
        places = np.arange(values.size, dtype=np.uint32).reshape(values.shape)
        places = places * np.uint32(0x9E3779B9)
        key = np.broadcast_to(key, values.shape).astype(np.float32)
        inner = mixed(places ^ mixed(key.view(np.uint32)))
        bits = mixed(np.ascontiguousarray(values, np.float32).view(np.uint32) ^ inner)
    return np.where(bits >> np.uint32(31), -0.5, 0.5)


@pytest.mark.parametrize("noise", ["dithered", "residual", "none"])
def test_the_noise_of_a_step_is_what_the_docstring_says(noise: str):
    quantizer = GDNSQ(4, noise=noise)
    log_step = np.array([[-3.0], [-2.5], [-1.25]], "float32")
    y, to_x, given = value_and_gradients(
        quantizer, X, {"log_step": log_step}, G, quantizer.blocks((-1,))
    )
    halves = reference_halves(X, log_step)
    made, slope = gradient_of_step(X.astype(float), 2.0 ** log_step.astype(float), noise, halves)
    assert_close(y, made)
    np.testing.assert_array_equal(to_x, G)
    assert_close(given["log_step"], (G * slope).sum(axis=1, keepdims=True), 1e-5)


@pytest.mark.forward
@few
@given(st.integers(0, 2**32 - 1), st.floats(-20.0, 20.0, width=32))
def test_signs_are_those_of_the_hash(seed: int, key: float):
    values = np.random.default_rng(seed).normal(size=(2, 3, 5)).astype("float32")
    received = to_numpy(random_halves(values, np.float32(key)))
    np.testing.assert_array_equal(received, reference_halves(values, np.float32(key)))


@pytest.mark.forward
@pytest.mark.parametrize("values", ["normal", "zeros", "few"])
def test_signs_look_random(values: str):
    """They are balanced, and independent of the data, of their neighbours and of the last step's.

    Bounds are five standard deviations of a fair coin.
    """
    rng, size = np.random.default_rng(0), 2**16
    x = {"normal": rng.normal(size=size), "zeros": np.zeros(size), "few": rng.integers(0, 3, size)}
    x = x[values].astype("float32")
    first = 2 * to_numpy(random_halves(x, np.float32(-6.5)))
    second = 2 * to_numpy(random_halves(x, np.nextafter(np.float32(-6.5), np.float32(0))))
    bound = 5 / math.sqrt(size)
    assert set(np.unique(first)) == {-1.0, 1.0}
    assert abs(first.mean()) < bound
    assert abs((first * second).mean()) < bound
    for distance in (1, 2, 32, 256):
        assert abs((first[distance:] * first[:-distance]).mean()) < 1.1 * bound
    if values == "normal":
        residual = np.round(x * 8) - x * 8
        assert abs((first * residual).mean()) < bound * residual.std()


@pytest.mark.forward
def test_the_width_starts_at_ten_bits():
    quantizer, blocks = GDNSQ(4), Blocks((-1,), (), "channel")
    view = blocks.view(X.shape)
    start = quantizer.start(X, view)
    extent = np.ptp(X.astype(float), axis=1, keepdims=True)
    assert_close(to_numpy(start["log_step"]), np.log2(extent / 1023))
    assert_close(to_numpy(quantizer.kernel_width(X, view, start)), np.full((3, 1), 10.0))
    found = quantizer.calibrated(Observation(-0.5, 1.5, X.ravel()))
    assert found["origin"] == -0.5 and found["is_signed"] == 1.0
    np.testing.assert_allclose(found["log_step"], math.log2(2 / 1023), rtol=1e-6)
    np.testing.assert_allclose(quantizer.input_width(found), 10.0, rtol=1e-6)
    assert quantizer.calibrated(Observation(0.0, 1.5, X.ravel()))["is_signed"] == 0.0
    assert quantizer.input_bits(found) == pytest.approx(10.0, abs=1e-3)


@pytest.mark.forward
def test_nothing_breaks_where_all_elements_are_equal():
    quantizer, blocks = GDNSQ(4), Blocks((-1,), (), "channel")
    x = np.full((2, 8), 0.3, "float32")
    start = quantizer.start(x, blocks.view(x.shape))
    np.testing.assert_array_equal(to_numpy(start["log_step"]), -12.0)
    np.testing.assert_array_equal(to_numpy(quantizer.fake_quantize(x, blocks, start)), x)
    assert quantizer.kernel_bits(x, blocks, start) == 4
    found = quantizer.calibrated(Observation(0.3, 0.3, x.ravel()))
    assert_close(to_numpy(quantizer.fake_quantize(x, quantizer.input_blocks((-1,)), found)), x)


@pytest.mark.forward
@few
@given(
    st.sampled_from(BITS),
    st.sampled_from([7, "channel", "tensor"]),
    st.sampled_from([None, "hadamard"]),
    st.integers(0, 2**32 - 1),
)
def test_codes_at_the_target_are_of_the_grid(bits: Any, size: Any, rotation: Any, seed: int):
    x = np.random.default_rng(seed).normal(size=(2, 20)).astype("float32")
    quantizer = GDNSQ(bits, block_size=size, rotation=rotation)
    tensor = rq.ops.quantize(x, quantizer)
    assert tensor.grid == quantizer.grid
    assert np.isin(to_numpy(tensor.codes), tensor.grid.codes).all()
    np.testing.assert_array_equal(
        to_numpy(tensor.dequantize()), to_numpy(rq.ops.fake_quantize(x, quantizer))
    )


@pytest.mark.forward
def test_a_width_above_the_target_is_stored_as_it_is_up_to_eight_bits():
    quantizer, blocks = GDNSQ(2), Blocks((-1,), (), "channel")
    view = blocks.view(X.shape)
    wide = quantizer.replace(bits=6).initial(X, view)
    assert quantizer.kernel_bits(X, blocks, wide) == 6.0
    tensor = quantizer.quantize(X, blocks, wide)
    assert tensor.grid.bits == 6
    assert_close(
        to_numpy(tensor.dequantize()), to_numpy(quantizer.fake_quantize(X, blocks, wide)), 1e-6
    )
    with pytest.raises(ValueError, match=r"10\.00 bits cannot be stored.*until they take 2"):
        quantizer.quantize(X, blocks, quantizer.start(X, view))


@pytest.mark.forward
def test_a_start_between_two_whole_widths_is_stored_at_the_wider():
    quantizer, blocks = GDNSQ(2, start_bits=2.5), Blocks((-1,), (), "channel")
    given = quantizer.start(X, blocks.view(X.shape))
    tensor = quantizer.quantize(X, blocks, given)
    assert tensor.grid.bits == 3
    fake = to_numpy(quantizer.fake_quantize(X, blocks, given))
    assert_close(to_numpy(tensor.dequantize()), fake, 1e-6)


@pytest.mark.parametrize("trust", [0.5, 1.0])
def test_trust_lets_gradients_of_inputs_pass_beyond_the_edge(trust: float):
    quantizer = GDNSQ(2, trust=trust)
    given = {"log_step": -1.0, "log_range": 1.0, "origin": -1.0, "is_signed": 1.0}
    parameters = {name: np.float32(value) for name, value in given.items()}
    _, to_x, _ = value_and_gradients(quantizer, X, parameters, G, quantizer.input_blocks((-1,)))
    v = (X + 1.0) * 2.0
    np.testing.assert_array_equal(to_x, G * ((v >= -trust / 2) & (v <= 3 + trust / 2)))


@pytest.mark.once
@pytest.mark.parametrize(
    ("bits", "fields", "words"),
    [
        (4, {"sparsity": "2:4"}, ["takes no `sparsity`", "zeros would be moved"]),
        (4, {"affine": True}, ["takes no `affine`"]),
        (4, {"noise": "loud"}, ["`noise` must be one of", "'loud'"]),
        (4, {"start_bits": 3}, ["`start_bits`", "from the target (4)", "start_bits=3"]),
        ("fp4", {}, ["evenly spaced", "'fp4'"]),
    ],
)
def test_wrong_fields(bits: Any, fields: dict[str, Any], words: list[str]):
    with pytest.raises(ValueError) as caught:
        GDNSQ(bits, **fields)
    assert all(word in str(caught.value) for word in words), caught.value


@pytest.mark.once
def test_config_round_trip():
    quantizer = GDNSQ(1.5, noise="none", start_bits=9, block_size=32, rotation="hadamard")
    assert GDNSQ.from_config(quantizer.get_config()) == quantizer
    assert quantizer.replace(bits=2).noise == "none"
    policy = rq.QuantizationPolicy(weights=quantizer, activations=GDNSQ(8))
    assert rq.QuantizationPolicy.from_config(policy.get_config()).weights == quantizer


def test_who_wants_no_gradient_gets_the_same_values_without_slopes(monkeypatch: pytest.MonkeyPatch):
    x = np.random.default_rng(0).normal(size=(6, 8)).astype("float32")
    expected = to_numpy(rq.ops.fake_quantize(x, GDNSQ(4)))

    def slopes(*_: Any) -> Any:
        raise NotImplementedError

    monkeypatch.setattr(GDNSQ, "slopes", slopes)
    with forward_only():
        received = to_numpy(rq.ops.fake_quantize(x, GDNSQ(4)))
    np.testing.assert_array_equal(received, expected)
    with pytest.raises(NotImplementedError):
        rq.ops.fake_quantize(x, GDNSQ(4))
