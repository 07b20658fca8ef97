"""The quantizer of ParetoQ for weights."""

from __future__ import annotations

import functools
from typing import Any

from keras import ops

from keras_rq.numerics.blocks import BlockView
from keras_rq.numerics.grids import Bits, Grid, grid_for
from keras_rq.quantizers.base import serializable
from keras_rq.quantizers.learned_step import LearnedStep
from keras_rq.quantizers.parameters import Parameter
from keras_rq.quantizers.parametric import Parameters

# Gradients stop at this share of the range, as in the authors' code.
_EDGE = 0.99
# The range over the width of one code, where the two differ.
_STRETCH = {1.5: 1.5, 2: 4.0}
# What the authors' code takes for `dy/da` beyond the edge, over the outermost code. Of a ternary
# grid, whose outer levels are 2/3 of the range, that is 1.
_OUTER = {1.5: 1.0, 2: 0.25}


@serializable
class StretchedElastic(LearnedStep):
    """The weight quantizer of ParetoQ (Liu et al., arXiv 2502.02631).

    With a learned range `a` for every output channel, balanced levels are stretched over it:

        ternary    values a {-2/3, 0, 2/3}             of w / a rounded to thirds
        two bits   values a {-3/4, -1/4, 1/4, 3/4}     of w / a rounded to odd quarters
        dy/dw = 1 for |w / a| <= 0.99, 0 outside
        dy/da = (y - w) / a inside; outside -1 or 1 (ternary), -3/4 or 3/4 (two bits)

    (stretched elastic quantization; `a` starts at `max|w|`). One bit is elastic binarization,
    `a sign(w)` with `dy/da = sign(w)` and `a` from `mean|w|`. From three bits up it is
    `LearnedStep` with a step from `max|w| / Q_P`. The gradient to `a` has the factor of LSQ,
    `1 / sqrt(size of w * Q_P)`, with `Q_P = 1` up to two bits.

    Args:
        bits: 1, 1.5 (ternary), or 2 to 8. The paper goes up to 4.
        block_size: see `LearnedStep`, as for the arguments that follow.
        rotation: see `LearnedStep`.
        trust: see `LearnedStep`; counted from the edge at 0.99.
        sparsity: see `LearnedStep`.
        conv_block_size: see `LearnedStep`.

    Raises:
        ValueError: names the argument, the value received and what is accepted.

    Example:

    >>> import numpy as np, keras_rq as rq
    >>> w = np.array([[-1.0, -0.4, 0.1, 0.6]], "float32")
    >>> y = rq.ops.fake_quantize(w, rq.quantizers.StretchedElastic(2))
    >>> [float(v) for v in y[0]]
    [-0.75, -0.25, 0.25, 0.75]
    """

    def __init__(self, bits: Bits, **fields: Any) -> None:
        super().__init__(bits, **fields)
        if self.bits == "fp4":
            raise ValueError(
                "StretchedElastic has integer grids: `bits` must be 1, 1.5 or 2 to 8. "
                f"Received: bits={bits!r}. Use LearnedStep('fp4')."
            )

    @functools.cached_property
    def grid(self) -> Grid:
        return grid_for(self.bits, affine=False) if self.bits == 2 else super().grid

    def kernel_parameters(self, view: BlockView) -> dict[str, Parameter]:
        return {"alpha": super().kernel_parameters(view)["step"]}

    def input_parameters(self) -> dict[str, Parameter]:
        raise ValueError(
            "StretchedElastic quantizes weights; ParetoQ leaves inputs to another quantizer. "
            f"Received: activations={self!r}. Use LearnedStep(bits), for example."
        )

    def initial(self, values: Any, view: BlockView) -> Parameters:
        if self.bits == 1:
            return {"alpha": view.mean(ops.abs(values))}
        largest = view.magnitude(view.present(values))
        return {"alpha": largest if self.bits in _STRETCH else largest * (1.0 / self.grid.high)}

    def slopes(
        self, values: Any, codes: Any, view: BlockView, parameters: Parameters
    ) -> tuple[Any, dict[str, Any]]:
        to_values, to_parameters = super().slopes(values, codes, view, parameters)
        return to_values, {"alpha": to_parameters["step"] * (1.0 / self._stretch)}

    def _outside(self, codes: Any) -> Any:
        return codes * (_OUTER[self.bits] * self._stretch) if self.bits in _OUTER else codes

    @property
    def _stretch(self) -> float:
        return _STRETCH.get(self.bits, 1.0)

    def _step(self, parameters: Parameters) -> Any:
        return super()._step({"step": parameters["alpha"]}) * (1.0 / self._stretch)

    @property
    def _edges(self) -> tuple[float, float]:
        if self.bits not in _STRETCH:
            return super()._edges
        return -_EDGE * self._stretch, _EDGE * self._stretch

    @property
    def _levels(self) -> float:
        return 1.0 if self.bits in _STRETCH else super()._levels
