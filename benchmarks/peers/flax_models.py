"""The models and the training step, in Flax; a peer injects its products or rewrites the model."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import common
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

MODES = {"jax": ("jit",)}


class Mlp(nn.Module):
    """784-width-width-10 with ReLU."""

    dtype: Any
    width: int = 512
    dot: Any = None
    conv: Any = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for _ in range(2):
            x = nn.relu(nn.Dense(self.width, dtype=self.dtype, dot_general_cls=self.dot)(x))
        return nn.Dense(10, dtype=self.dtype, dot_general_cls=self.dot)(x)


class Convnet(nn.Module):
    """Stages of two 3x3 convolutions with batch norm; pooling between the stages."""

    dtype: Any
    widths: tuple[int, ...] = (32, 64, 128)
    dot: Any = None
    conv: Any = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for stage, width in enumerate(self.widths):
            for _ in range(2):
                x = nn.Conv(
                    width,
                    (3, 3),
                    use_bias=False,
                    dtype=self.dtype,
                    conv_general_dilated_cls=self.conv,
                )(x)
                x = nn.relu(nn.BatchNorm(use_running_average=False, dtype=self.dtype)(x))
            if stage < len(self.widths) - 1:
                x = nn.max_pool(x, (2, 2), (2, 2))
        return nn.Dense(10, dtype=self.dtype, dot_general_cls=self.dot)(x.mean((1, 2)))


class Block(nn.Module):
    """A pre-norm block; its four dense layers are the peer's."""

    dtype: Any
    heads: int
    dot: Any = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        width = x.shape[-1]
        dense = functools.partial(
            nn.Dense,
            use_bias=False,
            dtype=self.dtype,
            dot_general_cls=self.dot,
            kernel_init=nn.initializers.normal(0.02),
        )
        y = dense(3 * width, name="qkv")(_norm(self.dtype)(x))
        y = y.reshape(*x.shape[:2], 3, self.heads, width // self.heads)
        y = jax.nn.dot_product_attention(
            y[:, :, 0], y[:, :, 1], y[:, :, 2], is_causal=True, implementation=attention()
        )
        x = x + _dropout(dense(width, name="out")(y.reshape(x.shape)))
        y = nn.gelu(dense(4 * width, name="up")(_norm(self.dtype)(x)), approximate=False)
        return x + _dropout(dense(width, name="down")(y))


class NanoGPT(nn.Module):
    """Logits of the next character; only the dense layers within blocks are the peer's."""

    dtype: Any
    width: int = 384
    blocks: int = 6
    heads: int = 6
    dot: Any = None
    conv: Any = None

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        normal = nn.initializers.normal(0.02)
        # Its gradient in float32, as in benchmarks/models.py, which says why.
        x = nn.Embed(common.VOCABULARY, self.width, dtype="float32", embedding_init=normal)(tokens)
        table = self.param("positions", normal, (common.CONTEXT, self.width))
        x = _dropout(x.astype(self.dtype) + table.astype(self.dtype))
        for index in range(self.blocks):
            x = Block(self.dtype, self.heads, self.dot, name=f"block{index}")(x)
        head = nn.Dense(
            common.VOCABULARY, use_bias=False, dtype="float32", kernel_init=normal, name="head"
        )
        return head(_norm(self.dtype)(x))


def _norm(dtype: Any) -> nn.Module:
    return nn.LayerNorm(epsilon=1e-5, use_bias=False, dtype=dtype)


def _dropout(x: jax.Array) -> jax.Array:
    return nn.Dropout(common.DROPOUT, deterministic=False)(x)


@functools.cache
def attention() -> str:
    """The fused attention of cuDNN where it runs, as Keras chooses too, else XLA's."""
    x = jnp.zeros((1, 64, 1, 64), "bfloat16")
    try:
        jax.nn.dot_product_attention(x, x, x, is_causal=True, implementation="cudnn")
    except Exception:
        return "xla"
    return "cudnn"


def build(job: common.Job, dot: Any = None, conv: Any = None) -> nn.Module:
    """The model of a job, given what makes a peer's dot_general and convolution."""
    if job.model == "nanogpt" and job.dtype == "bfloat16":
        attention()  # probed here: within a trace, a failure would come too late
    kind = job.model.partition("-")[0]
    module = {"mlp": Mlp, "convnet": Convnet, "nanogpt": NanoGPT}[kind]
    return module(jnp.dtype(job.dtype), dot=dot, conv=conv)


def train_step(job: common.Job, model: nn.Module) -> common.Training:
    """The whole step under one `jax.jit`, its state donated, with the batch on the device."""
    x, y = (jax.device_put(part) for part in job.data())
    key = jax.random.key(0)
    variables = jax.jit(model.init)({"params": key, "dropout": key}, x)
    others = {name: part for name, part in variables.items() if name != "params"}
    optimizer = _optimizer(job)
    state = (variables["params"], others, jax.jit(optimizer.init)(variables["params"]), key)

    def loss_of(params: Any, others: Any, key: jax.Array, x: jax.Array, y: jax.Array) -> Any:
        rngs = {"dropout": key, "params": key}
        logits, others = model.apply({"params": params, **others}, x, rngs=rngs, mutable=True)
        others = {name: part for name, part in others.items() if name != "params"}
        logits = logits.astype("float32")
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean(), others

    @functools.partial(jax.jit, donate_argnums=0)
    def update(state: Any, x: jax.Array, y: jax.Array) -> Any:
        params, others, moments, key = state
        key, now = jax.random.split(key)
        gradient = jax.value_and_grad(loss_of, has_aux=True)
        (loss, others), gradients = gradient(params, others, now, x, y)
        updates, moments = optimizer.update(gradients, moments, params)
        return (optax.apply_updates(params, updates), others, moments, key), loss

    def step() -> Any:
        nonlocal state
        state, loss = update(state, x, y)
        return state, loss

    return common.Training(step, lambda: _kernels(state[0]))


def _kernels(params: Any) -> dict[str, np.ndarray]:
    named = jax.tree_util.tree_leaves_with_path(params)
    return {jax.tree_util.keystr(path): np.array(p) for path, p in named if p.ndim > 1}


def _optimizer(job: common.Job) -> optax.GradientTransformation:
    if job.model == "nanogpt":
        adamw = optax.adamw(common.LEARNING_RATE, b2=0.99, weight_decay=0.1)
        return optax.chain(optax.clip_by_global_norm(1.0), adamw)
    return optax.adam(common.LEARNING_RATE)


def wait(_: str) -> Callable[[Any], Any]:
    """What blocks until a step is done."""
    return jax.block_until_ready
