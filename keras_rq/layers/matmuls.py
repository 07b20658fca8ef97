"""Products of two activations: attention, and drop-ins for `matmul` and `einsum`.

Both operands are quantized by one quantizer, `matmuls` of a policy. Queries and keys have blocks
along the head. Probabilities and values meet along the keys, of which nobody may know how many
there are: each row of probabilities, and each channel of the values, has one scale and offset over
all of them. Two consequences:

- A channel of the values has statistics over all keys that are there, masked ones and, in causal
  attention, later ones included: an output depends on them by a scale and an offset. A
  quantizer with a block size of "tensor" has them share more still.
- Zero probabilities stay zero, so that what a mask forbids or dropout drops has no weight.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import keras
from keras import ops

from keras_rq.layers.base import QuantizedLayer
from keras_rq.layers.products import Einsum as EinsumProduct
from keras_rq.layers.products import MatMul, OfUnknownLength, Product
from keras_rq.layers.registry import quantizes

_own = keras.saving.register_keras_serializable("keras_rq")


class _Attention(QuantizedLayer):
    """The two products of dot-product attention, one by one.

    Keras leaves them to a fused operation where it can, which knows no quantized operands: here the
    scores are always there, as they are in Keras with dropout.
    """

    kernel_names = ()
    key_first: ClassVar[bool]  # in the equation of the scores

    def pairs(self) -> dict[str, Product]:
        outputs = EinsumProduct.create(self._combine_equation, 0)
        return {
            "scores": EinsumProduct.create(self._dot_product_equation, 0),
            "outputs": OfUnknownLength.create(outputs, keep_zeros=True),
        }

    def pair_shapes(self) -> dict[str, tuple[Any, Any]]:
        shapes = self._build_shapes_dict
        query, value = tuple(shapes["query_shape"]), tuple(shapes["value_shape"])
        heads, size = self._query_dense.kernel.shape[-2:]
        query, key = (*query[:-1], heads, size), (*value[:-1], heads, size)
        value = (*value[:-1], heads, self._value_dense.kernel.shape[-1])
        sizes = self._sizes(self._dot_product_equation, *self._in_order(query, key))
        scores = tuple(sizes[letter] for letter in self._combine_equation.split(",")[0])
        return {"scores": self._in_order(query, key), "outputs": (scores, value)}

    @staticmethod
    def _sizes(equation: str, *shapes: Any) -> dict[str, int | None]:
        labels = equation.split("->")[0].split(",")
        pairs = zip(labels, shapes, strict=True)
        return {k: v for one, shape in pairs for k, v in zip(one, shape, strict=True)}

    def _in_order(self, query: Any, key: Any) -> tuple[Any, Any]:
        return (key, query) if self.key_first else (query, key)

    def _compute_attention(
        self,
        query: Any,
        key: Any,
        value: Any,
        attention_mask: Any = None,
        training: bool | None = None,
        return_attention_scores: bool = False,
        use_causal_mask: bool = False,
    ) -> tuple[Any, Any]:
        if use_causal_mask:
            causal = self._compute_causal_mask(query, value)
            if attention_mask is not None:
                causal = ops.logical_and(ops.cast(attention_mask, "bool"), causal)
            attention_mask = causal
        query = ops.multiply(query, ops.cast(1.0 / math.sqrt(query.shape[-1]), query.dtype))
        scores = self.multiply_pair("scores", *self._in_order(query, key))
        scores = self._masked_softmax(scores, attention_mask)
        kept = self._dropout_layer(scores, training=training)
        return self.multiply_pair("outputs", kept, value), scores


@quantizes(keras.layers.MultiHeadAttention)
class QuantizedMultiHeadAttention(_Attention, keras.layers.MultiHeadAttention):
    """`keras.layers.MultiHeadAttention` with quantized products of activations."""

    key_first = True


@quantizes(keras.layers.GroupQueryAttention)
class QuantizedGroupQueryAttention(_Attention, keras.layers.GroupQueryAttention):
    """`keras.layers.GroupQueryAttention` with quantized products of activations."""

    key_first = False


class _Pair(keras.layers.Layer):
    """A layer that multiplies two tensors."""

    def __init__(self, *, keep_zeros: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.keep_zeros = keep_zeros

    def build(self, a_shape: Any, b_shape: Any) -> None:
        """Has no variables; Keras keeps the shapes."""

    def call(self, a: Any, b: Any) -> Any:
        return self.product().apply(a, b)

    def product(self) -> Product:
        """What is computed, in float or not."""
        raise NotImplementedError

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "keep_zeros": self.keep_zeros}


@_own
class Matmul(_Pair):
    """`keras.ops.matmul(a, b)` as a layer, which the `matmuls` of a policy quantizes.

    Until then it is the operation. Each row of `a` and each column of `b` then has one scale and
    offset, since the length of the contracted axis may be unknown: integer block sizes and
    rotations of the quantizer do not apply, and "tensor" makes each operand one block.

    Args:
        keep_zeros: zeros of `a` are zeros still when it is quantized. For probabilities: what a
            mask forbids has no weight.
        **kwargs: of `keras.layers.Layer`.

    Call arguments:
        a: float tensor `(..., M, K)`.
        b: float tensor `(..., K, N)`.

    Returns:
        `(..., M, N)`, in the dtype of the operands.

    Example:

    >>> import keras, numpy as np, keras_rq as rq
    >>> class Attention(keras.layers.Layer):
    ...     def __init__(self, **kwargs):
    ...         super().__init__(**kwargs)
    ...         self.scores = rq.layers.Matmul(name="scores")
    ...         self.mix = rq.layers.Matmul(keep_zeros=True, name="mix")
    ...
    ...     def call(self, q, k, v):  # each (batch, tokens, features)
    ...         scores = self.scores(q, keras.ops.transpose(k, (0, 2, 1)))
    ...         return self.mix(keras.ops.softmax(scores / q.shape[-1] ** 0.5), v)
    >>> inputs = keras.Input((5, 8))
    >>> model = keras.Model(inputs, Attention(name="attend")(inputs, inputs, inputs))
    >>> policy = rq.QuantizationPolicy(matmuls=8)
    >>> sorted(row.path for row in rq.quantize(model, policy, verbose=False).rows)
    ['attend/mix', 'attend/scores']
    """

    def product(self) -> Product:
        return OfUnknownLength.create(MatMul(kernel_axes=(-2,)), self.keep_zeros)


@_own
class Einsum(_Pair):
    """`keras.ops.einsum(equation, a, b)` as a layer, which the `matmuls` of a policy quantizes.

    As `Matmul`, for products in Einstein notation: letters of both operands that the output lacks
    are contracted, and every other axis has statistics of its own.

    Args:
        equation: of two operands, without an ellipsis, as in "btnh,bsnh->bnts".
        keep_zeros: as in `Matmul`.
        **kwargs: of `keras.layers.Layer`.

    Raises:
        ValueError: if the equation is not of that form, or contracts nothing.

    Example:

    >>> import numpy as np, keras_rq as rq
    >>> scores = rq.layers.Einsum("btnh,bsnh->bnts")
    >>> scores(np.ones((1, 3, 2, 4)), np.ones((1, 5, 2, 4))).shape[1:] == (2, 3, 5)
    True
    """

    def __init__(self, equation: str, *, keep_zeros: bool = False, **kwargs: Any) -> None:
        super().__init__(keep_zeros=keep_zeros, **kwargs)
        self.equation = _check_equation(equation)

    def product(self) -> Product:
        return OfUnknownLength.create(EinsumProduct.create(self.equation, 0), self.keep_zeros)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "equation": self.equation}


class _QuantizedPair(QuantizedLayer):
    """A layer whose one product of activations is quantized."""

    kernel_names = ()

    def pairs(self) -> dict[str, Product]:
        return {"product": self.product()}

    def pair_shapes(self) -> dict[str, tuple[Any, Any]]:
        return {"product": tuple(self._build_shapes_dict.values())}

    def call(self, a: Any, b: Any) -> Any:
        return self.multiply_pair("product", a, b)


@quantizes(Matmul)
class QuantizedMatmul(_QuantizedPair, Matmul):
    """`Matmul` of quantized operands."""


@quantizes(Einsum)
class QuantizedEinsum(_QuantizedPair, Einsum):
    """`Einsum` of quantized operands."""


def _check_equation(equation: Any) -> str:
    try:
        operands, output = equation.replace(" ", "").split("->")
        a, b = operands.split(",")
        contracted = set(a) & set(b) - set(output)
        fits = bool(contracted) and "." not in equation and set(output) <= set(a) | set(b)
    except (AttributeError, ValueError):
        fits = False
    if not fits:
        raise ValueError(
            "`equation` must name two operands and an output, without an ellipsis, and contract a "
            f"letter of both: 'btnh,bsnh->bnts', for example. Received: equation={equation!r}"
        )
    return equation.replace(" ", "")
