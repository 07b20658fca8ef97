"""qwix: a Flax model rewritten by rules for quantization-aware training."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import common
import flax_models
import jax
import jax.numpy as jnp
import qwix
from flax import linen as nn
from qwix._src.core import sparsity

LAYERS = r"(Dense|Conv)_\d+|block\d+/(qkv|out|up|down)"
SCALES = "abs-max scales of this batch: activations by row, weights by output channel"
# The nearest to 1 bit is int2: int1 is a type, but `_check` finds that it rounds everything to 0.
SPARSE = {"weight_sparsity_n": 2, "weight_sparsity_m": 4}
SETTINGS: dict[str, tuple[str, str, int | None, dict[str, int]]] = {
    "A8W8": ("int8", "int8", None, {}),
    "A4W4": ("int4", "int4", None, {}),
    "A4W4-128": ("int4", "int4", common.BLOCK, {}),
    "A2W2-128": ("int2", "int2", common.BLOCK, {}),
    "A4W2-128-2:4": ("int4", "int2", common.BLOCK, SPARSE),
    "A1W1": ("int1", "int1", None, {}),
}


def variants(job: common.Job, framework: str, mode: str) -> Iterator[common.Variant]:
    """The settings, each with float gradients."""
    yield common.Variant(common.FLOAT, "flax.linen", _step(job, None))
    for setting, (a, w, tile, sparse) in SETTINGS.items():
        as_set = f"QtRule(act_qtype={a}, weight_qtype={w}, tile_size={tile}"
        as_set += f", sparsity_rule=SparsityRule({sparse}))" if sparse else ")"
        yield common.Variant(setting, f"{as_set}; {SCALES}", _step(job, (a, w, tile, sparse)))


def _step(job: common.Job, rule: Any) -> Callable[[], common.Training]:
    def build() -> common.Training:
        model = flax_models.build(job)
        if rule is not None:
            _check(*rule[:3])
            model = qwix.quantize_model(model, qwix.QtProvider(_rules(job, *rule)))
        return flax_models.train_step(job, model)

    return build


def _check(a: str, w: str, tile: int | None) -> None:
    """A layer whose outputs are all zero is no quantized layer."""
    x = jax.random.normal(jax.random.key(0), (2, 4 * common.BLOCK))
    rule = qwix.QtRule(act_qtype=a, weight_qtype=w, tile_size=tile or common.BLOCK)
    layer = qwix.quantize_model(nn.Dense(8), qwix.QtProvider([rule]))
    if not jnp.any(layer.apply(layer.init(jax.random.key(1), x), x)):
        raise ValueError(f"{a} x {w}: every product is 0")


def _rules(job: common.Job, a: str, w: str, tile: int | None, sparse: dict) -> list[qwix.QtRule]:
    extra = {"sparsity_rule": sparsity.SparsityRule(**sparse)} if sparse else None
    rule = functools.partial(qwix.QtRule, act_qtype=a, weight_qtype=w, additional_qt_config=extra)
    if tile is None:
        return [rule(module_path=LAYERS)]
    # 784 inputs are no multiple of 128: the first layer gets the largest tile that fits.
    first = rule(module_path="Dense_0", tile_size=common.divisor(784, tile))
    rest = rule(module_path=LAYERS, tile_size=tile)
    return [first, rest] if job.model.startswith("mlp") else [rest]


if __name__ == "__main__":
    peer = common.Peer(
        "qwix", ("jax",), flax_models.MODES, variants, flax_models.wait, tuple(common.BATCHES)
    )
    common.run(peer, common.arguments(peer.frameworks))
