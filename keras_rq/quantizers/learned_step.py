"""Learned step size quantization (LSQ)."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import numpy as np
from keras import ops

from keras_rq.numerics.blocks import BlockView
from keras_rq.numerics.dequantizers import Line
from keras_rq.numerics.grids import Grid, grid_for
from keras_rq.quantizers.base import serializable
from keras_rq.quantizers.learned import Learned, element_count
from keras_rq.quantizers.parameters import Observation, Parameter
from keras_rq.quantizers.parametric import Parameters

# Steps at or below zero would turn the grid over; a gradient still lifts them.
_SMALLEST_STEP = 1e-8


@serializable
class LearnedStep(Learned):
    """Learned step size quantization, LSQ (Esser et al., arXiv 1902.08153).

    With the step `s` and `v = x / s`, values are `s * round(clip(v, -Q_N, Q_P))` and

        dy/dx = 1 inside the range, 0 outside
        dy/ds = round(v) - v inside, -Q_N or Q_P outside, times 1 / sqrt(size of x * Q_P)

    (The paper counts the features of an input. Its size here is that of the batch, as in the public
    implementations, so that the same rate moves the step less in a larger batch.)

    Codes are `-2^(b-1) .. 2^(b-1)-1`. An input that calibration never sees below zero has codes
    `0 .. 2^b-1` instead, stored with `2^(b-1)` taken off. Steps start at `2 mean|x| / sqrt(Q_P)`.

    The paper starts at two bits. Here one bit has the codes -1 and 1 (a non-negative input 0 and
    2), the step starts at `mean|x|`, which has the least squared error, and `dy/ds` is the code
    everywhere, as in ParetoQ (arXiv 2502.02631). Ternary and FP4 grids follow the formulas above;
    two linear bits have the codes -2 .. 1.

    The layer keeps the variables: one `step` per block of a kernel, which stands in for the stored
    scale, and one for an input, which `keras_rq.calibrate` must set before training.

    Args:
        bits: 1, 1.5 (ternary), 2 to 8, or "fp4" (E2M1).
        block_size: elements of a kernel along the contraction axis that share a step; "channel":
            one step per output channel; "tensor": one per kernel. An input has one step.
        rotation: see `Quantizer`.
        trust: see `Quantizer`; None stops gradients at the edge of the range, as the paper does.
        sparsity: see `Quantizer`. Pruned elements do not move the step.
        conv_block_size: like `block_size`, along the input channels of a convolution's kernel.

    Raises:
        ValueError: names the argument, the value received and what is accepted.

    Example:

    >>> import numpy as np, keras_rq as rq
    >>> x = np.array([[-1.0, -0.25, 0.5, 0.75]], "float32")
    >>> y = rq.ops.fake_quantize(x, rq.quantizers.LearnedStep(2))  # the step is 2 mean|x|
    >>> [float(v) for v in y[0]]
    [-1.25, 0.0, 0.0, 1.25]
    """

    @functools.cached_property
    def grid(self) -> Grid:
        if self.bits in (1, 1.5, "fp4"):
            return grid_for(self.bits, affine=False)
        # The two's complement codes of an affine grid, counted from zero.
        return dataclasses.replace(grid_for(self.bits, affine=True), anchor=0.0)

    def kernel_parameters(self, view: BlockView) -> dict[str, Parameter]:
        return {"step": Parameter(() if self.block_size == "tensor" else view.statistic_shape)}

    def input_parameters(self) -> dict[str, Parameter]:
        return {"step": Parameter(), "shift": Parameter(trainable=False)}

    def initial(self, values: Any, view: BlockView) -> Parameters:
        scale = 1.0 if self.bits == 1 else 2.0 / math.sqrt(self.grid.high)
        return {"step": scale * view.mean(ops.abs(values))}

    def calibrated(self, seen: Observation) -> dict[str, np.ndarray]:
        shift = 0.0
        if seen.low >= 0 and self.pattern is None and self.bits != "fp4":
            shift = -self.grid.low  # codes from zero up
        high = self.grid.high + shift
        if seen.is_chosen:
            step = max(seen.high / high, seen.low / (self.grid.low + shift) if not shift else 0.0)
        else:
            mean = float(np.abs(seen.sample).mean())
            step = mean if self.bits == 1 else 2 * mean / math.sqrt(high)
        return {"step": np.float32(max(step, _SMALLEST_STEP)), "shift": np.float32(shift)}

    def encode_with(self, values: Any, view: BlockView, parameters: Parameters) -> tuple[Any, Line]:
        step, shift = self._step(parameters), parameters.get("shift")
        codes = self.grid.round(self._position(values, parameters), nearest=view.nearest)
        return codes, Line(step, None if shift is None else step * shift)

    def slopes(
        self, values: Any, codes: Any, view: BlockView, parameters: Parameters
    ) -> tuple[Any, dict[str, Any]]:
        position, shift = self._position(values, parameters), parameters.get("shift", 0.0)
        low, high = self._edges
        beyond = ops.maximum(position - high, low - position)
        to_step = self._outside(codes) + shift
        if self.bits != 1:
            to_step = ops.where(beyond <= 0.0, codes - position, to_step)
        size = element_count(values, view)
        return (
            ops.cast(beyond <= self.reach(), "float32"),
            {"step": to_step * ops.rsqrt(size * (self._levels + shift))},
        )

    def _outside(self, codes: Any) -> Any:
        """`dy/ds` beyond the edges."""
        return codes

    @property
    def _edges(self) -> tuple[float, float]:
        """Where gradients stop, in code units."""
        return self.grid.low, self.grid.high

    @property
    def _levels(self) -> float:
        """`Q_P` of the gradient's factor, for codes around zero."""
        return self.grid.high

    def _step(self, parameters: Parameters) -> Any:
        return ops.maximum(parameters["step"], _SMALLEST_STEP)

    def _position(self, values: Any, parameters: Parameters) -> Any:
        position = values * (1.0 / self._step(parameters))
        shift = parameters.get("shift")
        return position if shift is None else position - shift
