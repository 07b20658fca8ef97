"""Both passes of a rule as one GPU kernel each: data is read once and written once.

A kernel loads a tile of whole blocks, runs the rule itself on it, traced as it stands, and stores
the result: there is no second copy of the mathematics. Statistics stay in registers, and the
backward kernel finds them again from `x`, which it reads anyway. XLA, given the same functions,
makes a pass over the tensor for every reduction.

On other devices, for tensors whose blocks do not fit a tile, and under `keras.distribution`, whose
partitioner cannot look into a kernel, the rule runs as plain array operations; so it does
everywhere with `KERAS_RQ_KERNELS=0` in the environment.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import keras
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from keras_rq.backend.common import kernels_wanted
from keras_rq.backend.rule import GradientRule
from keras_rq.numerics.blocks import TileView

# Elements of a tile, and of a warp's share of it, that an H200 ran fastest of 2048, 4096 and 8192
# and of 256, 512 and 1024: rows of a matrix by themselves, columns beside each other.
_ROW_TILE, _COLUMN_TILE, _LARGEST_TILE = 2048, 8192, 16384
_SHARE, _LONG_SHARE = 512, 1024
_INNERMOST = 8  # elements along the last axis, for loads of 32 bytes of float32


class _Tiles(NamedTuple):
    """How a tensor `(outer, block, inner)` is cut.

    Attributes:
        shape: of the tensor as kernels see it: (outer, block) where inner is 1.
        tile: of one tile: whole blocks, each axis a power of two.
        axis: of the blocks, in a tile.
        length: of a block.
        grid: number of tiles along each axis but the block's.
    """

    shape: tuple[int, ...]
    tile: tuple[int, int]
    axis: int
    length: int
    grid: tuple[int, ...]

    @classmethod
    def cut(cls, tiling: tuple[int, int, int] | None) -> _Tiles | None:
        if tiling is None or 0 in tiling:
            return None
        outer, length, inner = tiling
        padded = pl.next_power_of_2(length)
        other = outer if inner == 1 else inner
        beside = max(_ROW_TILE // padded, 1) if inner == 1 else _COLUMN_TILE // padded
        beside = min(max(beside, 1 if inner == 1 else _INNERMOST), pl.next_power_of_2(other))
        if padded * beside > _LARGEST_TILE:
            return None
        count = pl.cdiv(other, beside)
        if inner == 1:
            return cls((outer, length), (beside, padded), 1, length, (count,))
        return cls((outer, length, inner), (padded, beside), 0, length, (count, outer))

    @property
    def warps(self) -> int:
        is_long = self.axis == 0 or self.tile[1] >= _ROW_TILE
        share = _LONG_SHARE if is_long else _SHARE
        return max(1, min(16, math.prod(self.tile) // share))

    @property
    def view(self) -> TileView:
        return TileView(self.tile, (self.axis,), length=self.length)

    @property
    def index(self) -> tuple[Any, ...]:
        """Which elements the running kernel works on."""
        other = 1 - self.axis
        start = pl.program_id(0) * self.tile[other]
        place = [pl.ds(0, self.tile[0]), pl.ds(0, self.tile[1])]
        place[other] = pl.ds(start, self.tile[other])
        return (pl.program_id(1), *place) if len(self.shape) == 3 else tuple(place)

    @property
    def mask(self) -> Any:
        """Which elements of the tile exist."""
        other = 1 - self.axis
        inside = None
        sizes = {self.axis: (0, self.length), other: (None, self.shape[-1 if other else 0])}
        for axis, (start, size) in sizes.items():
            if size % self.tile[axis] == 0:
                continue
            start = pl.program_id(0) * self.tile[axis] if start is None else start
            within = start + jax.lax.broadcasted_iota(jnp.int32, self.tile, axis) < size
            inside = within if inside is None else inside & within
        return inside


def forward(rule: GradientRule, x: Any) -> tuple[Any, Sequence[Any]]:
    """The rule's output and statistics; no statistics where a kernel may make the output."""
    inside = rule.inside(x.dtype)
    if (tiles := _tiles(inside)) is None:
        return rule.forward(x)

    def on_tiles(x: Any) -> Any:
        (y,) = run(inside, tiles, lambda tiled, x: tiled.forward(x)[:1], rule.enter(x))
        return rule.leave(y, x.dtype)

    made = jax.lax.platform_dependent(x, cuda=on_tiles, default=lambda x: rule.forward(x)[0])
    return made, ()


def backward(rule: GradientRule, x: Any, statistics: Sequence[Any], upstream: Any) -> Any:
    """Gradient to `x`."""
    return _backward(rule, x, statistics, upstream, again=False)[0]


def backward_and_again(
    rule: GradientRule, x: Any, statistics: Sequence[Any], upstream: Any
) -> tuple[Any, Any]:
    """Gradient to `x`, and the rule's output once more."""
    return _backward(rule, x, statistics, upstream, again=True)


def _backward(
    rule: GradientRule, x: Any, statistics: Sequence[Any], upstream: Any, again: bool
) -> tuple[Any, ...]:
    inside = rule.inside(x.dtype)
    if (tiles := _tiles(inside)) is None:
        gradient = rule.backward(x, statistics, upstream)
        return (gradient, rule.again(x, statistics)) if again else (gradient,)

    def passes(rule: GradientRule, x: Any, upstream: Any) -> tuple[Any, ...]:
        y, statistics = rule.forward(x)
        gradient = rule.backward(x, statistics, upstream)
        return (gradient, y) if again else (gradient,)

    def on_tiles(x: Any, upstream: Any) -> tuple[Any, ...]:
        made = run(inside, tiles, passes, rule.enter(x), rule.enter_back(upstream))
        gradient = rule.leave_back(made[0], x.dtype)
        return (gradient, rule.leave(made[1], x.dtype)) if again else (gradient,)

    plain = functools.partial(passes, rule)
    return jax.lax.platform_dependent(x, upstream, cuda=on_tiles, default=plain)


def on_gpu() -> bool:
    """Whether tensors lie on a GPU unless told otherwise."""
    return jax.default_backend() == "gpu"


def _tiles(rule: GradientRule) -> _Tiles | None:
    if not kernels_wanted() or not on_gpu():
        return None
    if keras.distribution.distribution() is not None:
        return None
    return _Tiles.cut(rule.tiling)


def run(
    rule: GradientRule,
    tiles: _Tiles,
    passes: Callable[..., tuple[Any, ...]],
    *arrays: Any,
    interpret: bool = False,
) -> tuple[Any, ...]:
    """Runs `passes(rule, *tiles)` on every tile of the arrays, which are shaped alike.

    Args:
        rule: the rule of the arrays.
        tiles: how they are cut.
        passes: makes tiles of tiles.
        arrays: what a kernel reads.
        interpret: run the kernel as array operations, on any device.
    """
    tiled = rule.on_view(tiles.view)
    split = [rule.split(a) for a in arrays]
    in_tiles = (jax.ShapeDtypeStruct(tiles.tile, s.dtype) for s in split)
    made = jax.eval_shape(functools.partial(passes, tiled), *in_tiles)

    def kernel(*refs: Any) -> None:
        index, mask = tiles.index, tiles.mask
        loaded = [
            triton.load(ref.at[index], mask=mask, other=None if mask is None else 0.0)
            for ref in refs[: len(arrays)]
        ]
        for ref, value in zip(refs[len(arrays) :], passes(tiled, *loaded), strict=True):
            triton.store(ref.at[index], value, mask=mask)

    made = pl.pallas_call(
        kernel,
        out_shape=[jax.ShapeDtypeStruct(tiles.shape, one.dtype) for one in made],
        grid=tiles.grid,
        compiler_params=triton.CompilerParams(num_warps=tiles.warps),
        interpret=interpret,
        name="keras_rq_tiles",
    )(*(a.reshape(tiles.shape) for a in split))
    return tuple(rule.merge(m.reshape(split[0].shape)) for m in made)
