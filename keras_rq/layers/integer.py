"""The forward product on the integer units while a layer is trained (`forward="int8"`)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from keras import ops

from keras_rq.layers.products import MatMul, Product
from keras_rq.numerics.dequantizers import Line
from keras_rq.ops import matmul_with_sums
from keras_rq.policy import LayerQuantization
from keras_rq.quantizers.tensor import QuantizedTensor


def reason_for_float(product: Product, quantization: LayerQuantization) -> str | None:
    """Why a product that was asked to run on integers does not, or None if it does."""
    weights, activations = quantization.weights, quantization.activations
    if weights is None or activations is None:
        return "only one of its operands is quantized"
    if weights.has_parameters or activations.has_parameters:
        return "a quantizer has variables of its own"
    if not product.is_matmul:
        return "it is no plain matrix product"
    if "fp4" in (weights.bits, activations.bits):
        return "FP4 codes are no integers"
    if weights.rotation != activations.rotation:
        return "only one of its operands is rotated"
    sizes = {weights.block_size, activations.block_size}
    return "its operands have different blocks" if len(sizes) > 1 else None


_MATRICES = MatMul()


@dataclass(frozen=True)
class IntegerForward:
    """Computes a product from codes; `constants` are the tensors of the quantized kernel.

    Attributes:
        product: which one.
        quantization: of the layer.
        kernel_shape: as the layer has it.
        kernel: as a matrix.
        code_sums: of the kernel's blocks.
    """

    product: Product
    quantization: LayerQuantization
    kernel_shape: tuple[int, ...]
    kernel: QuantizedTensor
    code_sums: Any

    @classmethod
    def create(
        cls, product: Product, quantization: LayerQuantization, kernel: Any, fold: Any = None
    ) -> IntegerForward:
        """Quantizes the float32 kernel, which holds the factor `fold`, and takes that out again."""
        kernel = ops.stop_gradient(kernel)
        weights, matrix = quantization.weights, product.kernel_as_matrix(kernel)
        quantized, sums = weights.quantize_and_sum(matrix, _MATRICES.kernel_blocks(weights))
        if fold is not None:
            fold = ops.stop_gradient(ops.broadcast_to(fold, kernel.shape))
            by_column = 1.0 / product.kernel_as_matrix(fold)[:1]
            quantized = replace(quantized, line=quantized.line.times(by_column))
        return cls(product, quantization, tuple(kernel.shape), quantized, sums)

    @property
    def constants(self) -> tuple[Any, ...]:
        line = self.kernel.line
        parts = self.kernel.codes, self.code_sums, line.scale
        return parts if line.offset is None else (*parts, line.offset)

    def __call__(self, x: Any, codes: Any, code_sums: Any, scale: Any, offset: Any = None) -> Any:
        kernel = replace(self.kernel, codes=codes, line=Line(scale, offset))
        activations = self.quantization.activations
        matrix, restore = self.product.input_as_matrix(x, self.kernel_shape)
        quantized, sums = activations.quantize_and_sum(matrix, _MATRICES.input_blocks(activations))
        made = matmul_with_sums(quantized, kernel, sums, code_sums)
        return ops.cast(restore(made), x.dtype)
