"""Presets: the shorthand of any policy, the quantizers of a paper."""

from __future__ import annotations

from typing import Any

import pytest

import keras_rq as rq
from keras_rq.quantizers import BitNet, QuEST, Ridge

pytestmark = pytest.mark.once
PRESETS = [rq.presets.paper, rq.presets.quest, rq.presets.bitnet]


@pytest.mark.parametrize(
    ("policy", "weights", "activations"),
    [
        (
            rq.presets.paper("A1W1"),
            Ridge(1, range="minmax", ridge_lambda=0.01, block_size=128),
            Ridge(1, range="minmax", ridge_lambda=0.01, block_size=128),
        ),
        (
            rq.presets.paper("A4W1.5-64"),
            Ridge(1.5, range="absmax", block_size=64),
            Ridge(4, range="minmax", block_size=64),
        ),
        (rq.presets.paper("W4-128-2:4"), Ridge(4, range="absmax", sparsity="2:4"), None),
        (rq.presets.paper("Wfp4"), Ridge("fp4", range="absmax"), None),
        (rq.presets.quest("A4W4"), QuEST(4), QuEST(4)),
        (rq.presets.quest("A8W1-64"), QuEST(1, block_size=64), QuEST(8, block_size=64)),
        (
            rq.presets.quest("A4W4-channel-4:8-paired"),
            QuEST(4, sparsity="4:8-paired"),
            QuEST(4),
        ),
        (rq.presets.bitnet("A8W1"), BitNet(1), BitNet(8, centered=False)),
        (rq.presets.bitnet("A8W1.5"), BitNet(1.5), BitNet(8, centered=False)),
        (
            rq.presets.bitnet("A1W1"),
            BitNet(1),
            BitNet(1, centered=False, block_size="channel"),
        ),
        (
            rq.presets.bitnet("W1.5-channel-2:4"),
            BitNet(1.5, block_size="channel", sparsity="2:4"),
            None,
        ),
    ],
)
def test_quantizers(policy: rq.QuantizationPolicy, weights: Any, activations: Any):
    assert policy.weights == weights and policy.activations == activations
    assert (
        rq.QuantizationPolicy.from_config(policy.get_config()).get_config() == policy.get_config()
    )


@pytest.mark.parametrize("preset", PRESETS)
def test_rules_and_the_forward_product_are_passed_on(preset: Any):
    rule = rq.Rule("head", skip=True)
    policy = preset("A8W8", rules=[rule], forward="int8")
    assert policy.rules == (rule,) and policy.forward == "int8"


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize(
    ("spec", "word"), [("A9W1", "bits=9"), ("W", "`spec` must read"), (4, "4")]
)
def test_errors_quote_the_shorthand(preset: Any, spec: Any, word: str):
    with pytest.raises(ValueError) as raised:
        preset(spec)
    assert word in str(raised.value) and repr(spec) in str(raised.value)
