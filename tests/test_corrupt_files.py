"""Files and configurations with faults: one clear error, and no code is run."""

from __future__ import annotations

import copy
import json
import re
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import keras
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import layers

import keras_rq as rq
from keras_rq.policy import LayerQuantization

pytestmark = pytest.mark.once


@pytest.fixture(scope="module")
def saved(tmp_path_factory: Any) -> Path:
    """A model whose layers are saved by themselves, by an envelope and by their own class."""
    inputs = keras.Input((3, 4))
    x = layers.Dense(4, name="first")(inputs)
    outputs = layers.MultiHeadAttention(1, 2, name="attention")(x, x)
    model = keras.Model(inputs, outputs, name="net")
    learned = rq.quantizers.LearnedStep(4)
    rq.quantize(model, rq.QuantizationPolicy(weights=learned, activations=8), verbose=False)
    path = tmp_path_factory.mktemp("saved") / "whole.keras"
    model.save(path)
    return path


def rewritten(path: Path, part: str, change: Callable[[bytes], bytes | None]) -> Path:
    """A copy of a .keras file with another part; None leaves it out."""
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    parts[part] = change(parts[part])
    target = path.with_name("other.keras")
    with zipfile.ZipFile(target, "w") as archive:
        for name, content in parts.items():
            if content is not None:
                archive.writestr(name, content)
    return target


def edited(path: Path, edit: Callable[[dict[str, Any]], Any]) -> Path:
    """A copy with another configuration; `edit` gets the layers' configurations by name."""

    def change(content: bytes) -> bytes:
        config = json.loads(content)
        edit({one["name"]: one["config"] for one in config["config"]["layers"]})
        return json.dumps(config).encode()

    return rewritten(path, "config.json", change)


def first(layers_by_name: dict[str, Any]) -> dict[str, Any]:
    return layers_by_name["first"]["quantization"]


def inside(layers_by_name: dict[str, Any]) -> dict[str, Any]:
    return next(iter(layers_by_name["attention"]["quantized"].values()))


UNKNOWN = {"registered_name": "keras_rq>Magic"}
LAYER, INSIDE = "Layer 'first', as it is saved: ", "Layer 'attention/query', as it is saved: "


@pytest.mark.parametrize(
    ("edit", "complaint"),
    [
        (lambda c: first(c)["weights"].update(UNKNOWN), LAYER + "A saved quantizer could not be"),
        (lambda c: first(c)["weights"]["config"].pop("bits"), LAYER + "A saved quantizer could"),
        (lambda c: first(c)["weights"]["config"].update(bits=[9]), LAYER + "A saved quantizer"),
        (lambda c: first(c)["weights"].pop("config"), LAYER + "A saved quantizer could not be"),
        (lambda c: first(c).pop("weights"), LAYER + "The saved form .* must have the fields"),
        (lambda c: first(c).update(version=99), LAYER + "The saved form .* version=99"),
        (lambda c: c["first"].pop("quantization"), LAYER + "The saved form .* version=None"),
        (lambda c: inside(c)["weights"].update(UNKNOWN), INSIDE + "A saved quantizer could not"),
        (lambda c: inside(c).update(version=99), INSIDE + "The saved form .* version=99"),
        (lambda c: inside(c).update({"class": "Conv2D"}), "had a quantized Conv2D as layer"),
        (lambda c: c["attention"].pop("inner"), "must have 'inner'.*inner=None"),
        (lambda c: c["attention"].pop("quantized"), "'attention' .* must have 'quantized'"),
        (lambda c: c["attention"].update(quantized={"x": {}}), "Received: quantized={'x': {}}"),
        (lambda c: c["attention"].update(quantized={"99": inside(c)}), "has no layer there"),
    ],
)
def test_faults_in_a_configuration_are_named(saved: Path, edit: Any, complaint: str):
    with pytest.raises((ValueError, TypeError)) as error:  # Keras makes a TypeError of ours
        keras.saving.load_model(edited(saved, edit))
    # Keras puts the whole configuration before what it encountered.
    assert re.search(complaint, str(error.value).rpartition("Exception encountered: ")[2])


def test_truncated_files_are_one_error(saved: Path, tmp_path: Path):
    content = saved.read_bytes()
    for length in (0, 100, len(content) // 2, len(content) - 1):
        (tmp_path / "m.keras").write_bytes(content[:length])
        with pytest.raises(ValueError, match=r"accessible `\.keras` zip file"):
            keras.saving.load_model(tmp_path / "m.keras")
    for length in (0, 100, 5000):
        path = rewritten(saved, "model.weights.h5", lambda old, n=length: old[:n])
        with pytest.raises(OSError, match=r"truncated file|file signature not found"):
            keras.saving.load_model(path)
    with pytest.raises(ValueError, match=r"Expected a model\.weights\.h5"):
        keras.saving.load_model(rewritten(saved, "model.weights.h5", lambda _: None))


# Nothing of these is ever followed, whatever a user has agreed to.


@pytest.fixture
def attacks(tmp_path: Path) -> Iterator[list[dict[str, Any]]]:
    """Saved objects that would make a file, if they were followed; checks that they were not."""
    mark, module = tmp_path / "ran", tmp_path / "evil_module.py"
    module.write_text(f"import pathlib; pathlib.Path({str(mark)!r}).touch(); Ridge = int")
    function = keras.saving.serialize_keras_object(
        lambda path=str(mark): __import__("pathlib").Path(path).touch()
    )
    call = {"class_name": "system", "module": "os", "config": f"touch {mark}"}
    evil = {"class_name": "Ridge", "module": "evil_module", "config": {"bits": 4}}
    lambda_layer = layers.Lambda(lambda x, path=str(mark): __import__("pathlib").Path(path).touch())
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(tmp_path)
        named = ({**evil, "registered_name": name} for name in ("evil_module>Ridge", "Ridge", None))
        layer = keras.saving.serialize_keras_object(lambda_layer)
        yield [function, call, {**call, "registered_name": "os>system"}, *named, layer]
    assert not mark.exists()


@pytest.mark.filterwarnings("ignore:The object being serialized includes a `lambda`")
@pytest.mark.parametrize("safe_mode", [True, False])
def test_loading_runs_no_code(saved: Path, attacks: list[dict[str, Any]], safe_mode: bool):
    policy = rq.QuantizationPolicy("A4W1", rules=[rq.Rule("a", weights=4)])
    for attack in attacks:

        def edit(by_name: dict[str, Any], attack: dict[str, Any] = attack) -> None:
            first(by_name).update(activations=attack)

        with pytest.raises(TypeError, match="saved quantizer could not be read"):
            keras.saving.load_model(edited(saved, edit), safe_mode=safe_mode)
        config = keras.saving.serialize_keras_object(policy)
        config["config"]["rules"][0]["weights"] = attack
        with pytest.raises((TypeError, ValueError), match="saved quantizer could not be read"):
            keras.saving.deserialize_keras_object(config, safe_mode=safe_mode)


# Any change at all.

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 10) | st.floats() | st.text(max_size=3)
    | st.sampled_from(["inherit", "keras_rq>Ridge", "fp4", "2:4", "int8", "hadamard"]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=2), inner),
    max_leaves=3,
)  # fmt: skip
WHOLE = rq.QuantizationPolicy(
    "A4W1-2:4", matmuls=8, rules=[rq.Rule("a", weights=rq.quantizers.QuEST(4)), rq.Rule("b")]
).get_config()


def places(config: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths of everything inside a configuration."""
    items = config.items() if isinstance(config, dict) else enumerate(config)
    for key, value in items:
        yield (*at, key)
        if isinstance(value, (dict, list)):
            yield from places(value, (*at, key))


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(list(places(WHOLE))), VALUES, st.sampled_from(["set", "remove", "add"]))
def test_a_changed_policy_is_refused_or_sane(place: tuple[Any, ...], value: Any, how: str):
    config = copy.deepcopy(WHOLE)
    around = config
    for key in place[:-1]:
        around = around[key]
    if how == "remove":
        del around[place[-1]]
    elif how == "set" or isinstance(around, list):
        around[place[-1]] = value
    else:
        around["added"] = value
    layer = layers.Dense(2, name="a")
    try:
        policy = rq.QuantizationPolicy.from_config(config)
    except (ValueError, TypeError) as error:
        assert str(error)
        return
    assert isinstance(policy.resolve(layer), LayerQuantization)
    again = rq.QuantizationPolicy.from_config(json.loads(json.dumps(policy.get_config())))
    assert again.get_config() == policy.get_config()
