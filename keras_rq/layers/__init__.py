"""Quantized layers: each one is the Keras layer of its name, with quantized operands."""

from keras_rq.layers.base import QuantizedLayer
from keras_rq.layers.convolutional import (
    QuantizedConv1D,
    QuantizedConv1DTranspose,
    QuantizedConv2D,
    QuantizedConv2DTranspose,
    QuantizedConv3D,
    QuantizedConv3DTranspose,
    QuantizedDepthwiseConv1D,
    QuantizedDepthwiseConv2D,
    QuantizedSeparableConv1D,
    QuantizedSeparableConv2D,
)
from keras_rq.layers.core import (
    QuantizedDense,
    QuantizedEinsumDense,
    QuantizedEmbedding,
    QuantizedReversibleEmbedding,
)
from keras_rq.layers.matmuls import (
    Einsum,
    Matmul,
    QuantizedEinsum,
    QuantizedGroupQueryAttention,
    QuantizedMatmul,
    QuantizedMultiHeadAttention,
)
from keras_rq.layers.recurrent import (
    QuantizedConvLSTMCell,
    QuantizedGRUCell,
    QuantizedLSTMCell,
    QuantizedSimpleRNNCell,
)
from keras_rq.layers.registration import multiply, register_layer
from keras_rq.layers.registry import quantized_class, supported_layers
from keras_rq.layers.subclasses import QuantizedSubclass

__all__ = [
    "Einsum",
    "Matmul",
    "QuantizedConv1D",
    "QuantizedConv1DTranspose",
    "QuantizedConv2D",
    "QuantizedConv2DTranspose",
    "QuantizedConv3D",
    "QuantizedConv3DTranspose",
    "QuantizedConvLSTMCell",
    "QuantizedDense",
    "QuantizedDepthwiseConv1D",
    "QuantizedDepthwiseConv2D",
    "QuantizedEinsum",
    "QuantizedEinsumDense",
    "QuantizedEmbedding",
    "QuantizedGRUCell",
    "QuantizedGroupQueryAttention",
    "QuantizedLSTMCell",
    "QuantizedLayer",
    "QuantizedMatmul",
    "QuantizedMultiHeadAttention",
    "QuantizedReversibleEmbedding",
    "QuantizedSeparableConv1D",
    "QuantizedSeparableConv2D",
    "QuantizedSimpleRNNCell",
    "QuantizedSubclass",
    "multiply",
    "quantized_class",
    "register_layer",
    "supported_layers",
]
