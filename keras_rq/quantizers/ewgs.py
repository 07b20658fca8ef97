"""EWGS: a straight-through gradient, larger or smaller by what an element was rounded."""

from __future__ import annotations

from typing import Any

from keras import ops

from keras_rq.numerics.grids import Bits
from keras_rq.quantizers.base import check_nonnegative, serializable
from keras_rq.quantizers.rule import Rounding
from keras_rq.quantizers.straight_through import StraightThrough


@serializable
class EWGS(StraightThrough):
    """Element-wise gradient scaling (Lee, Kim and Ham, arXiv 2104.00903) with a fixed factor.

    With `x_n` the data in units of the width of the grid, clipped to it, and `x_q` the quantized
    data in the same units, the gradient is

        G * (1 + delta * sign(G) * (x_n - x_q))

    so that an element moves the faster, the farther it is from the rounding threshold that its
    update moves it to. Outside the grid the gradient is zero (`trust=0`), as in
    the authors' code; their learned intervals are the `range` here, and their factor that follows
    the Hessian is left out.

    Args:
        bits: 1, 1.5 (ternary), 2 to 8, or "fp4" (E2M1).
        delta: how much the rounding weighs, >= 0. 0 is the clipped straight-through estimator. The
            authors' fixed factor is 0.001.
        affine: see `Quantizer`.
        block_size: see `Quantizer`.
        range: see `Quantizer`.
        rotation: see `Quantizer`.
        trust: see `Quantizer`.
        fade: see `Quantizer`.
        sparsity: see `Quantizer`. To a pruned element `x_q` is zero.
        calibration: "dynamic". Of static ranges the slope alone is known, which does not depend on
            what comes back.
        conv_block_size: see `Quantizer`.

    Raises:
        ValueError: names the argument, the value received and what is accepted.

    Example:

    >>> import numpy as np, keras_rq as rq
    >>> x = np.array([[-1.0, -0.5, 0.5, 1.0]], "float32")
    >>> y = rq.ops.fake_quantize(x, rq.quantizers.EWGS(2, range="minmax"))
    >>> [round(float(v), 2) for v in y[0]]
    [-1.0, -0.33, 0.33, 1.0]
    """

    def __init__(
        self,
        bits: Bits,
        *,
        delta: float = 0.001,
        affine: bool | str = "auto",
        block_size: int | str = 128,
        range: str = "auto",
        rotation: str | None = None,
        trust: float | None = 0.0,
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
        self.delta = check_nonnegative("delta", delta)
        if calibration == "static":
            raise ValueError(
                "EWGS scales gradients by what comes back, which a static range does not do. "
                f"Received: calibration={calibration!r}. Use calibration='dynamic', or "
                "StraightThrough or Ridge for a static range."
            )

    def gradient(
        self, rounding: Rounding, fitted: tuple[Any, ...], upstream: Any, pull: tuple[Any, ...]
    ) -> Any:
        grid, codes = self.grid, rounding.codes
        clipped = ops.clip(codes - rounding.noise, grid.low, grid.high)
        width = grid.high - grid.low
        return upstream + (self.delta / width) * ops.abs(upstream) * (clipped - codes)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "delta": self.delta}
