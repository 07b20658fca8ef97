"""Blocks in parts, their statistics several at a time: the way of XLA's CPU backend.

Left alone, it makes a pass over memory for every array that it reduces, and so for every product
of which a statistic is the mean. It makes one pass for several if they are one reduction, along an
axis of few elements. So statistics are taken of parts of a block first, of as many arrays as there
are, and what comes out is reduced further.

Where blocks run along an outer axis, a part is a few rows; they divide the blocks and the last one
too, so that nothing is padded. Where they run along the innermost axis, a part is every so many
elements, and as many parts lie beside each other as a vector of the processor holds, or more.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from keras import ops

from keras_rq.numerics.blocks import BlockView, MergedAxes, SplitView

_SHORTEST, _LONGEST = 8, 16  # elements of a part: reductions of more take ten times as long
_FEWEST_COLUMNS = 32  # below, rows are too short for vector instructions
_LANES = 16  # parts beside each other, or a multiple

_WAYS = {"mean_of_present": "sum", "max": "max", "min": "min"}  # by the name of a statistic
NEUTRAL = {"sum": 0.0, "max": -math.inf, "min": math.inf}  # by way: what changes nothing

Reduce = Callable[[Sequence[Any], Sequence[str], int], Sequence[Any]]


class Parts:
    """A split tensor with the elements of a part on an axis of their own.

    Arithmetic with a statistic, a number or others of its kind works element by element.

    Args:
        values: the array.
        spread: from a statistic to an array that broadcasts against the values.
    """

    def __init__(self, values: Any, spread: Callable[[Any], Any]) -> None:
        self.values, self._spread = values, spread

    def map(self, function: Callable[..., Any], *others: Any) -> Parts:
        """`function` of the values, and of statistics, numbers and others of its kind."""
        return Parts(function(self.values, *map(self._array, others)), self._spread)

    def _array(self, other: Any) -> Any:
        if isinstance(other, Parts):
            return other.values
        return self._spread(other) if len(getattr(other, "shape", ())) else other

    def __add__(self, other: Any) -> Parts:
        return self.map(operator.add, other)

    def __sub__(self, other: Any) -> Parts:
        return self.map(operator.sub, other)

    def __mul__(self, other: Any) -> Parts:
        return self.map(operator.mul, other)

    def __truediv__(self, other: Any) -> Parts:
        return self.map(operator.truediv, other)

    def __rsub__(self, other: Any) -> Parts:
        return self.map(lambda own, other: other - own, other)

    def __neg__(self) -> Parts:
        return self.map(operator.neg)

    def __abs__(self) -> Parts:
        return self.map(ops.abs)

    __radd__, __rmul__ = __add__, __mul__


def elementwise(function: Callable[[Any], Any], values: Any) -> Any:
    """`function` of an array or of parts."""
    return values.map(function) if isinstance(values, Parts) else function(values)


def in_parts(view: BlockView, reduce: Reduce) -> BlockView:
    """A view of the same blocks that takes statistics by way of parts, where it can.

    What it splits are arrays still, for passes over the whole tensor; `for_statistics` has parts.

    Args:
        view: the blocks.
        reduce: `keras_rq.backend.reduce_at_once`.
    """
    if isinstance(view, SplitView):
        merged, size = view.merged, view.block
    elif type(view) is BlockView and len(view.reduced) == 1:
        merged = MergedAxes(view.shape, view.reduced)
        size = view.shape[view.reduced[0]]
    else:
        return view
    inner = [n for a, n in enumerate(view.shape) if a not in merged.axes][merged.position :]
    if size is None or None in inner or len(view.reduced) != 1:
        return view
    if inner:
        return _in_rows(merged, size, math.prod(inner), reduce) or view
    return (_in_lanes(view, reduce) if isinstance(view, SplitView) else None) or view


def _in_rows(merged: MergedAxes, size: int, columns: int, reduce: Reduce) -> BlockView | None:
    part = _part(math.gcd(size, merged.length))
    if part < _SHORTEST or columns < _FEWEST_COLUMNS or size == part:
        return None
    blocks, reduced = merged.length // part, (merged.position + 1,)
    own = {"merged": merged, "blocks": blocks, "block": part, "parts": size // part}
    return _RowsView(merged.shape, reduced, **own, reduce=reduce)


def _in_lanes(view: SplitView, reduce: Reduce) -> BlockView | None:
    if view.block % _LANES or (part := _part(view.block // _LANES)) == 1:
        return None
    own = {"merged": view.merged, "blocks": view.blocks, "block": view.block, "part": part}
    return _LanesView(view.shape, view.reduced, **own, reduce=reduce)


def _part(length: int) -> int:
    return max(n for n in range(1, _LONGEST + 1) if length % n == 0)


@dataclass(frozen=True)
class _PartsView(SplitView):
    """Blocks whose statistics are taken by way of parts.

    Attributes:
        reduce: see `in_parts`.
    """

    reduce: Reduce = field(kw_only=True)

    def _fields(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__dataclass_fields__}


class _Statistics:
    """A `_PartsView` that splits into `Parts`."""

    def split(self, x: Any) -> Parts:
        return Parts(self._laid_out(super().split(x)), self._spread)

    def merge(self, values: Any) -> Any:
        raise NotImplementedError("Parts are for statistics.")

    def at_once(self, *wanted: tuple[str, Parts]) -> tuple[Any, ...]:
        ways = [_WAYS[name] for name, _ in wanted]
        neutral = [NEUTRAL[way] for way in ways]
        given = [
            (self._or(values, absent) if absent else values).values  # zero already: see `present`
            for (_, values), absent in zip(wanted, neutral, strict=True)
        ]
        of_parts = self.reduce(given, ways, self.merged.position + 1)
        made = [
            self._of_blocks(one, getattr(ops, way), absent)
            for one, way, absent in zip(of_parts, ways, neutral, strict=True)
        ]
        pairs = zip(made, ways, strict=True)
        return tuple(ops.multiply(m, self._over_length) if w == "sum" else m for m, w in pairs)

    def mean_of_present(self, values: Parts) -> Any:
        return self.at_once(("mean_of_present", values))[0]

    def magnitude(self, values: Parts) -> Any:
        return self.max(abs(values))

    def max(self, values: Parts) -> Any:
        return self.at_once(("max", values))[0]

    def min(self, values: Parts) -> Any:
        return self.at_once(("min", values))[0]


@dataclass(frozen=True)
class _RowsView(_PartsView):
    """Blocks along an outer axis. `blocks` and `block` are those of the parts.

    Statistics have one entry per part, equal within a block.

    Attributes:
        parts: of a block; the last one may have fewer.
    """

    parts: int = field(kw_only=True)

    @property
    def extents(self) -> None:
        return None  # no whole block lies along the middle axis

    @property
    def for_statistics(self) -> BlockView:
        return _RowsStatistics(**self._fields())


@dataclass(frozen=True)
class _RowsStatistics(_Statistics, _RowsView):
    """Has parts of half the length: other arrays than those of passes over the whole tensor.

    Of equal ones, the compiler would store what both compute.
    """

    @property
    def _split(self) -> int:
        return 2 if self.block % 2 == 0 else 1

    def _laid_out(self, values: Any) -> Any:
        at, sizes, n = self.merged.position, list(ops.shape(values)), self._split
        return ops.reshape(values, [*sizes[:at], sizes[at] * n, self.block // n, *sizes[at + 2 :]])

    def _spread(self, statistic: Any) -> Any:
        one_for_all = statistic.shape[self.merged.position] == 1
        return statistic if one_for_all else self._repeated(statistic, self._split)

    def _repeated(self, statistic: Any, times: int) -> Any:
        at, sizes = self.merged.position, list(ops.shape(statistic))
        shape = [*sizes[: at + 1], times, *sizes[at + 1 :]]
        spread = ops.broadcast_to(ops.expand_dims(statistic, at + 1), shape)
        return ops.reshape(spread, [*sizes[:at], sizes[at] * times, *sizes[at + 1 :]])

    def pivot(self, values: Parts) -> Any:
        first = slice(None, None, self.parts * self._split), slice(0, 1)
        return self._of_parts(values.values[((slice(None),) * self.merged.position) + first])

    def _of_blocks(self, values: Any, reduce: Callable[..., Any], absent: float) -> Any:
        at, sizes = self.merged.position, list(ops.shape(values))
        count = self.parts * self._split
        pads = [[0, 0] for _ in sizes]
        pads[at][1] = -sizes[at] % count
        if pads[at][1]:
            values = ops.pad(values, pads, constant_values=absent)
        values = ops.reshape(values, [*sizes[:at], -1, count, *sizes[at + 1 :]])
        return self._of_parts(reduce(values, axis=at + 1, keepdims=True))

    def _of_parts(self, statistic: Any) -> Any:
        """Statistics of blocks, at each of their parts."""
        whole = (slice(None),) * self.merged.position
        return self._repeated(statistic, self.parts)[(*whole, slice(0, self.blocks))]

    @property
    def _over_length(self) -> np.ndarray:
        rows = np.full(self.blocks, self.parts * self.block)
        whole = self.blocks // self.parts * self.parts
        rows[whole:] = (self.blocks - whole) * self.block
        return (1.0 / self._on_axes(rows[:, None])).astype(np.float32)


@dataclass(frozen=True)
class _LanesView(_PartsView):
    """Blocks along the innermost axis.

    Attributes:
        part: elements of a part.
    """

    part: int = field(kw_only=True)

    @property
    def for_statistics(self) -> BlockView:
        return _LanesStatistics(**self._fields())


@dataclass(frozen=True)
class _LanesStatistics(_Statistics, _LanesView):
    """Statistics of parts are lanes, which one more reduction ends."""

    def _laid_out(self, values: Any) -> Any:
        sizes = list(ops.shape(values))
        return ops.reshape(values, [*sizes[:-1], self.part, self.block // self.part])

    def _spread(self, statistic: Any) -> Any:
        return ops.expand_dims(statistic, self.merged.position + 1)

    def _or(self, values: Parts, absent: float) -> Parts:
        if not self._padding:
            return values
        present = self._laid_out(self._is_present)
        return values.map(lambda array: ops.where(present, array, np.float32(absent)))

    def pivot(self, values: Parts) -> Any:
        return values.values[..., 0, :1]

    def _of_blocks(self, values: Any, reduce: Callable[..., Any], absent: float) -> Any:
        return reduce(values, axis=-1, keepdims=True)

    @property
    def _over_length(self) -> np.ndarray:
        return (1.0 / self._is_present.sum(axis=-1, keepdims=True)).astype(np.float32)
