"""Custom gradients in PyTorch."""

from __future__ import annotations

import contextvars
import sys
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch

from keras_rq.backend.common import compiled as compiled
from keras_rq.backend.common import integer_codes as integer_codes
from keras_rq.backend.common import reduce_at_once as reduce_at_once
from keras_rq.backend.common import rotation_side as rotation_side
from keras_rq.backend.common import unpadded
from keras_rq.backend.inductor import fused
from keras_rq.backend.rule import Forward, GradientRule

convolve = unpadded

_IN_GRAPH: contextvars.ContextVar[bool] = contextvars.ContextVar("in_graph", default=False)
_OWNERS: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()


def call_in_graph(
    owner: Any,
    method: str,
    x: torch.Tensor,
    parameter: torch.Tensor,
    name: str,
    *more: torch.Tensor,
) -> torch.Tensor:
    """`owner.method(x, parameter, name, *more)`, which `torch.compile` runs instead of reading it.

    Its reader of Python would break the graph at many lines of a rule. Run on placeholders, as
    JAX traces, the method leaves its array operations in the graph and nothing else.
    """
    if not torch.compiler.is_compiling():
        return getattr(owner, method)(x, parameter, name, *more)
    return _traced_by_running(x, parameter, owner.__dict__["_rq_number"], method, name, *more)


def make_known(owner: Any) -> None:
    """Lets `call_in_graph` find the owner by a number, which a graph can hold."""
    number = owner.__dict__["_rq_number"] = id(owner)
    _OWNERS[number] = owner


def forget_traces(owners: Iterable[Any]) -> None:
    """Has functions traced again that were compiled before; see `keras_rq.backend.common`.

    The compiler keeps graphs by the code of a function, which all models share, and looks at no
    quantizer before it runs one again.
    """
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


@torch.compiler.allow_in_graph
def _traced_by_running(
    x: torch.Tensor,
    parameter: torch.Tensor,
    number: int,
    method: str,
    name: str,
    *more: torch.Tensor,
) -> torch.Tensor:
    token = _IN_GRAPH.set(True)
    try:
        return getattr(_OWNERS[number], method)(x, parameter, name, *more)
    finally:
        _IN_GRAPH.reset(token)


def as_it_is_now(value: torch.Tensor) -> torch.Tensor:
    """A value that may be assigned anew before the backward pass, which reads the one of now."""
    is_kept = torch.compiler.is_compiling() and torch.is_grad_enabled()
    return _copied(value) if is_kept else value


@torch.library.custom_op("keras_rq::copied", mutates_args=())
def _copied(value: torch.Tensor) -> torch.Tensor:
    """A copy that the compiler keeps: of its own operations it would make it again, of `value`."""
    return value.clone()


@_copied.register_fake
def _(value: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(value)


class _Ruled(torch.autograd.Function):
    """Runs a `GradientRule`; `setup_context` style, which torch.func and torch.compile need."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: torch.Tensor, rule: GradientRule) -> tuple[torch.Tensor, ...]:
        y, statistics = rule.forward(x)
        return (y, *statistics)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
        x, ctx.rule = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(x, *output[1:])

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor, *_: Any) -> tuple[torch.Tensor, None]:
        x, *statistics = ctx.saved_tensors
        return ctx.rule.backward(x, statistics, upstream), None


def with_gradient(rule: GradientRule, x: torch.Tensor) -> torch.Tensor:
    """Applies `rule` to `x`; see `keras_rq.backend.rule`."""
    rule = rule if _IN_GRAPH.get() else fused(rule, x)
    return _Ruled.apply(x, rule)[0]


def product_with_gradient(
    rule: GradientRule,
    x: torch.Tensor,
    kernel: torch.Tensor,
    product: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    otherwise: Forward | None = None,
) -> torch.Tensor:
    """`product(rule(x), kernel)`: keeps `x` and not the output of the rule.

    The forward pass is `otherwise`, where there is one.
    """
    rule = rule if _IN_GRAPH.get() else fused(rule, x)
    if otherwise is not None:
        return _Product.apply(x, kernel, rule, product, otherwise)
    y, *statistics = _Ruled.apply(x, rule)
    # A compiler decides by itself what to keep and what to make again.
    if _IN_GRAPH.get() or not y.requires_grad:
        return product(y, kernel)
    kept = _Remade(rule, x.detach(), statistics, y)
    with torch.autograd.graph.saved_tensors_hooks(kept.pack, kept.unpack):
        return product(y, kernel)


class _Product(torch.autograd.Function):
    """A product whose forward pass is computed by other means."""

    @staticmethod
    def forward(
        x: torch.Tensor, kernel: torch.Tensor, rule: Any, product: Any, otherwise: Any
    ) -> torch.Tensor:
        return otherwise(x, *otherwise.constants)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        x, kernel, ctx.rule, ctx.product, _ = inputs
        ctx.save_for_backward(x, kernel)

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[Any, ...]:
        x, kernel = ctx.saved_tensors
        y, statistics = ctx.rule.forward(x)
        to_y, to_kernel = torch.func.vjp(ctx.product, y, kernel)[1](upstream)
        return ctx.rule.backward(x, statistics, to_y), to_kernel, None, None, None


class _Remade:
    """Stands for the output of a rule, and views of it, between forward and backward pass."""

    def __init__(
        self, rule: GradientRule, x: torch.Tensor, statistics: list[Any], y: torch.Tensor
    ) -> None:
        self.rule, self.x, self.statistics = rule, x, statistics
        self.address = y.untyped_storage().data_ptr()

    def pack(self, saved: torch.Tensor) -> Any:
        if saved.untyped_storage().data_ptr() != self.address:
            return saved
        return saved.size(), saved.stride(), saved.storage_offset()

    def unpack(self, packed: Any) -> torch.Tensor:
        if isinstance(packed, torch.Tensor):
            return packed
        with torch.no_grad():
            return self.rule.again(self.x, self.statistics).as_strided(*packed)


def eagerly() -> Any:
    """A scope in which layers compute at once what they are called on, without gradients."""
    return torch.no_grad()


def where_traced() -> Any:
    """Equal at two places whose tensors may be used for each other; None: nowhere else."""
    # In this order: a compiler knows that it compiles, and cannot read a ContextVar.
    is_compiling = torch.compiler.is_compiling() or _IN_GRAPH.get()
    return None if is_compiling else (torch.is_grad_enabled(), torch.is_inference_mode_enabled())


def float32_matmul(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """A matrix product in float32 that keeps all digits of its operands, of one float dtype."""
    x, y = x.float(), y.float()
    rounds = x.is_cuda and torch.backends.cuda.matmul.allow_tf32
    # In float64 where a user lets GPUs round: dear, and as exact as asked for.
    return torch.matmul(x.double(), y.double()).to(x.dtype) if rounds else torch.matmul(x, y)
