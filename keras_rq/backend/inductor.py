"""Both passes of a rule as one GPU kernel each, made by PyTorch's compiler.

Eager PyTorch runs every operation of a rule as a kernel of its own, some twenty passes over the
tensor. Compiled, each pass becomes one Triton kernel that reads the data once: statistics stay in
registers, and the backward kernel finds them again from `x`. There is no second copy of the
mathematics. A tensor is handed over as (outer, block) or (outer, block, inner), so that one kernel
serves every layer with the same block.

Under `torch.compile` of a whole model the rule is part of that graph and none of this is needed.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx.experimental.proxy_tensor import make_fx

from keras_rq.backend.common import kernels_wanted
from keras_rq.backend.rule import GradientRule
from keras_rq.numerics.blocks import BlockView


def fused(rule: GradientRule, x: torch.Tensor) -> GradientRule:
    """The rule, run by kernels where `x` lies on a CUDA device and its blocks allow it."""
    if not x.is_cuda or rule.inside(x.dtype).tiling is None or torch.compiler.is_compiling():
        return rule
    if not kernels_wanted() or not _compiler_works(x.device):
        return rule
    return _Fused(rule, x)


class _Fused:
    """A rule that keeps no statistics and runs compiled, between the rotations that it may have."""

    tiling = None

    def __init__(self, rule: GradientRule, like: torch.Tensor) -> None:
        self._rule, self._inside = rule, rule.inside(like.dtype)
        outer, self._block, inner = self._inside.tiling
        self._shape = (outer, self._block) if inner == 1 else (outer, self._block, inner)
        self._on_blocks = self._inside.on_view(BlockView((None,) * len(self._shape), (1,)))

    def _run(self, make: Callable[..., Any], *tensors: torch.Tensor) -> torch.Tensor:
        rule, dtypes = self._inside, tuple(t.dtype for t in tensors)
        run = make(self._on_blocks, self._block, len(self._shape), dtypes, tensors[0].device)
        if rule.split_is_reshape:  # a fifth of the time that Keras's operations take to launch
            return run(*(t.reshape(self._shape) for t in tensors)).reshape(tensors[0].shape)
        split = [rule.split(t) for t in tensors]
        return rule.merge(run(*(t.reshape(self._shape) for t in split)).reshape(split[0].shape))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, Sequence[Any]]:
        return self.again(x, ()), ()

    def again(self, x: torch.Tensor, statistics: Sequence[Any]) -> torch.Tensor:
        return self._rule.leave(self._run(_forward, self._rule.enter(x)), x.dtype)

    def backward(self, x: torch.Tensor, statistics: Sequence[Any], upstream: Any) -> torch.Tensor:
        given = self._rule.enter(x), self._rule.enter_back(upstream)
        return self._rule.leave_back(self._run(_backward, *given), x.dtype)


@functools.lru_cache(maxsize=256)
def _forward(rule: GradientRule, *form: Any) -> Callable[..., Any]:
    return _compiled(lambda x: rule.forward(x)[0], *_examples(*form))


@functools.lru_cache(maxsize=256)
def _backward(rule: GradientRule, *form: Any) -> Callable[..., Any]:
    def backward(x: torch.Tensor, upstream: torch.Tensor) -> torch.Tensor:
        return rule.backward(x, rule.forward(x)[1], upstream)

    return _compiled(backward, *_examples(*form))


def _examples(
    block: int, rank: int, dtypes: Sequence[torch.dtype], device: torch.device
) -> list[torch.Tensor]:
    # Sizes that differ from each other and from 0 and 1, which would be taken for constants.
    shape = (6, block) if rank == 2 else (6, block, 10)
    # One tensor each: a single one, given twice, would be traced as one argument.
    return [torch.ones(shape, dtype=dtype, device=device) for dtype in dtypes]


def _compiled(function: Callable[..., Any], *examples: torch.Tensor) -> Callable[..., Any]:
    # Traced first, so that the compiler sees array operations and no Python: it would guard on
    # every attribute, and give up after a few rules.
    traced = make_fx(function, tracing_mode="symbolic")(*examples)
    return torch.compile(traced, dynamic=True)


@functools.cache
def _compiler_works(device: torch.device) -> bool:
    try:
        torch.compile(_probe)(torch.ones(8, device=device))
    except Exception as error:
        warnings.warn(
            f"Quantization runs without fused kernels, so training is slower: torch.compile does "
            f"not work on {device} ({type(error).__name__}). It needs Triton and a C compiler. "
            "Set KERAS_RQ_KERNELS=0 to do without them and without this warning.",
            stacklevel=2,
        )
        return False
    return True


def _probe(x: torch.Tensor) -> torch.Tensor:
    return x * 2 + 1
