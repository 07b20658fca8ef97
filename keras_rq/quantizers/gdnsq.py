"""GDNSQ: the bit width is learned, from ten bits down to the target."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from keras import ops

from keras_rq.numerics.blocks import Blocks, BlockView
from keras_rq.numerics.dequantizers import Line
from keras_rq.numerics.dither import random_halves
from keras_rq.numerics.grids import Bits, Grid, grid_for
from keras_rq.quantizers.base import serializable
from keras_rq.quantizers.learned import Learned
from keras_rq.quantizers.parameters import Observation, Parameter
from keras_rq.quantizers.parametric import Parameters
from keras_rq.quantizers.tensor import QuantizedTensor

NOISES = ("dithered", "residual", "none")
STORED_BITS = 8
# Where all elements are equal there is no range to divide: the authors' first step of kernels.
_STEP_OF_A_POINT = 2.0**-12


@serializable
class GDNSQ(Learned):
    r"""Gradual differentiable noise scale quantization (Salishev and Akhremchik, 2508.14004).

    A kernel with the step `s` and the zero point `z = min(x)` of every block, an input with the
    step `s`, the lower bound `z` and the range `q` of the whole tensor:

        v = (x - z) / s,   for inputs clipped to 0 .. q / s - 1
        y = s * round(v) + z

    The layer keeps `log2 s` and `log2 q` and trains them; the number of levels, and with it the bit
    width `log2(q / s)` (of a kernel `log2((max(x) - min(x)) / s + 1)`), is a real number. It starts
    at `start_bits`, and the penalty of `keras_rq.callbacks.GDNSQ` presses it down to `bits` while
    `fit` runs. From then on the codes are those of `bits`, and the model can be exported.

    Gradients, as in the authors' code (MHAQ), with `n = round(v) - v`:

        dy/dx = 1 inside the range, 0 outside
        dy/ds = n + s * noise, less 1 above the range
        dy/dq = 1 above the range;  dy/dz = 1 outside it, 0 inside

    `noise` is `rho / sqrt(3)`, with `rho` -1/2 or 1/2 at random: its variance is that of uniform
    rounding noise, 1/12, and nothing ties it to the data. It is drawn from the bits of the data, of
    the place of an element and of the step (`keras_rq.numerics.dither`), not from a generator: no
    state changes within a layer's call, so rematerialisation works, and a run that is resumed goes
    on as it would have. An input that calibration never sees below zero keeps its lower bound; that
    of other inputs is trained. Through the zero point of a kernel no gradient of `y` passes: the
    two ways cancel.

    Let no weight decay fall on the parameters: it would draw steps towards one.

    Args:
        bits: the target: 1, 1.5 (ternary, 3 levels), or 2 to 8.
        noise: "dithered", as above; "residual": the noise is `n` too, the authors' LSQ setting;
            "none": `dy/ds = n`, which is LSQ's.
        start_bits: the bit width before training, at least that of `bits`.
        block_size: elements of a kernel along the contraction axis that share a step; "channel":
            one step per output channel, as in the paper; "tensor": one per kernel.
        rotation: see `Quantizer`.
        trust: see `Quantizer`; None stops gradients at the edge of the range, as in the paper.
        conv_block_size: like `block_size`, along the input channels of a convolution's kernel.
        others: refused, with what to do instead.

    Raises:
        ValueError: names the argument, the value received and what is accepted.

    Example:

    A tensor by itself has nothing to train, and is quantized at the target:

    >>> import numpy as np, keras_rq as rq
    >>> x = np.array([[-1.0, -0.4, 0.4, 2.0]], "float32")
    >>> y = rq.ops.fake_quantize(x, rq.quantizers.GDNSQ(2))
    >>> [float(v) for v in y[0]]
    [-1.0, 0.0, 0.0, 2.0]
    """

    refused: Mapping[str, str] = {
        **Learned.refused,
        "affine": "its zero point is the smallest value",
        "sparsity": "its zero point is the smallest value, so that zeros would be moved",
    }

    def __init__(
        self,
        bits: Bits,
        *,
        noise: str = "dithered",
        start_bits: float = 10,
        block_size: int | str = "channel",
        rotation: str | None = None,
        trust: float | None = None,
        conv_block_size: int | str = "channel",
        **others: Any,
    ) -> None:
        super().__init__(
            bits,
            block_size=block_size,
            rotation=rotation,
            trust=trust,
            conv_block_size=conv_block_size,
            **others,
        )
        if self.bits == "fp4":
            raise ValueError("GDNSQ has evenly spaced levels. Received: bits='fp4'. Use 1 to 8.")
        if noise not in NOISES:
            raise ValueError(f"`noise` must be one of {list(NOISES)}. Received: noise={noise!r}")
        is_number = isinstance(start_bits, (int, float)) and not isinstance(start_bits, bool)
        if not (is_number and self.target <= start_bits <= 16):
            raise ValueError(
                f"`start_bits` must be a number from the target ({self.bits}) to 16. "
                f"Received: start_bits={start_bits!r}"
            )
        self.noise, self.start_bits = noise, start_bits

    @property
    def has_offset(self) -> bool:
        return True

    @functools.cached_property
    def grid(self) -> Grid:
        return grid_for(self.bits, affine=True)

    @property
    def target(self) -> float:
        """The bit width of the grid, `log2` of its levels."""
        return math.log2(len(self.grid.codes))

    # The variables.

    def kernel_parameters(self, view: BlockView) -> dict[str, Parameter]:
        return {"log_step": Parameter(() if self.block_size == "tensor" else view.statistic_shape)}

    def input_parameters(self) -> dict[str, Parameter]:
        return {
            "log_step": Parameter(),
            "log_range": Parameter(),
            "origin": Parameter(),
            "is_signed": Parameter(trainable=False),
        }

    def initial(self, values: Any, view: BlockView) -> Parameters:
        return self._spread(values, view, self.target)

    def start(self, values: Any, view: BlockView) -> Parameters:
        return self._spread(values, view, self.start_bits)

    def _spread(self, values: Any, view: BlockView, bits: float) -> Parameters:
        """The step at which the values of every block take so many bits."""
        extent = _extent(values, view)
        step = ops.where(extent > 0.0, extent * (1.0 / (2.0**bits - 1.0)), _STEP_OF_A_POINT)
        return {"log_step": ops.log2(step)}

    def calibrated(self, seen: Observation) -> dict[str, np.ndarray]:
        log_step, bits = math.log2(_STEP_OF_A_POINT), 0.0  # of an input that never changes
        if seen.high > seen.low:
            log_step = math.log2((seen.high - seen.low) / (2.0**self.start_bits - 1.0))
            bits = self.start_bits
        found = {
            "log_step": log_step,
            "log_range": log_step + bits,
            "origin": seen.low,
            "is_signed": float(seen.low < 0),
        }
        return {name: np.float32(value) for name, value in found.items()}

    # The two passes.

    def encode_with(self, values: Any, view: BlockView, parameters: Parameters) -> tuple[Any, Line]:
        step, low = ops.exp2(parameters["log_step"]), self.grid.low
        origin = self._origin(values, view, parameters)
        position = _clipped(self._position(values, view, parameters), parameters)
        codes = view.nearest(position) + low
        return codes, Line(step, origin - step * low if low else origin)

    def slopes(
        self, values: Any, codes: Any, view: BlockView, parameters: Parameters
    ) -> tuple[Any, dict[str, Any]]:
        step = ops.exp2(parameters["log_step"])
        position = self._position(values, view, parameters)
        residual = codes - self.grid.low - _clipped(position, parameters)
        to_step = residual + step * self._noise(values, residual, parameters)
        per_octave = math.log(2.0) * step
        if "log_range" not in parameters:
            return ops.ones_like(values), {"log_step": per_octave * to_step}
        top = _top(parameters)
        above = ops.cast(position > top, "float32")
        below = ops.cast(position < 0.0, "float32")
        is_trusted = ops.maximum(position - top, -position) <= self.reach()
        return ops.cast(is_trusted, "float32"), {
            "log_step": per_octave * (to_step - above),
            "log_range": math.log(2.0) * ops.exp2(parameters["log_range"]) * above,
            "origin": parameters["is_signed"] * (above + below),
        }

    def _noise(self, values: Any, residual: Any, parameters: Parameters) -> Any:
        if self.noise == "dithered":
            return random_halves(values, parameters["log_step"]) * (1.0 / math.sqrt(3.0))
        return residual if self.noise == "residual" else 0.0

    def _origin(self, values: Any, view: BlockView, parameters: Parameters) -> Any:
        origin = parameters.get("origin")
        return view.min(values) if origin is None else origin

    def _position(self, values: Any, view: BlockView, parameters: Parameters) -> Any:
        origin = self._origin(values, view, parameters)
        return (values - origin) * ops.exp2(-parameters["log_step"])

    # How wide it is.

    def kernel_width(self, values: Any, view: BlockView, parameters: Parameters) -> Any:
        """The bit width of every block of a kernel (rotated, split), a real number each.

        Its gradient reaches the step, and the largest and the smallest element.
        """
        log_step = ops.convert_to_tensor(parameters["log_step"], dtype="float32")
        return ops.log2(_extent(values, view) + ops.exp2(log_step)) - log_step

    def input_width(self, parameters: Parameters) -> Any:
        """The bit width of an input, a real number."""
        return parameters["log_range"] - parameters["log_step"]

    def kernel_bits(self, x: Any, blocks: Blocks, parameters: Parameters | None = None) -> Bits:
        x = self.rotate(ops.convert_to_tensor(x, dtype="float32"), blocks)
        view = blocks.view(tuple(x.shape))
        values = view.split(x)
        return self._taken(
            self.kernel_width(values, view, parameters or self.initial(values, view))
        )

    def input_bits(self, parameters: Parameters) -> Bits:
        return self._taken(self.input_width(parameters))

    def _taken(self, width: Any) -> Bits:
        """`bits` if they hold all codes of this width, else how many it takes."""
        widest = float(np.max(ops.convert_to_numpy(width)))
        if not math.isfinite(widest):
            return self.start_bits  # not calibrated
        levels = int(np.rint(2.0**widest - 1.0)) + 1
        return self.bits if levels <= len(self.grid.codes) else math.log2(levels)

    def quantize(
        self, x: Any, blocks: Blocks, parameters: Parameters | None = None
    ) -> QuantizedTensor:
        """Codes, scales and offsets of a tensor, at as many bits as they take now.

        Raises:
            ValueError: they take more than 8.
        """
        taken = self.kernel_bits(x, blocks, parameters)
        if taken == self.bits:
            return super().quantize(x, blocks, parameters)
        if taken > STORED_BITS:
            raise ValueError(
                f"Codes that take {taken:.2f} bits cannot be stored: {STORED_BITS} is the most. "
                f"Train on with keras_rq.callbacks.GDNSQ until they take {self.bits}, the target."
            )
        bits = math.ceil(taken)
        wider = self.replace(bits=bits, start_bits=max(self.start_bits, bits))
        return wider.quantize(x, blocks, parameters)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "noise": self.noise, "start_bits": self.start_bits}


def _extent(values: Any, view: BlockView) -> Any:
    return view.max(values) - view.min(values)


def _top(parameters: Parameters) -> Any:
    """The highest position of an input."""
    return ops.exp2(parameters["log_range"] - parameters["log_step"]) - 1.0


def _clipped(position: Any, parameters: Parameters) -> Any:
    if "log_range" not in parameters:
        return position
    return ops.minimum(ops.maximum(position, 0.0), _top(parameters))
