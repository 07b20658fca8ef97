"""A quantizer bound to a tensor: the two passes that a backend runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import keras
from keras import ops

from keras_rq import backend
from keras_rq.numerics.blocks import Blocks, BlockView, MergedAxes
from keras_rq.numerics.dequantizers import Line
from keras_rq.numerics.parts import in_parts
from keras_rq.numerics.ranges import Range
from keras_rq.numerics.rotations import rotation_size

if TYPE_CHECKING:
    from keras_rq.quantizers.base import Quantizer


class Rounding:
    """Codes and noise of a tensor, made when they are asked for: not every gradient does."""

    def __init__(self, rule: FakeQuantization, x: Any, span: Range) -> None:
        self._rule, self._x, self._span = rule, x, span
        self.values = rule.view.split(x)
        self._made: tuple[Any, Any] | None = None

    @property
    def _both(self) -> tuple[Any, Any]:
        # No `cached_property`: that of Python 3.11 has a lock, at which torch.compile breaks off.
        if self._made is None:
            rule = self._rule
            self._made = rule.quantizer.round(
                self._x, self.values, self._span, rule.view, rule.blocks
            )
        return self._made

    @property
    def codes(self) -> Any:
        return self._both[0]

    @property
    def noise(self) -> Any:
        return self._both[1]


class FakeQuantization:
    """Forward and backward of `Quantizer.fake_quantize`; see `keras_rq.backend.rule`.

    Args:
        quantizer: what quantizes.
        view: the tensor's blocks.
        blocks: what the view was made of.
        unrotate: undo the quantizer's rotation afterwards.
        rotated: None; or the dtype of outputs, where tensors come rotated and stay so.
    """

    def __init__(
        self,
        quantizer: Quantizer,
        view: BlockView,
        blocks: Blocks,
        unrotate: bool,
        rotated: Any = None,
    ) -> None:
        self.quantizer, self.view, self.blocks = quantizer, view, blocks
        self.unrotate, self.rotated = unrotate, rotated

    @property
    def tiling(self) -> tuple[int, int, int] | None:
        """`(outer, block, inner)` if every block is a line of its own in a tensor of that shape.

        A kernel may then work tile by tile. Masks and rotations look beyond a single block; a
        rotation can be done before and after, see `inside`.
        """
        alone = not self.prunes and not self._rotates
        return self.view.extents if alone else None

    @property
    def split_is_reshape(self) -> bool:
        """Whether `split` keeps all elements in their order."""
        return self.view.keeps_order

    def __eq__(self, other: object) -> bool:
        return isinstance(other, FakeQuantization) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)

    @property
    def _key(self) -> tuple[Any, ...]:
        return self.quantizer, self.view, self.blocks, self.unrotate, self.rotated

    def split(self, x: Any) -> Any:
        return self.view.split(x)

    def merge(self, values: Any) -> Any:
        return self.view.merge(values)

    def on_view(self, view: BlockView) -> FakeQuantization:
        """The same passes over another view."""
        return FakeQuantization(self.quantizer, view, self.blocks, self.unrotate, self.rotated)

    @property
    def _rotates(self) -> bool:
        return self.quantizer.rotation is not None and self.rotated is None

    @property
    def turn(self) -> int | None:
        """Length of the lines of neighbours that `enter` and `leave_back` rotate within blocks."""
        extents, shape, blocks = self.view.extents, self.view.shape, self.blocks
        if not self._rotates or self.unrotate or extents is None:
            return None
        axes, shared = (
            tuple(a % len(shape) for a in some) for some in (blocks.axes, blocks.shared)
        )
        size = rotation_size(MergedAxes(shape, axes).length)
        # The middle axis ends with the last axis of a block.
        last = len(shape) if blocks.size == "tensor" else max((*axes, *shared)) + 1
        are_neighbours = axes == tuple(range(last - len(axes), last))
        return size if are_neighbours and extents[1] % size == 0 else None

    def inside(self, dtype: Any) -> FakeQuantization:
        """The same passes without their rotations, which `enter` and `leave` do."""
        if not self._rotates:
            return self
        kept = "float32" if self.unrotate else keras.backend.standardize_dtype(dtype)
        return FakeQuantization(self.quantizer, self.view, self.blocks, False, kept)

    def enter(self, x: Any) -> Any:
        return self._rotate(x) if self._rotates else x

    def leave(self, y: Any, dtype: Any) -> Any:
        return cast_within(self._rotate(y), dtype) if self._rotates and self.unrotate else y

    def enter_back(self, upstream: Any) -> Any:
        return self._rotate(upstream) if self._rotates and self.unrotate else upstream

    def leave_back(self, gradient: Any, dtype: Any) -> Any:
        return ops.cast(self._rotate(gradient), dtype) if self._rotates else gradient

    @property
    def prunes(self) -> bool:
        """Whether a mask says which elements are kept."""
        return self.quantizer.pattern is not None

    @property
    def in_parts(self) -> FakeQuantization:
        """The same passes for compilers of CPUs; see `keras_rq.numerics.parts`."""
        return self.on_view(in_parts(self.view, backend.reduce_at_once))

    def forward(self, x: Any) -> tuple[Any, list[Any]]:
        view = self.view.for_statistics
        encoding = self.quantizer.encode(self._rotate(x), view, self.blocks)
        statistics = [part for part in encoding.span if part is not None]
        statistics += [part for part in encoding.fitted if part is not None]  # see `_parts`
        if view is not self.view:
            return self.again(x, statistics), statistics
        return self._values(encoding.codes, encoding.line, x.dtype), statistics

    def backward(self, x: Any, statistics: Sequence[Any], upstream: Any) -> Any:
        quantizer, view = self.quantizer, self.view
        span, fitted = self._parts(statistics)
        rounding = Rounding(self, self._rotate(x), span)
        upstream = self._rotate(upstream) if self.unrotate else ops.cast(upstream, "float32")
        split = view.split(upstream)
        if (other := view.for_statistics) is view:
            pull = quantizer.pull(rounding, fitted, split, view)
        else:
            parts = Rounding(self.on_view(other), self._rotate(x), span)
            pull = quantizer.pull(parts, fitted, other.split(upstream), other)
        gradient = quantizer.gradient(rounding, fitted, split, pull)
        gradient = quantizer.attenuate(gradient, rounding, span)
        return ops.cast(self._rotate(view.merge(gradient)), x.dtype)

    def integer_codes(self, x: Any) -> tuple[Any, Any, Line]:
        """The int8 codes of a tensor; the int32 sum of each block's and its line, float32."""
        encoding = self.quantizer.encode(self._rotate(x), self.view, self.blocks)
        codes, line = self.stored(encoding.codes, encoding.line)
        sums = ops.sum(codes, axis=self.view.reduced, keepdims=True)
        return ops.cast(self.view.merge(codes), "int8"), sums, line

    def stored(self, codes: Any, line: Line) -> tuple[Any, Line]:
        """Codes as they are stored, whole numbers in int32, and the line of those."""
        multiplier = self.quantizer.grid.code_multiplier
        return ops.cast(codes * multiplier, "int32"), line.for_multiplied_codes(multiplier)

    def again(self, x: Any, statistics: Sequence[Any]) -> Any:
        span, fitted = self._parts(statistics)
        codes = Rounding(self, self._rotate(x), span).codes
        return self._values(codes, self.quantizer.line(span, fitted), x.dtype)

    def _parts(self, statistics: Sequence[Any]) -> tuple[Range, tuple[Any, ...]]:
        of_span = 2 if self.quantizer.grid.affine else 1
        span, fitted = statistics[:of_span], statistics[of_span:]
        return Range(*span) if of_span == 2 else Range(*span, None), tuple(fitted)

    def _values(self, codes: Any, line: Any, dtype: Any) -> Any:
        values = self.view.merge(line(codes))
        values = self._rotate(values) if self.unrotate else values
        return cast_within(values, self.rotated or dtype)

    def _rotate(self, x: Any) -> Any:
        if self.rotated is not None:
            return ops.cast(x, "float32")
        return self.quantizer.rotate(x, self.blocks)


def cast_within(values: Any, dtype: Any) -> Any:
    """A cast that keeps within the largest float16."""
    # A fitted line may reach beyond the data, and the largest float16 is only 65504.
    narrow = keras.backend.standardize_dtype(dtype) == "float16"
    return ops.saturate_cast(values, dtype) if narrow else ops.cast(values, dtype)
