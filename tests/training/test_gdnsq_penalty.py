"""The penalty and the divergence of GDNSQ: the numbers of its authors' code."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import keras
import numpy as np
import pytest
from gradients import to_numpy, value_and_gradient
from keras import ops

import keras_rq as rq
from keras_rq.quantizers import GDNSQ
from keras_rq.training.annealing import Annealed, anneal
from keras_rq.training.distillation import jeffreys

FIXTURES = Path(__file__).parent.parent / "quantizers" / "fixtures"
RECORD = json.loads((FIXTURES / "gdnsq.json").read_text())


def test_the_loss_of_every_batch_is_that_of_the_authors_code():
    record = RECORD["penalties"]
    callback = rq.callbacks.GDNSQ(warmup=record["warmup"], growth=record["growth"])
    callback._growth = callback.growth
    callback._progress = keras.Variable(np.zeros(3, "float32"), trainable=False)
    kinds = ("weights", "activations")
    sizes = [len(record["batches"][0][kind]) for kind in kinds]
    for batch in record["batches"]:

        def total(widths: Any, batch: dict[str, Any] = batch) -> Any:
            parts = ops.split(widths, [sizes[0]])
            callback._operands = [
                SimpleNamespace(
                    kind=kind,
                    quantizer=GDNSQ(record["bits"][kind]),
                    width=lambda part=part: part,
                )
                for kind, part in zip(kinds, parts, strict=True)
            ]
            return callback.add_penalty(ops.convert_to_tensor(batch["base"], dtype="float32"))

        widths = np.concatenate([batch[kind] for kind in kinds]).astype("float32")
        before = to_numpy(callback._progress.value).copy()
        _, gradient = value_and_gradient(total, widths, np.float32(1.0))
        callback._progress.assign(before)
        received = to_numpy(total(ops.convert_to_tensor(widths)))
        np.testing.assert_allclose(received, batch["total"], rtol=3e-6)
        expected = np.concatenate([batch[f"to_{kind}"] for kind in kinds])
        np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-7)


def test_the_divergence_is_that_of_the_authors_code():
    record = RECORD["divergence"]
    student, teacher = (np.array(record[name], "float32") for name in ("student", "teacher"))
    loss, gradient = value_and_gradient(lambda x: jeffreys(x, teacher), student, np.float32(1.0))
    np.testing.assert_allclose(loss, record["loss"], rtol=1e-6)
    np.testing.assert_allclose(gradient, record["to_student"], rtol=1e-5, atol=1e-7)
    of_outputs = rq.distillation.Jeffreys().compute_loss([teacher] * 2, [student] * 2)
    np.testing.assert_allclose(to_numpy(of_outputs), 2 * record["loss"], rtol=1e-6)


@pytest.mark.forward
def test_the_divergence_of_equal_or_extreme_logits():
    logits = np.array([[0.0, 1e4, -1e4]], "float32")
    assert float(jeffreys(logits, logits)) == 0.0
    np.testing.assert_allclose(float(jeffreys(logits, -logits)), 4e4)


def test_logits_that_are_masked_on_both_sides_add_nothing():
    random = np.random.default_rng(0)
    student, teacher = random.normal(size=(2, 3, 5)).astype("float32")
    masked = [np.pad(x, ((0, 0), (0, 2)), constant_values=-np.inf) for x in (student, teacher)]
    received = value_and_gradient(lambda x: jeffreys(x, masked[1]), masked[0], np.float32(1.0))
    expected = value_and_gradient(lambda x: jeffreys(x, teacher), student, np.float32(1.0))
    np.testing.assert_allclose(received[0], expected[0], rtol=1e-6)
    np.testing.assert_allclose(received[1], np.pad(expected[1], ((0, 0), (0, 2))), atol=1e-7)


@pytest.mark.once("torch")
def test_annealing_begins_where_it_is_told_when_gradients_are_accumulated():
    optimizer = keras.optimizers.SGD(0.5, gradient_accumulation_steps=4)
    optimizer.build([])
    optimizer._iterations.assign(40)
    anneal(optimizer, 0.9, 0, True)
    assert float(optimizer.learning_rate) == pytest.approx(0.5)
    optimizer._iterations.assign(42)
    assert float(optimizer.learning_rate) == pytest.approx(0.5 * 0.9**2)


@pytest.mark.once("torch")
def test_round_trips():
    found = keras.saving.deserialize_keras_object(
        keras.saving.serialize_keras_object(rq.distillation.Jeffreys())
    )
    assert isinstance(found, rq.distillation.Jeffreys)
    schedule = Annealed(keras.optimizers.schedules.CosineDecay(0.1, 100), 0.9, 3, 10)
    again = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(schedule))
    for step in (0, 10, 15):
        expected = float(schedule.base(step)) * 0.9 ** (3 + max(step - 10, 0))
        np.testing.assert_allclose(float(schedule(step)), expected, rtol=1e-5)
        assert float(again(step)) == float(schedule(step))


@pytest.mark.once("torch")
@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"warmup": -1}, "`warmup` must be an integer >= 0"),
        ({"warmup": 1.5}, "`warmup` must be an integer >= 0"),
        ({"growth": -1.0}, "`growth` must be a number >= 0"),
        ({"decay": 0.0}, "`decay` must be in (0, 1]"),
    ],
)
def test_wrong_fields(fields: dict[str, Any], word: str):
    with pytest.raises(ValueError) as caught:
        rq.callbacks.GDNSQ(**fields)
    assert word in str(caught.value)
