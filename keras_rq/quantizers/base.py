"""The quantizer: independent fields, one forward pass, and an estimator for the gradient.

A tensor travels in one direction: blocks -> sparsity -> range -> grid -> dequantizer -> blocks. An
estimator is a subclass that says how codes become values (`fit`) and what gradient comes back
(`gradient`); everything else is a field.
"""

from __future__ import annotations

import functools
import numbers
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Self

import keras
from keras import ops

from keras_rq import backend
from keras_rq.backend.rule import Forward
from keras_rq.numerics import ranges, rotations, sparsity
from keras_rq.numerics.blocks import Blocks, BlockView, check_block_size
from keras_rq.numerics.dequantizers import Line
from keras_rq.numerics.grids import Bits, Grid, check_bits, grid_for
from keras_rq.numerics.parts import elementwise
from keras_rq.numerics.ranges import Range
from keras_rq.quantizers import parametric, static
from keras_rq.quantizers.parameters import Observation, Parameter
from keras_rq.quantizers.parametric import Parameters
from keras_rq.quantizers.rule import FakeQuantization, Rounding, cast_within
from keras_rq.quantizers.tensor import QuantizedTensor, rotate


class Encoding(NamedTuple):
    """One tensor, quantized. All parts are float32 and split into blocks by the view.

    Attributes:
        codes: integers (half-integers for FP4), 0 where pruned or padded.
        noise: `codes - f(x)`: rounding, clipping and pruning together.
        span: where the grid lies, one per block.
        fitted: what the estimator knows of every block, as `Quantizer.fit` returned it.
        line: how codes become values, one per block.
    """

    codes: Any
    noise: Any
    span: Range
    fitted: tuple[Any, ...]
    line: Line


class Quantizer:
    """Fields that every estimator shares. Use a subclass such as `Ridge`.

    Quantizers are immutable, serializable and hold no variables, so that one can serve many layers:
    a layer keeps what a quantizer learns.

    Args:
        bits: 1, 1.5 (ternary), 2 to 8, or "fp4" (E2M1).
        affine: fit an offset as well as a scale. "auto": an offset for integer grids, none for
            ternary, FP4 and sparse tensors, whose zero must stay zero. (The shorthand of a policy
            gives ternary inputs one.)
        block_size: elements along the contraction axis that share statistics; "channel": all of
            them; "tensor": the whole tensor. Convolutions have `conv_block_size` instead.
        range: "minmax", "absmax", "rms" or "absmean" (see `keras_rq.numerics.ranges`). "auto":
            "rms" up to two bits, where reaching the outliers costs more than clipping them (the
            paper leaves the range open; digits network at A1W1: 93 % against 82 % with "minmax");
            above, "minmax" where there is an offset and "absmax" where there is none.
        rotation: None or "hadamard", along the contraction, before statistics are taken. Operands
            that are both rotated have the same product. Where they do not (depthwise convolutions,
            some grouped ones, tables whose rows are looked up), `keras_rq.quantize` drops the
            rotation of both. If one operand alone is rotated, it is rotated back before
            the product, which an exported file then computes in float. Codes, levels and zeros
            are those of the rotated tensor: rotated back, it has other values and hardly a zero.
        trust: None, or a factor >= 0: gradients stop at elements that lie farther outside the grid
            than this many half steps (QuEST, arXiv 2502.05003). 0 stops them at the edge. What is
            pruned lies inside as a rule, and keeps its gradient.
        fade: None, or a number > 0: gradients of elements beyond the outermost threshold fade with
            their distance from it, as a Gaussian whose standard deviation is this many half steps.
            With one bit the only threshold is the middle. What `trust` cuts off at a point, this
            lets out by degrees.
        sparsity: None, "N:M", (N, M), "N:M-paired" (neighbours stay or go together), or the
            fraction of zeros.
        calibration: "dynamic", the statistics of the tensor at hand; "static", for inputs of
            layers: one range and one dequantizer for the whole tensor, whatever `block_size` says,
            fixed by `keras_rq.calibrate` (see `keras_rq.quantizers.static`).
        conv_block_size: like `block_size`, along the input channels of a convolution. "channel"
            gives one scale and offset per sample to its input and per output channel to its kernel:
            only then does it remain one integer convolution. An integer lowers to a sum of them.

    Raises:
        ValueError: names the argument, the value received and what is accepted.
    """

    def __init__(
        self,
        bits: Bits,
        *,
        affine: bool | str = "auto",
        block_size: int | str = 128,
        range: str = "auto",
        rotation: str | None = None,
        trust: float | None = None,
        fade: float | None = None,
        sparsity: Any = None,
        calibration: str = "dynamic",
        conv_block_size: int | str = "channel",
    ) -> None:
        self.bits = check_bits(bits)
        self.affine = _check_choice("affine", affine, ("auto", True, False))
        self.block_size = check_block_size(block_size)
        self.range = _check_choice("range", range, ("auto", *ranges.RANGES))
        self.rotation = rotations.check_rotation(rotation)
        self.trust = None if trust is None else check_nonnegative("trust", trust)
        self.fade = None if fade is None else check_positive("fade", fade)
        self.sparsity = _sparsity_text(sparsity)
        self.calibration = _check_choice("calibration", calibration, ("dynamic", "static"))
        self.conv_block_size = check_block_size(conv_block_size, "conv_block_size")
        if affine is True and self.sparsity is not None:
            raise ValueError(
                "A sparse tensor needs a linear dequantizer: an offset would move its zeros. "
                f"Received: affine=True, sparsity={sparsity!r}. Use affine='auto' or False."
            )
        if self.range == "minmax" and not self.has_offset:
            raise ValueError(
                "range='minmax' needs an offset, and this quantizer has none "
                f"(bits={bits!r}, affine={affine!r}, sparsity={sparsity!r}). "
                "Use range='absmax' or 'rms', or affine=True."
            )

    # What the fields come to.

    @property
    def has_offset(self) -> bool:
        """`affine`, with "auto" resolved."""
        if self.affine == "auto":
            return self.sparsity is None and self.bits not in (1.5, "fp4")
        return self.affine

    @property
    def range_rule(self) -> str:
        """`range`, with "auto" resolved."""
        if self.range != "auto":
            return self.range
        if self.bits in (1, 1.5, 2):
            return "rms"
        return "minmax" if self.has_offset else "absmax"

    @property
    def trust_factor(self) -> float | None:
        """`trust`, with "auto" resolved where an estimator has one."""
        return self.trust

    @functools.cached_property
    def grid(self) -> Grid:
        return grid_for(self.bits, self.has_offset)

    @functools.cached_property
    def pattern(self) -> sparsity.Sparsity | None:
        """`sparsity`, parsed."""
        return sparsity.check_sparsity(self.sparsity)

    def blocks(
        self, axes: Sequence[int], shared: Sequence[int] = (), *, convolution: bool = False
    ) -> Blocks:
        """Which elements share statistics, given the contraction axes and the spatial ones."""
        size = self.block_size
        if convolution and size != "tensor":
            size = self.conv_block_size
        return Blocks(tuple(axes), tuple(shared), size)

    def input_blocks(
        self, axes: Sequence[int], shared: Sequence[int] = (), *, convolution: bool = False
    ) -> Blocks:
        """`blocks` of the input of a layer: variables of one's own hold for the whole tensor."""
        if self.has_parameters:
            return Blocks(tuple(axes), tuple(shared), "tensor")
        return self.blocks(axes, shared, convolution=convolution)

    # Variables of its own, which the layer keeps. A quantizer that learns overrides all of these.

    @property
    def has_parameters(self) -> bool:
        """Whether the layer keeps variables for it, rather than statistics of the data at hand."""
        return self.calibration == "static"

    def kernel_parameters(self, view: BlockView) -> dict[str, Parameter]:
        """The variables it needs to quantize a kernel whose blocks are `view`, by name.

        Raises:
            ValueError: if it cannot quantize kernels.
        """
        if self.calibration == "static":
            raise ValueError(
                "calibration='static' fixes the range of inputs; a kernel is at hand whenever it "
                f"is quantized. Received: weights={self!r}. Use calibration='dynamic'."
            )
        return {}

    def input_parameters(self) -> dict[str, Parameter]:
        """The variables it needs to quantize the input of a layer, all of shape `()`, by name.

        Raises:
            ValueError: if it cannot quantize inputs.
        """
        return static.parameters(self) if self.calibration == "static" else {}

    def initial(self, values: Any, view: BlockView) -> Parameters:
        """Parameters that suit a float32 tensor at hand (rotated, split by `view`)."""
        return static.initial(self, values, view)

    def start(self, values: Any, view: BlockView) -> Parameters:
        """Parameters with which the kernel of a layer begins its training; see `initial`."""
        return self.initial(values, view)

    def calibrated(self, seen: Observation) -> dict[str, Any]:
        """Parameters of an input, of shape `()`, from what calibration has seen of it."""
        return static.calibrated(self, seen)

    def encode_with(self, values: Any, view: BlockView, parameters: Parameters) -> tuple[Any, Line]:
        """Codes of a float32 tensor (rotated, split by `view`), and what they stand for."""
        return static.encode(self, values, view, parameters)

    def slopes(
        self, values: Any, codes: Any, view: BlockView, parameters: Parameters
    ) -> tuple[Any, dict[str, Any]]:
        """Derivatives of the dequantized values to `values` and, by name, to the parameters.

        Element by element; the codes are those of `encode_with`.
        """
        return static.slopes(self, values, parameters)

    def kernel_bits(self, x: Any, blocks: Blocks, parameters: Parameters | None = None) -> Bits:
        """Bits that the codes of a kernel take now: `bits`, unless the width is trained."""
        return self.bits

    def input_bits(self, parameters: Parameters) -> Bits:
        """Bits that the codes of an input take now: `bits`, unless the width is trained."""
        return self.bits

    # The estimator.

    def fit(self, codes: Any, noise: Any, view: BlockView) -> tuple[Any, ...]:
        """Statistics of every block that `line` and `gradient` need; trailing None are left out."""
        raise NotImplementedError(f"{type(self).__name__} defines no dequantizer.")

    def line(self, span: Range, fitted: tuple[Any, ...]) -> Line:
        """The dequantizer of every block from its range and what `fit` returned."""
        raise NotImplementedError(f"{type(self).__name__} defines no dequantizer.")

    def pull(
        self, rounding: Rounding, fitted: tuple[Any, ...], upstream: Any, view: BlockView
    ) -> tuple[Any, ...]:
        """Statistics of the upstream gradient of every block, if `gradient` needs any."""
        return ()

    def gradient(
        self, rounding: Rounding, fitted: tuple[Any, ...], upstream: Any, pull: tuple[Any, ...]
    ) -> Any:
        """Gradient to the data from the gradient to its dequantized values, before `attenuate`.

        It works element by element; `pull` is what the method of that name returned.
        """
        raise NotImplementedError(f"{type(self).__name__} defines no gradient.")

    def is_trusted(self, rounding: Rounding, span: Range) -> Any:
        """Where the gradient passes, if there is a `trust_factor`."""
        reach = self.trust_factor * 0.5 * self.grid.edge_step
        return ranges.outside(rounding.values, span, self.grid) <= reach

    def attenuate(self, gradient: Any, rounding: Rounding, span: Range) -> Any:
        """What `trust` and `fade` let through of a gradient."""
        if self.trust_factor is not None:
            gradient = ops.where(self.is_trusted(rounding, span), gradient, 0.0)
        return self.faded(gradient, rounding.values, span)

    def faded(self, gradient: Any, values: Any, span: Range) -> Any:
        """What `fade` lets through of a gradient."""
        if self.fade is None:
            return gradient
        distance = ranges.beyond_thresholds(values, span, self.grid)
        return gradient * ops.exp(-0.5 * ops.square(distance * (1.0 / self.fade)))

    # The forward pass.

    def fake_quantize(
        self,
        x: Any,
        blocks: Blocks,
        parameters: Parameters | None = None,
        *,
        unrotate: bool = True,
    ) -> Any:
        """Quantizes and dequantizes, with this estimator's gradient.

        Args:
            x: float tensor of any float dtype; statistics are taken in float32.
            blocks: which elements share statistics.
            parameters: the values of the quantizer's own variables, if it has any. Left out, they
                are what suits `x`, and constants.
            unrotate: undo `rotation` afterwards. A product of two operands that are rotated alike
                needs no way back.

        Returns:
            A tensor of the shape and dtype of `x`.
        """
        x = ops.convert_to_tensor(x)
        if not self.has_parameters:
            return backend.with_gradient(self.rule(x.shape, blocks, unrotate=unrotate), x)
        rotated = self.rotate(ops.cast(x, "float32"), blocks)
        values = parametric.fake_quantize(self, rotated, blocks, parameters)
        return cast_within(self.rotate(values, blocks) if unrotate else values, x.dtype)

    def multiply(
        self,
        x: Any,
        kernel: Any,
        product: Callable[[Any, Any], Any],
        blocks: Blocks,
        parameters: Parameters | None = None,
        *,
        unrotate: bool = True,
        forward: Forward | None = None,
    ) -> Any:
        """`product(fake_quantize(x), kernel)`, where `product` is linear in both.

        Args:
            x: see `fake_quantize`.
            kernel: the other operand.
            product: what multiplies them.
            blocks: see `fake_quantize`.
            parameters: see `fake_quantize`.
            unrotate: see `fake_quantize`.
            forward: another way to compute the forward pass, for quantizers without parameters.
        """
        if self.has_parameters:
            quantized = self.fake_quantize(x, blocks, parameters, unrotate=unrotate)
            return product(quantized, kernel)
        rule = self.rule(x.shape, blocks, unrotate=unrotate)
        return backend.product_with_gradient(rule, x, kernel, product, forward)

    def rule(
        self, shape: tuple[int | None, ...], blocks: Blocks, *, unrotate: bool = True
    ) -> FakeQuantization:
        """The two passes of `fake_quantize` over a tensor of `shape`, for a backend to run."""
        return FakeQuantization(self, blocks.view(tuple(shape)), blocks, unrotate)

    def quantize(
        self, x: Any, blocks: Blocks, parameters: Parameters | None = None
    ) -> QuantizedTensor:
        """Codes, scales and offsets of a tensor, ready to be stored."""
        if not self.has_parameters:
            return self.quantize_and_sum(x, blocks)[0]
        x = ops.convert_to_tensor(x)
        rule, rotated = self.rule(x.shape, blocks, unrotate=False), self.rotate(x, blocks)
        codes, line = rule.stored(*parametric.encode(self, rotated, rule.view, blocks, parameters))
        return self._as_tensor(ops.cast(rule.view.merge(codes), "int8"), line, rule)

    def quantize_and_sum(self, x: Any, blocks: Blocks) -> tuple[QuantizedTensor, Any]:
        """What `quantize` returns, and the int32 sums of every block's codes, split like the view.

        Raises:
            TypeError: the quantizer has variables of its own.
        """
        if self.has_parameters:
            raise TypeError(f"{type(self).__name__} has variables of its own; use `quantize`.")
        x = ops.convert_to_tensor(x)
        rule = self.rule(x.shape, blocks, unrotate=False)
        codes, sums, line = backend.integer_codes(rule, x)
        return self._as_tensor(codes, line, rule), sums

    def _as_tensor(self, codes: Any, line: Line, rule: FakeQuantization) -> QuantizedTensor:
        return QuantizedTensor(
            codes=codes,
            line=line,
            view=rule.view,
            axes=rule.blocks.axes,
            grid=self.grid,
            rotated=self.rotation is not None,
            sparse=self.pattern is not None,
        )

    def rotate(self, x: Any, blocks: Blocks) -> Any:
        """`rotation`, which is its own inverse, along the contraction; the result is float32."""
        return ops.cast(x, "float32") if self.rotation is None else rotate(x, blocks.axes)

    def codes_and_line(
        self, x: Any, view: BlockView, blocks: Blocks, parameters: Parameters | None = None
    ) -> tuple[Any, Line]:
        """Float32 codes and the line of every block, of a float32 tensor (already rotated)."""
        if self.has_parameters:
            return parametric.encode(self, x, view, blocks, parameters)
        encoding = self.encode(x, view, blocks)
        return encoding.codes, encoding.line

    def encode(self, x: Any, view: BlockView, blocks: Blocks) -> Encoding:
        """Quantizes a float32 tensor (already rotated)."""
        values = view.split(x)
        span = ranges.find_range(values, view, self.grid, self.range_rule)
        codes, noise = self.round(x, values, span, view, blocks)
        fitted = self.fit(codes, noise, view)
        return Encoding(codes, noise, span, fitted, self.line(span, fitted))

    def round(
        self, x: Any, values: Any, span: Range, view: BlockView, blocks: Blocks
    ) -> tuple[Any, Any]:
        """Codes and noise of a tensor `x` whose blocks are `values`."""
        position = span.position(values)
        within = self.range_rule not in ranges.CLIPPING
        codes = elementwise(
            functools.partial(self.grid.round, within=within, nearest=view.nearest), position
        )
        mask = self.keep_mask(x, blocks)
        codes = view.present(codes if mask is None else codes * view.split(mask))
        return codes, codes - self.grid.from_zero(position)

    def keep_mask(self, x: Any, blocks: Blocks) -> Any:
        """1 where `sparsity` keeps an element of a rotated tensor, 0 elsewhere; None without."""
        if self.pattern is None:
            return None
        return sparsity.keep_mask(x, self.pattern, blocks.axes)

    # Serialization.

    def get_config(self) -> dict[str, Any]:
        """Fields by name; `from_config` takes them back."""
        return {
            "bits": self.bits,
            "affine": self.affine,
            "block_size": self.block_size,
            "range": self.range,
            "rotation": self.rotation,
            "trust": self.trust,
            "fade": self.fade,
            "sparsity": self.sparsity,
            "calibration": self.calibration,
            "conv_block_size": self.conv_block_size,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        return cls(**config)

    def replace(self, **fields: Any) -> Self:
        """A copy with other values for some fields."""
        return type(self).from_config({**self.get_config(), **fields})

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Quantizer) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)

    @functools.cached_property
    def _key(self) -> tuple[Any, ...]:
        # Made once: eager PyTorch looks a rule up at every call.
        return type(self), *sorted(self.get_config().items(), key=lambda field: field[0])

    def __repr__(self) -> str:
        fields = ", ".join(f"{k}={v!r}" for k, v in self.get_config().items() if k != "bits")
        return f"{type(self).__name__}({self.bits!r}, {fields})"


def check_nonnegative(name: str, value: Any) -> float:
    """Returns `value` as a float or raises a `ValueError` that names the argument."""
    return _check_number(name, value, ">= 0", lambda number: number >= 0)


def check_positive(name: str, value: Any) -> float:
    """Returns `value` as a float or raises a `ValueError` that names the argument."""
    return _check_number(name, value, "> 0", lambda number: number > 0)


def _check_number(name: str, value: Any, bound: str, is_within: Callable[[Any], bool]) -> float:
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not is_number or not (is_within(value) and value < float("inf")):
        raise ValueError(f"`{name}` must be a finite number {bound}. Received: {name}={value!r}")
    return float(value)


def check_flag(name: str, value: Any) -> bool:
    """Returns `value` or raises a `ValueError` that names the argument."""
    return _check_choice(name, value, (True, False))


def _check_choice(name: str, value: Any, accepted: tuple[Any, ...]) -> Any:
    if not any(
        value is choice or (isinstance(value, str) and value == choice) for choice in accepted
    ):
        raise ValueError(f"`{name}` must be one of {list(accepted)}. Received: {name}={value!r}")
    return value


def _sparsity_text(value: Any) -> str | float | None:
    pattern = sparsity.check_sparsity(value)
    if isinstance(pattern, sparsity.Unstructured):
        return pattern.fraction
    return None if pattern is None else str(pattern)


def serializable(cls: type) -> type:
    """Registers a quantizer, so that it can be saved within a model."""
    return keras.saving.register_keras_serializable("keras_rq")(cls)
