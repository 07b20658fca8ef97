"""Policies: shorthand, rules, and the forms in which they are saved."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from keras import layers

import keras_rq as rq
from keras_rq.policy import LayerQuantization
from keras_rq.quantizers import QuEST, Ridge, StraightThrough

pytestmark = pytest.mark.once


def model_of(*names: str) -> keras.Model:
    stack = [layers.Dense(4, name=name) for name in names]
    return keras.Sequential([keras.Input((4,)), *stack], name="net")


# Shorthand.

ROTATED = functools.partial(Ridge, 1, fade=1.2, rotation="hadamard")


@pytest.mark.parametrize(
    ("spec", "weights", "activations"),
    [
        ("A4W1", Ridge(1, fade=1.6), Ridge(4)),
        ("A8W8", Ridge(8), Ridge(8)),
        ("A3W5", Ridge(5), Ridge(3)),
        ("A1.5W1.5", Ridge(1.5, fade=1.0), Ridge(1.5, fade=1.0, affine=True)),
        ("Afp4Wfp4", Ridge("fp4"), Ridge("fp4")),
        ("Afp4W1.5", Ridge(1.5, fade=1.0), Ridge("fp4")),
        ("W4", Ridge(4), None),
        ("Wfp4", Ridge("fp4"), None),
        ("W1.5-64", Ridge(1.5, fade=1.0, block_size=64), None),
        ("A4W4-32", Ridge(4, block_size=32), Ridge(4, block_size=32)),
        ("W1", Ridge(1, fade=1.6), None),
        ("A1W1", ROTATED(), ROTATED()),
        ("A1W1-channel", ROTATED(block_size="channel"), ROTATED(block_size="channel")),
        ("A1W1-64-2:4", ROTATED(block_size=64, sparsity="2:4"), ROTATED(block_size=64)),
        ("A2W2", *[Ridge(2, fade=2.5, rotation="hadamard")] * 2),
        ("A1W1.5", Ridge(1.5, fade=1.0), Ridge(1, fade=1.6)),
        ("A4W2-tensor", Ridge(2, fade=1.3, block_size="tensor"), Ridge(4, block_size="tensor")),
        ("A4W4-2:4", Ridge(4, sparsity="2:4"), Ridge(4)),
        ("W1-1:4", Ridge(1, fade=1.6, sparsity="1:4"), None),
        ("A4W1-128-2:4", Ridge(1, fade=1.6, sparsity="2:4"), Ridge(4)),
        ("A4W1-4:8-paired", Ridge(1, fade=1.6, sparsity="4:8-paired"), Ridge(4)),
        (
            "A4W1-channel-1:4",
            Ridge(1, fade=1.6, block_size="channel", sparsity="1:4"),
            Ridge(4, block_size="channel"),
        ),
    ],
)
def test_shorthand(spec: str, weights: Any, activations: Any):
    policy = rq.QuantizationPolicy(spec)
    assert (policy.weights, policy.activations) == (weights, activations)


@pytest.mark.parametrize(
    "spec",
    [
        "",
        "4",
        "A4",
        "a4w1",
        "A4W1 ",
        "A4 W1",
        "W1A4",
        "A4W1-",
        "A4W1-rows",
        "A4W1--128",
        "A4W1-2:4-128",
        "A4W1-128-2:4-1",
        "2:4",
        "A4W1-2/4",
        "A4W1-paired",
        "A-4W1",
        "int8",
        8,
        None.__class__,
    ],
)
def test_what_is_no_shorthand_is_told_the_grammar(spec: Any):
    with pytest.raises(ValueError) as error:
        rq.QuantizationPolicy(spec)
    assert "A<bits>W<bits>" in str(error.value)
    assert f"Received: spec={spec!r}" in str(error.value)


@pytest.mark.parametrize(
    ("spec", "complaint"),
    [
        ("A9W4", "bits=9"),
        ("A4W16", "bits=16"),
        ("A0W4", "bits=0"),
        ("A2.5W4", "bits=2.5"),
        ("A4W1..5", "bits='1..5'"),
        ("A4W4-0", "block_size=0"),
        ("A4W4-4:2", "sparsity='4:2'"),
        ("A4W4-0:4", "sparsity='0:4'"),
        ("A4W4-4:4", "sparsity='4:4'"),
        ("A4W4-1:4-paired", "sparsity='1:4-paired'"),
    ],
)
def test_errors_in_shorthand_quote_it(spec: str, complaint: str):
    with pytest.raises(ValueError) as error:
        rq.QuantizationPolicy(spec)
    assert f"In the shorthand {spec!r}" in str(error.value)
    assert complaint in str(error.value)


def test_arguments_replace_what_the_shorthand_says():
    policy = rq.QuantizationPolicy("A4W1", weights=8)
    assert (policy.weights, policy.activations) == (Ridge(8), Ridge(4))
    quantizer = StraightThrough(4)
    assert rq.QuantizationPolicy("A4W1", activations=quantizer).activations is quantizer


def test_what_is_left_of_a_rotated_pair_is_not_rotated():
    policy = rq.QuantizationPolicy("A1W1", activations=8)
    assert (policy.weights, policy.activations) == (Ridge(1, fade=1.6), Ridge(8))
    policy = rq.QuantizationPolicy("A4W1", activations=1)  # one bit each, but not rotated
    assert (policy.weights, policy.activations) == (Ridge(1, fade=1.2), Ridge(1))
    policy = rq.QuantizationPolicy("A1W1", weights=QuEST(4))
    assert (policy.weights, policy.activations) == (QuEST(4), Ridge(1, fade=1.6))
    rules = [
        rq.Rule("a", weights=8),
        rq.Rule("b", activations=8),
        rq.Rule("c", activations=QuEST(4)),
        rq.Rule("d", activations=None),
        rq.Rule("e", matmuls=8),
    ]
    policy = rq.QuantizationPolicy("A1W1", rules=rules)
    found = [policy.resolve(layer) for layer in model_of("a", "b", "c", "d", "e", "f").layers]
    assert [(one.weights, one.activations) for one in found] == [
        (Ridge(8), Ridge(1, fade=1.2)),
        (Ridge(1, fade=1.2), Ridge(8)),
        (ROTATED(), QuEST(4)),
        (Ridge(1, fade=1.2), None),
        (ROTATED(), ROTATED()),
        (ROTATED(), ROTATED()),
    ]
    policy = rq.QuantizationPolicy(weights=QuEST(4), rules=[rq.Rule("a", activations=8)])
    found = policy.resolve(model_of("a").layers[0])
    assert (found.weights, found.activations) == (QuEST(4), Ridge(8))  # alone from the start


# Wrong arguments.


@pytest.mark.parametrize(
    ("make", "kind", "complaint"),
    [
        (lambda: rq.QuantizationPolicy(), ValueError, "does nothing"),
        (lambda: rq.QuantizationPolicy(weights=[4]), TypeError, "Received: [4]"),
        (lambda: rq.QuantizationPolicy(weights=9), ValueError, "bits=9"),
        (lambda: rq.QuantizationPolicy(activations="fp8"), ValueError, "bits='fp8'"),
        (lambda: rq.QuantizationPolicy("A4W1", matmuls=9), ValueError, "bits=9"),
        (lambda: rq.QuantizationPolicy(matmuls=Ridge(4, sparsity=0.5)), ValueError, "no weights"),
        (lambda: rq.QuantizationPolicy("A4W1", rules=["head"]), TypeError, "Received: 'head'"),
        (lambda: rq.QuantizationPolicy(weights=Ridge(4, ridge_lambda=-1)), ValueError, "=-1"),
        (lambda: rq.Rule(3), TypeError, "match=3"),
        (lambda: rq.Rule(int), TypeError, "match=<class 'int'>"),
        (lambda: rq.Rule(keras.losses.Loss), TypeError, "match=<class"),
        (lambda: rq.Rule("(", skip=True), ValueError, "'('"),
        (lambda: rq.Rule("a", weights=9), ValueError, "bits=9"),
        (lambda: rq.Rule("a", matmuls=9), ValueError, "bits=9"),
        (lambda: rq.Rule("a", matmuls=8, skip=True), ValueError, "matmuls=8"),
        (lambda: rq.Rule("a", weights=8, skip=True), ValueError, "weights=8"),
    ],
)
def test_wrong_arguments_are_quoted(make: Any, kind: type, complaint: str):
    with pytest.raises(kind) as error:
        make()
    assert complaint in str(error.value)


# Rules.


def resolved(policy: rq.QuantizationPolicy, layer: Any) -> tuple[Any, Any]:
    quantization = policy.resolve(layer)
    return quantization.weights, quantization.activations


def test_first_match_wins():
    first, second = rq.Rule("a", weights=2), rq.Rule("ab", weights=3)
    policy = rq.QuantizationPolicy("A4W1", rules=[first, second])
    (layer,) = model_of("abc").layers
    assert policy.rule_for(layer) is first
    assert resolved(policy, layer) == (Ridge(2), Ridge(4))


def test_what_a_rule_leaves_out_is_the_policys():
    (layer,) = model_of("head").layers
    policy = rq.QuantizationPolicy("A4W1", rules=[rq.Rule("head", activations=8)])
    assert resolved(policy, layer) == (Ridge(1, fade=1.6), Ridge(8))
    policy = rq.QuantizationPolicy("A4W1", rules=[rq.Rule("head", weights=None)])
    assert resolved(policy, layer) == (None, Ridge(4))
    policy = rq.QuantizationPolicy("A4W1", rules=[rq.Rule("head", skip=True)])
    assert resolved(policy, layer) == (None, None)


def test_rules_alone_quantize_only_what_they_match():
    body, head = model_of("body", "head").layers
    policy = rq.QuantizationPolicy(rules=[rq.Rule("head", weights=4)])
    assert resolved(policy, head) == (Ridge(4), None)
    assert resolved(policy, body) == (None, None)


def test_a_regular_expression_is_searched_in_the_path():
    inner = keras.Sequential([keras.Input((4,)), layers.Dense(4, name="d")], name="encoder")
    model = keras.Sequential([keras.Input((4,)), inner, layers.Dense(4, name="e")])
    nested, last = inner.layers[0], model.layers[-1]
    assert nested.path == "encoder/d"
    assert rq.Rule("encoder/").matches(nested)
    assert rq.Rule("r/d$").matches(nested)
    assert not rq.Rule("encoder").matches(last)


def nested(name: str) -> keras.Model:
    """Two dense layers of one name, in sub-models of the class of that name."""
    inputs = x = keras.Input((6,))
    for of in ("first", "second"):
        inner = keras.Input((6,))
        dense = layers.Dense(6, name="dense")
        if name == "Sequential":
            part = keras.Sequential([inner, dense], name=of)
        else:
            part = keras.Model(inner, dense(inner), name=of)
        x = part(x)
    return keras.Model(inputs, layers.Dense(2, name="head")(x))


@pytest.mark.parametrize("name", ["Sequential", "Functional"])
def test_a_path_is_that_of_the_model_before_and_after_loading(name: str, tmp_path: Path):
    policy = rq.QuantizationPolicy("A4W4", rules=[rq.Rule("^first/", weights=8)])
    expected = [("first/dense", 8), ("second/dense", 4), ("head", 4)]
    fresh = nested(name)
    fresh.save(tmp_path / "m.keras")
    loaded = keras.saving.load_model(tmp_path / "m.keras")
    for model in (fresh, loaded):
        report = model.quantize(policy, verbose=False)
        assert [(row.path, row.weight_bits) for row in report.rows] == expected
    loaded.save(tmp_path / "m.keras")
    again = rq.report(keras.saving.load_model(tmp_path / "m.keras"))
    assert [(row.path, row.weight_bits) for row in again.rows] == expected


def test_a_sequential_is_in_its_paths_after_loading_too(tmp_path: Path):
    model = keras.Sequential([keras.Input((6,)), layers.Dense(4, name="dense")], name="net")
    model.save(tmp_path / "m.keras")
    loaded = keras.saving.load_model(tmp_path / "m.keras")
    for one in (model, loaded):
        assert [row.path for row in rq.report(one).rows] == ["net/dense"]


@keras.saving.register_keras_serializable("test_policy")
class Holding(keras.Model):
    """A sub-model and a layer, in a subclassed model."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.part = keras.Sequential([layers.Dense(6, name="inner")], name="part")
        self.own = layers.Dense(6, name="own")

    def call(self, x: Any) -> Any:
        return self.own(self.part(x))


def test_a_subclassed_model_is_in_its_paths_after_loading_too(tmp_path: Path):
    model = Holding(name="holding")
    model(keras.ops.ones((2, 6)))
    model.save(tmp_path / "m.keras")
    loaded = keras.saving.load_model(tmp_path / "m.keras")
    for one in (model, loaded):
        paths = {row.path for row in rq.report(one).rows}
        assert paths == {"holding/part/inner", "holding/own"}


def test_a_class_matches_its_subclasses_and_their_quantized_forms():
    class Mine(layers.Dense):
        pass

    rule = rq.Rule(layers.Dense)
    assert rule.matches(Mine(2)) and rule.matches(layers.Dense(2))
    assert not rule.matches(layers.Conv2D(2, 2))
    model = model_of("a")
    model.quantize(rq.QuantizationPolicy("W4"), verbose=False)
    assert rule.matches(model.layers[0])


def test_a_callable_is_asked():
    rule = rq.Rule(lambda layer: layer.units > 3)
    assert rule.matches(layers.Dense(4)) and not rule.matches(layers.Dense(3))


def test_a_rule_without_a_layer_warns_and_is_named():
    policy = rq.QuantizationPolicy("A4W1", rules=[rq.Rule("haed", skip=True)])
    with pytest.warns(UserWarning, match=r"Rule\('haed'\) decided for no layer of 'net'"):
        model_of("head").quantize(policy, verbose=False)


def test_a_rule_behind_another_warns():
    rules = [rq.Rule("head", weights=2), rq.Rule(layers.Dense, weights=4)]
    with pytest.warns(UserWarning, match=r"Rule\(Dense\)"):
        model_of("head").quantize(rq.QuantizationPolicy("A4W1", rules=rules), verbose=False)


def test_rules_decide_in_a_model():
    rules = [rq.Rule("skip", skip=True), rq.Rule("head$", weights=8, activations=None)]
    model = model_of("first", "skipped", "head")
    report = model.quantize(rq.QuantizationPolicy("A4W1", rules=rules), verbose=False)
    bits = [(row.activation_bits, row.weight_bits) for row in report.rows]
    assert bits == [(4, 1), (32, 32), (32, 8)]
    assert "Rule('skip')" in report.kept_float["net/skipped"]


# Saved forms.

POLICIES = [
    rq.QuantizationPolicy("A4W1-64-2:4"),
    rq.QuantizationPolicy(weights=StraightThrough(4, trust=1.0), activations=Ridge(8)),
    rq.QuantizationPolicy(rules=[rq.Rule("a", weights=4)]),
    rq.QuantizationPolicy(
        "Afp4W1.5",
        rules=[
            rq.Rule("head", weights=8),
            rq.Rule(layers.Embedding, weights=Ridge(4, rotation="hadamard"), activations=None),
            rq.Rule("^stem", skip=True),
        ],
    ),
    rq.QuantizationPolicy(matmuls=8, rules=[rq.Rule("a", matmuls=None), rq.Rule("b", matmuls=4)]),
    rq.QuantizationPolicy("A4W1", fold_batch_norm=True),
]


@pytest.mark.parametrize("policy", POLICIES, ids=range(len(POLICIES)))
def test_policies_survive_json(policy: rq.QuantizationPolicy):
    saved = json.loads(json.dumps(keras.saving.serialize_keras_object(policy)))
    loaded = keras.saving.deserialize_keras_object(saved)
    assert type(loaded) is rq.QuantizationPolicy
    assert loaded.get_config() == policy.get_config()
    for layer in (*model_of("head", "stem", "other").layers, layers.Embedding(3, 4, name="e")):
        assert loaded.resolve(layer) == policy.resolve(layer)


@pytest.mark.parametrize("version", [1, 2])
def test_older_policies_quantize_no_matmuls(version: int):
    policy = rq.QuantizationPolicy("A4W1", rules=[rq.Rule("a", weights=4)])
    config = json.loads(json.dumps(policy.get_config())) | {"version": version}
    del config["fold_batch_norm"]
    for old in (config, *config["rules"]):
        del old["matmuls"]
    loaded = rq.QuantizationPolicy.from_config(config)
    assert loaded.get_config() == policy.get_config()
    layer = LayerQuantization(Ridge(1), Ridge(4))
    config = layer.get_config() | {"version": version}
    del config["matmuls"], config["fold_batch_norm"]
    assert LayerQuantization.from_config(config) == layer


def test_policies_of_version_3_fold_nothing():
    policy = rq.QuantizationPolicy("A4W1", fold_batch_norm=True)
    for saved in (policy, policy.resolve(layers.Dense(2))):
        config = saved.get_config() | {"version": 3}
        del config["fold_batch_norm"]
        assert not type(saved).from_config(config).fold_batch_norm


def test_a_callable_rule_cannot_be_saved():
    policy = rq.QuantizationPolicy("A4W1", rules=[rq.Rule(lambda layer: True)])
    with pytest.raises(ValueError, match="callable cannot be saved"):
        policy.get_config()


def test_a_callable_rule_does_not_keep_the_model_from_being_saved(tmp_path):
    model = model_of("head")
    rules = [rq.Rule(lambda layer: layer.name == "head", weights=2)]
    model.quantize(rq.QuantizationPolicy("A4W1", rules=rules), verbose=False)
    model.save(tmp_path / "m.keras")
    loaded = keras.saving.load_model(tmp_path / "m.keras")
    assert loaded.layers[0].quantization.weights == Ridge(2)


def broken(**changes: Any) -> dict[str, Any]:
    config = LayerQuantization(Ridge(4), None).get_config()
    return {k: v for k, v in {**config, **changes}.items() if v is not ...}


def saved_quantizer(**changes: Any) -> dict[str, Any]:
    return {**keras.saving.serialize_keras_object(Ridge(4)), **changes}


@pytest.mark.parametrize(
    ("config", "complaint"),
    [
        (broken(version=5), "version=5"),
        (broken(version=...), "version=None"),
        ("A4W1", "version='A4W1'"),
        (broken(weights=...), "Received: ['activations', 'fold_batch_norm', 'forward', 'matmuls']"),
        (broken(fold_batch_norm=1), "fold_batch_norm=1"),
        (broken(biases=None), "'biases'"),
        (broken(matmuls=4), "Received: 4"),
        (broken(weights=saved_quantizer(registered_name="keras_rq>Magic")), "keras_rq>Magic"),
        (broken(weights=saved_quantizer(config={})), "could not be read"),
        (broken(weights=saved_quantizer(config={"bits": 4, "magic": 1})), "'magic': 1"),
        (broken(weights=saved_quantizer(config={"bits": 9})), "'bits': 9"),
        (broken(weights=keras.saving.serialize_keras_object(layers.Dense(2))), "A saved quantizer"),
        (broken(weights=4), "Received: 4"),
        (broken(weights="os.system"), "'os.system'"),
    ],
)
def test_saved_layers_with_faults_are_refused(config: Any, complaint: str):
    with pytest.raises(ValueError) as error:
        LayerQuantization.from_config(config)
    assert complaint in str(error.value)


RULE = {"weights": None, "activations": None, "matmuls": None, "skip": False}


@pytest.mark.parametrize(
    ("rule", "complaint"),
    [
        ({"match": {"path": "a"}}, "a rule must have the fields"),
        ({**RULE, "match": "a"}, "Received: 'a'"),
        ({**RULE, "match": {"module": "os"}}, "'os'"),
        ("head", "version='head'"),
    ],
)
def test_saved_rules_with_faults_are_refused(rule: Any, complaint: str):
    config = {**rq.QuantizationPolicy("A4W1").get_config(), "rules": [rule]}
    with pytest.raises(ValueError) as error:
        rq.QuantizationPolicy.from_config(config)
    assert complaint in str(error.value)


def test_a_saved_layer_with_an_unknown_quantizer_is_one_clear_error():
    model = model_of("head")
    model.quantize(rq.QuantizationPolicy("W4"), verbose=False)
    text = model.to_json().replace("keras_rq>Ridge", "keras_rq>Magic")
    with pytest.raises(Exception, match="saved quantizer could not be read"):
        keras.models.model_from_json(text)


def test_loading_a_rule_imports_nothing(tmp_path):
    mark = tmp_path / "ran"
    (tmp_path / "evil.py").write_text(f"import pathlib; pathlib.Path({str(mark)!r}).touch()")
    rule = {**RULE, "match": {"class": "evil.Layer"}}
    config = {**rq.QuantizationPolicy("A4W1").get_config(), "rules": [rule]}
    policy = rq.QuantizationPolicy.from_config(config)
    assert not policy.rules[0].matches(layers.Dense(2))
    assert not mark.exists()


def test_quantizers_are_shared_not_copied():
    policy = rq.QuantizationPolicy("A4W1")
    model = model_of("a", "b")
    model.quantize(policy, verbose=False)
    assert all(layer.quantization.weights is policy.weights for layer in model.layers)
    assert np.unique([layer.quantization.activations.bits for layer in model.layers]) == [4]
