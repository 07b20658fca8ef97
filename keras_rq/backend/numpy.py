"""NumPy has no gradients: forward only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from keras_rq.backend.common import as_it_is_now as as_it_is_now
from keras_rq.backend.common import call_in_graph as call_in_graph
from keras_rq.backend.common import compiled as compiled
from keras_rq.backend.common import eagerly as eagerly
from keras_rq.backend.common import forget_traces as forget_traces
from keras_rq.backend.common import integer_codes as integer_codes
from keras_rq.backend.common import make_known as make_known
from keras_rq.backend.common import reduce_at_once as reduce_at_once
from keras_rq.backend.common import rotation_side as rotation_side
from keras_rq.backend.common import unpadded
from keras_rq.backend.rule import Forward, GradientRule

convolve = unpadded


def with_gradient(rule: GradientRule, x: Any) -> Any:
    """Applies the forward half of `rule` to `x`; see `keras_rq.backend.rule`."""
    return rule.forward(x)[0]


def product_with_gradient(
    rule: GradientRule,
    x: Any,
    kernel: Any,
    product: Callable[[Any, Any], Any],
    otherwise: Forward | None = None,
) -> Any:
    """`product(rule(x), kernel)`, or `otherwise`."""
    if otherwise is not None:
        return otherwise(x, *otherwise.constants)
    return product(with_gradient(rule, x), kernel)


def where_traced() -> Any:
    """Equal at two places whose tensors may be used for each other; None: nowhere else."""
    return "eager"


def float32_matmul(x: Any, y: Any) -> Any:
    """A matrix product in float32 that keeps all digits of its operands, of one float dtype."""
    return np.matmul(x.astype("float32"), y.astype("float32"))
