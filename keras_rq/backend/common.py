"""What several backends share."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from keras import ops

from keras_rq.backend.rule import GradientRule
from keras_rq.numerics.rotations import LARGEST


def kernels_wanted() -> bool:
    """Whether fused kernels may run: not with `KERAS_RQ_KERNELS=0` in the environment."""
    return os.environ.get("KERAS_RQ_KERNELS") != "0"


def rotation_side() -> int:
    """Of the largest matrix that rotations multiply by; additions do what is left of them."""
    return LARGEST


def reduce_at_once(arrays: Sequence[Any], ways: Sequence[str], axis: int) -> Sequence[Any]:
    """Reduces float32 arrays of one shape along an axis, each by its way: "sum", "max" or "min"."""
    return [getattr(ops, way)(one, axis=axis) for one, way in zip(arrays, ways, strict=True)]


def integer_codes(rule: GradientRule, x: Any) -> tuple[Any, Any, Any]:
    """What `rule.integer_codes(x)` returns, made as fast as the backend can."""
    return rule.integer_codes(x)


def call_in_graph(owner: Any, method: str, x: Any, parameter: Any, name: str, *more: Any) -> Any:
    """`owner.method(x, parameter, name, *more)`; all that carries a gradient is passed."""
    return getattr(owner, method)(x, parameter, name, *more)


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of arrays, as one program where operations one by one take long to compile."""
    return function


def eagerly() -> AbstractContextManager[Any]:
    """A scope in which layers compute at once what they are called on, without gradients."""
    return nullcontext()


def make_known(owner: Any) -> None:
    """Prepares an owner for `call_in_graph`."""


def as_it_is_now(value: Any) -> Any:
    """A value that may be assigned anew before the backward pass, which reads the one of now."""
    return value


def forget_traces(owners: Iterable[Any]) -> None:
    """Has functions traced again that were compiled before: all, or those that `owners` hold."""


def unpadded(
    x: Any, kernel: Any, strides: Sequence[int], dilation: Sequence[int], data_format: str
) -> Any:
    """A convolution without padding; groups follow from the channels."""
    return ops.conv(
        x,
        kernel,
        strides=list(strides),
        padding="valid",
        data_format=data_format,
        dilation_rate=tuple(dilation),
    )
