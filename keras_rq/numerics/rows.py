"""Blocks along rows of a matrix, their statistics taken row by row: the way of CPU compilers.

XLA's CPU backend makes a pass over memory for every array that it reduces, and so for every product
of which a statistic is the mean. What it does fuse are operations element by element. Here a sum
over rows is one: the rows are cut out first, the few operations of the summand run on each of them,
and a chain of additions follows, in registers. Only sums of some rows each are ever reduced.

A block is counted in parts of a few rows, which divide it and the last block too, so that nothing
is padded.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from keras import ops

from keras_rq.numerics.blocks import BlockView, MergedAxes, SplitView

_SHORTEST, _LONGEST = 8, 16  # rows of a part
_FEWEST_COLUMNS = 32  # below, rows are too short for vector instructions


class Rows:
    """A split tensor as its rows within the parts, each as wide as a statistic.

    Arithmetic with a statistic, a number or other rows works row by row.
    """

    def __init__(self, rows: Sequence[Any]) -> None:
        self.rows = rows

    def map(self, function: Callable[..., Any], *others: Any) -> Rows:
        """`function` of every row, and of the others where they have rows too."""
        columns = [
            other.rows if isinstance(other, Rows) else [other] * len(self.rows) for other in others
        ]
        return Rows([function(*each) for each in zip(self.rows, *columns, strict=True)])

    def __add__(self, other: Any) -> Rows:
        return self.map(operator.add, other)

    def __sub__(self, other: Any) -> Rows:
        return self.map(operator.sub, other)

    def __mul__(self, other: Any) -> Rows:
        return self.map(operator.mul, other)

    def __abs__(self) -> Rows:
        return self.map(ops.abs)


def elementwise(function: Callable[[Any], Any], values: Any) -> Any:
    """`function` of an array or of rows."""
    return values.map(function) if isinstance(values, Rows) else function(values)


def unbroken(chain: Any) -> Any:
    """What a chain made; it keeps the compiler from taking that apart for its own reduction."""
    return ops.where(ops.isnan(chain), np.float32(np.nan), chain)


def in_parts(view: BlockView) -> BlockView:
    """A view of the same blocks in parts, where rows are long and a part divides all blocks.

    What it splits are arrays still, for passes over the whole tensor; `by_rows` takes statistics.
    Statistics have one entry per part, equal within a block.
    """
    if isinstance(view, SplitView):
        merged, size = view.merged, view.block
    elif type(view) is BlockView and len(view.reduced) == 1:
        merged = MergedAxes(view.shape, view.reduced)
        size = view.shape[view.reduced[0]]
    else:
        return view
    at = merged.position
    inner = [n for a, n in enumerate(view.shape) if a not in merged.axes][at:]
    if size is None or None in inner or len(view.reduced) != 1:
        return view
    part = _part(math.gcd(size, merged.length))
    if part < _SHORTEST or math.prod(inner) < _FEWEST_COLUMNS or size == part:
        return view
    return _PartsView(
        view.shape,
        (at + 1,),
        merged=merged,
        blocks=merged.length // part,
        block=part,
        parts=size // part,
    )


def _part(length: int) -> int:
    return max(n for n in range(1, _LONGEST + 1) if length % n == 0)


@dataclass(frozen=True)
class _PartsView(SplitView):
    """Blocks of several parts, the last one of fewer. `blocks` and `block` are those of the parts.

    Attributes:
        parts: of a block.
    """

    parts: int = field(kw_only=True)

    @property
    def extents(self) -> None:
        return None  # no whole block lies along the middle axis

    @property
    def by_rows(self) -> BlockView:
        return _RowsView(**{name: getattr(self, name) for name in self.__dataclass_fields__})


@dataclass(frozen=True)
class _RowsView(_PartsView):
    """The same, split into `Rows`."""

    def split(self, x: Any) -> Rows:
        x, at = super().split(x), self.merged.position
        before = (slice(None),) * (at + 1)
        return Rows([x[(*before, slice(row, row + 1))] for row in range(self.block)])

    def merge(self, values: Any) -> Any:
        raise NotImplementedError("Rows are for statistics.")

    def mean_of_present(self, values: Rows) -> Any:
        rows = np.full(self.blocks, self.parts * self.block)
        whole = self.blocks // self.parts * self.parts
        rows[whole:] = (self.blocks - whole) * self.block
        total = self._of_blocks(values, operator.add, ops.sum, 0.0)
        return ops.multiply(total, (1.0 / self._on_axes(rows[:, None])).astype(np.float32))

    def magnitude(self, values: Rows) -> Any:
        return self._of_blocks(abs(values), ops.maximum, ops.max, 0.0)

    def max(self, values: Rows) -> Any:
        return self._of_blocks(values, ops.maximum, ops.max, -np.inf)

    def min(self, values: Rows) -> Any:
        return self._of_blocks(values, ops.minimum, ops.min, np.inf)

    def pivot(self, values: Rows) -> Any:
        at = self.merged.position
        return self._to_parts(
            values.rows[0][(slice(None),) * at + (slice(None, None, self.parts),)]
        )

    def _of_blocks(
        self, values: Rows, chain: Callable[..., Any], reduce: Callable[..., Any], absent: float
    ) -> Any:
        """Statistics of blocks, at each of their parts."""
        of_parts = unbroken(functools.reduce(chain, values.rows))
        at, sizes = self.merged.position, list(ops.shape(of_parts))
        pads = [[0, 0] for _ in sizes]
        pads[at][1] = -self.blocks % self.parts
        if pads[at][1]:
            of_parts = ops.pad(of_parts, pads, constant_values=absent)
        of_parts = ops.reshape(of_parts, [*sizes[:at], -1, self.parts, *sizes[at + 1 :]])
        return self._to_parts(reduce(of_parts, axis=at + 1))

    def _to_parts(self, values: Any) -> Any:
        at, sizes = self.merged.position, list(ops.shape(values))
        shape = [*sizes[: at + 1], self.parts, *sizes[at + 1 :]]
        spread = ops.broadcast_to(ops.expand_dims(values, at + 1), shape)
        spread = ops.reshape(spread, [*sizes[:at], -1, *sizes[at + 1 :]])
        return spread[(slice(None),) * at + (slice(0, self.blocks),)]
