"""Custom gradients in TensorFlow."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import tensorflow as tf

from keras_rq.backend import common
from keras_rq.backend.common import as_it_is_now as as_it_is_now
from keras_rq.backend.common import call_in_graph as call_in_graph
from keras_rq.backend.common import compiled as compiled
from keras_rq.backend.common import eagerly as eagerly
from keras_rq.backend.common import integer_codes as integer_codes
from keras_rq.backend.common import make_known as make_known
from keras_rq.backend.common import unpadded
from keras_rq.backend.rule import Forward, GradientRule
from keras_rq.numerics.parts import NEUTRAL

# TensorFlow promises neither; without them every statistic takes a pass of its own.
try:
    from tensorflow.compiler.tf2xla.ops import gen_xla_ops
    from tensorflow.python.ops.control_flow_util import GraphOrParentsInXlaContext
except ImportError:
    gen_xla_ops = None

convolve = unpadded


def _arranged(rule: GradientRule) -> GradientRule:
    # What the XLA of TensorFlow gains with parts, a mask takes away: both arrangements need it.
    return rule.in_parts if _for_xla_on_a_cpu() and not rule.prunes else rule


def _for_xla_on_a_cpu() -> bool:
    """Whether XLA will compile what is traced now; then it may have operations of XLA's own."""
    if gen_xla_ops is None or tf.executing_eagerly():
        return False
    is_elsewhere = _has_gpu or tf.config.list_physical_devices("TPU")
    return not is_elsewhere and GraphOrParentsInXlaContext(tf.compat.v1.get_default_graph())


_COMBINE = {"sum": tf.add, "max": tf.maximum, "min": tf.minimum}


def reduce_at_once(arrays: Sequence[Any], ways: Sequence[str], axis: int) -> Sequence[Any]:
    """Reduces float32 arrays of one shape along an axis, each by its way: "sum", "max" or "min"."""
    if len(arrays) == 1:
        return common.reduce_at_once(arrays, ways, axis)
    return gen_xla_ops.xla_variadic_reduce_v2(
        inputs=arrays,
        init_values=[tf.constant(NEUTRAL[way]) for way in ways],
        dimensions_to_reduce=[axis],
        reducer=_combined(tuple(ways)),
    )


@functools.cache
def _combined(ways: tuple[str, ...]) -> Any:
    """The function of two numbers each that a reduction applies."""

    @tf.function
    def combine(*numbers: Any) -> tuple[Any, ...]:
        pairs = zip(ways, numbers[: len(ways)], numbers[len(ways) :], strict=True)
        return tuple(_COMBINE[way](first, second) for way, first, second in pairs)

    with tf.init_scope():  # no part of the graph that happens to be traced
        return combine.get_concrete_function(*[tf.TensorSpec((), "float32")] * (2 * len(ways)))


def with_gradient(rule: GradientRule, x: Any) -> Any:
    """Applies `rule` to `x`; see `keras_rq.backend.rule`."""
    rule = _arranged(rule)

    @tf.custom_gradient
    def apply(x: Any) -> Any:
        # Cut from the tape, which would keep every intermediate of the forward pass alive.
        y, statistics = rule.forward(tf.stop_gradient(x))
        return y, lambda upstream: rule.backward(x, statistics, upstream)

    return apply(tf.convert_to_tensor(x))


def product_with_gradient(
    rule: GradientRule,
    x: Any,
    kernel: Any,
    product: Callable[[Any, Any], Any],
    otherwise: Forward | None = None,
) -> Any:
    """`product(rule(x), kernel)`, linear in both: keeps `x` and not the output of the rule.

    The forward pass is `otherwise`, where there is one.
    """
    rule = _arranged(rule)

    @tf.custom_gradient
    def apply(x: Any, kernel: Any) -> Any:
        y, statistics = rule.forward(tf.stop_gradient(x))

        def backward(upstream: Any) -> tuple[Any, Any]:
            again = rule.again(x, statistics)
            with tf.GradientTape(watch_accessed_variables=False) as tape:
                tape.watch((again, kernel))
                # Nobody reads this output, so that a graph drops the product and keeps its slopes.
                output = product(again, kernel)
            to_y, to_kernel = tape.gradient(output, (again, kernel), upstream)
            return rule.backward(x, statistics, to_y), to_kernel

        if otherwise is not None:
            return otherwise(tf.stop_gradient(x), *otherwise.constants), backward
        return product(y, tf.stop_gradient(kernel)), backward

    return apply(tf.convert_to_tensor(x), tf.convert_to_tensor(kernel))


def forget_traces(owners: Iterable[Any]) -> None:
    """Has functions traced again that `owners` decorated with `tf.function`.

    Their graphs are kept by object, and show nothing of what became of its layers since.
    """
    kind = tf.types.experimental.PolymorphicFunction
    for owner in owners:
        for name, function in list(vars(owner).items()):
            if isinstance(function, kind):
                setattr(owner, name, function._clone(None))
        for method in (value for cls in type(owner).__mro__ for value in vars(cls).values()):
            if isinstance(method, kind):
                method._descriptor_cache.pop(owner, None)


def where_traced() -> Any:
    """Equal at two places whose tensors may be used for each other; None: nowhere else."""
    return "eager" if tf.executing_eagerly() else tf.compat.v1.get_default_graph()


def _float32_matmul(x: Any, y: Any) -> Any:
    """A matrix product in float32 that keeps all digits of its operands, of one float dtype."""
    x, y = tf.cast(x, "float32"), tf.cast(y, "float32")
    if x.shape.rank < y.shape.rank:
        # Else XLA's CPU backend multiplies all matrices as one, with a transpose before and after.
        x = tf.broadcast_to(x, tf.concat([tf.shape(y)[:-2], tf.shape(x)], 0))
    return tf.matmul(x, y)


# TensorFlow says for a whole process, not for a product, whether GPUs may round the operands.
_has_gpu = bool(tf.config.list_physical_devices("GPU"))
float32_matmul: Callable[[Any, Any], Any] | None = None if _has_gpu else _float32_matmul


def rotation_side() -> int:
    """Of the largest matrix that rotations multiply by; additions do what is left of them."""
    return 32  # on CPUs; GPUs have no product
