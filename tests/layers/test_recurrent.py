"""Recurrent layers: their cells on quantized operands, step by step, and the loops around them."""

from __future__ import annotations

from typing import Any, NamedTuple

import keras
import numpy as np
import pytest
from gradients import BACKEND, compiled, relative_error, to_numpy, value_and_gradient
from keras import layers
from keras.src.layers.rnn.conv_lstm import ConvLSTMCell
from layer_cases import SCHEMES, Operand, Scheme, quantized

import keras_rq as rq
from keras_rq.layers import quantized_class
from keras_rq.policy import LayerQuantization
from keras_rq.quantizers import Quantizer, Ridge

A4W4 = Scheme("A4W4", Ridge(4), Ridge(4))
UNITS, STEPS, FEATURES = 4, 3, 8

# Three steps of float32 sums, each fed with the one before.
ROUNDING = 1e-5


def draw(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


class Operands(NamedTuple):
    """Weights of a cell in float64, and how its products are quantized."""

    kernel: np.ndarray
    recurrent_kernel: np.ndarray
    bias: np.ndarray
    scheme: Scheme

    def product(self, x: np.ndarray, kernel: np.ndarray) -> np.ndarray:
        x = quantized(x, self.scheme.activations, Operand((-1,)))
        kernel = quantized(kernel, self.scheme.weights, Operand((0,)))
        assert min(x.tie_distance.min(), kernel.tie_distance.min()) > 2e-6  # draw again
        return x.y @ kernel.y


def simple(w: Operands, x: np.ndarray, states: list[np.ndarray]) -> list[np.ndarray]:
    product = w.product(x, w.kernel) + w.product(states[0], w.recurrent_kernel)
    return [np.tanh(product + w.bias)]


def lstm(w: Operands, x: np.ndarray, states: list[np.ndarray]) -> list[np.ndarray]:
    h, c = states
    i, f, g, o = np.split(w.product(x, w.kernel) + w.product(h, w.recurrent_kernel) + w.bias, 4, -1)
    c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
    return [sigmoid(o) * np.tanh(c), c]


def gru_after(w: Operands, x: np.ndarray, states: list[np.ndarray]) -> list[np.ndarray]:
    (h,) = states
    xz, xr, xh = np.split(w.product(x, w.kernel) + w.bias[0], 3, -1)
    hz, hr, hh = np.split(w.product(h, w.recurrent_kernel) + w.bias[1], 3, -1)
    z = sigmoid(xz + hz)
    return [z * h + (1 - z) * np.tanh(xh + sigmoid(xr + hr) * hh)]


def gru_before(w: Operands, x: np.ndarray, states: list[np.ndarray]) -> list[np.ndarray]:
    (h,) = states
    xz, xr, xh = np.split(w.product(x, w.kernel) + w.bias, 3, -1)
    uz, ur, uh = np.split(w.recurrent_kernel, 3, -1)
    z, r = sigmoid(xz + w.product(h, uz)), sigmoid(xr + w.product(h, ur))
    return [z * h + (1 - z) * np.tanh(xh + w.product(r * h, uh))]


class Kind(NamedTuple):
    """A recurrent layer, and a step of it in NumPy."""

    layer: type
    step: Any
    states: int
    arguments: dict[str, Any] = {}  # noqa: RUF012  never changed

    def make(self, **more: Any) -> Any:
        layer = self.layer(UNITS, bias_initializer="normal", **self.arguments, **more)
        layer.build((None, STEPS, FEATURES))
        return layer


KINDS = {
    "SimpleRNN": Kind(layers.SimpleRNN, simple, 1),
    "LSTM": Kind(layers.LSTM, lstm, 2),
    "GRU": Kind(layers.GRU, gru_after, 1),
    "GRU, reset before": Kind(layers.GRU, gru_before, 1, {"reset_after": False}),
}
kinds = pytest.mark.parametrize("kind", KINDS.values(), ids=lambda k: k.step.__name__)


def quantize(layer: Any, scheme: Scheme = A4W4) -> Any:
    rq.quantize(
        layer,
        rq.QuantizationPolicy(weights=scheme.weights, activations=scheme.activations),
        verbose=False,
    )
    return layer


def run(layer: Any, *inputs: Any, **arguments: Any) -> list[np.ndarray]:
    function = compiled(lambda *x: keras.tree.flatten(layer(*x, **arguments)))
    inputs = keras.tree.map_structure(keras.ops.convert_to_tensor, inputs)
    return [to_numpy(y) for y in function(*inputs)]


@pytest.mark.forward
@pytest.mark.parametrize(
    ("name", "scheme"),
    [
        *((name, A4W4) for name in KINDS),
        ("LSTM", SCHEMES["blocks"]),
        ("GRU, reset before", SCHEMES["rotated"]),
    ],
    ids=lambda v: getattr(v, "name", v),
)
def test_layers_are_their_formulas_on_quantized_operands(name: str, scheme: Scheme):
    for seed in range(10):
        try:
            return _check_against_formulas(KINDS[name], scheme, seed)
        except AssertionError as error:
            if "draw again" not in str(error):
                raise
    raise AssertionError("no draw without a rounding tie")


def _check_against_formulas(kind: Kind, scheme: Scheme, seed: int) -> None:
    keras.utils.set_random_seed(seed)
    layer = quantize(kind.make(return_sequences=True, return_state=True), scheme)
    weights = Operands(*(w.astype(float) for w in layer.get_weights()), scheme)
    x = draw(seed, 2, STEPS, FEATURES)
    states = [draw(seed + i, 2, UNITS) for i in range(kind.states)]
    outputs, *last = run(layer, x, states)
    expected = [s.astype(float) for s in states]
    for t in range(STEPS):
        expected = kind.step(weights, x[:, t].astype(float), expected)
        assert relative_error(outputs[:, t], expected[0]) < ROUNDING
    for received, wanted in zip(last, expected, strict=True):
        assert relative_error(received, wanted) < ROUNDING


@pytest.mark.forward
@pytest.mark.parametrize(
    "arguments",
    [{}, {"unroll": True, "use_bias": False}, {"go_backwards": True}],
    ids=str,
)
@kinds
def test_without_quantizers_they_are_the_keras_layers(kind: Kind, arguments: dict[str, Any]):
    layer = kind.make(return_sequences=True, **arguments)
    x = draw(0, 2, STEPS, FEATURES)
    mask = np.array([[True, True, False], [True, False, True]])
    expected = run(layer, x)[0], run(layer, x, mask=mask)[0]
    rq.quantize(layer, rq.QuantizationPolicy("A8W8"), verbose=False)
    (cell,) = [c for c in layer._flatten_layers() if isinstance(c, rq.layers.QuantizedLayer)]
    cell.quantization = LayerQuantization(None, None)
    received = run(layer, x)[0], run(layer, x, mask=mask)[0]
    for got, wanted in zip(received, expected, strict=True):
        assert relative_error(got, wanted) < ROUNDING


@pytest.mark.parametrize("implementation", [1, 2])
@kinds
def test_dropout_falls_on_the_elements_that_keras_drops(kind: Kind, implementation: int):
    """At 8 bits the outputs with dropout are those of the float layer with the same masks."""
    one_mask = kind.layer is layers.SimpleRNN
    rates = {"dropout": 0.5, "recurrent_dropout": 0.5 if implementation == 1 else 0.0, "seed": 3}
    more = {} if one_mask else {"implementation": implementation}
    x = 3 * draw(0, 2, STEPS, FEATURES)
    both = [kind.make(**rates, **more) for _ in range(2)]
    both[1].set_weights(both[0].get_weights())
    quantize(both[1], Scheme("A8W8", Ridge(8), Ridge(8)))
    expected, received = (to_numpy(layer(x, training=True)) for layer in both)
    undropped = to_numpy(both[1](x))
    assert relative_error(received, expected) < 0.05
    assert relative_error(undropped, expected) > 0.1


# Convolutional cells.


def _conv_lstm(rank: int, **arguments: Any) -> Any:
    cls = {1: layers.ConvLSTM1D, 2: layers.ConvLSTM2D, 3: layers.ConvLSTM3D}[rank]
    layer = cls(3, 2, bias_initializer="normal", **arguments)
    layer.build((None, 2, *(5,) * rank, 4))
    return layer


def _padded(x: np.ndarray, pads: tuple[int, int], rank: int) -> np.ndarray:
    return np.pad(x, [(0, 0), *[pads] * rank, (0, 0)])


def _conv(x: np.ndarray, kernel: np.ndarray, scheme: Scheme, strides: int) -> np.ndarray:
    """A convolution without padding in NumPy; the operands are quantized first."""
    rank = kernel.ndim - 2
    spatial = tuple(range(rank))
    x = quantized(x, scheme.activations, Operand((rank + 1,), tuple(range(1, rank + 1)), True))
    kernel = quantized(kernel, scheme.weights, Operand((rank,), spatial, True))
    assert min(x.tie_distance.min(), kernel.tie_distance.min()) > 2e-6, "draw again"
    windows = np.lib.stride_tricks.sliding_window_view(
        x.y, kernel.y.shape[:rank], tuple(range(1, rank + 1))
    )
    windows = windows[(slice(None), *[slice(None, None, strides)] * rank)]
    axes = [*range(rank + 2, 2 * rank + 2), rank + 1]
    return np.tensordot(windows, kernel.y, (axes, list(range(rank + 1))))


@pytest.mark.parametrize(
    ("rank", "arguments", "pads"),
    [
        (1, {}, (0, 0)),
        (2, {"padding": "same"}, (0, 1)),
        (2, {"strides": 2}, (0, 0)),
        (3, {}, (0, 0)),
    ],
    ids=str,
)
def test_convolutional_cells(rank: int, arguments: dict[str, Any], pads: tuple[int, int]):
    for seed in range(10):
        try:
            return _check_convolution(rank, arguments, pads, seed)
        except AssertionError as error:
            if "draw again" not in str(error):
                raise
    raise AssertionError("no draw without a rounding tie")


def _check_convolution(
    rank: int, arguments: dict[str, Any], pads: tuple[int, int], seed: int
) -> None:
    keras.utils.set_random_seed(seed)
    layer = _conv_lstm(rank, return_sequences=True, **arguments)
    quantize(layer)
    kernel, recurrent_kernel, bias = (w.astype(float) for w in layer.get_weights())
    x = draw(seed, 2, 2, *(5,) * rank, 4)
    outputs = run(layer, x)[0]
    h = c = np.zeros(outputs[:, 0].shape)
    for t in range(2):
        z = _conv(_padded(x[:, t], pads, rank), kernel, A4W4, arguments.get("strides", 1)) + bias
        if t:  # a state of zeros has no range
            z = z + _conv(_padded(h, (0, 1), rank), recurrent_kernel, A4W4, 1)
        i, f, g, o = np.split(z, 4, -1)
        c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
        h = sigmoid(o) * np.tanh(c)
        assert relative_error(outputs[:, t], h) < ROUNDING


def test_convolutional_dropout_has_a_mask_for_each_gate():
    both = [_conv_lstm(2, dropout=0.5, recurrent_dropout=0.5, seed=1) for _ in range(2)]
    both[1].set_weights(both[0].get_weights())
    quantize(both[1], Scheme("A8W8", Ridge(8), Ridge(8)))
    x = 3 * draw(0, 2, 2, 5, 5, 4)
    expected, received = (to_numpy(layer(x, training=True)) for layer in both)
    assert relative_error(received, expected) < 0.05


# Gradients.


# JAX compiles four loops for each.
PULLED = ["LSTM", "GRU, reset before"] if BACKEND == "jax" else list(KINDS)


@pytest.mark.parametrize(("name", "unroll"), [*((name, False) for name in PULLED), ("LSTM", True)])
def test_the_gradient_is_that_of_cells_with_equal_kernels(name: str, unroll: bool):
    """The sum of the steps' gradients, each from a cell that is called by itself."""
    kind = KINDS[name]
    layer = quantize(kind.make(unroll=unroll))
    (cell,) = [c for c in layer._flatten_layers() if isinstance(c, rq.layers.QuantizedLayer)]
    kernels, tensor = layer.get_weights(), keras.ops.convert_to_tensor
    x = tensor(draw(0, 2, STEPS, FEATURES))
    start = [tensor(draw(1 + i, 2, UNITS)) for i in range(kind.states)]
    upstream = draw(3, 2, UNITS)
    state = [tensor(v) for v in layer.non_trainable_variables]

    def looped(weights: list[Any]) -> Any:
        return layer.stateless_call(weights, state, x, initial_state=start)[0]

    def step_by_step(weights: list[Any]) -> Any:
        states = start
        for t in range(STEPS):
            (h, states), _ = cell.stateless_call(weights, state, x[:, t], states)
        return h

    for i in range(2):

        def of(function: Any, i: int = i) -> Any:
            return lambda kernel: function([*kernels[:i], kernel, *kernels[i + 1 :]])

        received = value_and_gradient(of(looped), kernels[i], upstream)
        expected = value_and_gradient(of(step_by_step), kernels[i], upstream)
        for got, wanted in zip(received, expected, strict=True):
            assert relative_error(got, wanted) < ROUNDING
            assert np.abs(wanted).max() > 1e-3


# What the loop does.


@pytest.fixture
def quantized_shapes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes of the tensors that went through `fake_quantize`, which kernels do."""
    shapes: list[tuple[int, ...]] = []
    original = Quantizer.fake_quantize

    def counted(self: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
        shapes.append(tuple(x.shape))
        return original(self, x, *args, **kwargs)

    monkeypatch.setattr(Quantizer, "fake_quantize", counted)
    return shapes


@pytest.mark.parametrize("unroll", [False, True])
def test_kernels_are_quantized_once_a_sequence(unroll: bool, quantized_shapes: list):
    """Of both layers, in the forward pass, however often a loop's body is traced."""
    inputs = keras.Input((STEPS, FEATURES))
    x = layers.LSTM(4, return_sequences=True, unroll=unroll)(inputs)
    x = layers.RNN([layers.GRUCell(4), layers.GRUCell(3)], unroll=unroll)(x)
    model = keras.Model(inputs, x)
    rq.quantize(model, rq.QuantizationPolicy("A4W4"), verbose=False)
    once = sorted([(8, 16), (4, 16), (4, 12), (4, 12), (4, 9), (3, 9)])
    quantized_shapes.clear()
    model(draw(0, 2, STEPS, FEATURES))
    assert sorted(quantized_shapes) == once
    batch = draw(0, 2, STEPS, FEATURES), draw(1, 2, 3)
    model.compile("sgd", "mse", run_eagerly=BACKEND == "tensorflow")
    quantized_shapes.clear()
    model.train_on_batch(*batch)
    assert len(quantized_shapes) % len(once) == 0 and set(quantized_shapes) == set(once)
    quantized_shapes.clear()
    model.train_on_batch(*batch)
    assert sorted(quantized_shapes) == ([] if BACKEND == "jax" else once)  # JAX has compiled it


def test_integer_products_in_a_loop():
    layer, x = layers.LSTM(4), draw(0, 2, STEPS, FEATURES)
    layer.build(x.shape)
    other = layers.LSTM(4)
    other.build(x.shape)
    other.set_weights(layer.get_weights())
    quantize(layer)
    rq.quantize(other, rq.QuantizationPolicy("A4W4", forward="int8"), verbose=False)
    assert relative_error(run(other, x)[0], run(layer, x)[0]) < 1e-4


@pytest.mark.parametrize("name", ["lstm", "gru", "bidirectional_lstm", "bidirectional_gru"])
def test_fused_loops_are_left_alone(name: str, monkeypatch: pytest.MonkeyPatch):
    """They would multiply the float kernels without a word."""
    called = []
    monkeypatch.setattr(keras.src.backend, name, lambda *a, **k: called.append(name), raising=False)
    inner = layers.LSTM(4) if "lstm" in name else layers.GRU(4)
    layer = layers.Bidirectional(inner) if "bi" in name else inner
    layer.build((None, STEPS, FEATURES))
    quantize(layer)
    assert run(layer, draw(0, 2, STEPS, FEATURES))[0].shape == (2, 8 if "bi" in name else 4)
    assert not called


@pytest.mark.once
def test_a_cell_that_must_run_on_cudnn_stays_in_float():
    layer = layers.LSTM(4, use_cudnn=True, name="fused")
    layer.build((None, STEPS, FEATURES))
    report = rq.quantize(layer, rq.QuantizationPolicy("A4W4"), verbose=False)
    (reason,) = report.kept_float.values()
    assert "'fused' asks for use_cudnn=True" in reason
    assert layer.use_cudnn is True


@pytest.mark.forward
def test_stateful_layers_go_on_where_they_were():
    layer = layers.GRU(4, stateful=True)
    layer.build((2, STEPS, FEATURES))
    quantize(layer)
    x = draw(0, 2, STEPS, FEATURES)
    first = to_numpy(layer(x))
    second = to_numpy(layer(x))
    layer.reset_state()
    again = to_numpy(layer(x))
    assert np.any(first != second)
    np.testing.assert_array_equal(first, again)


@pytest.mark.forward
def test_masked_steps_leave_the_state_alone():
    layer = quantize(KINDS["LSTM"].make())
    x = draw(0, 2, STEPS, FEATURES)
    short = np.array([[True, True, False]] * 2)
    masked = to_numpy(layer(x, mask=short))
    x[:, 2] = 100.0
    np.testing.assert_array_equal(to_numpy(layer(x, mask=short)), masked)


@pytest.mark.forward
def test_time_distributed_over_an_unknown_number_of_steps():
    """Every step has statistics of its own where the whole batch shares them."""
    policy = rq.QuantizationPolicy(weights=4, activations=Ridge(4))
    inputs = keras.Input((None, FEATURES))
    model = keras.Model(inputs, layers.TimeDistributed(layers.Dense(4))(inputs))
    rq.quantize(model, policy, verbose=False)
    x = draw(0, 2, STEPS, FEATURES)
    kernel = quantized(model.get_weights()[0], Ridge(4), Operand((0,))).y
    expected = quantized(x, Ridge(4), Operand((-1,))).y @ kernel
    assert relative_error(model.predict(x, verbose=0), expected) < ROUNDING


# Reports and files.


@pytest.mark.once
@pytest.mark.parametrize(
    ("layer", "shape", "energy"),
    [
        (lambda: layers.SimpleRNN(5), (7, 3), 7 * (3 + 5) * 5),
        (lambda: layers.LSTM(5), (7, 3), 7 * (3 + 5) * 5 * 4),
        (lambda: layers.GRU(5, reset_after=False), (7, 3), 7 * (3 + 5) * 5 * 3),
        (lambda: layers.RNN(layers.GRUCell(5)), (7, 3), 7 * (3 + 5) * 5 * 3),
        (lambda: layers.ConvLSTM1D(2, 3, strides=2), (7, 9, 3), 7 * 4 * 3 * (3 + 2) * 8),
        (lambda: layers.TimeDistributed(layers.LSTM(5)), (2, 7, 3), 2 * 7 * (3 + 5) * 5 * 4),
        (lambda: layers.TimeDistributed(layers.Dense(5)), (7, 3), 7 * 3 * 5),
        (lambda: layers.LSTM(5), (None, 3), None),
    ],
)
def test_reports_count_the_steps(layer: Any, shape: tuple, energy: int | None):
    model = keras.Sequential([keras.Input(shape), layer()])
    (row,) = rq.quantize(model, rq.QuantizationPolicy("A4W2"), verbose=False).rows
    assert row.energy == (None if energy is None else 4 * 2 * energy)


@pytest.mark.once
def test_every_cell_of_keras_is_known():
    cells = [getattr(layers, name) for name in dir(layers) if name.endswith("Cell")]
    assert all(quantized_class(cell) for cell in [*cells, ConvLSTMCell])


@pytest.mark.once
def test_a_quantized_layer_can_be_put_into_a_bidirectional_one():
    layer = layers.LSTM(4, name="inner")
    layer.build((None, STEPS, FEATURES))
    quantize(layer)
    both = layers.Bidirectional(layer)
    both.build((None, STEPS, FEATURES))
    assert both.forward_layer.name == "forward_inner"
    assert both.backward_layer.go_backwards and not both.forward_layer.go_backwards
    cells = [both.forward_layer.cell, both.backward_layer.cell]
    assert all(cell.quantization == layer.cell.quantization for cell in cells)
