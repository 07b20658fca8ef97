"""Quantized convolutions.

By default the whole input of a sample shares one scale and offset, and so does the kernel of each
output channel: only then does a convolution of quantized operands remain one integer convolution.
`conv_block_size` gives every block of input channels its own, at the price of one integer
convolution per block.

Padding. A padded convolution is a convolution without padding of the zero-padded input, and it is
the padded input that is quantized: its zeros count in the statistics and get the code nearest to
zero like every other value. Each output pixel is then the same affine function of codes, at the
border as inside, and integer inference needs no map of border corrections.
"""

from __future__ import annotations

from typing import Any

import keras
from keras import ops
from keras.src import backend as keras_backend

from keras_rq.layers.base import QuantizedLayer
from keras_rq.layers.products import Convolution, Depthwise, Product, TransposedConvolution
from keras_rq.layers.registry import quantizes


class _Convolutional(QuantizedLayer):
    """Padding, and the channel axis, that all convolutions share."""

    ends_in_bias = True

    def call(self, inputs: Any) -> Any:
        return self._finish(self.multiply("kernel", self._padded(inputs)))

    def _padded(self, inputs: Any) -> Any:
        return pad_input(
            inputs,
            self.padding,
            self.kernel_size,
            self.strides,
            self.dilation_rate,
            self.data_format,
        )

    def _finish(self, outputs: Any) -> Any:
        return self.add_bias_and_activate(outputs, -1 if self.data_format == "channels_last" else 1)


class _Dense(_Convolutional):
    """Convolutions that mix all channels."""

    def products(self) -> dict[str, Product]:
        geometry = (self.strides, self.dilation_rate, self.data_format)
        return {"kernel": Convolution.create(self.rank, *geometry, self.groups)}


class _Depthwise(_Convolutional):
    """Convolutions that keep channels apart.

    Each output channel of the kernel has one scale and offset over its spatial elements. The input
    has one per sample: its channels meet the same product kernel.
    """

    def products(self) -> dict[str, Product]:
        geometry = (self.strides, self.dilation_rate, self.data_format)
        return {"kernel": Depthwise.create(self.rank, *geometry)}


class _Separable(_Convolutional):
    """A depthwise and a pointwise convolution; the input of each is quantized."""

    kernel_names = ("depthwise_kernel", "pointwise_kernel")

    def products(self) -> dict[str, Product]:
        geometry = (self.strides, self.dilation_rate, self.data_format)
        ones = (1,) * self.rank
        return {
            "depthwise_kernel": Depthwise.create(self.rank, *geometry),
            "pointwise_kernel": Convolution.create(self.rank, ones, ones, self.data_format),
        }

    def call(self, inputs: Any) -> Any:
        outputs = self.multiply("depthwise_kernel", self._padded(inputs))
        return self._finish(self.multiply("pointwise_kernel", outputs))


class _Transposed(_Convolutional):
    """Transposed convolutions: padding crops their output, so the input is quantized as it is."""

    def products(self) -> dict[str, Product]:
        geometry = (self.strides, self.dilation_rate, self.data_format)
        crop = (self.padding, self.output_padding)
        return {"kernel": TransposedConvolution.create(self.rank, *geometry, *crop)}

    def _padded(self, inputs: Any) -> Any:
        return inputs


@quantizes(keras.layers.Conv1D)
class QuantizedConv1D(_Dense, keras.layers.Conv1D):
    """`keras.layers.Conv1D` on quantized operands; causal padding included."""


@quantizes(keras.layers.Conv2D)
class QuantizedConv2D(_Dense, keras.layers.Conv2D):
    """`keras.layers.Conv2D` on quantized operands."""


@quantizes(keras.layers.Conv3D)
class QuantizedConv3D(_Dense, keras.layers.Conv3D):
    """`keras.layers.Conv3D` on quantized operands."""


@quantizes(keras.layers.Conv1DTranspose)
class QuantizedConv1DTranspose(_Transposed, keras.layers.Conv1DTranspose):
    """`keras.layers.Conv1DTranspose` on quantized operands."""


@quantizes(keras.layers.Conv2DTranspose)
class QuantizedConv2DTranspose(_Transposed, keras.layers.Conv2DTranspose):
    """`keras.layers.Conv2DTranspose` on quantized operands."""


@quantizes(keras.layers.Conv3DTranspose)
class QuantizedConv3DTranspose(_Transposed, keras.layers.Conv3DTranspose):
    """`keras.layers.Conv3DTranspose` on quantized operands."""


@quantizes(keras.layers.DepthwiseConv1D)
class QuantizedDepthwiseConv1D(_Depthwise, keras.layers.DepthwiseConv1D):
    """`keras.layers.DepthwiseConv1D` on quantized operands."""


@quantizes(keras.layers.DepthwiseConv2D)
class QuantizedDepthwiseConv2D(_Depthwise, keras.layers.DepthwiseConv2D):
    """`keras.layers.DepthwiseConv2D` on quantized operands."""


@quantizes(keras.layers.SeparableConv1D)
class QuantizedSeparableConv1D(_Separable, keras.layers.SeparableConv1D):
    """`keras.layers.SeparableConv1D` on quantized operands, both halves."""


@quantizes(keras.layers.SeparableConv2D)
class QuantizedSeparableConv2D(_Separable, keras.layers.SeparableConv2D):
    """`keras.layers.SeparableConv2D` on quantized operands, both halves."""


def pad_input(
    inputs: Any,
    padding: str,
    kernel_size: tuple[int, ...],
    strides: tuple[int, ...],
    dilation: tuple[int, ...],
    data_format: str,
) -> Any:
    """The input with the zeros that `padding` ("valid", "same" or "causal") asks for."""
    if padding == "valid":
        return inputs
    first = 1 if data_format == "channels_last" else 2
    sizes = ops.shape(inputs)
    pads: list[list[Any]] = [[0, 0] for _ in sizes]
    for i, (kernel, stride, rate) in enumerate(zip(kernel_size, strides, dilation, strict=True)):
        reach = rate * (kernel - 1)
        if padding == "causal":
            pads[first + i] = [reach, 0]
            continue
        total = reach
        if stride > 1:
            size = sizes[first + i]
            total = (-(-size // stride) - 1) * stride + reach + 1 - size
            total = max(total, 0) if isinstance(total, int) else ops.maximum(total, 0)
        pads[first + i] = [total // 2, total - total // 2]
    if all(pad == [0, 0] for pad in pads):
        return inputs
    # `ops.pad` gives each of its calls a name, at which the graphs of `torch.compile` end.
    return keras_backend.numpy.pad(inputs, pads)
