"""The models and the training step, in PyTorch; `Layers` says which of them are the peer's."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import types
from collections.abc import Callable
from typing import Any

import common
import torch
from torch import nn
from torch.nn import functional as F

MODES = ("eager", "compiled")
_serial = itertools.count()


@dataclasses.dataclass(frozen=True)
class Layers:
    """What makes the layers that a peer quantizes."""

    linear: Callable[..., nn.Module] = nn.Linear
    conv: Callable[..., nn.Module] = nn.Conv2d


def build(job: common.Job, layers: Layers | None = None) -> nn.Module:
    """The model of a job, on the CPU, in float32."""
    torch.manual_seed(0)
    layers = layers or Layers()
    kind = job.model.partition("-")[0]
    return {"mlp": mlp, "convnet": convnet, "nanogpt": NanoGPT}[kind](layers)


def mlp(layers: Layers, width: int = 512) -> nn.Module:
    """784-width-width-10 with ReLU."""
    return nn.Sequential(
        layers.linear(784, width),
        nn.ReLU(),
        layers.linear(width, width),
        nn.ReLU(),
        layers.linear(width, 10),
    )


def convnet(layers: Layers, widths: tuple[int, ...] = (32, 64, 128)) -> nn.Module:
    """Stages of two 3x3 convolutions with batch norm; pooling between the stages."""
    body: list[nn.Module] = []
    channels = 3
    for stage, width in enumerate(widths):
        for _ in range(2):
            body += [layers.conv(channels, width, 3, padding=1, bias=False)]
            body += [nn.BatchNorm2d(width), nn.ReLU()]
            channels = width
        if stage < len(widths) - 1:
            body += [nn.MaxPool2d(2)]
    body += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), layers.linear(channels, 10)]
    return nn.Sequential(*body)


class Block(nn.Module):
    """A pre-norm block; its four linear layers are the peer's."""

    def __init__(self, layers: Layers, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = (nn.LayerNorm(width, 1e-5, bias=False) for _ in range(2))
        self.qkv = layers.linear(width, 3 * width, bias=False)
        self.out = layers.linear(width, width, bias=False)
        self.up = layers.linear(width, 4 * width, bias=False)
        self.down = layers.linear(4 * width, width, bias=False)
        self.dropout = nn.Dropout(common.DROPOUT)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, tokens, width = x.shape
        shape = (batch, tokens, 3, self.heads, width // self.heads)
        q, k, v = self.qkv(self.norm1(x)).view(shape).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.dropout(self.out(y.transpose(1, 2).reshape(batch, tokens, width)))
        return x + self.dropout(self.down(F.gelu(self.up(self.norm2(x)))))


class NanoGPT(nn.Module):
    """Logits of the next character; only the linear layers within blocks are the peer's."""

    def __init__(self, layers: Layers, width: int = 384, blocks: int = 6, heads: int = 6) -> None:
        super().__init__()
        self.tokens = nn.Embedding(common.VOCABULARY, width)
        self.positions = nn.Parameter(0.02 * torch.randn(common.CONTEXT, width))
        self.blocks = nn.ModuleList(Block(layers, width, heads) for _ in range(blocks))
        self.norm = nn.LayerNorm(width, 1e-5, bias=False)
        self.head = nn.Linear(width, common.VOCABULARY, bias=False)
        self.dropout = nn.Dropout(common.DROPOUT)
        for name, parameter in self.named_parameters():
            if name.endswith("weight") and parameter.ndim == 2:
                deep = name.endswith(("out.weight", "down.weight"))
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * blocks) if deep else 0.02)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.dropout(self.tokens(tokens) + self.positions)
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        # In float32, as in benchmarks/models.py.
        with torch.autocast(x.device.type, enabled=False):
            return self.head(x.float())


def train_step(job: common.Job, mode: str, model: nn.Module) -> common.Training:
    """The whole step: forward, backward and update, with the batch on the device."""
    torch._dynamo.config.recompile_limit = 64  # each setting compiles the same code anew
    device = "cuda" if job.device == "gpu" else "cpu"
    model = model.to(device).train()
    x, y = (torch.from_numpy(part.copy()).to(device) for part in job.data())
    x = x.permute(0, 3, 1, 2).contiguous() if x.ndim == 4 else x.long() if x.ndim == 2 else x
    if job.model != "nanogpt":
        x = x.float()
    targets = y.long().flatten()
    optimizer = _optimizer(job, model)
    low = torch.autocast(device, torch.bfloat16, enabled=job.dtype == "bfloat16")

    def loss_of(x: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        with low:
            logits = model(x)
        return F.cross_entropy(logits.float().flatten(0, -2), targets)

    forward = torch.compile(_own_code(loss_of)) if mode == "compiled" else loss_of

    def step() -> torch.Tensor:
        optimizer.zero_grad(set_to_none=True)
        loss = forward(x, targets)
        loss.backward()
        if job.model == "nanogpt":
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return loss

    return common.Training(step, functools.partial(_kernels, model))


def _own_code(function: types.FunctionType) -> types.FunctionType:
    """A copy that torch.compile does not take for another setting's function."""
    code = function.__code__.replace(co_name=f"{function.__name__}_{next(_serial)}")
    return types.FunctionType(code, function.__globals__, code.co_name, None, function.__closure__)


def _kernels(model: nn.Module) -> dict[str, Any]:
    named = model.named_parameters()
    return {name: p.detach().cpu().numpy().copy() for name, p in named if p.ndim > 1}


def _optimizer(job: common.Job, model: nn.Module) -> torch.optim.Optimizer:
    rate, parameters = common.LEARNING_RATE, model.parameters()
    if job.model == "nanogpt":
        return torch.optim.AdamW(parameters, rate, betas=(0.9, 0.99), weight_decay=0.1, fused=True)
    return torch.optim.Adam(parameters, rate, fused=True)


def wait(_: str) -> Callable[[Any], Any]:
    """What blocks until a step is done."""
    return lambda _: torch.cuda.synchronize() if torch.cuda.is_available() else None
