"""Equality with the authors' own code on recorded numbers: LSQ, ParetoQ.

The fixture names the repositories and commits; it holds numbers only.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gradients import to_numpy
from keras import ops
from learned import value_and_gradients

from keras_rq.numerics.blocks import Blocks
from keras_rq.quantizers import LearnedStep, StretchedElastic
from keras_rq.quantizers.parameters import Observation

FIXTURE = json.loads((Path(__file__).parent / "fixtures" / "lsq_paretoq.json").read_text())
PARETOQ, QUEST = FIXTURE["paretoq"], FIXTURE["quest"]
X = np.array(PARETOQ["x"], "float32")
UPSTREAM = np.array(PARETOQ["upstream"], "float32")


def name_of(case: dict[str, Any]) -> str:
    extra = [str(case[k]) for k in ("all_positive", "is_first") if k in case]
    return "-".join([case["function"], str(case["bits"]), *extra])


def assert_close(received: Any, expected: Any, atol: float = 0.0) -> None:
    """To the rounding of float32; a code that differs is far outside."""
    np.testing.assert_allclose(received, np.array(expected, "float64"), rtol=2e-6, atol=atol)


def uncertainty(bits: float) -> float:
    """Of a gradient to a step: a sum of differences of numbers as large as the codes."""
    return float(2.0 ** (bits - 1 - 23) * np.abs(UPSTREAM).sum() / np.sqrt(X.size))


@pytest.mark.parametrize("case", PARETOQ["cases"], ids=name_of)
def test_paretoq(case: dict[str, Any]):
    """Both of its functions, at its starting values and at clipping ones."""
    stretched = case["function"] == "StretchedElasticQuant"
    quantizer, name = (StretchedElastic, "alpha") if stretched else (LearnedStep, "step")
    quantizer, given = quantizer(case["bits"]), {name: np.array(case["alpha"], "float32")}
    blocks = quantizer.blocks((-1,))
    y, to_x, to = value_and_gradients(quantizer, X, given, UPSTREAM, blocks)
    assert_close(y, case["y"], 1e-9)
    np.testing.assert_array_equal(to_x, np.array(case["to_x"], "float32"))
    assert_close(to[name], case["to_alpha"], uncertainty(case["bits"]))


@pytest.mark.forward
@pytest.mark.parametrize("bits", [1, 1.5, 2, 3, 4, 8])
def test_paretoq_starts_where_its_training_script_does(bits: float):
    """From `train.py` of the same commit: the mean, the maximum, the maximum over the codes."""
    cases = [c for c in PARETOQ["cases"] if c["bits"] == bits]
    kind = "StretchedElasticQuant" if bits in (1.5, 2) else "LsqBinaryTernaryExtension"
    first = next(case for case in cases if case["function"] == kind)
    view = StretchedElastic(bits).blocks((-1,)).view(X.shape)
    received = StretchedElastic(bits).initial(ops.convert_to_tensor(X), view)["alpha"]
    assert_close(to_numpy(received), first["alpha"])


@pytest.mark.parametrize("case", QUEST["cases"], ids=name_of)
def test_lsq_per_tensor(case: dict[str, Any]):
    """The LSQ of QuEST's repository, signed and from zero up; it starts where the paper says."""
    x = np.abs(X) if case["all_positive"] else X
    quantizer = LearnedStep(case["bits"])
    first = quantizer.calibrated(Observation(float(x.min()), float(x.max()), x.astype(float)))
    if case["is_first"]:
        assert_close(first["step"], case["step"])
    given = {**first, "step": np.float32(case["step"])}
    blocks = Blocks((-1,), (), "tensor")
    y, to_x, to = value_and_gradients(quantizer, x, given, UPSTREAM, blocks)
    # Codes from zero up are stored less 2^(b-1), which a line adds again. (It adds 1e-9 of a step.)
    assert_close(y, case["y"], case["step"] * 2.0 ** (case["bits"] - 1 - 23) + 2e-9)
    np.testing.assert_array_equal(to_x, UPSTREAM * (np.array(case["to_x"]) != 0))
    assert_close(to["step"], case["to_step"], uncertainty(case["bits"]))
