"""Which codes exist: one bit, ternary, two to eight bits, and FP4 (E2M1).

A grid is a finite set of codes. A *linear* grid is symmetric around zero and `f(x) = x / scale`;
an *affine* grid is anchored at its lowest code and `f(x) = (x - origin) / scale + low`. Codes are
small integers so that products of codes are exact in int32; FP4 codes are half-integers and are
doubled when they are stored (`code_multiplier`).

| bits   | affine codes         | linear codes           |
|--------|----------------------|------------------------|
| 1      | 0, 1                 | -1, 1                  |
| 1.5    | -1, 0, 1             | -1, 0, 1               |
| 2      | -2 .. 1              | -3, -1, 1, 3           |
| b >= 3 | -2^(b-1) .. 2^(b-1)-1| -(2^(b-1)-1) .. 2^(b-1)-1 |
| "fp4"  | E2M1 values          | E2M1 values            |

Two linear bits have no zero: with one they would be the ternary grid again, at two thirds of the
levels (ask for `bits=1.5` if that is wanted). Where the linear grid starts is invisible to the
affine dequantizer, which fits offset and scale itself.

A *mid-rise* grid (`midrise_grid`) has all 2^b levels, symmetric around zero, and hence none at
zero: the value of a code is `scale * (code + 1/2)`.
"""

from __future__ import annotations

import numbers
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from keras import ops

Bits = int | float | str
SUPPORTED_BITS: tuple[Bits, ...] = (1, 1.5, 2, 3, 4, 5, 6, 7, 8, "fp4")

# Edge of the grid, in standard deviations, that minimises the mean squared error of a Gaussian.
# Keys: number of levels of a uniform grid. Even counts are the published values of QuEST
# (arXiv 2502.05003); odd counts, which contain zero, were found by the same minimisation
# (`tests/numerics/test_grids.py` repeats it).
_GAUSSIAN_EDGE = {
    2: 0.7978845587140913,
    3: 1.2240089519030855,
    4: 1.4935346200015913,
    7: 1.952309080644322,
    8: 2.051068354131873,
    15: 2.473879176638324,
    16: 2.513930578568423,
    31: 2.898727917101390,
    32: 2.9160938834961225,
    63: 3.270115066294645,
    64: 3.276597282593217,
    127: 3.607460539106886,
    128: 3.6010497188221655,
    255: 3.920500995757417,
    256: 3.884938678807525,
}
_E2M1_GAUSSIAN_EDGE = 2.92247856  # QuEST's, too


@dataclass(frozen=True)
class Grid:
    """A finite set of codes.

    Attributes:
        bits: the name users give it: 1, 1.5, 2 ... 8 or "fp4".
        codes: all codes in ascending order, as float values.
        anchor: the code at the origin of the range: 0 for linear grids, for affine ones the lowest;
            -1/2 for a mid-rise grid, where zero lies halfway between -1 and 0.
        edge_step: distance between the two outermost codes, in code units.
        gaussian_edge: where the outermost code lies on a standard normal, for the least error.
        code_multiplier: stored integer code = code * code_multiplier.
    """

    bits: Bits
    codes: tuple[float, ...]
    anchor: float
    edge_step: float
    gaussian_edge: float
    code_multiplier: int = 1

    @property
    def low(self) -> float:
        return self.codes[0]

    @property
    def high(self) -> float:
        return self.codes[-1]

    @property
    def affine(self) -> bool:
        return self.anchor == self.low

    def from_zero(self, position: Any) -> Any:
        """A position that is counted from the anchor, counted from the code 0."""
        return self.counted_from(0.0, position)

    def counted_from(self, code: float, position: Any) -> Any:
        """A position that is counted from the anchor, counted from another code."""
        # No compiler leaves out an addition of zero, which makes a zero of minus zero.
        shift = self.anchor - code
        return position + shift if shift else position

    def round(
        self,
        position: Any,
        within: bool = False,
        nearest: Callable[[Any], Any] = ops.round,
    ) -> Any:
        """Nearest code to each `position` (code units, measured from the anchor).

        Args:
            position: float32 tensor.
            within: whether no position lies beyond the outermost codes by more than rounding;
                otherwise what does is clipped.
            nearest: rounds to whole numbers, halves to even ones.
        """
        if self.bits == "fp4":
            return _round_e2m1(self.from_zero(position), nearest)
        if self.edge_step == 2:  # odd integers: halfway is an even integer, which goes up
            codes, shift = 2 * ops.floor(position * 0.5) + 1, 0.0
        elif self.anchor == -0.5:  # halfway is an integer, which goes up: zero does, everywhere
            codes, shift = ops.floor(position), 0.0
        else:
            # Round before the shift to the lowest code: adding first would move ties.
            codes, shift = nearest(position), self.anchor
        if not within:
            codes = ops.clip(codes, self.low - shift, self.high - shift)
        return codes + shift if shift else codes

    def to_index(self, stored: np.ndarray) -> np.ndarray:
        """Index 0 .. len(codes)-1 of stored integer codes (NumPy), as uint8."""
        table = np.asarray(self.codes) * self.code_multiplier
        return np.searchsorted(table, np.asarray(stored, np.float64)).astype(np.uint8)

    def from_index(self, index: np.ndarray) -> np.ndarray:
        """Stored int8 codes of indices made by `to_index` (NumPy)."""
        return (np.asarray(self.codes) * self.code_multiplier).astype(np.int8)[index]


def _round_e2m1(value: Any, nearest: Callable[[Any], Any]) -> Any:
    """Nearest FP4 (E2M1) value, ties to even mantissa as in the OCP microscaling specification."""
    magnitude = ops.abs(value)
    fine, middle, coarse = (
        nearest(2 * magnitude) / 2,
        nearest(magnitude),
        2 * nearest(magnitude / 2),
    )
    rounded = ops.where(magnitude <= 2, fine, ops.where(magnitude <= 4, middle, coarse))
    return ops.sign(value) * ops.minimum(rounded, 6.0)


def check_bits(bits: Any) -> Bits:
    """Returns `bits` in canonical form or raises a `ValueError` that lists what is accepted."""
    if isinstance(bits, str):
        bits = bits.lower()
    scalar = isinstance(bits, (str, numbers.Real)) and not isinstance(bits, bool)
    canonical = [b for b in SUPPORTED_BITS if scalar and b == bits]
    if not canonical:
        raise ValueError(
            f"`bits` must be one of {list(SUPPORTED_BITS)} (1.5 is ternary, 'fp4' is E2M1). "
            f"Received: bits={bits!r}"
        )
    return canonical[0]


def grid_for(bits: Bits, affine: bool) -> Grid:
    """The grid of a bit width.

    Args:
        bits: 1, 1.5 (ternary), 2 to 8, or "fp4".
        affine: whether the dequantizer fits an offset; the grid's anchor is then its lowest code.

    Returns:
        A `Grid`.

    Raises:
        ValueError: for any other `bits`.
    """
    bits = check_bits(bits)
    if bits == "fp4":
        half = (0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
        codes = (*(-v for v in reversed(half)), 0.0, *half)
        return Grid(bits, codes, codes[0] if affine else 0.0, 2.0, _E2M1_GAUSSIAN_EDGE, 2)
    if bits == 1.5:
        low, high, step = -1, 1, 1
    elif affine:
        low = 0 if bits == 1 else -(2 ** (bits - 1))
        high, step = low + 2**bits - 1, 1
    elif bits <= 2:
        high, step = 2**bits - 1, 2
        low = -high
    else:
        high, step = 2 ** (bits - 1) - 1, 1
        low = -high
    return _uniform(bits, low, high, step, float(low) if affine else 0.0)


def midrise_grid(bits: Bits, sparse: bool = False) -> Grid:
    """The levels of QuEST (arXiv 2502.05003): 2^b of them, half a step and more away from zero.

    Args:
        bits: 1, 1.5, 2 to 8, or "fp4". Ternary and FP4 grids have a zero here too.
        sparse: whether pruned elements need a code. It is 0 and no level of the grid, so the levels
            become odd integers, up to 2^b - 1. At 8 bits those and 0 do not fit a byte: the grid
            is then the linear one, of 255 levels with zero among them.

    Returns:
        A `Grid` for a range without an origin.

    Raises:
        ValueError: for any other `bits`.
    """
    bits = check_bits(bits)
    if bits in (1.5, "fp4") or (bits == 8 and sparse):
        return grid_for(bits, affine=False)
    if bits == 1 or sparse:
        high = 2**bits - 1
        return _uniform(bits, -high, high, 2, 0.0)
    return _uniform(bits, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1, 1, -0.5)


def _uniform(bits: Bits, low: int, high: int, step: int, anchor: float) -> Grid:
    codes = tuple(float(c) for c in range(low, high + 1, step))
    return Grid(bits, codes, anchor, float(step), _GAUSSIAN_EDGE[len(codes)])
