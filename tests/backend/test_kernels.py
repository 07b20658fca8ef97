"""Fused kernels against the rule they are made of: the plain path is their oracle."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
from gradients import BACKEND, compiled, relative_error, to_numpy
from keras import ops

from keras_rq.numerics.blocks import BlockView, TileView
from keras_rq.quantizers import EWGS, BitNet, QuEST, Ridge, StraightThrough

on_jax = pytest.mark.skipif(BACKEND != "jax", reason="JAX only")
on_torch = pytest.mark.skipif(BACKEND != "torch", reason="PyTorch only")

QUANTIZERS = [
    Ridge(4),
    Ridge(1, block_size="channel"),
    Ridge(8, block_size="channel", ridge_lambda=0.0),
    Ridge(1, trust=0.5, block_size=64),
    Ridge(1, fade=1.6, block_size=64),
    Ridge(1.5, block_size=32),
    Ridge("fp4", block_size=64),
    Ridge(2, range="absmax", block_size=64),
    Ridge(2, block_size=64),
    StraightThrough(4, trust=0.0, range="rms", block_size=64),
    QuEST(4, rotation=None),
    QuEST(1),
    Ridge(4, rotation="hadamard"),
    Ridge(4, rotation="hadamard", block_size=64),
    BitNet(1, block_size=64),
    EWGS(2, block_size=64),
]
quantizers = pytest.mark.parametrize("quantizer", QUANTIZERS, ids=lambda q: repr(q)[:40])
# Rows that fill no tile, an odd length, columns, columns that fill no tile, a convolution's kernel,
# contraction axes that lie apart; channels that are worked on in pieces, along either axis.
TENSORS = [
    ((37, 128), -1),
    ((5, 200), -1),
    ((256, 48), 0),
    ((200, 20), 0),
    ((3, 3, 8, 20), (0, 1, 2)),
    ((4, 10, 32), (2, 0)),
    ((5, 224), -1),
    ((96, 20), 0),
]
tensors = pytest.mark.parametrize(("shape", "axes"), TENSORS, ids=str)


def make(
    quantizer: Any, shape: tuple[int, ...], axes: Any, dtype: str, unrotate: bool = False
) -> tuple[Any, Any, Any]:
    """A rule, data and an upstream gradient; skips what has no tiles."""
    axes = axes if isinstance(axes, tuple) else (axes,)
    rule = quantizer.rule(shape, quantizer.blocks(axes), unrotate=unrotate)
    if rule.inside(dtype).tiling is None:
        pytest.skip("ragged blocks run as plain array operations")
    rng = np.random.default_rng(0)
    data = (ops.cast(rng.normal(size=shape).astype("float32"), dtype) for _ in range(2))
    return rule, *data


def both(rule: Any, x: Any, upstream: Any) -> tuple[Any, Any]:
    y, statistics = rule.forward(x)
    return rule.backward(x, statistics, upstream), y


def in_kernels(kernels: Any, x: Any, upstream: Any) -> tuple[Any, ...]:
    return *kernels.backward(True, x, upstream), kernels.forward(x)


def check(received: Any, expected: Any, dtype: str) -> None:
    # The last of the 8 digits of bfloat16, of the 11 of float16.
    limit = {"float32": 1e-6, "bfloat16": 1e-2, "float16": 1.5e-3}[dtype]
    for one, other in zip(received, expected, strict=True):
        assert (
            relative_error(to_numpy(ops.cast(one, "float32")), to_numpy(ops.cast(other, "float32")))
            < limit
        )


# Narrow floats are cast where a tile is loaded and stored: rows and columns that fill no tile.
TYPED = [(*tensor, "float32") for tensor in TENSORS]
TYPED += [(*tensor, "bfloat16") for tensor in TENSORS[1:4:2]]
# Long enough for matrix units to rotate them.
TURNED = [
    ((70, 128), -1, "bfloat16"),
    ((70, 384), -1, "float16"),
    ((70, 256), -1, "float32"),
    ((256, 40), 0, "float32"),
    ((256, 40), 0, "bfloat16"),
]
TYPED += TURNED


@on_jax
@quantizers
@pytest.mark.parametrize(("shape", "axes", "dtype"), TYPED, ids=str)
def test_pallas_kernels_equal_the_rule(quantizer: Any, shape: Any, axes: Any, dtype: str):
    from keras_rq.backend import pallas

    for unrotate in {False, quantizer.rotation is not None}:
        rule, x, upstream = make(quantizer, shape, axes, dtype, unrotate)
        kernels = pallas.Kernels.of(rule, x.dtype)._replace(interpret=not pallas.on_gpu())
        received = compiled(functools.partial(in_kernels, kernels))(x, upstream)
        expected = compiled(functools.partial(both, rule))(x, upstream)
        assert all(one.dtype == x.dtype for one in received)
        check(received, (*expected, expected[1]), dtype)


@on_jax
@quantizers
@pytest.mark.parametrize(("shape", "axes", "dtype"), TYPED, ids=str)
def test_codes_of_kernels_equal_those_of_the_rule(
    quantizer: Any, shape: Any, axes: Any, dtype: str
):
    import jax

    from keras_rq.backend import pallas

    rule, x, _ = make(quantizer, shape, axes, dtype)
    kernels = pallas.Kernels.of(rule, x.dtype)._replace(interpret=not pallas.on_gpu())
    received, expected = compiled(lambda x: (kernels.integer_codes(x), rule.integer_codes(x)))(x)
    (codes, sums, line), (own_codes, own_sums, own_line) = received, expected
    assert (codes.dtype, sums.dtype) == ("int8", "int32")
    # A sum in another order can move a position over the edge between two codes.
    assert np.mean(to_numpy(codes) != to_numpy(own_codes)) < 1e-3
    split = to_numpy(rule.view.split(ops.cast(codes, "int32")))
    np.testing.assert_array_equal(to_numpy(sums), split.sum(axis=rule.view.reduced, keepdims=True))
    assert [part is None for part in line] == [part is None for part in own_line]
    for part, own in zip(jax.tree.leaves(line), jax.tree.leaves(own_line), strict=True):
        assert part.shape == own.shape == sums.shape == own_sums.shape
        assert relative_error(to_numpy(part), to_numpy(own)) < 1e-5


@on_jax
@pytest.mark.parametrize(("shape", "axes", "dtype"), TURNED, ids=str)
@pytest.mark.parametrize("method", [QuEST, Ridge])
def test_tensors_are_rotated_in_kernels_that_compile_for_gpus(
    method: Any, shape: Any, axes: Any, dtype: str
):
    import jax

    from keras_rq.backend import pallas

    quantizer = method(1, block_size=128, rotation="hadamard")
    rule, x, upstream = make(quantizer, shape, axes, dtype)
    kernels = pallas.Kernels.of(rule, x.dtype)
    assert kernels.turn.length == 128
    for run in (lambda x, g: kernels.backward(True, x, g), lambda x, g: kernels.integer_codes(x)):
        traced = jax.jit(run).trace(x, upstream)
        assert "keras_rq_tiles" in traced.lower(lowering_platforms=("cuda",)).as_text()


@on_jax
def test_a_rotation_that_is_no_line_of_the_tile_stays_outside():
    from keras_rq.backend import pallas

    quantizer = Ridge(8, block_size="tensor", rotation="hadamard")
    for axis, turn in ((0, None), (1, 128)):
        rule, x, _ = make(quantizer, (128, 128), axis, "float32")
        received = pallas.Kernels.of(rule, x.dtype).turn
        assert (received and received.length) == turn


@on_jax
@pytest.mark.parametrize(("shape", "axis"), [((64, 384), -1), ((384, 64), 0)], ids=str)
def test_channels_in_pieces_compile_for_gpus(shape: tuple[int, int], axis: int):
    import jax

    from keras_rq.backend import pallas

    rule, x, upstream = make(Ridge(8, block_size="channel"), shape, axis, "bfloat16")
    kernels = pallas.Kernels.of(rule, x.dtype)
    assert kernels.tiles.sizes == (128, 128, 128)
    for run in (lambda x, g: kernels.backward(True, x, g), lambda x, g: kernels.integer_codes(x)):
        traced = jax.jit(run).trace(x, upstream)
        assert "keras_rq_tiles" in traced.lower(lowering_platforms=("cuda",)).as_text()


@on_jax
@pytest.mark.parametrize(
    ("length", "sizes"),
    [
        (384, (128, 128, 128)),
        (1536, (512, 512, 512)),
        (224, (32,) * 7),
        (128, (128,)),
        (1, (1,)),
        (200, (256,)),
        (31, (32,)),
        (288, (512,)),
    ],
)
def test_blocks_are_cut_into_few_equal_powers_of_two(length: int, sizes: tuple[int, ...]):
    from keras_rq.backend.pieces import sizes_of

    assert sizes_of(length) == sizes


@on_jax
@pytest.mark.parametrize("axis", [0, 1])
def test_a_function_of_pieces_equals_that_of_the_whole(axis: int):
    import jax
    import jax.numpy as jnp

    from keras_rq.backend.pieces import Cut

    def function(x: Any, y: Any) -> Any:
        total = jnp.sum(x * y, axis, keepdims=True)
        largest = jnp.where(x > 0, x, 0.0).max(axis, keepdims=True)
        return x - total / largest, jnp.broadcast_to(total, x.shape), jnp.log1p(jnp.exp(y))

    sizes = (32, 32, 32)
    shape = (4, 96) if axis else (96, 4)
    whole = [jax.random.normal(jax.random.key(i), shape) for i in range(2)]
    made = Cut(axis, sizes).run(function, *(jnp.split(one, 3, axis) for one in whole))
    for received, expected in zip(made, function(*whole), strict=True):
        assert [one.shape[axis] for one in received] == list(sizes)
        np.testing.assert_allclose(jnp.concatenate(received, axis), expected, rtol=1e-5, atol=1e-5)


@on_jax
@pytest.mark.parametrize("operation", [lambda x: x.cumsum(1), lambda x: x.reshape(-1)])
def test_a_function_that_looks_across_pieces_is_refused(operation: Any):
    import jax.numpy as jnp

    from keras_rq.backend.pieces import Cut

    with pytest.raises(NotImplementedError, match=r"reduces along the blocks\. Received"):
        Cut(1, (32, 32, 32)).run(lambda x: [operation(x)], [jnp.ones((4, 32))] * 3)


@on_jax
@pytest.mark.parametrize("axis", [-1, 0])
def test_the_gpu_path_of_a_whole_quantizer(axis: int, monkeypatch: pytest.MonkeyPatch):
    """On a machine whose default device is a GPU, what runs on its CPU is the plain rule."""
    import jax

    import keras_rq as rq
    from keras_rq.backend import pallas

    x = np.random.default_rng(0).normal(size=(128, 256)).astype("float32")

    def run(x: Any) -> Any:
        y, pull = jax.vjp(lambda x: rq.ops.fake_quantize(x, Ridge(4), axis=axis), x)
        return pull(y * x)[0], y

    expected = jax.jit(run)(x)
    monkeypatch.setattr(pallas, "on_gpu", lambda: True)
    check(jax.jit(lambda x: run(x))(x), expected, "float32")


@on_jax
def test_the_gpu_path_of_codes_and_its_derivative(monkeypatch: pytest.MonkeyPatch):
    import jax

    import keras_rq as rq
    from keras_rq.backend import pallas

    x = np.random.default_rng(0).normal(size=(128, 256)).astype("float32")

    def run(x: Any) -> Any:
        quantized = rq.ops.quantize(x, Ridge(8))
        return (quantized.scale * quantized.offset).sum(), quantized.codes

    expected = jax.jit(jax.value_and_grad(run, has_aux=True))(x)
    monkeypatch.setattr(pallas, "on_gpu", lambda: True)
    received = jax.jit(jax.value_and_grad(lambda x: run(x), has_aux=True))(x)
    np.testing.assert_array_equal(received[0][1], expected[0][1])
    assert relative_error(to_numpy(received[1]), to_numpy(expected[1])) < 1e-4


@on_jax
def test_eager_calls_are_traced_once(monkeypatch: pytest.MonkeyPatch):
    import jax

    import keras_rq as rq
    from keras_rq.backend import pallas
    from keras_rq.quantizers.rule import FakeQuantization

    traced = []

    def counted(rule: Any, x: Any) -> Any:
        traced.append(x.shape)
        return forward(rule, x)

    forward = FakeQuantization.forward
    monkeypatch.setattr(pallas, "on_gpu", lambda: True)
    monkeypatch.setattr(FakeQuantization, "forward", counted)
    pallas._forward.clear_cache()
    x = jax.numpy.ones((8, 128))
    rq.ops.fake_quantize(x, Ridge(4))
    before = len(traced)
    assert before > 0
    rq.ops.fake_quantize(2 * x, Ridge(4))
    assert len(traced) == before


@pytest.fixture
def inductor(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The traced graphs, run without the compiler: its code needs a GPU to be what users run."""
    import torch

    from keras_rq.backend import inductor

    def forget() -> None:
        inductor._forward.cache_clear()
        inductor._backward.cache_clear()

    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    forget()
    yield inductor
    forget()


# PyTorch traces each for half a second; JAX meets all pairs.
PAIRS = [(q, *tensor) for turn, q in enumerate(QUANTIZERS) for tensor in TENSORS[turn % 2 :: 2]]
HALVES = [(q, *tensor[:2]) for q in (QuEST(1), Ridge(4)) for tensor in TURNED[:2]]


@on_torch
@pytest.mark.parametrize(
    ("quantizer", "shape", "axes", "dtype"),
    [*((*pair, "float32") for pair in PAIRS), *((*pair, "bfloat16") for pair in HALVES)],
    ids=lambda value: str(value)[:40],
)
def test_what_pytorch_compiles_equals_the_rule(
    quantizer: Any, shape: Any, axes: Any, dtype: str, inductor: Any
):
    rule, x, upstream = make(quantizer, shape, axes, dtype)
    fused = inductor._Fused(rule, x)
    received = fused.backward(x, (), upstream), fused.forward(x)[0]
    assert all(one.dtype == x.dtype for one in received)
    check(received, both(rule, x, upstream), dtype)


@on_torch
def test_one_pair_of_graphs_serves_all_tensors_with_the_same_blocks(inductor: Any):
    for shape in ((3, 7, 256), (40, 384), (2, 128)):
        rule, x, upstream = make(Ridge(4), shape, -1, "float32")
        fused = inductor._Fused(rule, x)
        received = fused.backward(x, (), upstream), fused.again(x, ())
        check(received, both(rule, x, upstream), "float32")
    assert inductor._forward.cache_info().misses == inductor._backward.cache_info().misses == 1


@pytest.mark.forward
def test_a_tile_rounds_halves_to_even():
    view = TileView((1, 16), (1,), length=16)
    halves = np.arange(-4, 4, 0.5, dtype="float32")[None]
    near = np.nextafter(halves, np.float32(9))
    for values in (halves, near, -near, 1e5 * halves):
        received = to_numpy(view.nearest(ops.convert_to_tensor(values)))
        np.testing.assert_array_equal(received, np.round(values))


@pytest.mark.forward
@pytest.mark.parametrize("length", [5, 8])
def test_a_tile_leaves_its_padding_out(length: int):
    x = np.random.default_rng(0).normal(size=(4, 8)).astype("float32")
    tile, whole = TileView((4, 8), (1,), length=length), BlockView((4, length), (1,))
    for statistic in ("mean", "max", "min"):
        received = to_numpy(getattr(tile, statistic)(ops.convert_to_tensor(x)))
        expected = to_numpy(getattr(whole, statistic)(ops.convert_to_tensor(x[:, :length])))
        assert relative_error(received, expected) < 1e-6
