"""The numbers that the authors' own code gives, as `fixtures/record.py` wrote them down."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gradients import fake_quantizer, relative_error, to_numpy, value_and_gradient

import keras_rq as rq
from keras_rq.numerics import ranges
from keras_rq.policy import LayerQuantization
from keras_rq.quantizers import EWGS, BitNet, QuEST

FIXTURES = Path(__file__).parent / "fixtures"
RECORDS = {
    name: json.loads((FIXTURES / f"{name}.json").read_text())
    for name in ("quest", "bitnet", "ewgs")
}
PRECISION = 1e-6  # numbers were written with seven digits

PLAIN = {
    **{f"STEQuantizer(bits={b})": QuEST(b, rotation=None, trust=None) for b in (1, 2, 3, 4, 8)},
    **{
        f"TrustQuantizer(bits={b})": QuEST(b, rotation=None, trust=1.0)
        for b in (1, 2, 3, 4, 5, 6, 7, 8)
    },
    "ClipQuantizer(bits=1, clip_scale=1.25)": QuEST(1, rotation=None, trust=0.25),
    "ClipQuantizer(bits=1, clip_scale=1.3)": QuEST(1, rotation=None),
    "ClipQuantizer(bits=4, clip_scale=1)": QuEST(4, rotation=None, trust=0.0),
    "FP4STEQuantizer()": QuEST("fp4", rotation=None, trust=None),
    "FP4ClipQuantizer()": QuEST("fp4", rotation=None, trust=0.0),
    "FP4TrustQuantizer(trust=0.48707976)": QuEST("fp4", rotation=None),
    **{
        f"FourEightSTEQuantizer(bits={b})": QuEST(
            b, rotation=None, trust=None, sparsity="4:8-paired"
        )
        for b in (1, 4)
    },
    **{
        f"FourEightTrustQuantizer(bits={b})": QuEST(
            b, rotation=None, trust=1.0, sparsity="4:8-paired"
        )
        for b in (1, 2, 3, 4, 7)
    },
    **{f"HadamardTrustQuantizer(bits={b})": QuEST(b, trust=1.0) for b in (1, 4, 8)},
    "HadamardClipQuantizer(bits=1, clip_scale=1.3)": QuEST(1),
    "HadamardFP4TrustQuantizer(trust=0.48707976)": QuEST("fp4"),
    "HadamardFourEightTrustQuantizer(bits=4)": QuEST(4, sparsity="4:8-paired"),
}
LINEAR = {  # weights, activations
    "A4W4": (QuEST(4), QuEST(4)),
    "A1W1": (QuEST(1), QuEST(1)),
    "Afp4Wfp4": (QuEST("fp4"), QuEST("fp4")),
    "A4W4, sparse": (QuEST(4, sparsity="4:8-paired"), QuEST(4)),
    "W2": (QuEST(2), None),
}


def inputs(name: str, width: int = 128) -> dict[str, np.ndarray]:
    record = RECORDS[name]["inputs"]
    return {key: np.array(value)[:, :width].astype("float32") for key, value in record.items()}


def numbers(name: str, case: str) -> dict[str, np.ndarray]:
    return {key: np.array(value) for key, value in RECORDS[name]["cases"][case].items()}


@pytest.mark.once
def test_every_recorded_number_is_compared():
    linear = {f"QuantizedLinear: {name}" for name in LINEAR}
    assert set(RECORDS["quest"]["cases"]) == set(PLAIN) | linear


@pytest.mark.parametrize("case", PLAIN)
def test_quest(case: str):
    expected = numbers("quest", case)
    given = inputs("quest", expected["y"].shape[1])
    y, gradient = value_and_gradient(fake_quantizer(PLAIN[case]), given["x"], given["upstream"])
    assert relative_error(y, expected["y"]) < PRECISION
    assert relative_error(gradient, expected["dx"]) < PRECISION


@pytest.mark.parametrize("case", LINEAR)
def test_linear_layer_of_quest(case: str):
    """Both operands stay rotated: the layer multiplies what "Half" classes give it."""
    given, expected = inputs("quest"), numbers("quest", f"QuantizedLinear: {case}")
    layer = rq.layers.QuantizedDense(
        3, use_bias=False, quantization=LayerQuantization(*LINEAR[case])
    )
    layer.build((None, 128))
    kernel, upstream = given["weight"].T, given["upstream_of_product"]

    def of(x: Any, kernel: Any) -> Any:
        return layer.stateless_call([kernel], [], x)[0]

    y, dx = value_and_gradient(lambda x: of(x, kernel), given["x"], upstream)
    _, dw = value_and_gradient(lambda w: of(given["x"], w), kernel, upstream)
    assert relative_error(y, expected["y"]) < PRECISION
    assert relative_error(dx, expected["dx"]) < PRECISION
    assert relative_error(dw.T, expected["dw"]) < PRECISION


@pytest.mark.parametrize(
    ("case", "name", "quantizer"),
    [
        ("quant_weight_fp16", "weight", BitNet(1.5)),
        ("quant_input", "x", BitNet(8)),
    ],
)
def test_bitnet(case: str, name: str, quantizer: Any):
    y = to_numpy(rq.ops.fake_quantize(inputs("bitnet")[name], quantizer))
    assert relative_error(y, numbers("bitnet", case)["y"]) < PRECISION


@pytest.mark.parametrize("case", RECORDS["ewgs"]["cases"])
def test_ewgs(case: str, monkeypatch: pytest.MonkeyPatch):
    given, expected = inputs("ewgs", 32), numbers("ewgs", case)
    kind, bits, delta = case.replace(" bits", "").replace("delta ", "").split(", ")
    quantizer = EWGS(
        int(bits),
        delta=float(delta),
        affine=True,
        range={"weight": "absmax", "act": "rms"}[kind],
        block_size="tensor",
    )
    if kind == "act":  # their interval is a parameter; it was recorded at this value
        x, grid = given["x"].astype("float64"), quantizer.grid
        ends = (x.mean() + sign * grid.gaussian_edge * x.std() for sign in (-1, 1))
        fixed = ranges.range_over(*ends, grid)
        monkeypatch.setattr(ranges, "find_range", lambda *_: fixed)
    y, gradient = value_and_gradient(fake_quantizer(quantizer), given["x"], given["upstream"])
    assert relative_error(y, expected["y"]) < PRECISION
    assert relative_error(gradient, expected["dx"]) < PRECISION
