"""Quantized Dense, EinsumDense, Embedding and ReversibleEmbedding."""

from __future__ import annotations

from typing import Any

import keras
from keras import ops
from keras.src.backend import set_keras_mask

from keras_rq import backend
from keras_rq.layers.base import QuantizedLayer
from keras_rq.layers.parameters import of_kernel
from keras_rq.layers.products import Einsum, Lookup, MatMul, Product, ReversedLookup
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
        return ops.cast(self.multiply("embeddings", inputs, Lookup()), self.compute_dtype)

    def multiply_quantized(self, name: str, x: Any) -> Any:
        if "int" not in keras.backend.standardize_dtype(x.dtype):
            return super().multiply_quantized(name, x)
        table, values = self.float32_kernel(name), of_kernel(self, name).values()
        return backend.call_in_graph(self, "look_up", x, table, name, *values)

    def look_up(self, indices: Any, table: Any, name: str, *values: Any) -> Any:
        """Quantized rows of the float32 `table`; `values` are those of the parameters."""
        product, quantizer = Lookup(), self.quantization.weights
        if quantizer is None:
            return product.apply(indices, table)
        blocks = product.kernel_blocks(quantizer)
        given = of_kernel(self, name).named(values).weights
        if given or blocks.size == "tensor" or isinstance(quantizer.pattern, Unstructured):
            return product.apply(indices, quantizer.fake_quantize(table, blocks, given))
        return quantizer.fake_quantize(product.apply(indices, table), blocks)


@quantizes(keras.layers.ReversibleEmbedding)
class QuantizedReversibleEmbedding(QuantizedEmbedding, keras.layers.ReversibleEmbedding):
    """`keras.layers.ReversibleEmbedding` with quantized tables.

    In reverse it is a matrix product, whose input is quantized too. With tied weights the table is
    one kernel for both: its blocks run along each row, which is what the product contracts.
    """

    kernel_names = ("embeddings", "reverse_embeddings")

    def products(self) -> dict[str, Product]:
        if self.tie_weights:
            return {"embeddings": ReversedLookup()}
        return {"embeddings": Lookup(), "reverse_embeddings": MatMul()}

    def call(self, inputs: Any, reverse: bool = False) -> Any:
        if not reverse:
            rows = super().call(inputs)
            mask = keras.layers.Embedding.compute_mask(self, inputs)
            if mask is not None:
                set_keras_mask(rows, mask)
            return rows
        if self.reverse_dtype is not None:
            inputs = ops.cast(inputs, self.reverse_dtype)
        logits = self.multiply("embeddings" if self.tie_weights else "reverse_embeddings", inputs)
        if self.logit_soft_cap is not None:
            cap = self.logit_soft_cap
            logits = ops.multiply(ops.tanh(ops.divide(logits, cap)), cap)
        return logits
