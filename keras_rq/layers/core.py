"""Quantized Dense, EinsumDense and Embedding."""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from keras_rq.layers.base import QuantizedLayer
from keras_rq.layers.parameters import of_kernel
from keras_rq.layers.products import Einsum, Lookup, MatMul, Product
from keras_rq.layers.registry import quantizes
from keras_rq.numerics.sparsity import Unstructured


@quantizes(keras.layers.Dense)
class QuantizedDense(QuantizedLayer, keras.layers.Dense):
    """`keras.layers.Dense` on quantized operands.

    Blocks run along the contraction axis of both operands: `block_size` consecutive features of one
    token of the input, and of one output channel of the kernel, share a scale and an offset. The
    product is then a sum over blocks of integer products (Theorem 1). The bias stays in float.
    """

    ends_in_bias = True

    def products(self) -> dict[str, Product]:
        return {"kernel": MatMul()}

    def call(self, inputs: Any, training: bool | None = None) -> Any:
        return self.add_bias_and_activate(self.multiply("kernel", inputs))


@quantizes(keras.layers.EinsumDense)
class QuantizedEinsumDense(QuantizedLayer, keras.layers.EinsumDense):
    """`keras.layers.EinsumDense` on quantized operands.

    Letters that both operands have and the output lacks are contracted; blocks run along them as if
    they were one axis, in the order of the kernel. Every other axis has statistics of its own.
    """

    ends_in_bias = True

    def products(self) -> dict[str, Product]:
        rank = len(self._build_shapes_dict["input_shape"]) if self._build_shapes_dict else 0
        return {"kernel": Einsum.create(self.equation, rank)}

    def call(self, inputs: Any, training: bool | None = None) -> Any:
        return self.add_bias_and_activate(self.multiply("kernel", inputs))


@quantizes(keras.layers.Embedding)
class QuantizedEmbedding(QuantizedLayer, keras.layers.Embedding):
    """`keras.layers.Embedding` with a quantized table; its input are indices.

    Blocks run along each row: a row is looked up first and then quantized, with the same result.
    A quantizer with variables of its own quantizes the whole table.
    """

    kernel_names = ("embeddings",)

    def products(self) -> dict[str, Product]:
        return {"embeddings": Lookup()}

    def call(self, inputs: Any) -> Any:
        if inputs.dtype not in ("int32", "int64"):
            inputs = ops.cast(inputs, "int32")
        return ops.cast(self.multiply("embeddings", inputs), self.compute_dtype)

    def multiply_by(self, x: Any, master: Any, name: str, *values: Any) -> Any:
        product, quantizer = self.products()[name], self.quantization.weights
        if quantizer is None:
            return product.apply(x, master)
        blocks = product.kernel_blocks(quantizer)
        given = of_kernel(self, name).named(values).weights
        if given or blocks.size == "tensor" or isinstance(quantizer.pattern, Unstructured):
            return product.apply(x, quantizer.fake_quantize(master, blocks, given))
        return quantizer.fake_quantize(product.apply(x, master), blocks)
