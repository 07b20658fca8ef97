"""Ranges that are fixed after calibration: `calibration="static"`.

Calibration fixes the grid and the dequantizer of an input, for the whole tensor: the range comes
from its observer, and the line from the estimator's own regression over a sample of all that
calibration has seen. Both then are constants, `x~ = scale * code + offset`, so that integer
inference needs no statistics of the data at hand.

For the gradient, the regression of very many elements onto their codes hardly moves with one of
them: of the closed form in `keras_rq.numerics.dequantizers` the first-order term remains,
`dL/dx = (scale / range_scale) G`, masked by `trust` and `fade`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from keras import ops

from keras_rq.numerics import ranges
from keras_rq.numerics.blocks import Blocks, BlockView
from keras_rq.numerics.dequantizers import Line
from keras_rq.numerics.ranges import Range
from keras_rq.quantizers.parameters import Observation, Parameter
from keras_rq.quantizers.parametric import Parameters

if TYPE_CHECKING:
    from keras_rq.quantizers.base import Quantizer


def parameters(quantizer: Quantizer) -> dict[str, Parameter]:
    """What a layer keeps: where the grid lies, and the line; none is trained."""
    names = ["range_scale", "scale"]
    names += ["range_origin"] if quantizer.grid.affine else []
    # Without a level at zero, as on QuEST's grids, a line without an origin has an offset too.
    names += ["offset"] if quantizer.has_offset or quantizer.grid.anchor else []
    return {name: Parameter((), trainable=False) for name in names}


def initial(quantizer: Quantizer, values: Any, view: BlockView) -> Parameters:
    """The parameters that make a tensor's own statistics static."""
    span = ranges.find_range(values, view, quantizer.grid, quantizer.range_rule)
    return _fitted(quantizer, values, view, span)


def calibrated(quantizer: Quantizer, seen: Observation) -> dict[str, np.ndarray]:
    """The parameters after calibration."""
    sample = ops.convert_to_tensor(seen.sample, dtype="float32")
    view = Blocks(size="tensor").view(tuple(sample.shape))
    if quantizer.range_rule in ranges.CLIPPING and not seen.is_chosen:
        found = initial(quantizer, sample, view)
    else:
        is_even = quantizer.range_rule == "absmax"
        span = ranges.range_over(seen.low, seen.high, quantizer.grid, is_even)
        found = _fitted(quantizer, sample, view, span)
    return {name: ops.convert_to_numpy(value).reshape(()) for name, value in found.items()}


def encode(quantizer: Quantizer, values: Any, view: BlockView, given: Parameters) -> Any:
    """Codes, and the line."""
    codes = _round(quantizer, values, view, _span(given))
    return codes, Line(given["scale"], given.get("offset"))


def slopes(quantizer: Quantizer, values: Any, given: Parameters) -> tuple[Any, dict[str, Any]]:
    """The derivative of the outputs to the data; none to the parameters."""
    span = _span(given)
    slope = given["scale"] / span.scale
    if quantizer.trust_factor is not None:
        reach = quantizer.trust_factor * 0.5 * quantizer.grid.edge_step
        slope = ops.where(ranges.outside(values, span, quantizer.grid) <= reach, slope, 0.0)
    return quantizer.faded(slope, values, span), {}


def _span(given: Parameters) -> Range:
    return Range(given["range_scale"], given.get("range_origin"))


def _round(quantizer: Quantizer, values: Any, view: BlockView, span: Range) -> Any:
    return quantizer.grid.round(span.position(values), nearest=view.nearest)


def _fitted(quantizer: Quantizer, values: Any, view: BlockView, span: Range) -> Parameters:
    codes = view.present(_round(quantizer, values, view, span))
    noise = codes - quantizer.grid.from_zero(span.position(values))
    line = quantizer.line(span, quantizer.fit(codes, noise, view))
    found = {"range_scale": span.scale, "scale": line.scale}
    if span.origin is not None:
        found["range_origin"] = span.origin
    if line.offset is not None:
        found["offset"] = line.offset
    return found
