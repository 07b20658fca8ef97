"""The models and the training step, in Keras 3; `Layers` says which of them are the peer's.

The step is the one that `fit` runs: Keras's own `make_train_function`, with the state that `fit`
hands it, fed a batch that stays on the device.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any

import common

MODES = {"jax": ("jit",), "tensorflow": ("jit",)}


@dataclasses.dataclass(frozen=True)
class Layers:
    """What makes layers: those that a peer quantizes, and the rest as `keras` has them.

    Attributes:
        keras: Keras, or what has its interface.
        dense: makes a layer given its units.
        conv: makes a layer given its filters and kernel size.
        relu: makes an activation that stands alone.
    """

    keras: Any
    dense: Callable[..., Any]
    conv: Callable[..., Any]
    relu: Callable[[], Any]


def plain(keras: Any) -> Layers:
    """The layers of Keras itself."""
    relu = functools.partial(keras.layers.Activation, "relu")
    return Layers(keras, keras.layers.Dense, keras.layers.Conv2D, relu)


def build(job: common.Job, layers: Layers) -> Any:
    """The model of a job, not compiled."""
    layers.keras.utils.set_random_seed(0)
    kind = job.model.partition("-")[0]
    return {"mlp": mlp, "convnet": convnet}[kind](layers)


def mlp(layers: Layers, width: int = 512) -> Any:
    """784-width-width-10 with ReLU."""
    inputs = x = layers.keras.layers.Input((784,))
    for _ in range(2):
        x = layers.relu()(layers.dense(width)(x))
    return layers.keras.Model(inputs, layers.dense(10)(x))


def convnet(layers: Layers, widths: tuple[int, ...] = (32, 64, 128)) -> Any:
    """Stages of two 3x3 convolutions with batch norm; pooling between the stages."""
    inputs = x = layers.keras.layers.Input((32, 32, 3))
    for stage, width in enumerate(widths):
        for _ in range(2):
            x = layers.conv(width, 3, padding="same", use_bias=False)(x)
            x = layers.relu()(layers.keras.layers.BatchNormalization()(x))
        if stage < len(widths) - 1:
            x = layers.keras.layers.MaxPooling2D()(x)
    x = layers.keras.layers.GlobalAveragePooling2D()(x)
    return layers.keras.Model(inputs, layers.dense(10)(x))


def train_step(job: common.Job, framework: str, make: Callable[[], Any]) -> common.Training:
    """The step of `fit`, given what makes the model, under the job's dtype policy."""
    import keras

    policy = {"float32": "float32", "bfloat16": "mixed_bfloat16"}[job.dtype]
    keras.config.set_dtype_policy(policy)
    model = make()
    model.compile(
        optimizer=keras.optimizers.Adam(common.LEARNING_RATE),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        jit_compile=True,
    )
    return {"jax": _jax, "tensorflow": _tensorflow}[framework](job, model)


def _jax(job: common.Job, model: Any) -> common.Training:
    import jax

    x, y = (jax.device_put(part) for part in job.data())
    _prepare(model, x, y)
    kinds = ("trainable", "non_trainable", "optimizer", "metrics")
    wanted = {f"{kind}_variables": True for kind in kinds}
    state = model._get_jax_state(**wanted, purge_model_variables=True)
    batches = itertools.repeat((x, y))
    names = [variable.path for variable in model.trainable_variables]

    def step() -> Any:
        nonlocal state
        _, state = model.train_function(state, batches)
        return state

    return common.Training(step, lambda: _kernels(names, state[0]))


def _tensorflow(job: common.Job, model: Any) -> common.Training:
    import tensorflow as tf

    x, y = (tf.identity(tf.constant(part)) for part in job.data())
    _prepare(model, x, y)
    batches = itertools.repeat((x, y))
    return common.Training(lambda: model.train_function(batches), lambda: _own_kernels(model))


def _own_kernels(model: Any) -> dict[str, Any]:
    variables = model.trainable_variables
    return _kernels([variable.path for variable in variables], variables)


def _kernels(names: list[str], values: list[Any]) -> dict[str, Any]:
    """Copies of what layers multiply by; learned bit widths and scales go by other names."""
    import keras

    named = zip(names, values, strict=True)
    return {n: keras.ops.convert_to_numpy(v).copy() for n, v in named if n.endswith("kernel")}


def _prepare(model: Any, x: Any, y: Any) -> None:
    model._symbolic_build(data_batch=(x, y))
    model.make_train_function()


def wait(framework: str) -> Callable[[Any], Any]:
    """What blocks until a step is done."""
    if framework == "jax":
        import jax

        return jax.block_until_ready
    return lambda result: [value.numpy() for value in result.values()]
