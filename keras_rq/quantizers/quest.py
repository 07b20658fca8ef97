"""QuEST: a rotated tensor on a Gaussian's grid, and gradients where the grid can be trusted."""

from __future__ import annotations

import functools
from typing import Any

from keras import ops

from keras_rq.numerics.grids import Bits, Grid, midrise_grid
from keras_rq.numerics.ranges import Range
from keras_rq.quantizers.base import serializable
from keras_rq.quantizers.rule import Rounding
from keras_rq.quantizers.straight_through import StraightThrough

_RANGES = ("auto", "rms", "absmax", "absmean")
_ROUNDING = 1e-5  # of half a step


@serializable
class QuEST(StraightThrough):
    """Hadamard rotation, Gaussian-optimal grid and trust estimator (QuEST, arXiv 2502.05003).

    The contraction axis is rotated in blocks of 128 (the largest power of two that divides it, if
    that is less), which makes its values look Gaussian. The grid has 2^b levels, symmetric around
    zero and without one at zero; its outermost level lies where the error of a Gaussian of the
    block's root mean square is least. Ternary and FP4 grids have a zero. The gradient is the
    upstream one where the quantized value is a trustworthy stand-in for the value, else zero. If
    both operands of a product are rotated, neither is rotated back before it, and layers where that
    would be wrong are not rotated (see `Quantizer`).

    Of the code: the 1e-8 that the authors add to a scale is left out (a flat row needs none here),
    and a value halfway between two levels goes to the upper one.

    Args:
        bits: 1, 1.5 (ternary), 2 to 8, or "fp4" (E2M1).
        trust: see `Quantizer`. "auto": one half step, the authors' default, and 0.3 for one bit,
            where their runs clip at 1.3 times the level.
        fade: see `Quantizer`.
        block_size: see `Quantizer`; the authors have one scale per token and output channel.
        range: "rms" (which "auto" stands for too), "absmax" or "absmean".
        rotation: see `Quantizer`.
        sparsity: see `Quantizer`; the authors' is "4:8-paired". The tensor is quantized first and
            pruned then. A pruned element's gradient passes if it lies within half a step of zero
            (`trust` half steps, if that is more). With 8 bits the grid of a sparse tensor has 255
            levels and a zero, since 256 and a zero are no byte.
        calibration: see `Quantizer`.
        conv_block_size: see `Quantizer`.

    Raises:
        ValueError: names the argument, the value received and what is accepted.

    Example:

    >>> import numpy as np, keras_rq as rq
    >>> x = np.array([[-1.0, -0.5, 0.5, 1.0]], "float32")
    >>> y = rq.ops.fake_quantize(x, rq.quantizers.QuEST(2, rotation=None))
    >>> [round(float(v), 2) for v in y[0]]
    [-1.18, -0.39, 0.39, 1.18]
    """

    def __init__(
        self,
        bits: Bits,
        *,
        trust: float | str | None = "auto",
        fade: float | None = None,
        block_size: int | str = "channel",
        range: str = "rms",
        rotation: str | None = "hadamard",
        sparsity: Any = None,
        calibration: str = "dynamic",
        conv_block_size: int | str = "channel",
    ) -> None:
        if range not in _RANGES:
            raise ValueError(
                f"`range` of QuEST, whose grid is symmetric around zero, must be one of "
                f"{list(_RANGES)}. Received: range={range!r}"
            )
        is_auto = isinstance(trust, str) and trust == "auto"
        super().__init__(
            bits,
            affine=False,
            block_size=block_size,
            range=range,
            rotation=rotation,
            trust=None if is_auto else trust,
            fade=fade,
            sparsity=sparsity,
            calibration=calibration,
            conv_block_size=conv_block_size,
        )
        self.trust = trust if is_auto else self.trust

    @property
    def range_rule(self) -> str:
        return "rms" if self.range == "auto" else self.range

    @property
    def trust_factor(self) -> float | None:
        if self.trust == "auto":
            return 0.3 if self.bits == 1 else 1.0
        return self.trust

    @functools.cached_property
    def grid(self) -> Grid:
        return midrise_grid(self.bits, sparse=self.sparsity is not None)

    def is_trusted(self, rounding: Rounding, span: Range) -> Any:
        trusted = super().is_trusted(rounding, span)
        if self.pattern is None:
            return trusted
        # The error of what is kept is at most half a step within the grid, so this is about what
        # is pruned.
        reach = max(1.0, self.trust_factor) * 0.5 * self.grid.edge_step
        return ops.logical_and(trusted, ops.abs(rounding.noise) <= reach * (1 + _ROUNDING))

    def get_config(self) -> dict[str, Any]:
        config = super().get_config()
        del config["affine"]
        return config
