"""torchao: fake-quantized linear layers of its QAT API, eager and through torch.compile."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import common
import torch
import torch_models
from torch import nn
from torchao.quantization import quantize_
from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig
from torchao.quantization.qat.fake_quantizer import IntxFakeQuantizer

# The nearest to 1 bit is int2: int1 is a type, but `_check` finds that all weights become equal.
SETTINGS = {
    "A8W8": (torch.int8, torch.int8, None),
    "A4W4-128": (torch.int4, torch.int4, common.BLOCK),
    "A4W4": (torch.int4, torch.int4, None),
    "A4W2": (torch.int4, torch.int2, None),
    "A1W1": (torch.int1, torch.int1, None),
}


def variants(job: common.Job, framework: str, mode: str) -> Iterator[common.Variant]:
    """The settings; activations have one scale and offset per row, the only kind torchao has."""
    yield common.Variant(common.FLOAT, "torch.nn", _step(job, mode, None))
    for setting, (a, w, group) in SETTINGS.items():
        per = "per_channel" if group is None else f"group_size={group}"
        as_set = f"activations IntxFakeQuantizeConfig({a}, per_token, is_symmetric=False), "
        as_set += f"weights IntxFakeQuantizeConfig({w}, {per}, is_symmetric=True); scales dynamic"
        yield common.Variant(setting, as_set, _step(job, mode, (a, w, group)))


def _step(job: common.Job, mode: str, kind: Any) -> Callable[[], common.Training]:
    def build() -> common.Training:
        model = torch_models.build(job)
        if kind is not None:
            for part in model.blocks if job.model == "nanogpt" else [model]:
                _prepare(part, *kind)
        return torch_models.train_step(job, mode, model)

    return build


def _check(config: IntxFakeQuantizeConfig, width: int) -> None:
    """Weights that all have one value are no quantized weights."""
    weights = IntxFakeQuantizer(config)(torch.randn(8, width))
    if len(weights.unique()) == 1:
        raise ValueError(f"{config.dtype}: every weight becomes {weights.flatten()[0].item():g}")


def _prepare(model: nn.Module, a: torch.dtype, w: torch.dtype, group: int | None) -> None:
    """Swaps the layers; a convolution is handed over too, for torchao to say what it thinks."""
    activations = IntxFakeQuantizeConfig(a, "per_token", is_symmetric=False)
    for size in {module.in_features for module in model.modules() if _is(module, nn.Linear)}:
        if group is None:
            weights = IntxFakeQuantizeConfig(w, "per_channel", is_symmetric=True)
        else:  # 784 inputs are no multiple of 128: the largest group that fits
            weights = IntxFakeQuantizeConfig(w, group_size=common.divisor(size, group))
        _check(weights, size)
        config = QATConfig(activation_config=activations, weight_config=weights, step="prepare")
        quantize_(model, config, _chooser(size))


def _chooser(size: int) -> Callable[[nn.Module, str], bool]:
    def chosen(module: nn.Module, _: str) -> bool:
        return _is(module, nn.Conv2d) or (_is(module, nn.Linear) and module.in_features == size)

    return chosen


def _is(module: nn.Module, kind: type[nn.Module]) -> bool:
    return type(module) is kind  # a layer that is swapped already derives from nn.Linear


if __name__ == "__main__":
    modes = {"torch": torch_models.MODES}
    peer = common.Peer(
        "torchao", ("torch",), modes, variants, torch_models.wait, tuple(common.BATCHES)
    )
    common.run(peer, common.arguments(peer.frameworks))
