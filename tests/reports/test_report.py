"""What a report says, against counts made by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import reference
from keras import layers
from reference import Spec

import keras_rq as rq
from keras_rq.quantizers import LearnedStep, Ridge
from keras_rq.reports.report import Row

pytestmark = pytest.mark.once

A4W1 = rq.QuantizationPolicy("A4W1")


def row_of(layer: Any, shape: tuple[int | None, ...], policy: Any) -> Row:
    dtype = "int32" if isinstance(layer, layers.Embedding) else "float32"
    model = keras.Sequential([keras.Input(shape, dtype=dtype), layer])
    if policy is not None:
        model.quantize(policy, verbose=False)
    (row,) = rq.report(model).rows
    return row


class Mac:
    """Multiplications and stored bytes of a layer, counted by hand."""

    def __init__(self, name: str, layer: Any, shape: Any, kernel: int, uses: int, channels: int):
        self.name, self.layer, self.shape = name, layer, shape
        self.kernel, self.uses, self.channels = kernel, uses, channels


COUNTS = [
    Mac("Dense", lambda: layers.Dense(4), (16,), 64, 1, 4),
    Mac("Dense on 5 tokens", lambda: layers.Dense(4), (5, 16), 64, 5, 4),
    Mac("Dense on 2x5 tokens", lambda: layers.Dense(4), (2, 5, 16), 64, 10, 4),
    Mac("Conv1D", lambda: layers.Conv1D(4, 3, padding="causal"), (7, 2), 24, 7, 4),
    Mac(
        "Conv2D",
        lambda: layers.Conv2D(4, 3, padding="same", strides=2),
        (6, 6, 3),
        3 * 3 * 3 * 4,
        3 * 3,
        4,
    ),
    Mac(
        "Conv2D in groups",
        lambda: layers.Conv2D(4, 3, groups=2),
        (5, 5, 8),
        3 * 3 * 4 * 4,
        3 * 3,
        4,
    ),
    Mac(
        "Conv2D, channels first",
        lambda: layers.Conv2D(4, 3, data_format="channels_first"),
        (2, 6, 5),
        3 * 3 * 2 * 4,
        4 * 3,
        4,
    ),
    Mac("Conv3D", lambda: layers.Conv3D(4, 2), (3, 4, 5, 2), 8 * 2 * 4, 2 * 3 * 4, 4),
    Mac("DepthwiseConv2D", lambda: layers.DepthwiseConv2D(3), (6, 6, 3), 3 * 3 * 3, 4 * 4, 3),
    Mac(
        "DepthwiseConv2D with a multiplier",
        lambda: layers.DepthwiseConv2D(3, depth_multiplier=2),
        (6, 6, 3),
        3 * 3 * 3 * 2,
        4 * 4,
        6,
    ),
    # Each element of the input meets the whole kernel.
    Mac(
        "Conv2DTranspose",
        lambda: layers.Conv2DTranspose(4, 3, strides=2),
        (5, 4, 2),
        3 * 3 * 2 * 4,
        5 * 4,
        4,
    ),
    Mac(
        "Conv2DTranspose without strides",
        lambda: layers.Conv2DTranspose(4, 3),
        (5, 4, 2),
        3 * 3 * 2 * 4,
        5 * 4,
        4,
    ),
    Mac(
        "EinsumDense with two contraction axes",
        lambda: layers.EinsumDense("abcd,cde->abe", (None, 5), bias_axes="e"),
        (3, 2, 4),
        40,
        3,
        5,
    ),
    Mac(
        "EinsumDense with two output axes",
        lambda: layers.EinsumDense("abc,cde->abde", (None, 2, 3), bias_axes="de"),
        (7, 8),
        48,
        7,
        6,
    ),
    Mac(
        "EinsumDense with an ellipsis",
        lambda: layers.EinsumDense("...x,xy->...y", 5, bias_axes="y"),
        (2, 3, 8),
        40,
        6,
        5,
    ),
]

counts = pytest.mark.parametrize("count", COUNTS, ids=lambda count: count.name)


@counts
def test_energy_and_bytes(count: Mac):
    """A8W4: products of 8 and 4 bits; half a byte per code and 8 bytes per channel."""
    row = row_of(count.layer(), count.shape, rq.QuantizationPolicy("A8W4"))
    assert (row.activation_bits, row.weight_bits) == (8, 4)
    assert row.energy == 8 * 4 * count.kernel * count.uses
    stored = math.ceil(count.kernel / 2) + 8 * count.channels
    bias = count.channels
    assert row.kernel_elements == count.kernel
    assert row.parameters == count.kernel + bias
    assert row.nbytes == stored + 4 * bias
    assert row.bits_per_element == 8 * stored / count.kernel


@counts
def test_energy_and_bytes_in_float(count: Mac):
    row = row_of(count.layer(), count.shape, None)
    assert (row.activation_bits, row.weight_bits, row.sqnr_db) == (32, 32, None)
    assert row.energy == 32 * 32 * count.kernel * count.uses
    assert row.nbytes == 4 * row.parameters
    assert row.bits_per_element == 32


def test_separable_convolution_counts_both_halves():
    layer = layers.SeparableConv2D(4, 3, padding="same", strides=2, depth_multiplier=2)
    row = row_of(layer, (6, 6, 3), rq.QuantizationPolicy("A8W4"))
    depthwise, pointwise = 3 * 3 * 3 * 2, 3 * 2 * 4
    assert row.energy == 8 * 4 * (depthwise + pointwise) * 3 * 3
    assert row.nbytes == depthwise // 2 + 8 * 6 + pointwise // 2 + 8 * 4 + 4 * 4


def test_attention_counts_its_projections():
    x = keras.Input((5, 8))
    attention = layers.MultiHeadAttention(2, 4, use_bias=False)
    model = keras.Model(x, attention(x, x))
    model.quantize(A4W1, verbose=False)
    rows = rq.report(model).rows
    energy = {row.path.split("/")[-1]: row.energy for row in rows}
    projection = 4 * 1 * (8 * 2 * 4) * 5
    names = ("query", "key", "value", "attention_output")
    assert energy == dict.fromkeys(names, projection)
    # 64 bits, and scale and offset of 8 channels each.
    assert [row.nbytes for row in rows] == [8 + 8 * 8] * 4


def test_a_layer_that_a_graph_calls_several_times_counts_as_often():
    x = keras.Input((5, 6))
    dense, twice = layers.Dense(6, use_bias=False, name="d"), keras.Input((5, 6))
    twice = keras.Model(twice, dense(dense(twice)))
    model = keras.Model(x, layers.Dense(2, use_bias=False, name="head")(twice(twice(twice(x)))))
    energy = {row.path.split("/")[-1]: row.energy for row in rq.report(model).rows}
    assert energy == {"d": 6 * 5 * 6 * 6 * 32 * 32, "head": 5 * 6 * 2 * 32 * 32}


def test_a_loop_within_a_graph():
    x = keras.Input((7, 5, 6))
    inner = keras.Input((5, 6))
    dense = layers.Dense(6, use_bias=False, name="d")
    part = keras.Model(inner, dense(dense(inner)))
    model = keras.Model(x, layers.TimeDistributed(part)(x))
    (row,) = rq.report(model).rows
    assert row.energy == 7 * 2 * 5 * 6 * 6 * 32 * 32


def test_a_table_that_is_looked_up_and_multiplied_multiplies_once():
    x = keras.Input((5,), dtype="int32")
    table = layers.ReversibleEmbedding(7, 6, name="table")
    (row,) = rq.report(keras.Model(x, table(table(x), reverse=True))).rows
    assert row.energy == 5 * 6 * 7 * 32 * 32


@pytest.mark.parametrize("is_first", [True, False])
def test_a_loop_of_unknown_length_leaves_the_energy_open(is_first: bool):
    x, y = keras.Input((None, 6)), keras.Input((6,))
    dense = layers.Dense(6)
    parts = [lambda: layers.TimeDistributed(dense)(x), lambda: dense(y)]
    outputs = [part() for part in (parts if is_first else parts[::-1])]
    (row,) = rq.report(keras.Model([x, y], outputs)).rows
    assert row.energy is None


def test_a_kernel_that_a_wrapper_lists_too_counts_once():
    inner = layers.Conv2D(6, 3, use_bias=False)
    model = keras.Sequential([keras.Input((8, 8, 4)), layers.SpectralNormalization(inner)])
    report = model.quantize(A4W1, verbose=False)
    assert report.total.parameters == model.count_params() == 3 * 3 * 4 * 6 + 6
    assert report.total.nbytes == 3 * 3 * 4 * 6 // 8 + 6 * 8 + 4 * 6


def test_keras_own_quantization_is_refused():
    model = keras.Sequential([keras.Input((8,)), layers.Dense(4, name="own")])
    model.quantize("int8")
    with pytest.raises(ValueError, match=r"own' carries Keras's own quantization \('int8'\)"):
        rq.report(model)


def test_embedding_multiplies_nothing():
    row = row_of(layers.Embedding(7, 10), (3,), rq.QuantizationPolicy("W4"))
    assert (row.energy, row.activation_bits, row.weight_bits) == (0, None, 4)
    assert row.nbytes == 70 // 2 + 7 * 8


def test_normalization_has_bytes_and_no_kernel():
    row = row_of(layers.BatchNormalization(), (6,), None)
    assert (row.nbytes, row.kernel_elements, row.energy) == (4 * 4 * 6, 0, 0)
    assert row.bits_per_element is None


@pytest.mark.parametrize(
    ("policy", "bits"),
    [
        (rq.QuantizationPolicy("W8"), 8 * 70 * 4 + 64 * 4),
        (rq.QuantizationPolicy("W3"), 3 * 70 * 4 + 64 * 4),
        (rq.QuantizationPolicy("W2-tensor"), 2 * 70 * 4 + 64),
        # Blocks of 32, 32 and 6.
        (rq.QuantizationPolicy("W1-32"), 70 * 4 + 64 * 4 * 3),
        # Five ternary digits to a byte, and no offset.
        (rq.QuantizationPolicy("W1.5"), 8 * (70 * 4 // 5) + 32 * 4),
        (rq.QuantizationPolicy("Wfp4-channel"), 4 * 70 * 4 + 32 * 4),
        # A scale per channel and no offset; a mask of 70 bits, and 4 bits of 36 in each channel.
        (rq.presets.quest("W4"), 4 * 70 * 4 + 32 * 4),
        (rq.presets.quest("W4-channel-4:8-paired"), 70 * 4 + 4 * 36 * 4 + 32 * 4),
    ],
    ids=["W8", "W3", "W2-tensor", "W1-32", "W1.5", "Wfp4-channel", "QuEST", "QuEST-4:8-paired"],
)
def test_bytes_of_every_storage(policy: Any, bits: int):
    row = row_of(layers.Dense(4, use_bias=False), (70,), policy)
    assert row.nbytes == bits // 8
    assert row.bits_per_element == bits / 280


def spec(**fields: Any) -> Spec:
    return Spec(axes=(0,), **fields)


@pytest.mark.parametrize(
    ("quantizer", "words"),
    [
        (Ridge(4), spec(bits=4, affine=True, rule="minmax")),
        (
            Ridge(2, range="minmax", block_size=32),
            spec(bits=2, affine=True, rule="minmax", block=32),
        ),
        (
            Ridge(4, sparsity="2:4"),
            spec(bits=4, affine=False, rule="absmax", keep=(2, 4)),
        ),
    ],
    ids=["W4", "W2-32", "W4-2:4"],
)
def test_error_is_that_of_numpy(quantizer: Any, words: Spec):
    layer = layers.Dense(6, use_bias=False)
    row = row_of(layer, (48,), rq.QuantizationPolicy(weights=quantizer))
    kernel = np.asarray(layer.get_weights()[0], np.float64)
    noise = reference.quantize(kernel, words).y - kernel
    expected = 10 * math.log10(np.sum(kernel**2) / np.sum(noise**2))
    assert row.sqnr_db == pytest.approx(expected, abs=1e-4)


def test_sparse_storage_is_a_mask_and_the_codes_that_are_not_zero():
    layer = layers.Dense(6, use_bias=False)
    row = row_of(layer, (48,), rq.QuantizationPolicy("A8W4-2:4"))
    words = spec(bits=4, affine=False, rule="absmax", keep=(2, 4))
    codes = reference.quantize(np.asarray(layer.get_weights()[0], np.float64), words).codes
    assert row.sparsity == 0.5
    assert row.energy == 8 * 4 * 0.5 * 48 * 6
    assert row.nbytes == 48 * 6 // 8 + math.ceil(np.count_nonzero(codes) / 2) + 4 * 6
    # Of what is left at the end as many are kept, if there are as many.
    rest = row_of(layers.Dense(6, use_bias=False), (7,), rq.QuantizationPolicy("A8W4-2:4"))
    assert rest.sparsity == pytest.approx(3 / 7)
    assert rest.energy == pytest.approx(8 * 4 * 4 * 6)


def test_a_learned_step_is_the_stored_scale_and_counts_once():
    policy = rq.QuantizationPolicy(weights=LearnedStep(4), activations=LearnedStep(8))
    row = row_of(layers.Dense(4), (16,), policy)
    # Codes, a step for each output; the bias; a step and a shift of the input.
    assert row.nbytes == 64 // 2 + 4 * 4 + 4 * 4 + 2 * 4
    assert row.parameters == 64 + 4 + 4 + 2
    assert row.bits_per_element == 4 + 32 * 4 / 64
    assert (row.activation_bits, row.weight_bits) == (8, 4)
    static = rq.QuantizationPolicy("W4", activations=Ridge(8, calibration="static"))
    # Codes, a scale and an offset for each output; the bias; range and line of the input.
    assert row_of(layers.Dense(4), (16,), static).nbytes == 64 // 2 + 8 * 4 + 4 * 4 + 4 * 4


def test_unknown_sizes_leave_the_energy_open():
    model = keras.Sequential([keras.Input((None, 8)), layers.Dense(4), layers.Dense(4)])
    report = model.quantize(A4W1, verbose=False)
    assert [row.energy for row in report.rows] == [None, None]
    assert report.total.energy is None
    assert "?" in str(report)


def mixed() -> rq.Report:
    model = keras.Sequential(
        [
            keras.Input((16,)),
            layers.Dense(8, name="body"),
            layers.LayerNormalization(name="norm"),
            layers.Dense(2, name="head"),
        ],
        name="net",
    )
    policy = rq.QuantizationPolicy("A4W1-2:4", rules=[rq.Rule("head", skip=True)])
    return model.quantize(policy, verbose=False)


def test_total():
    report = mixed()
    body, norm, head = report.rows
    total = report.total
    assert total.parameters == sum(row.parameters for row in report.rows)
    assert total.nbytes == body.nbytes + norm.nbytes + head.nbytes
    assert total.energy == body.energy + head.energy
    stored = body.bits_per_element * 128 + 32 * 16
    assert total.bits_per_element == pytest.approx(stored / 144)
    assert total.sparsity == pytest.approx(0.5 * 128 / 144)


def test_a_report_is_json():
    report = mixed()
    found = json.loads(json.dumps(report.to_dict()))
    assert found["name"] == "net"
    assert [row["path"] for row in found["rows"]] == [row.path for row in report.rows]
    assert found["total"]["nbytes"] == report.total.nbytes
    assert found["rows"][2]["reason"] == "Rule('head') leaves it in float"


def test_a_report_is_a_table():
    report = mixed()
    lines = str(report).splitlines()
    table = lines[1 : lines.index(next(line for line in lines if line.startswith("total"))) + 1]
    assert lines[0] == "net"
    assert [line.split()[0] for line in table[2:5]] == [row.path for row in report.rows]
    body = table[2].split()
    assert body[1:5] == ["Dense", "4", "1", "50%"]
    assert f"{report.rows[0].nbytes:,}" in body
    assert "float: net/head (Rule('head') leaves it in float)" in lines
    assert max(map(len, lines)) < 140


def test_a_report_is_a_picture(tmp_path: Path):
    mixed().plot(tmp_path / "report.png")
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")


def test_nothing_to_draw():
    model = keras.Sequential([keras.Input((4,)), layers.LayerNormalization()], name="bare")
    with pytest.raises(ValueError, match="'bare' has no layer with a kernel"):
        rq.report(model).plot("report.png")


def test_models_without_weights_have_an_empty_report():
    model = keras.Sequential([keras.Input((4,)), layers.ReLU()])
    total = rq.report(model).total
    assert (total.nbytes, total.bits_per_element, total.energy) == (0, None, 0)


def test_what_is_no_model_is_refused():
    with pytest.raises(TypeError, match=r"Received: 'model\.keras'"):
        rq.report("model.keras")
    with pytest.raises(ValueError, match="'late' is not built"):
        rq.report(keras.Sequential([layers.Dense(2)], name="late"))


def test_a_report_does_not_touch_the_model():
    model = keras.Sequential([keras.Input((16,)), layers.Dense(8)])
    model.quantize(A4W1, verbose=False)
    before = [w.tobytes() for w in model.get_weights()], model.to_json()
    rq.report(model)
    assert ([w.tobytes() for w in model.get_weights()], model.to_json()) == before
