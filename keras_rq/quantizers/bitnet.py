"""BitNet: the sign or the nearest of -1, 0, 1, times the mean magnitude."""

from __future__ import annotations

from typing import Any

from keras_rq.numerics.dequantizers import Line
from keras_rq.numerics.grids import Bits
from keras_rq.numerics.ranges import Range
from keras_rq.quantizers.base import check_flag, serializable
from keras_rq.quantizers.straight_through import StraightThrough


@serializable
class BitNet(StraightThrough):
    """Weights and activations of BitNet (arXiv 2310.11453) and BitNet b1.58 (arXiv 2402.17764).

    One bit: `sign(w - mean(w)) * mean(|w|)`. Ternary: the nearest of -1, 0 and 1 to
    `w / mean(|w|)`, times `mean(|w|)`. Both take the mean over the whole tensor, for that is how
    the papers quantize weights. More bits are the papers' activations, 8 bits of them: the largest
    magnitude of a token lies on the outermost code. The gradient is straight-through.

    The papers leave activations of one bit and ternary ones open. The choice here is one mean
    magnitude per token, and `sign(x)` where one bit is asked for: `BitNet(1, centered=False,
    block_size="channel")`, as in `keras_rq.presets.bitnet`. The normalization that the papers put
    before each product is a layer of the model.

    Args:
        bits: 1, 1.5 (ternary), 2 to 8, or "fp4" (E2M1).
        centered: whether one bit is the sign of the difference from the mean, which a sparse tensor
            never is. More bits ignore it.
        block_size: see `Quantizer`. "auto": "tensor" for one bit and ternary, "channel" for more.
        range: see `Quantizer`. "auto": "absmean" for one bit and ternary, "absmax" for more.
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
    >>> x = np.array([[-2.0, -0.25, 0.25, 1.5]], "float32")
    >>> y = rq.ops.fake_quantize(x, rq.quantizers.BitNet(1.5))
    >>> [int(v) for v in y[0]]
    [-1, 0, 0, 1]
    """

    def __init__(
        self,
        bits: Bits,
        *,
        centered: bool = True,
        block_size: int | str = "auto",
        range: str = "auto",
        rotation: str | None = None,
        trust: float | None = None,
        fade: float | None = None,
        sparsity: Any = None,
        calibration: str = "dynamic",
        conv_block_size: int | str = "channel",
    ) -> None:
        self.centered = check_flag("centered", centered)
        if isinstance(block_size, str) and block_size == "auto":
            block_size = "tensor" if bits in (1, 1.5) else "channel"
        super().__init__(
            bits,
            affine=False,
            block_size=block_size,
            range=range,
            rotation=rotation,
            trust=trust,
            fade=fade,
            sparsity=sparsity,
            calibration=calibration,
            conv_block_size=conv_block_size,
        )

    @property
    def has_offset(self) -> bool:
        return self.bits == 1 and self.centered and self.sparsity is None

    @property
    def range_rule(self) -> str:
        if self.range != "auto":
            return self.range
        return "absmean" if self.bits in (1, 1.5) else "absmax"

    def line(self, span: Range, fitted: tuple[Any, ...]) -> Line:
        if not self.grid.affine:
            return super().line(span, fitted)
        # The mean is subtracted and not added again: the two levels lie around zero.
        return Line(span.scale, span.scale * (-0.5 * (self.grid.low + self.grid.high)))

    def get_config(self) -> dict[str, Any]:
        config = {**super().get_config(), "centered": self.centered}
        del config["affine"]
        return config
