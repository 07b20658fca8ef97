"""Fused kernels against the rule they are made of: the plain path is their oracle."""

from __future__ import annotations

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


def make(quantizer: Any, shape: tuple[int, ...], axes: Any, dtype: str) -> tuple[Any, Any, Any]:
    """A rule, data and an upstream gradient; skips what has no tiles."""
    axes = axes if isinstance(axes, tuple) else (axes,)
    # A 16-bit tensor that is rotated stays so, as in a product of two of them.
    rule = quantizer.rule(shape, quantizer.blocks(axes), unrotate=dtype == "float32")
    if rule.inside(dtype).tiling is None:
        pytest.skip("ragged blocks run as plain array operations")
    rng = np.random.default_rng(0)
    data = (ops.cast(rng.normal(size=shape).astype("float32"), dtype) for _ in range(2))
    return rule, *data


def both(rule: Any, x: Any, upstream: Any) -> tuple[Any, Any]:
    y, statistics = rule.forward(x)
    return rule.backward(x, statistics, upstream), y


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
TURNED = [((70, 128), -1, "bfloat16"), ((70, 384), -1, "float16")]
TYPED += TURNED


@on_jax
@quantizers
@pytest.mark.parametrize(("shape", "axes", "dtype"), TYPED, ids=str)
def test_pallas_kernels_equal_the_rule(quantizer: Any, shape: Any, axes: Any, dtype: str):
    from keras_rq.backend import pallas

    rule, x, upstream = make(quantizer, shape, axes, dtype)
    kernels = pallas.Kernels.of(rule, x.dtype)._replace(interpret=not pallas.on_gpu())

    @compiled
    def made(x: Any, upstream: Any) -> Any:
        return kernels.backward(True, x, upstream), both(rule, x, upstream), kernels.forward(x)

    on_tiles, plain, y = made(x, upstream)
    assert all(one.dtype == x.dtype for one in (*on_tiles, y))
    check(on_tiles, plain, dtype)
    check([y], plain[1:], dtype)


@on_jax
@pytest.mark.parametrize(("shape", "axes", "dtype"), TURNED, ids=str)
@pytest.mark.parametrize("quantizer", [QuEST(1), Ridge(1, rotation="hadamard")], ids=repr)
def test_rows_of_16_bits_are_rotated_in_kernels_that_compile_for_gpus(
    quantizer: Any, shape: Any, axes: Any, dtype: str
):
    import jax

    from keras_rq.backend import pallas

    rule, x, upstream = make(quantizer, shape, axes, dtype)
    kernels = pallas.Kernels.of(rule, x.dtype)
    assert kernels.turn == 128
    traced = jax.jit(lambda x, g: kernels.backward(True, x, g)).trace(x, upstream)
    assert "keras_rq_tiles" in traced.lower(lowering_platforms=("cuda",)).as_text()


@on_jax
@pytest.mark.parametrize(("shape", "axis"), [((64, 384), -1), ((384, 64), 0)], ids=str)
def test_channels_in_pieces_compile_for_gpus(shape: tuple[int, int], axis: int):
    import jax

    from keras_rq.backend import pallas

    rule, x, upstream = make(Ridge(8, block_size="channel"), shape, axis, "bfloat16")
    kernels = pallas.Kernels.of(rule, x.dtype)
    assert kernels.tiles.sizes == (256, 128)
    traced = jax.jit(lambda x, g: kernels.backward(True, x, g)).trace(x, upstream)
    assert "keras_rq_tiles" in traced.lower(lowering_platforms=("cuda",)).as_text()


@on_jax
@pytest.mark.parametrize(
    ("length", "sizes"),
    [(384, (256, 128)), (224, (128, 64, 32)), (128, (128,)), (1, (1,)), (200, (256,)), (31, (32,))],
)
def test_blocks_are_cut_into_few_powers_of_two(length: int, sizes: tuple[int, ...]):
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

    sizes = (32, 64) if axis else (64, 32)
    shape = (4, 96) if axis else (96, 4)
    whole = [jax.random.normal(jax.random.key(i), shape) for i in range(2)]
    at = [sizes[0]]
    made = Cut(axis, sizes).run(function, *(jnp.split(one, at, axis) for one in whole))
    for received, expected in zip(made, function(*whole), strict=True):
        assert [one.shape[axis] for one in received] == list(sizes)
        np.testing.assert_allclose(jnp.concatenate(received, axis), expected, rtol=1e-5, atol=1e-5)


@on_jax
@pytest.mark.parametrize("operation", [lambda x: x.cumsum(1), lambda x: x.reshape(-1)])
def test_a_function_that_looks_across_pieces_is_refused(operation: Any):
    import jax.numpy as jnp

    from keras_rq.backend.pieces import Cut

    with pytest.raises(NotImplementedError, match=r"reduces along the blocks\. Received"):
        Cut(1, (64, 32)).run(lambda x: [operation(x)], [jnp.ones((4, 64)), jnp.ones((4, 32))])


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
HALVES = [(q, *tensor[:2]) for q in (QuEST(1), Ridge(4)) for tensor in TURNED]


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
