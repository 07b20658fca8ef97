"""Blocks along the innermost axis, their statistics taken lane by lane: the way of CPU compilers.

What `keras_rq.numerics.rows` does with the rows of a matrix is done here within a line. A block is
cut into pieces of some neighbours, as long as a vector of the processor or a multiple of it; the
few operations of a summand run on each piece, and a chain of additions adds them up. Only what is
left, a number for each lane, is reduced.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from keras import ops

from keras_rq.numerics.blocks import BlockView, SplitView
from keras_rq.numerics.rows import Rows, unbroken

_LANES = 16  # or a multiple
_MOST_PIECES = 16


def in_lanes(view: BlockView) -> BlockView:
    """A view of the same blocks, its statistics taken lane by lane where lanes fill the blocks."""
    if type(view) is not SplitView or _pieces(view.block) == 1:
        return view
    at, rank = view.merged.position, len(view.shape) - len(view.merged.axes) + 1
    if at != rank - 1 or view.reduced != (at + 1,):
        return view
    return _LanesView(
        view.shape, view.reduced, merged=view.merged, blocks=view.blocks, block=view.block
    )


def _pieces(block: int) -> int:
    return max(n for n in range(1, _MOST_PIECES + 1) if block % (n * _LANES) == 0 or n == 1)


@dataclass(frozen=True)
class _LanesView(SplitView):
    """What it splits are arrays still, for passes over the whole tensor."""

    @property
    def by_rows(self) -> BlockView:
        return _PiecesView(**{name: getattr(self, name) for name in self.__dataclass_fields__})


@dataclass(frozen=True)
class _PiecesView(_LanesView):
    """The same, split into `Rows`, each of a piece of every block."""

    def split(self, x: Any) -> Rows:
        return Rows(self._cut(super().split(x)))

    def merge(self, values: Any) -> Any:
        raise NotImplementedError("Pieces are for statistics.")

    def _cut(self, x: Any) -> list[Any]:
        length = self.block // _pieces(self.block)
        return [x[..., start : start + length] for start in range(0, self.block, length)]

    def _or(self, values: Rows, absent: float) -> Rows:
        if not self._padding:
            return values
        masks = self._cut(self._is_present)
        chosen = zip(masks, values.rows, strict=True)
        return Rows(
            [row if m.all() else ops.where(m, row, np.float32(absent)) for m, row in chosen]
        )

    def mean_of_present(self, values: Rows) -> Any:
        lengths = self._is_present.sum(axis=-1, keepdims=True)
        total = self._of_blocks(values, operator.add, ops.sum)
        return ops.multiply(total, (1.0 / lengths).astype(np.float32))

    def magnitude(self, values: Rows) -> Any:
        return self._of_blocks(abs(values), ops.maximum, ops.max)

    def max(self, values: Rows) -> Any:
        return self._of_blocks(self._or(values, -np.inf), ops.maximum, ops.max)

    def min(self, values: Rows) -> Any:
        return self._of_blocks(self._or(values, np.inf), ops.minimum, ops.min)

    def pivot(self, values: Rows) -> Any:
        return values.rows[0][..., :1]

    @staticmethod
    def _of_blocks(values: Rows, chain: Callable[..., Any], reduce: Callable[..., Any]) -> Any:
        return reduce(unbroken(functools.reduce(chain, values.rows)), axis=-1, keepdims=True)
