"""The straight-through estimator: the range is the dequantizer, the noise has no gradient."""

from __future__ import annotations

from typing import Any

from keras_rq.numerics.blocks import BlockView
from keras_rq.numerics.dequantizers import Line
from keras_rq.numerics.ranges import Range
from keras_rq.quantizers.base import Quantizer, serializable
from keras_rq.quantizers.rule import Rounding


@serializable
class StraightThrough(Quantizer):
    """Fake quantization whose gradient ignores the rounding (Bengio et al., arXiv 1308.3432).

    Values are `scale * (code - anchor) + origin` with the scale and origin of the range. The
    gradient is the identity; with `trust=0` it is zero outside the range, the clipped variant.

    Args:
        bits: 1, 1.5 (ternary), 2 to 8, or "fp4" (E2M1).
        affine: see `Quantizer`, as for the arguments that follow.

    Raises:
        ValueError: names the argument, the value received and what is accepted.

    Example:

    >>> import numpy as np, keras_rq as rq
    >>> x = np.array([[-1.0, -0.5, 0.5, 1.0]], "float32")
    >>> y = rq.ops.fake_quantize(x, rq.quantizers.StraightThrough(2, range="minmax"))
    >>> [round(float(v), 2) for v in y[0]]
    [-1.0, -0.33, 0.33, 1.0]
    """

    def fit(self, codes: Any, noise: Any, view: BlockView) -> tuple[Any, ...]:
        return ()

    def line(self, span: Range, fitted: tuple[Any, ...]) -> Line:
        shift = self.grid.anchor
        if span.origin is None:
            return Line(span.scale, -shift * span.scale if shift else None)
        return Line(span.scale, span.origin - span.scale * shift)

    def gradient(
        self, rounding: Rounding, fitted: tuple[Any, ...], upstream: Any, pull: tuple[Any, ...]
    ) -> Any:
        return upstream
