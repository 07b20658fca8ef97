"""tensorflow-model-optimization: quantization-aware training of a tf_keras (Keras 2) model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import common
import keras_models
import tensorflow as tf
import tensorflow_model_optimization as tfmot
import tf_keras
from tensorflow_model_optimization.python.core.quantization.keras.experimental import (
    default_n_bit,
)

MODES = {"tensorflow": ("jit", "graph")}
# Bits of activations and weights; None is the default scheme, of 8 bits.
SETTINGS: dict[str, tuple[int, int] | None] = {
    "A8W8": None,
    "A8W8 n-bit": (8, 8),
    "A4W4": (4, 4),
    "A4W1": (4, 1),
    "A1W1": (1, 1),
}


def variants(job: common.Job, framework: str, mode: str) -> Iterator[common.Variant]:
    """The settings; activations have moving ranges, biases stay float."""
    yield common.Variant(common.FLOAT, "tf_keras.layers", _step(job, mode, lambda model: model))
    for setting, bits in SETTINGS.items():
        as_set = "quantize_model(): default 8-bit scheme"
        if bits is not None:
            as_set = f"quantize_apply(DefaultNBitQuantizeScheme(num_bits_activation={bits[0]}, "
            as_set += f"num_bits_weight={bits[1]}))"
        yield common.Variant(setting, as_set, _step(job, mode, _quantizer(bits)))


def _quantizer(bits: tuple[int, int] | None) -> Callable[[Any], Any]:
    api = tfmot.quantization.keras
    if bits is None:
        return api.quantize_model

    def quantize(model: Any) -> Any:
        scheme = default_n_bit.default_n_bit_quantize_scheme.DefaultNBitQuantizeScheme(
            num_bits_activation=bits[0], num_bits_weight=bits[1]
        )
        registry = default_n_bit.default_n_bit_quantize_registry
        with api.quantize_scope(vars(registry)):
            return api.quantize_apply(api.quantize_annotate_model(model), scheme)

    return quantize


def _step(
    job: common.Job, mode: str, quantize: Callable[[Any], Any]
) -> Callable[[], common.Training]:
    def build() -> common.Training:
        if job.dtype != "float32":
            raise ValueError(f"{job.dtype}: tfmot's layers compute in float32")
        model = quantize(keras_models.build(job, keras_models.plain(tf_keras)))
        model.compile(
            optimizer=tf_keras.optimizers.Adam(common.LEARNING_RATE),
            loss=tf_keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        )
        batch = tuple(tf.identity(tf.constant(part)) for part in job.data())
        train = tf.function(model.train_step, jit_compile=mode == "jit")
        return common.Training(lambda: train(batch), lambda: _kernels(model))

    return build


def _kernels(model: Any) -> dict[str, Any]:
    return {v.name: v.numpy() for v in model.trainable_variables if "kernel" in v.name}


def wait(_: str) -> Callable[[Any], Any]:
    """What blocks until a step is done."""
    return lambda result: [value.numpy() for value in result.values()]


if __name__ == "__main__":
    peer = common.Peer("tensorflow-model-optimization", ("tensorflow",), MODES, variants, wait)
    common.run(peer, common.arguments(peer.frameworks))
