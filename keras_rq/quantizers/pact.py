"""Parameterized clipping activation (PACT)."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
from keras import ops

from keras_rq.numerics.blocks import BlockView
from keras_rq.numerics.dequantizers import Line
from keras_rq.numerics.grids import Bits, Grid, grid_for
from keras_rq.quantizers.base import serializable
from keras_rq.quantizers.learned import Learned
from keras_rq.quantizers.parameters import Observation, Parameter
from keras_rq.quantizers.parametric import Parameters

# A clip at or below zero would turn the grid over; a gradient still lifts it.
_SMALLEST = 1e-8


@serializable
class PACT(Learned):
    """Parameterized clipping activation, PACT (Choi et al., arXiv 1805.06085): inputs of layers.

    With the learned clip `a`, `y = clip(x, 0, a)` is rounded to `2^b` levels from 0 to `a`, and

        dy/dx = 1 for 0 <= x < a, 0 outside;   dy/da = 1 for x >= a, 0 elsewhere

    The paper clips what a ReLU gives. An input that calibration sees below zero gets the levels
    from `-a` to `a` instead, with `dy/da = -1` for `x <= -a`. Clips start at the largest magnitude
    that calibration finds; the paper's penalty on `a` is the weight decay of an optimizer.

    The layer keeps the variables: one `alpha` for the whole input, which `keras_rq.calibrate` must
    set before training, and whether levels start at 0 or at `-a`.

    Args:
        bits: 1, 1.5 (three levels), or 2 to 8.
        rotation: see `Quantizer`.
        trust: see `Quantizer`; None stops gradients at the edge of the range, as the paper does.

    Raises:
        ValueError: names the argument, the value received and what is accepted.

    Example:

    >>> import numpy as np, keras_rq as rq
    >>> x = np.array([[0.0, 0.4, 0.7, 3.0]], "float32")
    >>> y = rq.ops.fake_quantize(x, rq.quantizers.PACT(2))
    >>> [float(v) for v in y[0]]
    [0.0, 0.0, 1.0, 3.0]
    """

    refused: ClassVar[Mapping[str, str]] = {
        **Learned.refused,
        "affine": "its levels start at zero, or at -alpha",
        "block_size": "an input has one clip",
        "conv_block_size": "an input has one clip",
        "sparsity": "its grid has no code for zero where levels start at -alpha",
    }

    def __init__(self, bits: Bits, **fields: Any) -> None:
        self._refuse(fields)
        super().__init__(bits, **fields)
        if self.bits == "fp4":
            raise ValueError(
                "PACT has uniform levels: `bits` must be 1, 1.5 or 2 to 8. "
                f"Received: bits={bits!r}. Use LearnedStep('fp4')."
            )

    @functools.cached_property
    def grid(self) -> Grid:
        return grid_for(self.bits, affine=True)

    def kernel_parameters(self, view: BlockView) -> dict[str, Parameter]:
        raise ValueError(
            "PACT clips the inputs of layers. "
            f"Received: weights={self!r}. Use LearnedStep(bits) for weights, for example."
        )

    def input_parameters(self) -> dict[str, Parameter]:
        return {"alpha": Parameter(), "floor": Parameter(trainable=False)}

    def initial(self, values: Any, view: BlockView) -> Parameters:
        values = view.present(values)
        is_signed = view.min(values) < 0
        return {"alpha": view.magnitude(values), "floor": -ops.cast(is_signed, "float32")}

    def calibrated(self, seen: Observation) -> dict[str, np.ndarray]:
        largest = max(abs(seen.low), abs(seen.high), _SMALLEST)
        return {"alpha": np.float32(largest), "floor": np.float32(-1.0 if seen.low < 0 else 0.0)}

    def encode_with(self, values: Any, view: BlockView, parameters: Parameters) -> tuple[Any, Line]:
        alpha, lowest = self._ends(parameters)
        step = (alpha - lowest) * (1.0 / (self.grid.high - self.grid.low))
        codes = self.grid.round((values - lowest) * (1.0 / step), nearest=view.nearest)
        return codes, Line(step, lowest - step * self.grid.low)

    def slopes(
        self, values: Any, codes: Any, view: BlockView, parameters: Parameters
    ) -> tuple[Any, dict[str, Any]]:
        alpha, lowest = self._ends(parameters)
        reach = self.reach() * (alpha - lowest) * (1.0 / (self.grid.high - self.grid.low))
        inside = ops.logical_and(values >= lowest - reach, values < alpha + reach)
        below = ops.where(values <= lowest, parameters["floor"], 0.0)
        return (
            ops.cast(inside, "float32"),
            {"alpha": ops.where(values >= alpha, 1.0, below)},
        )

    def _ends(self, parameters: Parameters) -> tuple[Any, Any]:
        alpha = ops.maximum(parameters["alpha"], _SMALLEST)
        return alpha, parameters["floor"] * alpha
