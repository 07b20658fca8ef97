"""brevitas: its QuantLinear and QuantConv2d.

`torch-jit` is PyTorch with `BREVITAS_JIT=1`, which brevitas reads when it is imported. `compiled`
hands the model to torch.compile; `compiled quantizers` is brevitas's own `compile_quant()`, with
the rest, and the float baseline, eager.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from typing import Any

import common

FRAMEWORKS = ("torch", "torch-jit")
QUANTIZERS = "compiled quantizers"
OPTIONS = common.arguments(FRAMEWORKS)
os.environ["BREVITAS_JIT"] = str(int(OPTIONS.framework == "torch-jit"))

import brevitas.nn as qnn  # noqa: E402
import torch_models  # noqa: E402
from brevitas.quant import (  # noqa: E402
    Int8ActPerTensorFloat,
    Int8WeightPerChannelFloat,
    SignedBinaryActPerTensorConst,
    SignedBinaryWeightPerTensorConst,
)


class Activations(Int8ActPerTensorFloat):
    """Takes its first scale from one batch, not 300: the steady state is what is timed."""

    collect_stats_steps = 1


def variants(job: common.Job, framework: str, mode: str) -> Iterator[common.Variant]:
    """The settings; brevitas quantizes the input of a layer within the layer."""
    for setting, bits in common.SETTINGS.items():
        as_set = "torch.nn" if bits[0] is None else f"{_describe(*bits)}, bias float"
        yield common.Variant(setting, as_set, _step(job, mode, bits))


def _describe(a_bits: int, w_bits: int) -> str:
    if a_bits == 1:
        a = "input_quant SignedBinaryActPerTensorConst"
    else:
        a = f"input_quant Int8ActPerTensorFloat, {a_bits} bit, learned scale, no longer collecting"
    w = f"weight_quant Int8WeightPerChannelFloat, {w_bits} bit"
    return f"{a}; {'weight_quant SignedBinaryWeightPerTensorConst' if w_bits == 1 else w}"


def _step(
    job: common.Job, mode: str, bits: tuple[int | None, int | None]
) -> Callable[[], common.Training]:
    def build() -> common.Training:
        layers = None if bits[0] is None else _layers(*bits)
        model = torch_models.build(job, layers)
        if mode == QUANTIZERS:
            for module in model.modules():
                if hasattr(module, "compile_quant"):
                    module.compile_quant()
        return torch_models.train_step(job, mode, model)

    return build


def _layers(a_bits: int, w_bits: int) -> torch_models.Layers:
    kinds: dict[str, Any] = {"input_quant": SignedBinaryActPerTensorConst}
    if a_bits > 1:
        kinds = {"input_quant": Activations, "input_bit_width": a_bits}
    if w_bits > 1:
        kinds |= {"weight_quant": Int8WeightPerChannelFloat, "weight_bit_width": w_bits}
    else:
        kinds |= {"weight_quant": SignedBinaryWeightPerTensorConst}
    kinds["bias_quant"] = None
    return torch_models.Layers(
        linear=_positional(qnn.QuantLinear, kinds), conv=_positional(qnn.QuantConv2d, kinds)
    )


def _positional(kind: Any, kinds: dict[str, Any]) -> Callable[..., Any]:
    """QuantLinear has no default for `bias`."""
    return functools.partial(
        lambda *sizes, bias=True, **more: kind(*sizes, bias=bias, **more), **kinds
    )


if __name__ == "__main__":
    modes = {"torch": (*torch_models.MODES, QUANTIZERS), "torch-jit": ("eager",)}
    peer = common.Peer(
        "brevitas", FRAMEWORKS, modes, variants, torch_models.wait, tuple(common.BATCHES)
    )
    common.run(peer, OPTIONS)
