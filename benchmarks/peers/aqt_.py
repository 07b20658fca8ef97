"""AQT: its dot_general and convolution, injected into Flax."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import common
import flax_models
from aqt.jax.v2 import aqt_conv_general
from aqt.jax.v2 import config as aqt_config
from aqt.jax.v2 import tiled_dot_general as tiled
from aqt.jax.v2.flax import aqt_flax

SCALES = "symmetric, abs-max scales of this batch: activations by row, weights by output channel"


def variants(job: common.Job, framework: str, mode: str) -> Iterator[common.Variant]:
    """The settings; the forward product is quantized, as in training for inference."""
    for setting, (a_bits, w_bits) in common.SETTINGS.items():
        if a_bits is None:
            yield common.Variant(setting, "flax.linen", _step(job, None))
            continue
        as_set = f"set_bits(forward: {a_bits}, {w_bits}; gradients: float); {SCALES}"
        yield common.Variant(setting, as_set, _step(job, (a_bits, w_bits)))
    if job.model != "convnet":
        as_set = (
            f"set_bits(forward: 4, 4; gradients: float), contraction in tiles of {common.BLOCK}"
        )
        yield common.Variant("A4W4-128", as_set, _step(job, (4, 4), common.BLOCK))
        as_set = "config_v4(): forward 8 bit, gradient of the input 8 bit with stochastic rounding"
        yield common.Variant("A8W8, gradients too", as_set, _step(job, "v4"))


def _step(job: common.Job, bits: Any, tile: int | None = None) -> Callable[[], common.Training]:
    def build() -> common.Training:
        if bits is None:
            return flax_models.train_step(job, flax_models.build(job))
        dot = functools.partial(_dot, bits, tile)
        conv = functools.partial(_conv, bits)
        return flax_models.train_step(job, flax_models.build(job, dot, conv))

    return build


def _dot(bits: Any, tile: int | None) -> Any:
    """A Flax module that multiplies; the tile divides the contracted axis, whatever its size."""
    config = aqt_config.config_v4()
    if bits != "v4":
        config = aqt_config.default_unquantized_config()
        aqt_config.set_bits(config, *bits, None, None, None, None)
    if tile is None:
        return aqt_flax.AqtDotGeneral(config)

    def multiply(x: Any, kernel: Any, dimensions: Any, **kwargs: Any) -> Any:
        (x_axis,), (kernel_axis,) = dimensions[0]
        size = common.divisor(x.shape[x_axis], tile)
        tiling = tiled.Cfg(_along(x_axis, size), _along(kernel_axis, size))
        dot = aqt_flax.AqtDotGeneral(config, tiling_cfg=tiling)
        return dot(x, kernel, dimensions, **kwargs)

    return multiply


def _along(axis: int, size: int) -> Any:
    return tiled.TensorTiling([tiled.AxisTiling(axis=axis, tile_size=size)], [])


def _conv(bits: tuple[int, int]) -> Any:
    config = aqt_config.default_unquantized_config()
    config.fwd = aqt_conv_general.conv_general_dilated_make(2, *bits)
    return aqt_flax.AqtConvGeneralDilated(config)


if __name__ == "__main__":
    peer = common.Peer(
        "aqtp", ("jax",), flax_models.MODES, variants, flax_models.wait, tuple(common.BATCHES)
    )
    common.run(peer, common.arguments(peer.frameworks))
