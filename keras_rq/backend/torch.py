"""Custom gradients in PyTorch."""

from __future__ import annotations

from typing import Any

import torch

from keras_rq.backend.rule import GradientRule


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
    return _Ruled.apply(x, rule)[0]
