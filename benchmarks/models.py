"""Plain Keras models, as a user would write them, and synthetic batches for them.

Nothing of keras_rq is in here. `MODELS` says what is trained how: batch sizes and number format by
device, loss and optimizer.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import keras
import numpy as np
from keras import layers, ops

Batch = tuple[np.ndarray, np.ndarray]
DTYPES = {"cpu": "float32", "gpu": "mixed_bfloat16"}


@dataclasses.dataclass(frozen=True)
class Workload:
    """A model and how it is trained.

    Attributes:
        name: what rows call the model.
        build: makes the float model.
        batch: makes inputs and targets, given their number and a source of random numbers.
        batches: batch sizes to measure, by device ("cpu", "gpu").
        loss: makes the loss.
        optimizer: makes the optimizer.
        dtypes: Keras's dtype policy, by device.
    """

    name: str
    build: Callable[[], keras.Model]
    batch: Callable[[int, np.random.Generator], Batch]
    batches: Mapping[str, tuple[int, ...]]
    loss: Callable[[], keras.losses.Loss]
    optimizer: Callable[[], keras.optimizers.Optimizer]
    dtypes: Mapping[str, str] = dataclasses.field(default_factory=lambda: DTYPES)


def mlp(width: int = 512) -> keras.Model:
    """784-width-width-10 with ReLU."""
    return keras.Sequential(
        [
            keras.Input((784,)),
            layers.Dense(width, activation="relu"),
            layers.Dense(width, activation="relu"),
            layers.Dense(10),
        ]
    )


def convnet(widths: tuple[int, ...] = (32, 64, 128)) -> keras.Model:
    """Stages of two 3x3 convolutions with batch norm on 32x32 images; each halves the image."""
    inputs = x = keras.Input((32, 32, 3))
    for stage, width in enumerate(widths):
        for _ in range(2):
            x = layers.Conv2D(width, 3, padding="same", use_bias=False)(x)
            x = layers.BatchNormalization()(x)
            x = layers.Activation("relu")(x)
        if stage < len(widths) - 1:
            x = layers.MaxPooling2D()(x)
    x = layers.GlobalAveragePooling2D()(x)
    return keras.Model(inputs, layers.Dense(10)(x))


@keras.saving.register_keras_serializable("benchmarks")
class Shortcut(layers.Layer):
    """Takes every second pixel and appends channels of zeros: He's option A, without weights."""

    def __init__(self, channels: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.channels = channels

    def call(self, inputs: Any) -> Any:
        added = self.channels - inputs.shape[-1]
        padding = ((0, 0), (0, 0), (0, 0), (added // 2, added - added // 2))
        return ops.pad(inputs[:, ::2, ::2], padding)

    def compute_output_shape(self, input_shape: tuple[int | None, ...]) -> tuple[int | None, ...]:
        batch, height, width, _ = input_shape
        return (batch, (height + 1) // 2, (width + 1) // 2, self.channels)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "channels": self.channels}


def resnet20(*, blocks: int = 3, size: int = 32, classes: int = 10) -> keras.Model:
    """The CIFAR ResNet of He et al. (arXiv 1512.03385); three blocks a stage are 20 layers."""
    inputs = keras.Input((size, size, 3))
    x = layers.Activation("relu")(_normalized_conv(inputs, 16, 1, "stem"))
    for stage, width in enumerate((16, 32, 64)):
        for index in range(blocks):
            halves = stage > 0 and index == 0
            name = f"stage{stage}_block{index}"
            y = _normalized_conv(x, width, 2 if halves else 1, f"{name}_conv1")
            y = layers.Activation("relu")(y)
            y = _normalized_conv(y, width, 1, f"{name}_conv2")
            shortcut = Shortcut(width, name=f"{name}_shortcut")(x) if halves else x
            x = layers.Activation("relu")(layers.Add()([y, shortcut]))
    x = layers.GlobalAveragePooling2D()(x)
    return keras.Model(inputs, layers.Dense(classes, name="head")(x))


def _normalized_conv(x: Any, width: int, strides: int, name: str) -> Any:
    x = layers.Conv2D(
        width,
        3,
        strides=strides,
        padding="same",
        use_bias=False,
        kernel_initializer=keras.initializers.VarianceScaling(2.0, "fan_out", "untruncated_normal"),
        name=name,
    )(x)
    return layers.BatchNormalization(momentum=0.9, epsilon=1e-5, name=f"{name}_norm")(x)


@keras.saving.register_keras_serializable("benchmarks")
class Attention(layers.Layer):
    """Splits what a fused projection made into queries, keys and values, and attends."""

    def __init__(self, heads: int, causal: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.heads, self.causal = heads, causal

    def call(self, qkv: Any) -> Any:
        batch, tokens, width = ops.shape(qkv)
        qkv = ops.reshape(qkv, (batch, tokens, 3, self.heads, width // (3 * self.heads)))
        # cuDNN trains no attention over an odd number of tokens, which Keras finds out too late.
        flash = False if tokens is not None and tokens % 2 else None
        attended = ops.dot_product_attention(
            *(qkv[:, :, i] for i in range(3)), is_causal=self.causal, flash_attention=flash
        )
        return ops.reshape(attended, (batch, tokens, width // 3))

    def compute_output_shape(self, input_shape: tuple[int | None, ...]) -> tuple[int | None, ...]:
        return (*input_shape[:-1], input_shape[-1] // 3)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "heads": self.heads, "causal": self.causal}


@keras.saving.register_keras_serializable("benchmarks")
class Positions(layers.Layer):
    """Adds a learned vector to each position; shorter sequences use the first ones."""

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        initializer = keras.initializers.RandomNormal(stddev=0.02)
        self.table = self.add_weight(shape=input_shape[1:], initializer=initializer, name="table")

    def call(self, inputs: Any) -> Any:
        return inputs + self.table[: ops.shape(inputs)[1]]


@keras.saving.register_keras_serializable("benchmarks")
class ClassToken(layers.Layer):
    """Puts one learned token before the others."""

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        self.token = self.add_weight(
            shape=(1, 1, input_shape[-1]), initializer="zeros", name="token"
        )

    def call(self, inputs: Any) -> Any:
        token = ops.broadcast_to(self.token, (ops.shape(inputs)[0], 1, self.token.shape[-1]))
        return ops.concatenate([token, inputs], axis=1)


def nanogpt(
    *,
    width: int = 384,
    blocks: int = 6,
    heads: int = 6,
    context: int = 256,
    vocabulary: int = 65,
    dropout: float = 0.2,
    ends_dtype: str | None = None,
) -> keras.Model:
    """The nanoGPT of `train_shakespeare_char.py`: logits of the next character.

    `ends_dtype` is that of the token table and of the logits, where it is not the model's. In
    bfloat16 a GPU adds up the table's gradient by compare and swap, and the common characters of
    a text wait for each other: that alone took longer than all else of a step.

    Two things differ: the head has a matrix of its own instead of the token table, and no dropout
    falls on the attention weights, which `keras.ops.dot_product_attention` does not offer.
    """
    block = Transformer(width, heads, blocks, dropout, use_bias=False, causal=True)
    tokens = keras.Input((context,), dtype="int32")
    x = layers.Embedding(
        vocabulary, width, embeddings_initializer=_normal(), name="tokens", dtype=ends_dtype
    )(tokens)
    x = Positions(name="positions")(x)
    x = layers.Dropout(dropout)(x)
    for index in range(blocks):
        x = block(x, f"block{index}")
    x = block.norm("last_norm")(x)
    head = layers.Dense(
        vocabulary, use_bias=False, kernel_initializer=_normal(), name="head", dtype=ends_dtype
    )
    return keras.Model(tokens, head(x))


def vit_tiny(
    *, width: int = 192, blocks: int = 12, heads: int = 3, size: int = 224, classes: int = 1000
) -> keras.Model:
    """ViT-Ti/16: patches of 16 x 16 pixels, a class token, and logits from that token."""
    block = Transformer(width, heads, blocks, dropout=0.0, use_bias=True, causal=False)
    images = keras.Input((size, size, 3))
    x = layers.Conv2D(width, 16, strides=16, name="patches")(images)
    x = layers.Reshape((-1, width))(x)
    x = Positions(name="positions")(ClassToken(name="class_token")(x))
    for index in range(blocks):
        x = block(x, f"block{index}")
    x = block.norm("last_norm")(x)
    return keras.Model(images, layers.Dense(classes, name="head")(x[:, 0]))


@dataclasses.dataclass(frozen=True)
class Transformer:
    """Pre-norm blocks of fused-projection attention and a GELU feed-forward of 4 x width."""

    width: int
    heads: int
    blocks: int
    dropout: float
    use_bias: bool
    causal: bool

    def __call__(self, x: Any, name: str) -> Any:
        """One block, as a functional graph; `name` begins the names of its layers."""
        residual = 0.02 / math.sqrt(2 * self.blocks)  # nanoGPT's scaling by depth
        y = self.norm(f"{name}_norm1")(x)
        y = self._dense(3 * self.width, f"{name}_qkv")(y)
        y = Attention(self.heads, self.causal, name=f"{name}_attention")(y)
        x = x + self._dropped(self._dense(self.width, f"{name}_out", stddev=residual)(y))
        y = self.norm(f"{name}_norm2")(x)
        y = self._dense(4 * self.width, f"{name}_up", activation="gelu")(y)
        return x + self._dropped(self._dense(self.width, f"{name}_down", stddev=residual)(y))

    def norm(self, name: str) -> layers.Layer:
        """LayerNorm, without an offset where the model has no biases."""
        return layers.LayerNormalization(epsilon=1e-5, center=self.use_bias, name=name)

    def _dense(self, units: int, name: str, stddev: float = 0.02, **kwargs: Any) -> layers.Layer:
        kernel = _normal(stddev)
        return layers.Dense(
            units, use_bias=self.use_bias, kernel_initializer=kernel, name=name, **kwargs
        )

    def _dropped(self, x: Any) -> Any:
        return layers.Dropout(self.dropout)(x) if self.dropout else x


def wide_block(width: int = 4096, heads: int = 32, context: int = 2048) -> keras.Model:
    """One causal transformer block, wide enough for its matrix products to be what costs."""
    block = Transformer(width, heads, blocks=1, dropout=0.0, use_bias=False, causal=True)
    inputs = keras.Input((context, width))
    return keras.Model(inputs, block(inputs, "block"))


def _normal(stddev: float = 0.02) -> keras.initializers.Initializer:
    return keras.initializers.RandomNormal(stddev=stddev)


def _vectors(count: int, random: np.random.Generator) -> Batch:
    x = random.normal(size=(count, 784)).astype("float32")
    return x, random.integers(0, 10, count, dtype="int32")


def _images(size: int, classes: int) -> Callable[[int, np.random.Generator], Batch]:
    def make(count: int, random: np.random.Generator) -> Batch:
        x = random.normal(size=(count, size, size, 3)).astype("float32")
        return x, random.integers(0, classes, count, dtype="int32")

    return make


def _text(count: int, random: np.random.Generator) -> Batch:
    tokens = random.integers(0, 65, (count, 257), dtype="int32")
    return tokens[:, :-1], tokens[:, 1:]


def _activations(count: int, random: np.random.Generator) -> Batch:
    x = random.standard_normal((count, 2048, 4096), "float32")
    return x, np.roll(x, 1, axis=1)


def _cross_entropy() -> keras.losses.Loss:
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def nanogpt_optimizer(learning_rate: Any = 1e-3) -> keras.optimizers.Optimizer:
    """AdamW as `train_shakespeare_char.py` sets it; the rate may be a schedule."""
    return keras.optimizers.AdamW(learning_rate, weight_decay=0.1, beta_2=0.99, global_clipnorm=1.0)


# On a CPU of two cores the transformers get batches that a float step takes a second or two for.
MODELS: dict[str, Workload] = {
    workload.name: workload
    for workload in (
        Workload(
            "mlp",
            mlp,
            _vectors,
            {"cpu": (64, 1024), "gpu": (64, 1024)},
            _cross_entropy,
            lambda: keras.optimizers.Adam(1e-3),
        ),
        Workload(
            "convnet",
            convnet,
            _images(32, 10),
            {"cpu": (64,), "gpu": (64,)},
            _cross_entropy,
            lambda: keras.optimizers.Adam(1e-3),
        ),
        Workload(
            "nanogpt",
            functools.partial(nanogpt, ends_dtype="float32"),
            _text,
            {"cpu": (4,), "gpu": (64,)},
            _cross_entropy,
            nanogpt_optimizer,
        ),
        Workload(
            "vit_tiny",
            vit_tiny,
            _images(224, 1000),
            {"cpu": (8,), "gpu": (64,)},
            _cross_entropy,
            lambda: keras.optimizers.AdamW(1e-3, weight_decay=0.05),
        ),
        Workload(
            "wide_block",
            wide_block,
            _activations,
            {"cpu": (), "gpu": (8,)},
            keras.losses.MeanSquaredError,
            lambda: keras.optimizers.AdamW(1e-4),
        ),
    )
}
