"""PQuantML: a Keras model rewritten by `add_compression_layers`, with and without pruning."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import common
import keras_models

FRAMEWORKS = ("jax", "tensorflow")
OPTIONS = common.arguments(FRAMEWORKS)
os.environ["KERAS_BACKEND"] = OPTIONS.framework

import keras  # noqa: E402
import pquant  # noqa: E402
from pquant.core.keras.layers import post_pretrain_functions  # noqa: E402

# Bits of activations and of weights (with the sign), and the pruning method that trains along.
SETTINGS = {
    "A8W8": (8, 8, None),
    "A8W8, cs": (8, 8, "cs"),
    "A8W8, pdp": (8, 8, "pdp"),
    "A4W4": (4, 4, None),
    "A4W2": (4, 2, None),
}


def variants(job: common.Job, framework: str, mode: str) -> Iterator[common.Variant]:
    """The settings; two bits are the least with which its fixed point has two signs."""
    yield common.Variant(common.FLOAT, "keras.layers", _step(job, framework, None))
    for setting, (a, w, method) in SETTINGS.items():
        as_set = f"{method or 'cs'}_config() with {_quantization(a, w)}; "
        as_set += f"enable_pruning={method is not None}; main stage of training"
        yield common.Variant(setting, as_set, _step(job, framework, (a, w, method)))


def _quantization(a: int, w: int) -> dict[str, Any]:
    """What is set in `quantization_parameters`; the rest is as PQuantML ships it.

    By channel, it finds the integer bits itself and takes no fewer than 0: of few bits, kernels
    all round to 0 then. Those get one range of ±1/8 for the tensor.
    """
    integer = 0.0 if w == 8 else -3.0
    return {
        "granularity": "per_channel" if w == 8 else "per_tensor",
        "default_weight_keep_negatives": 1.0,
        "default_weight_integer_bits": integer,
        "default_weight_fractional_bits": w - 1.0 - integer,
        "default_data_keep_negatives": 1.0,
        "default_data_integer_bits": min(2.0, a - 1.0),
        "default_data_fractional_bits": a - 1.0 - min(2.0, a - 1.0),
    }


def _step(
    job: common.Job, framework: str, kind: tuple[int, int, str | None] | None
) -> Callable[[], common.Training]:
    def make() -> Any:
        model = keras_models.build(job, keras_models.plain(keras))
        return model if kind is None else _compressed(model, *kind)

    return lambda: keras_models.train_step(job, framework, make)


def _compressed(model: Any, a: int, w: int, method: str | None) -> Any:
    """The model in the main stage of training, after what PQuantML calls pretraining."""
    config = {"cs": pquant.cs_config, "pdp": pquant.pdp_config}[method or "cs"]()
    config.pruning_parameters.enable_pruning = method is not None
    for name, value in _quantization(a, w).items():
        setattr(config.quantization_parameters, name, value)
    model = pquant.add_compression_layers(model, config)
    post_pretrain_functions(model, config)
    return model


if __name__ == "__main__":
    peer = common.Peer("pquant-ml", FRAMEWORKS, keras_models.MODES, variants, keras_models.wait)
    common.run(peer, OPTIONS)
