"""qkeras-v3: the Keras 3 fork of QKeras, on JAX or TensorFlow."""

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
import qkeras  # noqa: E402

# Quantizers of inputs and of kernels, in qkeras's own notation.
SETTINGS = {
    "A8W8": ("quantized_bits(8,3,1,alpha=1)", "quantized_bits(8,0,1,alpha='auto')"),
    "A8W8 fixed scales": ("quantized_bits(8,3,1,alpha=1)", "quantized_bits(8,0,1,alpha=1)"),
    "A8W8 linear": ("quantized_linear(8,3,1,alpha=1)", "quantized_linear(8,0,1,alpha='auto')"),
    "A4W4": ("quantized_bits(4,2,1,alpha=1)", "quantized_bits(4,0,1,alpha='auto')"),
    "A4W1": ("quantized_bits(4,2,1,alpha=1)", "binary(alpha='auto')"),
    "A1W1": ("binary(alpha=1)", "binary(alpha='auto')"),
}


def variants(job: common.Job, framework: str, mode: str) -> Iterator[common.Variant]:
    """The settings; `alpha='auto'` fits one scale per output channel by least squares."""
    yield common.Variant(common.FLOAT, "keras.layers", _step(job, framework, None))
    for setting, (inputs, kernels) in SETTINGS.items():
        as_set = f"QActivation({inputs}) before each layer, kernel_quantizer={kernels}, bias float"
        yield common.Variant(setting, as_set, _step(job, framework, (inputs, kernels)))


def _step(
    job: common.Job, framework: str, kinds: tuple[str, str] | None
) -> Callable[[], common.Training]:
    def make() -> Any:
        layers = keras_models.plain(keras) if kinds is None else _layers(*kinds)
        return keras_models.build(job, layers)

    return lambda: keras_models.train_step(job, framework, make)


def _layers(inputs: str, kernels: str) -> keras_models.Layers:
    def behind(kind: Any) -> Callable[..., Any]:
        def make(*args: Any, **kwargs: Any) -> Callable[[Any], Any]:
            layer = kind(*args, kernel_quantizer=kernels, **kwargs)
            return lambda x: layer(qkeras.QActivation(inputs)(x))

        return make

    plain = keras_models.plain(keras)
    return keras_models.Layers(keras, behind(qkeras.QDense), behind(qkeras.QConv2D), plain.relu)


if __name__ == "__main__":
    peer = common.Peer("qkeras-v3", FRAMEWORKS, keras_models.MODES, variants, keras_models.wait)
    common.run(peer, OPTIONS)
