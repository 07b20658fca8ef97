"""The mix-in that makes a Keras layer quantized.

A quantized class is `class QuantizedX(QuantizedLayer, keras.layers.X)`. It has the variables of X
and no others, so optimizer states, checkpoints and parameter counts are those of the float layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import keras
from keras import ops
from keras.src.backend import AutocastScope

from keras_rq.layers.products import Product
from keras_rq.policy import LayerQuantization


class QuantizedLayer:
    """Quantized operands for a Keras layer.

    Subclasses define `products`, and a `call` with the signature of the Keras layer's: Keras caches
    that signature when a layer is made, and the class of a living layer is swapped by
    `keras_rq.quantize`.
    """

    quantization: LayerQuantization

    def __init__(self, *args: Any, quantization: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if isinstance(quantization, dict):
            quantization = LayerQuantization.from_config(quantization)
        self.quantization = quantization

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "quantization": self.quantization.get_config()}

    # What a subclass is.

    def products(self) -> dict[str, Product]:
        """The layer's products, by the name of the attribute that holds the kernel."""
        raise NotImplementedError

    # What a subclass uses.

    @property
    def lowered(self) -> Callable[[str, Product, Any], Any] | None:
        """What computes the products instead, while an exporter traces or observes the layer."""
        return self.__dict__.get("_rq_lowered")

    def multiply(self, name: str, x: Any) -> Any:
        """The product of an input and the kernel called `name`, both quantized."""
        product = self.products()[name]
        if (lowered := self.lowered) is not None:
            return lowered(name, product, x)
        return self.multiply_quantized(name, product, x)

    def multiply_quantized(self, name: str, product: Product, x: Any) -> Any:
        """What `multiply` does when nothing stands in for it."""
        quantization = self.quantization
        weights, activations = quantization.weights, quantization.activations
        kernel = self.float32_kernel(name)
        # Rotated alike, the operands keep their product: no way back is needed.
        alike = bool(weights and activations and weights.rotation == activations.rotation)
        alike = alike and product.shares_rotation(x.shape, kernel.shape)
        if activations is not None:
            x = activations.fake_quantize(x, product.input_blocks(activations), unrotate=not alike)
        if weights is not None:
            kernel = weights.fake_quantize(
                kernel, product.kernel_blocks(weights), unrotate=not alike
            )
        return product.apply(x, ops.cast(kernel, x.dtype))

    def float32_kernel(self, name: str) -> Any:
        """The master kernel: quantizers see it before any cast to the compute dtype."""
        with AutocastScope(None):
            return ops.cast(ops.convert_to_tensor(getattr(self, name)), "float32")

    def add_bias_and_activate(self, outputs: Any, channel_axis: int = -1) -> Any:
        """The part of a layer that stays in float."""
        if self.bias is not None:
            bias = self.bias
            if channel_axis != -1:
                shape = [1] * len(outputs.shape)
                shape[channel_axis] = -1
                bias = ops.reshape(bias, shape)
            outputs = ops.add(outputs, bias)
        return outputs if self.activation is None else self.activation(outputs)


def is_quantized(layer: keras.layers.Layer) -> bool:
    """Whether keras_rq has quantized this layer."""
    return isinstance(layer, QuantizedLayer)


@contextmanager
def lowered_by(
    layer: QuantizedLayer, compute: Callable[[str, Product, Any], Any]
) -> Iterator[None]:
    """Lets `compute(kernel name, product, input)` stand in for the layer's products."""
    layer.__dict__["_rq_lowered"] = compute
    try:
        yield
    finally:
        del layer.__dict__["_rq_lowered"]


@contextmanager
def all_lowered_by(
    model: keras.layers.Layer,
    make: Callable[[QuantizedLayer], Callable[[str, Product, Any], Any]],
) -> Iterator[None]:
    """Lets `make(layer)` stand in for the products of every quantized layer of a model."""
    with ExitStack() as stack:
        for layer in model._flatten_layers():
            if is_quantized(layer):
                stack.enter_context(lowered_by(layer, make(layer)))
        yield
