"""A function of one tensor with a gradient of its own, as every backend runs it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, Self


class GradientRule(Protocol):
    """A forward function and its vector-Jacobian product, written once in keras.ops.

    A backend keeps `x` and the statistics between the two passes and nothing else, so what the
    backward pass needs of the size of `x` it computes again.

    Attributes:
        view: the blocks, a `numerics.blocks.BlockView`.
        tiling: `(outer, block, inner)`, the shape in which what `split` returns is independent
            blocks along the middle axis; None if it is not. A backend may then run the passes
            tile by tile.
        split_is_reshape: whether `split` keeps all elements in their order.
        turn: None; or a length, a power of two: `enter` is the Hadamard rotation of every so many
            neighbours along the middle axis of what `inside` has for `tiling`, and they fill its
            blocks; `leave_back` is too, and `leave` and `enter_back` change nothing.
        prunes: whether a mask says which elements are kept.
        in_parts: the same rule, its passes arranged for XLA's CPU backend.
    """

    view: Any
    tiling: tuple[int, int, int] | None
    split_is_reshape: bool
    turn: int | None
    prunes: bool
    in_parts: Self

    def forward(self, x: Any) -> tuple[Any, Sequence[Any]]:
        """Returns the output, shaped like `x`, and a sequence of small tensors."""

    def backward(self, x: Any, statistics: Sequence[Any], upstream: Any) -> Any:
        """Returns the gradient to `x`, in its dtype, from the gradient to the output."""

    def again(self, x: Any, statistics: Sequence[Any]) -> Any:
        """Returns the output of `forward` once more."""

    def integer_codes(self, x: Any) -> tuple[Any, Any, Any]:
        """Returns int8 codes, shaped like `x`, and what there is one of for every block.

        Those have the block's axes with one element each: the int32 sums of the codes, and named
        tuples of float32 tensors or None.
        """

    def split(self, x: Any) -> Any:
        """Returns `x` with its blocks laid open."""

    def merge(self, values: Any) -> Any:
        """Inverse of `split`."""

    def on_view(self, view: Any) -> Self:
        """The same rule for whole blocks laid out as `view`, a `numerics.blocks.BlockView`."""

    def inside(self, dtype: Any) -> Self:
        """What is left of the rule for a tensor of `dtype` when these four do what they can.

        `forward(x)` is `leave(inside.forward(enter(x)), dtype)`, and `backward(x, upstream)` is
        `leave_back(inside.backward(enter(x), enter_back(upstream)), dtype)`.
        """

    def enter(self, x: Any) -> Any:
        """What `inside` takes for `x`."""

    def leave(self, y: Any, dtype: Any) -> Any:
        """The output from that of `inside`."""

    def enter_back(self, upstream: Any) -> Any:
        """What `inside` takes for the gradient to the output."""

    def leave_back(self, gradient: Any, dtype: Any) -> Any:
        """The gradient to `x` from that of `inside`."""


class Forward(Protocol):
    """Another way to compute a product forward, with the gradient of the product itself.

    Attributes:
        constants: tensors that it needs besides the data; no gradient flows to them.
    """

    constants: tuple[Any, ...]

    def __call__(self, x: Any, *constants: Any) -> Any:
        """The product of the data and the constants."""
