"""The denoising quantizer: ridge regression of the data onto its own codes."""

from __future__ import annotations

from typing import Any

from keras_rq.numerics.blocks import BlockView
from keras_rq.numerics.dequantizers import (
    Line,
    RidgeFit,
    ridge_fit_noise,
    ridge_gradient,
    ridge_pull,
)
from keras_rq.numerics.grids import Bits
from keras_rq.numerics.ranges import Range
from keras_rq.quantizers.base import Quantizer, check_flag, check_nonnegative, serializable
from keras_rq.quantizers.rule import Rounding


@serializable
class Ridge(Quantizer):
    """Additive-noise quantization with a ridge-regression dequantizer (arXiv 2409.09245).

    Codes are `q = f(x) + delta`, with the noise `delta` (rounding, clipping, pruning) a constant
    for the gradient. Scale and offset are the ridge regression of `x` onto `q`, block by block, and
    do carry gradient, so that the backward pass knows the noise where a straight-through estimator
    ignores it. Forward and backward formulas: `keras_rq.numerics.dequantizers`.

    Args:
        bits: 1, 1.5 (ternary), 2 to 8, or "fp4" (E2M1).
        affine: see `Quantizer`.
        ridge_lambda: penalty on the slope, >= 0, in squared code units; mean-normalised, so that
            its weight does not depend on the block size. The paper uses 0.01 throughout.
        fit_gradient: whether the fitted scale and offset carry gradient, as in the paper. Without
            it, the gradient is a multiple of the upstream one: straight-through, with the scale of
            a least-squares fit.
        block_size: see `Quantizer`.
        range: see `Quantizer`.
        rotation: see `Quantizer`.
        trust: see `Quantizer`.
        fade: see `Quantizer`.
        sparsity: see `Quantizer`.
        calibration: see `Quantizer`.
        conv_block_size: see `Quantizer`.

    Raises:
        ValueError: names the argument, the value received and what is accepted.

    Example:

    >>> import numpy as np, keras_rq as rq
    >>> x = np.array([[-1.0, -0.5, 0.5, 1.0]], "float32")
    >>> y = rq.ops.fake_quantize(x, rq.quantizers.Ridge(1, ridge_lambda=0.0))
    >>> [round(float(v), 2) for v in y[0]]  # the two levels are the class means
    [-0.75, -0.75, 0.75, 0.75]
    """

    def __init__(
        self,
        bits: Bits,
        *,
        affine: bool | str = "auto",
        ridge_lambda: float = 0.01,
        fit_gradient: bool = True,
        block_size: int | str = 128,
        range: str = "auto",
        rotation: str | None = None,
        trust: float | None = None,
        fade: float | None = None,
        sparsity: Any = None,
        calibration: str = "dynamic",
        conv_block_size: int | str = "channel",
    ) -> None:
        super().__init__(
            bits,
            affine=affine,
            block_size=block_size,
            range=range,
            rotation=rotation,
            trust=trust,
            fade=fade,
            sparsity=sparsity,
            calibration=calibration,
            conv_block_size=conv_block_size,
        )
        self.ridge_lambda = check_nonnegative("ridge_lambda", ridge_lambda)
        self.fit_gradient = check_flag("fit_gradient", fit_gradient)

    def fit(self, codes: Any, noise: Any, view: BlockView) -> RidgeFit:
        # Positions on codes, rather than values on codes: a flat block is then exactly zero, and
        # the slope over the width of one code, which the gradient needs, is no rounding error
        # over a tiny width.
        return ridge_fit_noise(codes, noise, view, self.has_offset, self.ridge_lambda)

    def line(self, span: Range, fitted: tuple[Any, ...]) -> Line:
        fit = RidgeFit(*fitted)
        scale = span.scale * fit.slope
        if span.origin is None:
            return Line(scale, None)
        position_mean = fit.code_mean - fit.noise_mean - self.grid.anchor
        value_mean = span.origin + span.scale * position_mean
        return Line(scale, value_mean - scale * fit.code_mean, fit.code_mean, value_mean)

    def pull(
        self, rounding: Rounding, fitted: tuple[Any, ...], upstream: Any, view: BlockView
    ) -> tuple[Any, ...]:
        if not self.fit_gradient:
            return ()
        return ridge_pull(RidgeFit(*fitted), rounding.codes, upstream, view)

    def gradient(
        self, rounding: Rounding, fitted: tuple[Any, ...], upstream: Any, pull: tuple[Any, ...]
    ) -> Any:
        if not self.fit_gradient:
            return RidgeFit(*fitted).slope * upstream
        return ridge_gradient(RidgeFit(*fitted), rounding.codes, rounding.noise, upstream, *pull)

    def get_config(self) -> dict[str, Any]:
        own = {"ridge_lambda": self.ridge_lambda, "fit_gradient": self.fit_gradient}
        return {**super().get_config(), **own}
