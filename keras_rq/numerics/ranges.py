"""Where the grid lies over the data: `f(x) = (x - origin) / scale`, one range per block.

Four rules. `minmax` spans the data and is affine; `absmax` reaches the largest magnitude on both
sides; `rms` reaches a number of standard deviations that is optimal for a Gaussian (QuEST, arXiv
2502.05003) and clips what lies beyond; `absmean` puts the outermost of two or three levels at the
mean magnitude (BitNet, arXiv 2310.11453 and 2402.17764) and clips likewise. For more levels, where
BitNet has none, it reaches the square root of half the number of steps times as far. An affine grid
lies around the mean with `rms` and `absmean`, around zero with `absmax`. With `rms`, three or more
evenly spaced levels are then moved to lie between the least and the largest value, and narrowed
where there is less room: of what a ReLU has made, no level is wasted below zero (its noise at two
bits is about halved), and the few levels of a Gaussian stay where they are. No gradient flows
through a range: the paper (arXiv 2409.09245) leaves it open, and a range that carries a gradient
moves by its two outermost elements alone.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from keras import ops

from keras_rq.numerics.blocks import BlockView
from keras_rq.numerics.grids import Grid

RANGES = ("minmax", "absmax", "rms", "absmean")
CLIPPING = ("rms", "absmean")  # values may lie beyond the grid

# Scales below the smallest normal float32 would be flushed to zero on some devices, and then
# divided by. A block that is flatter than this has all its elements on one code.
_SMALLEST = float(np.finfo(np.float32).tiny)

# Of a float32 position, relative to the width of the grid.
_ROUNDING = 1e-6


class Range(NamedTuple):
    """Width of one code (`scale`) and the value of the anchor code (`origin`; None: zero)."""

    scale: Any
    origin: Any

    def position(self, values: Any) -> Any:
        """`values` in code units, measured from the anchor."""
        # One reciprocal a block: a division an element costs more than all else in a pass, and
        # compilers rewrite it into this on some devices and not on others.
        return (values if self.origin is None else values - self.origin) * (1.0 / self.scale)


def find_range(values: Any, view: BlockView, grid: Grid, rule: str) -> Range:
    """Lays a grid over every block.

    Args:
        values: float32 tensor split into blocks by `view`, zero where that holds padding.
        view: the blocks.
        grid: the codes; an affine grid gets an origin, a linear one does not.
        rule: "minmax" (affine grids only), "absmax", "rms" or "absmean".

    Returns:
        A `Range` of float32 statistics, one per block, with the reduced axes kept.
    """
    # Multiplying by a float32 reciprocal, not dividing: converters rewrite the division into it,
    # and rounding ties would fall differently in training and in the exported file.
    if grid.affine:
        low, width = _interval(values, view, grid, rule)
        return Range(_at_least(width * _reciprocal(grid.high - grid.low)), low)
    reach = _magnitude(values, view, grid, rule)
    return Range(_at_least(reach * _reciprocal(grid.high - grid.anchor)), None)


def range_over(low: float, high: float, grid: Grid, is_even: bool = False) -> Range:
    """Lays a grid over a given interval.

    Args:
        low: its lower end.
        high: its upper end.
        grid: the codes.
        is_even: whether to reach as far on both sides of zero as the interval does on one; a linear
            grid does anyway.

    Returns:
        A `Range` of float32 scalars.
    """
    reach = max(abs(low), abs(high))
    if grid.affine:
        low, high = (-reach, reach) if is_even else (low, high)
        span = max((high - low) / (grid.high - grid.low), _SMALLEST), low
    else:
        span = max(reach / (grid.high - grid.anchor), _SMALLEST), None
    return Range(
        *(part if part is None else ops.convert_to_tensor(part, "float32") for part in span)
    )


def _interval(values: Any, view: BlockView, grid: Grid, rule: str) -> tuple[Any, Any]:
    if rule == "minmax":
        low, high = view.at_once(("min", values), ("max", values))
        return low, high - low
    if rule == "absmax":
        reach = view.magnitude(values)
        return -reach, 2 * reach
    if rule == "absmean" or grid.bits in (1, "fp4"):
        center = view.mean_of_present(values)
        # BitNet subtracts the mean from the values and not from their scale.
        reach = _magnitude(values - center if rule == "rms" else values, view, grid, rule)
        # Two levels part at the mean, which is a good place; FP4 is finest in the middle, which
        # stays at the mean.
        return center - reach, 2 * reach
    center, least, largest = view.at_once(
        ("mean_of_present", values), ("min", values), ("max", values)
    )
    farthest = ops.maximum(largest - center, center - least)
    reach = grid.gaussian_edge * _root_mean_square(view.present(values - center), view, farthest)
    width = ops.minimum(2 * reach, largest - least)
    # No `clip`: where rounding makes its bounds cross, backends disagree on which of them wins.
    return ops.maximum(least, ops.minimum(center - reach, largest - width)), width


def _magnitude(values: Any, view: BlockView, grid: Grid, rule: str) -> Any:
    if rule == "rms":
        values = view.present(values)
        return grid.gaussian_edge * _root_mean_square(values, view, view.magnitude(values))
    if rule == "absmean":
        steps = len(grid.codes) - 1
        return math.sqrt(max(1.0, steps / 2)) * view.mean_of_present(abs(values))
    return view.magnitude(values)


def _root_mean_square(values: Any, view: BlockView, farthest: Any) -> Any:
    # Relative to the largest magnitude, so that the squares of huge and tiny values stay finite.
    unit = _at_least(farthest)
    values = values * (1.0 / unit)
    return unit * ops.sqrt(view.mean_of_present(values * values))


def _at_least(scale: Any) -> Any:
    return ops.maximum(scale, _SMALLEST)


def _reciprocal(number: float) -> float:
    return float(np.float32(1.0) / np.float32(number))


def outside(values: Any, span: Range, grid: Grid) -> Any:
    """How far each value lies beyond the outermost codes, in code units; 0 inside the grid."""
    position = grid.from_zero(span.position(values))
    beyond = ops.maximum(position - grid.high, grid.low - position)
    # Extremes of the data may lie on an edge of the range, give or take their rounding.
    return ops.where(beyond > _ROUNDING * (grid.high - grid.low), beyond, 0.0)


def beyond_thresholds(values: Any, span: Range, grid: Grid) -> Any:
    """How far each value lies beyond the outermost threshold, in half steps; 0 between the two.

    A threshold is where the code changes, half a step within an outermost code.
    """
    half, middle = 0.5 * grid.edge_step, 0.5 * (grid.high + grid.low)
    beyond = abs(grid.counted_from(middle, span.position(values))) - (grid.high - middle - half)
    return ops.maximum(beyond * (1.0 / half), 0.0)
