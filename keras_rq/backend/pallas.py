"""Both passes of a rule as one GPU kernel each: data is read once and written once.

A kernel loads a tile of whole blocks, runs the rule itself on it, traced as it stands, and stores
the result: there is no second copy of the mathematics. Statistics stay in registers, and the
backward kernel finds them again from `x`, which it reads anyway. XLA, given the same functions,
makes a pass over the tensor for every reduction. Rotations are done on the tile, by the matrix
units; those that do not fit it, or are undone again, before and after, in passes of their own.

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
from keras_rq.backend.pieces import Cut, sizes_of
from keras_rq.backend.rule import GradientRule
from keras_rq.numerics.blocks import TileView
from keras_rq.numerics.rotations import signs, transformed

# Elements of a tile, and of a warp's share of it, that an H200 ran fastest of 2048, 4096 and 8192
# and of 256, 512 and 1024: rows of a matrix by themselves, columns beside each other.
_ROW_TILE, _COLUMN_TILE, _LARGEST_TILE = 2048, 8192, 16384
_SHARE, _LONG_SHARE = 512, 1024
_INNERMOST = 8  # elements along the last axis, for loads of 32 bytes of float32
_PROGRAMS = 132  # one for each multiprocessor of an H200: small tensors have smaller tiles
# Of tiles that are rotated, columns and rows. A warp multiplies 16 rows of them or more: with fewer
# in a tile, or more warps, several do the same, or wait for each other.
_TURN_TILE, _TURN_WARPS = (2048, 8192), (2, 4)
# Of the matrix: sums and differences of pieces do the rest of a rotation. Of 16, 32, 64 and 128, an
# H200 ran 64 fastest.
_TURN_SIDE = 64
_SMALLEST_SIDE = 16  # of a matrix that Triton multiplies


class _Turn(NamedTuple):
    """Rotations of tiles by matrix products of their pieces, and sums and differences of those.

    Attributes:
        length: of the lines that are rotated.
        side: of the matrix.
        axis: of the blocks, in a tile.
        sizes: of the pieces of a block: as long as the matrix, or a single one for rows of several
            lines, padded.
    """

    length: int
    side: int
    axis: int
    sizes: tuple[int, ...]

    @classmethod
    def of(cls, rule: GradientRule) -> _Turn | None:
        """That of a rule; None where nothing is rotated that Triton's matrix products can."""
        length, tiling = rule.turn, rule.inside("float32").tiling
        if length is None or length < _SMALLEST_SIDE or tiling is None:
            return None
        _, block, inner = tiling
        if block == length:
            side = min(length, _TURN_SIDE)
            return cls(length, side, int(inner == 1), (side,) * (length // side))
        return cls(length, length, 1, (pl.next_power_of_2(block),)) if inner == 1 else None

    def __call__(self, pieces: Sequence[Any], matrix: Any) -> list[Any]:
        """Rotated pieces, float32. The matrix is of signs, of 16 bits."""
        made = transformed([self._product(piece, matrix) for piece in pieces])
        return [one * (1.0 / math.sqrt(self.length)) for one in made]

    def _product(self, x: Any, matrix: Any) -> Any:
        # The small parts first.
        parts = reversed(_in_16_bits(x)) if x.dtype == jnp.float32 else [x]
        return functools.reduce(jnp.add, [self._times(part, matrix) for part in parts])

    def _times(self, x: Any, matrix: Any) -> Any:
        if self.axis == 0:
            return jax.lax.dot(matrix, x, preferred_element_type="float32")
        lines = x.reshape(-1, self.side)
        return jax.lax.dot(lines, matrix, preferred_element_type="float32").reshape(x.shape)


class _Tiles(NamedTuple):
    """How a tensor `(outer, block, inner)` is cut.

    Attributes:
        shape: of the tensor as kernels see it: (outer, block) where inner is 1.
        tile: of one tile: whole blocks, a power of two of them.
        axis: of the blocks, in a tile.
        length: of a block.
        grid: number of tiles along each axis but the block's.
        sizes: of the pieces of a block, equal powers of two; a single one may be longer than it.
    """

    shape: tuple[int, ...]
    tile: tuple[int, int]
    axis: int
    length: int
    grid: tuple[int, ...]
    sizes: tuple[int, ...]

    @classmethod
    def of(cls, tiling: tuple[int, int, int] | None, turn: _Turn | None = None) -> _Tiles | None:
        """Tiles for the `tiling` of a rule; None: too large, or nothing that can be rotated.

        Args:
            tiling: see `GradientRule`.
            turn: how they are rotated; None: they are not.
        """
        if tiling is None or 0 in tiling:
            return None
        outer, length, inner = tiling
        padded, is_row = pl.next_power_of_2(length), inner == 1
        other, around, least = (outer, 1, 1) if is_row else (inner, outer, _INNERMOST)
        size, sizes = (_ROW_TILE if is_row else _COLUMN_TILE), sizes_of(length)
        if turn is not None:
            size, sizes = _TURN_TILE[turn.axis], turn.sizes
            least = max(_SMALLEST_SIDE * turn.side // sizes[0], 1)
        beside = min(max(size // padded, least), pl.next_power_of_2(other))
        if padded * beside > _LARGEST_TILE:
            return None
        if turn is not None and beside < least:
            return None
        may_narrow = turn is None or not is_row
        while may_narrow and beside > least and around * pl.cdiv(other, beside) < _PROGRAMS:
            beside //= 2
        count = pl.cdiv(other, beside)
        long = sum(sizes)
        if is_row:
            return cls((outer, length), (beside, long), 1, length, (count,), sizes)
        return cls((outer, length, inner), (long, beside), 0, length, (count, outer), sizes)

    @property
    def warps(self) -> int:
        """Of a kernel that does not rotate."""
        size = pl.next_power_of_2(math.prod(self.tile))
        is_long = size >= _COLUMN_TILE if self.axis == 0 else size // self.tile[0] >= _ROW_TILE
        return max(1, min(16, size // (_LONG_SHARE if is_long else _SHARE)))

    @property
    def view(self) -> TileView:
        return TileView(self.tile, (self.axis,), length=self.length)

    def index(self, piece: int) -> tuple[Any, ...]:
        """Which elements of a piece the running kernel works on."""
        other = 1 - self.axis
        place = [pl.ds(pl.program_id(0) * self.tile[other], self.tile[other])] * 2
        place[self.axis] = pl.ds(piece * self.sizes[0], self.sizes[0])
        return (pl.program_id(1), *place) if len(self.shape) == 3 else tuple(place)

    @property
    def piece(self) -> tuple[int, ...]:
        """Shape of a piece of a tile."""
        return tuple(self.sizes[0] if a == self.axis else n for a, n in enumerate(self.tile))

    @property
    def statistic_shape(self) -> tuple[int, ...]:
        """Of what there is one of for every block."""
        return (self.shape[0], *self.shape[2:])

    @property
    def statistic_index(self) -> tuple[Any, ...]:
        """Which blocks the running kernel works on."""
        size = self.tile[1 - self.axis]
        place = pl.ds(pl.program_id(0) * size, size)
        return (pl.program_id(1), place) if len(self.shape) == 3 else (place,)

    @property
    def statistic_mask(self) -> Any:
        """Which blocks exist; None: all."""
        size, count = self.tile[1 - self.axis], self.statistic_shape[-1]
        if count % size == 0:
            return None
        return pl.program_id(0) * size + jax.lax.broadcasted_iota(jnp.int32, (size,), 0) < count

    def mask(self, piece: int) -> Any:
        """Which elements of a piece exist; None: all."""
        other = 1 - self.axis
        shape, inside = self.piece, None
        sizes = {self.axis: (0, self.length), other: (None, self.shape[-1 if other else 0])}
        for axis, (start, size) in sizes.items():
            if size % self.tile[axis] == 0:
                continue
            start = pl.program_id(0) * self.tile[axis] if start is None else start
            within = start + jax.lax.broadcasted_iota(jnp.int32, shape, axis) < size
            inside = within if inside is None else inside & within
        return inside


def _in_16_bits(x: Any) -> list[Any]:
    """Three bfloat16 tensors whose sum is a float32 one, to the last digit of what is not tiny."""
    parts = []
    for _ in range(3):
        # Cut off, by bits: a cast there and back is what XLA takes for nothing.
        bits = jax.lax.bitcast_convert_type(x, jnp.int32) & -(1 << 16)
        part = jax.lax.bitcast_convert_type(bits, jnp.float32)
        parts.append(part.astype(jnp.bfloat16))
        x = x - part
    return parts


class Kernels(NamedTuple):
    """How a rule runs in kernels.

    Attributes:
        inside: what is left of the rule for them.
        tiles: theirs.
        outside: the rule that says what enters and leaves them.
        turn: how they rotate tiles; None: they do not.
        interpret: run them as array operations, on any device.
    """

    inside: GradientRule
    tiles: _Tiles
    outside: GradientRule
    turn: _Turn | None = None
    interpret: bool = False

    @classmethod
    def of(cls, rule: GradientRule, dtype: Any) -> Kernels | None:
        """Those for a tensor of some dtype; None where its blocks do not fit a tile."""
        inside, turn = rule.inside(dtype), _Turn.of(rule)
        if turn is not None and jnp.dtype(dtype).itemsize in (2, 4):
            tiles = _Tiles.of(inside.tiling, turn)
            if tiles is not None:
                return cls(inside, tiles, inside, turn)
        tiles = _Tiles.of(inside.tiling)
        return None if tiles is None else cls(inside, tiles, rule)

    def forward(self, x: Any) -> Any:
        """The rule's output."""
        (y,) = self._run(lambda rule, x: rule.forward(x)[:1], self.outside.enter(x))
        return self.outside.leave(self._merged(y), x.dtype)

    def integer_codes(self, x: Any) -> tuple[Any, Any, Any]:
        """What the rule's `integer_codes` returns."""
        x = self.outside.enter(x)
        form = jax.tree.structure(jax.eval_shape(self.inside.integer_codes, x))
        made = self._run(lambda rule, x: jax.tree.leaves(rule.integer_codes(x)), x)
        shape = self.inside.view.statistic_shape
        parts = [self._merged(made[0]), *(part.reshape(shape) for part in made[1:])]
        return jax.tree.unflatten(form, parts)

    def backward(self, again: bool, x: Any, upstream: Any) -> tuple[Any, ...]:
        """The gradient to `x`; and, for `again`, the output."""
        given = self.outside.enter(x), self.outside.enter_back(upstream)
        gradient, *y = self._run(functools.partial(_passes, again), *given)
        y = [self.outside.leave(self._merged(one), x.dtype) for one in y]
        return self.outside.leave_back(self._merged(gradient), x.dtype), *y

    def _merged(self, values: Any) -> Any:
        """A tensor from its blocks as kernels see them."""
        return self.inside.merge(values.reshape(self.inside.view.split_shape))

    def _run(self, passes: Callable[..., Sequence[Any]], *arrays: Any) -> Sequence[Any]:
        """`passes(rule, *tiles)` on every tile of arrays that are shaped alike."""
        tiles, turn, dtype = self.tiles, self.turn, arrays[0].dtype
        given = [self.inside.split(a).reshape(tiles.shape) for a in arrays]
        cut = Cut(tiles.axis, tiles.sizes)
        run = functools.partial(cut.run, functools.partial(passes, self.inside.on_view(tiles.view)))
        if turn is None:
            return _call(tiles, run, given, (), tiles.warps, self.interpret)

        def rotated(matrix: Any, x: Sequence[Any], *upstream: Sequence[Any]) -> Sequence[Any]:
            first, *others = run(turn(x, matrix), *upstream)
            if upstream:
                # The gradient. Of 16 bits, one product in their precision: one rounding more than
                # the plain rule, which rotates in float32.
                first = turn([piece.astype(dtype) for piece in first], matrix)
                first = [piece.astype(dtype) for piece in first]
            return [first, *others]

        matrix = jnp.asarray(signs(turn.side), jnp.bfloat16 if dtype == jnp.float32 else dtype)
        return _call(tiles, rotated, given, (matrix,), _TURN_WARPS[turn.axis], self.interpret)


def _passes(again: bool, rule: GradientRule, x: Any, upstream: Any) -> tuple[Any, ...]:
    y, statistics = rule.forward(x)
    gradient = rule.backward(x, statistics, upstream)
    return (gradient, y) if again else (gradient,)


def _call(
    tiles: _Tiles,
    function: Callable[..., Sequence[Sequence[Any]]],
    arrays: Sequence[Any],
    whole: Sequence[Any],
    warps: int,
    interpret: bool,
) -> Sequence[Any]:
    """Runs a function on whole small arrays and the pieces of every tile of others.

    A gradient takes the place of the upstream one; XLA copies that where something else reads it.
    """
    piece = tiles.piece
    shapes = [jax.ShapeDtypeStruct(one.shape, one.dtype) for one in whole]
    pieces = [[jax.ShapeDtypeStruct(piece, a.dtype)] * len(tiles.sizes) for a in arrays]
    made = jax.eval_shape(function, *shapes, *pieces)
    count, end = len(whole), len(arrays) + len(whole)
    replaces = len(arrays) > 1 and made[0][0].dtype == arrays[1].dtype
    are_tiles = [one[0].shape == piece for one in made]

    def kernel(*refs: Any) -> None:
        places = [(tiles.index(piece), tiles.mask(piece)) for piece in range(len(tiles.sizes))]
        small = [triton.load(ref) for ref in refs[:count]]
        loaded = [
            [triton.load(ref.at[i], mask=m, other=None if m is None else 0.0) for i, m in places]
            for ref in refs[count:end]
        ]
        made = function(*small, *loaded)
        for ref, values, is_tile in zip(refs[end:], made, are_tiles, strict=True):
            if is_tile:
                for (index, mask), value in zip(places, values, strict=True):
                    triton.store(ref.at[index], value, mask=mask)
            else:
                index, mask = tiles.statistic_index, tiles.statistic_mask
                triton.store(ref.at[index], values[0].reshape(-1), mask=mask)

    return pl.pallas_call(
        kernel,
        out_shape=[
            jax.ShapeDtypeStruct(tiles.shape if is_tile else tiles.statistic_shape, one[0].dtype)
            for one, is_tile in zip(made, are_tiles, strict=True)
        ],
        grid=tiles.grid,
        input_output_aliases={count + 1: 0} if replaces else {},
        compiler_params=triton.CompilerParams(num_warps=warps),
        interpret=interpret,
        name=f"keras_rq_tiles_{'x'.join(map(str, tiles.shape))}",
    )(*whole, *arrays)


def forward(rule: GradientRule, x: Any) -> tuple[Any, Sequence[Any]]:
    """The rule's output and statistics; no statistics where a kernel may make the output."""
    if (kernels := _kernels(rule, x.dtype)) is None:
        return rule.forward(x)
    return _forward(rule, kernels, x), ()


def integer_codes(rule: GradientRule, x: Any) -> tuple[Any, Any, Any]:
    """What the rule's `integer_codes` returns."""
    if (kernels := _kernels(rule, x.dtype)) is None:
        return rule.integer_codes(x)
    return _integer_codes(rule, kernels, x)


def backward(rule: GradientRule, x: Any, statistics: Sequence[Any], upstream: Any) -> Any:
    """Gradient to `x`."""
    if (kernels := _kernels(rule, x.dtype)) is None:
        return rule.backward(x, statistics, upstream)
    return _backward(rule, kernels, False, x, upstream)[0]


def backward_and_again(
    rule: GradientRule, x: Any, statistics: Sequence[Any], upstream: Any
) -> tuple[Any, Any]:
    """Gradient to `x`, and the rule's output once more."""
    if (kernels := _kernels(rule, x.dtype)) is None:
        return rule.backward(x, statistics, upstream), rule.again(x, statistics)
    return _backward(rule, kernels, True, x, upstream)


def _compiled_once(static: int) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """For eager calls: the next one with equal rules, the first arguments, is not traced again."""
    return functools.partial(jax.jit, static_argnums=tuple(range(static)), inline=True)


@_compiled_once(2)
def _forward(rule: GradientRule, kernels: Kernels, x: Any) -> Any:
    return jax.lax.platform_dependent(x, cuda=kernels.forward, default=lambda x: rule.forward(x)[0])


@_compiled_once(2)
def _integer_codes(rule: GradientRule, kernels: Kernels, x: Any) -> tuple[Any, Any, Any]:
    @jax.custom_jvp
    def made(x: Any) -> tuple[Any, Any, Any]:
        return jax.lax.platform_dependent(x, cuda=kernels.integer_codes, default=rule.integer_codes)

    @made.defjvp
    def _(primals: Sequence[Any], tangents: Sequence[Any]) -> tuple[Any, Any]:
        # Of the rule: a kernel has no derivative of its own.
        return made(*primals), jax.jvp(rule.integer_codes, primals, tangents)[1]

    return made(x)


@_compiled_once(3)
def _backward(
    rule: GradientRule, kernels: Kernels, again: bool, x: Any, upstream: Any
) -> tuple[Any, ...]:
    return jax.lax.platform_dependent(
        x,
        upstream,
        cuda=functools.partial(kernels.backward, again),
        default=functools.partial(_passes, again, rule),
    )


def on_gpu() -> bool:
    """Whether tensors lie on a GPU unless told otherwise."""
    return jax.default_backend() == "gpu"


def _kernels(rule: GradientRule, dtype: Any) -> Kernels | None:
    if not kernels_wanted() or not on_gpu():
        return None
    if keras.distribution.distribution() is not None:
        return None
    return Kernels.of(rule, dtype)
