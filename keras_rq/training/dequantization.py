"""`dequantize`: a quantized model becomes a float one again, in place."""

from __future__ import annotations

from collections.abc import Iterator

import keras
import numpy as np
from keras import ops

from keras_rq.layers.base import QuantizedLayer
from keras_rq.layers.parameters import variables_of
from keras_rq.training import containers, guards, optimizers
from keras_rq.training.surgery import forget_compiled_functions, quantized_layers


def dequantize(model: keras.layers.Layer, baked: bool) -> None:
    """Gives the layers of a model their float classes back; see `keras_rq.dequantize`."""
    if not isinstance(model, keras.layers.Layer):
        raise TypeError(f"`model` must be a Keras model or layer. Received: {model!r}")
    quantized = quantized_layers(model)
    if not quantized:
        raise ValueError(f"Model {model.name!r} has no layer that keras_rq quantized.")
    kernels = [baking for layer in quantized for baking in _bakings(layer)] if baked else []
    for variable, value in kernels:
        variable.assign(value)
    dropped = [variable for layer in quantized for variable in variables_of(layer)]
    guards.remove_guards(model)
    for layer in model._flatten_layers():
        containers.detach(layer)
    optimizers.renew(model, dropped)
    forget_compiled_functions(model)


def _bakings(layer: QuantizedLayer) -> Iterator[tuple[keras.Variable, np.ndarray]]:
    """Variables of kernels, and what they must hold for the kernels to be the quantized ones."""
    if layer.quantization.weights is None:
        return
    for name in layer.products():
        kernel, value = layer.float32_kernel(name), layer.dequantized_kernel(name)
        variable = getattr(layer, name)
        if not isinstance(variable, keras.Variable):  # with LoRA: the kernel is a sum
            variable = getattr(layer, f"_{name}")
            value = value + (ops.cast(variable, "float32") - kernel)
        yield variable, ops.convert_to_numpy(value)
