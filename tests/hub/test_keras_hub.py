"""Models of KerasHub from quantization to generation, as its users would take them there."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import keras
import numpy as np
import pytest

import keras_rq as rq
from keras_rq.layers.base import is_quantized
from keras_rq.training.surgery import quantized_layers

pytestmark = [
    # Of KerasHub and Keras, for float models as well.
    pytest.mark.filterwarnings("ignore:`compile\\(\\)` was not called as part of model loading"),
    pytest.mark.filterwarnings("ignore:Skipping variable loading for optimizer"),
    pytest.mark.filterwarnings("ignore:`shuffle=True` was passed"),
    pytest.mark.filterwarnings("ignore:Gradients do not exist for variables"),
]

BACKEND = keras.backend.backend()
NORMS = {"LayerNormalization", "BatchNormalization", "RMSNormalization"}


class Case(NamedTuple):
    """What a user says of a model, and the classes of layers that then stay in float."""

    policy: rq.QuantizationPolicy
    float_classes: set[str]
    jax: bool = False  # whether JAX runs it too, which compiles each for longer than the others run


def policy(spec: str, matmuls: int | None = None) -> rq.QuantizationPolicy:
    return rq.QuantizationPolicy(spec, matmuls=matmuls)


CASES = {
    "bert": Case(policy("A8W8", 8), {"PositionEmbedding"}),
    # Its head owns a bias alone, and multiplies by the table of the tokens.
    "bert_masked": Case(policy("A4W4-channel"), {"PositionEmbedding", "MaskedLMHead"}),
    "gpt2": Case(policy("A8W8", 8), {"PositionEmbedding"}, jax=True),
    "gemma": Case(policy("A4W4-channel"), set()),
    "vit": Case(policy("A8W8", 8), {"ViTPatchingAndEmbedding"}),
    "resnet": Case(policy("A4W4-channel"), set(), jax=True),
    "mobilenet": Case(policy("A8W8"), set()),
    "deeplab": Case(policy("A4W4-channel"), set()),
    "segformer": Case(policy("A8W8", 8), {"SegFormerMultiheadAttention"}),
    "mmdit": Case(policy("A8W8", 8), {"AdjustablePositionEmbedding", "MMDiTBlock"}),
}
HERE = [name for name, case in CASES.items() if case.jax or BACKEND != "jax"]
WRITERS = ["gemma"] if BACKEND == "jax" else ["gpt2", "gemma"]


def journey_of(name: str) -> Any:
    """A fresh model, its data and its loss; skips without KerasHub, which `make test` installs."""
    pytest.importorskip("keras_hub", reason="KerasHub is not installed; the Makefile says how")
    import hub_models

    keras.utils.set_random_seed(0)
    return hub_models.MAKERS[name]()


@pytest.fixture(scope="module", autouse=True)
def quick_compilation() -> Iterator[None]:
    """These models take far longer to compile than to run."""
    if BACKEND != "jax":
        yield
        return
    import jax

    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def fit(journey: Any, epochs: int = 3) -> list[float]:
    model, metrics = journey.model, {}
    if hasattr(model, "backbone"):  # a task, whose default metrics do not suit every target
        metrics = {"weighted_metrics": []} if journey.y.ndim == 2 else {"metrics": []}
    optimizer = keras.optimizers.SGD(0.02)
    model.compile(optimizer, journey.loss, jit_compile=BACKEND == "jax", **metrics)
    history = model.fit(journey.x, journey.y, epochs=epochs, batch_size=4, verbose=0)
    return history.history["loss"]


class Trained:
    """A model that was quantized, trained and saved."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.case, self.journey = name, CASES[name], journey_of(name)
        self.model = self.journey.model
        self.report = self.model.quantize(self.case.policy, verbose=False)
        self.losses = fit(self.journey)
        self.path = folder / f"{name}.keras"
        self.model.save(self.path)
        self.predictions = self.model.predict(self.journey.x, verbose=0)


@pytest.fixture(scope="module", params=HERE)
def trained(request: Any, tmp_path_factory: Any) -> Trained:
    return Trained(request.param, tmp_path_factory.mktemp("hub"))


def test_layers_are_quantized_or_named(trained: Trained):
    rows = {row.path: row for row in trained.report.rows}
    kept = {rows[path].layer for path in trained.report.kept_float}
    assert kept - NORMS == trained.case.float_classes
    plain = {id(layer) for layer in trained.model._flatten_layers() if not is_quantized(layer)}
    owners = {layer.path for layer in trained.model._flatten_layers() if layer._trainable_variables}
    assert plain and owners <= set(rows)


def test_training_reduces_the_loss(trained: Trained):
    assert np.isfinite(trained.losses).all()
    assert trained.losses[-1] < trained.losses[0]


def test_the_saved_model_is_the_trained_one(trained: Trained):
    loaded = keras.saving.load_model(trained.path)
    assert isinstance(loaded, type(trained.model)) or type(loaded).__name__ == "MMDiT"
    assert [(type(one), one.quantization) for one in quantized_layers(loaded)] == [
        (type(one), one.quantization) for one in quantized_layers(trained.model)
    ]
    received = loaded.predict(trained.journey.x, verbose=0)
    np.testing.assert_array_equal(received, trained.predictions)


PROMPT = 3


def written(journey: Any) -> np.ndarray:
    """What a model generates after a prompt, from its cache of keys and values."""
    tokens = journey.x["token_ids"].copy()
    tokens[:, PROMPT:] = 0
    mask = np.zeros_like(tokens)
    mask[:, :PROMPT] = 1
    inputs = {"token_ids": tokens, "padding_mask": mask}
    return journey.model.generate(inputs, stop_token_ids=None)["token_ids"]


@pytest.mark.parametrize("name", WRITERS)
def test_generation_from_a_cache_is_that_of_the_whole_model(name: str):
    journey = journey_of(name)
    model = journey.model
    for number, variable in enumerate(model.trainable_variables):
        # Such that every token depends on all before.
        variable.assign(np.random.default_rng(number).normal(0, 0.5, variable.shape))
    model.compile(sampler="greedy", jit_compile=BACKEND == "jax")
    in_float = written(journey)
    model.quantize(rq.QuantizationPolicy("A3W2"), verbose=False)
    tokens = written(journey)
    # Of tokens to come a causal model knows nothing, so that one pass has all logits.
    inputs = {"token_ids": tokens, "padding_mask": np.ones_like(tokens)}
    logits = model.predict(inputs, verbose=0)
    np.testing.assert_array_equal(tokens[:, PROMPT:], logits.argmax(-1)[:, PROMPT - 1 : -1])
    assert np.any(tokens != in_float)
    rq.dequantize(model)
    np.testing.assert_array_equal(written(journey), in_float)


cheapest = pytest.mark.skipif(BACKEND != "torch", reason="the same on all; PyTorch is quickest")


@cheapest
@pytest.mark.parametrize("first", ["lora", "quantize"])
def test_lora(first: str, tmp_path: Path):
    journey = journey_of("gpt2")
    model = journey.model
    if first == "lora":
        model.backbone.enable_lora(2)
    model.quantize(rq.QuantizationPolicy("A8W4"), verbose=False)
    if first == "quantize":
        model.backbone.enable_lora(2)
    losses = fit(journey)
    assert losses[-1] < losses[0]
    model.save(tmp_path / "m.keras")
    loaded = keras.saving.load_model(tmp_path / "m.keras")
    expected = model.predict(journey.x, verbose=0)
    np.testing.assert_array_equal(loaded.predict(journey.x, verbose=0), expected)


@cheapest
def test_ranges_from_data_where_a_table_has_no_way_back():
    journey = journey_of("bert")
    static = rq.quantizers.Ridge(8, calibration="static")
    journey.model.quantize(rq.QuantizationPolicy("W8", activations=static), verbose=False)
    rq.calibrate(journey.model, [journey.x], verbose=False)
    losses = fit(journey)
    assert losses[-1] < losses[0]


@cheapest
def test_a_preset_is_of_a_float_model(tmp_path: Path):
    journey = journey_of("gpt2")
    expected = journey.model.predict(journey.x, verbose=0)
    journey.model.quantize(rq.QuantizationPolicy("A8W8"), verbose=False)
    with pytest.raises(ValueError, match=r"dequantize\(model\) before save_to_preset"):
        journey.model.save_to_preset(tmp_path / "preset")
    rq.dequantize(journey.model).save_to_preset(tmp_path / "preset")
    loaded = type(journey.model).from_preset(str(tmp_path / "preset"))
    np.testing.assert_array_equal(loaded.predict(journey.x, verbose=0), expected)


@pytest.mark.once
@pytest.mark.parametrize(
    ("name", "in_float"),
    [
        ("bert", {f"{of}_embedding/embeddings" for of in ("token", "segment")}),
        ("resnet", set()),
    ],
)
def test_export(name: str, in_float: set[str], tmp_path: Path):
    pytest.importorskip("ai_edge_litert")
    journey = journey_of(name)
    journey.model.quantize(rq.QuantizationPolicy("A8W8"), verbose=False)
    result = rq.export(journey.model, tmp_path / "m.tflite", inputs=journey.x, verbose=False)
    backbone = f"{journey.model.backbone.name}/"
    found = {one.path.removeprefix(backbone) for one in result.products if one.kernel == "float"}
    assert found == in_float
