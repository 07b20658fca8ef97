"""Every quantized layer, with what the reference must know of it written out by hand.

A case says which axes of its input and kernels are contracted, which share statistics with them,
and with how many zeros its input is padded; the package's own descriptions are not consulted.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import reference
from keras import layers
from reference import Spec

from keras_rq.policy import LayerQuantization
from keras_rq.quantizers import EWGS, Quantizer, QuEST, Ridge, StraightThrough

Pads = tuple[tuple[int, int], ...]


class Operand(NamedTuple):
    """Contraction axes, axes that share statistics with them, and whether blocks apply."""

    axes: tuple[int, ...]
    shared: tuple[int, ...] = ()
    convolution: bool = False
    can_block: bool = True


class LayerCase(NamedTuple):
    """A layer and its operands. `kernels` are in the order in which the layer uses them."""

    name: str
    keras_class: type
    arguments: dict[str, Any]
    shape: tuple[int, ...]
    input: Operand
    kernels: dict[str, Operand]
    pads: Pads = ()

    def make(self, **overrides: Any) -> Any:
        layer = self.keras_class(**{"bias_initializer": "normal", **self.arguments, **overrides})
        layer.build((None, *self.shape))
        return layer

    def pad(self, x: np.ndarray) -> np.ndarray:
        if not self.pads:
            return x
        first = 2 if self.arguments.get("data_format") == "channels_first" else 1
        around = [(0, 0)] * x.ndim
        around[first : first + len(self.pads)] = self.pads
        return np.pad(x, around)


class Scheme(NamedTuple):
    """Quantizers of both operands."""

    name: str
    weights: Quantizer | None
    activations: Quantizer | None

    @property
    def quantization(self) -> LayerQuantization:
        return LayerQuantization(self.weights, self.activations)


def spec_of(quantizer: Quantizer, operand: Operand) -> Spec:
    """The reference's description of a quantizer on an operand."""
    block = quantizer.block_size
    if operand.convolution and block != "tensor":
        block = quantizer.conv_block_size
    if not operand.can_block and block != "tensor":
        block = "channel"
    numbers, _, paired = (quantizer.sparsity or "").partition("-")
    return Spec(
        bits=quantizer.bits,
        affine=quantizer.has_offset,
        rule=quantizer.range_rule,
        ridge_lambda=getattr(quantizer, "ridge_lambda", None),
        block=block,
        axes=operand.axes,
        shared=operand.shared,
        keep=tuple(int(n) for n in numbers.split(":")) if numbers else None,
        paired=bool(paired),
        midrise=isinstance(quantizer, QuEST),
        trust=quantizer.trust_factor,
        fade=quantizer.fade,
        rotated=quantizer.rotation is not None,
        edge=quantizer.grid.gaussian_edge,
    )


def quantized(x: np.ndarray, quantizer: Quantizer | None, operand: Operand) -> reference.Result:
    """An operand quantized by the reference; itself where there is no quantizer."""
    x = np.asarray(x, np.float64)
    if quantizer is None:
        return reference.Result(x, x, np.full(x.shape, np.inf))
    return reference.quantize(x, spec_of(quantizer, operand))


SCHEMES = {
    scheme.name: scheme
    for scheme in (
        Scheme("A4W1", Ridge(1), Ridge(4)),
        Scheme("A1.5W1.5", Ridge(1.5), Ridge(1.5, affine=True)),
        Scheme("A8W4-2:4", Ridge(4, sparsity="2:4"), Ridge(8)),
        Scheme("blocks", Ridge(4, block_size=4, conv_block_size=2), Ridge(4, block_size=4)),
        Scheme("tensor", StraightThrough(4, block_size="tensor"), Ridge(3, block_size="tensor")),
        Scheme("rotated", Ridge(4, rotation="hadamard"), Ridge(4, rotation="hadamard")),
        Scheme("half-rotated", Ridge(4, rotation="hadamard"), Ridge(4)),
        Scheme("fp4-channel", Ridge("fp4", block_size="channel"), Ridge("fp4")),
        Scheme("QuEST", QuEST(4), QuEST(4)),
        Scheme("QuEST A1W1", QuEST(1), QuEST(1, rotation=None)),
        Scheme("QuEST-4:8-paired", QuEST(4, sparsity="4:8-paired"), QuEST(8)),
        Scheme("EWGS", EWGS(4), EWGS(2)),
        Scheme("W2", Ridge(2), None),
        Scheme("A2", None, Ridge(2)),
    )
}

_DENSE = {"kernel": Operand((0,))}


def _einsum(name: str, equation: str, output: Any, shape: Any, x: Any, kernel: Any) -> LayerCase:
    bias = equation.split("->")[1].rstrip(".")[-1]
    arguments = {"equation": equation, "output_shape": output, "bias_axes": bias}
    return LayerCase(
        name, layers.EinsumDense, arguments, shape, Operand(x), {"kernel": Operand(kernel)}
    )


def _input(rank: int, data_format: str) -> Operand:
    if data_format == "channels_first":
        return Operand((1,), tuple(range(2, rank + 2)), convolution=True)
    return Operand((rank + 1,), tuple(range(1, rank + 1)), convolution=True)


def _conv(
    name: str, cls: type, rank: int, shape: tuple[int, ...], pads: Pads = (), **arguments: Any
) -> LayerCase:
    spatial = tuple(range(rank))
    full = Operand((rank,), spatial, convolution=True)
    depthwise = Operand(spatial, (), convolution=True, can_block=False)
    kernels = {"kernel": full}
    if "Depthwise" in cls.__name__:
        kernels = {"kernel": depthwise}
    elif "Separable" in cls.__name__:
        kernels = {"depthwise_kernel": depthwise, "pointwise_kernel": full}
    elif "Transpose" in cls.__name__:
        kernels = {"kernel": Operand((rank + 1,), spatial, convolution=True)}
    if "Depthwise" not in cls.__name__:
        arguments = {"filters": 3, **arguments}
    x = _input(rank, arguments.get("data_format", "channels_last"))
    return LayerCase(name, cls, arguments, shape, x, kernels, pads)


# One of every kind.
KINDS = [
    LayerCase("Dense", layers.Dense, {"units": 5}, (10,), Operand((-1,)), _DENSE),
    _einsum("EinsumDense", "abc,cd->abd", (None, 5), (3, 8), (2,), (0,)),
    _conv("Conv1D", layers.Conv1D, 1, (7, 4), kernel_size=3),
    _conv("Conv2D", layers.Conv2D, 2, (5, 6, 4), kernel_size=3),
    _conv("Conv3D", layers.Conv3D, 3, (3, 4, 3, 4), kernel_size=2),
    _conv("Conv1DTranspose", layers.Conv1DTranspose, 1, (5, 4), kernel_size=3),
    _conv("Conv2DTranspose", layers.Conv2DTranspose, 2, (4, 3, 4), kernel_size=3),
    _conv("Conv3DTranspose", layers.Conv3DTranspose, 3, (3, 2, 3, 4), kernel_size=2),
    _conv("DepthwiseConv1D", layers.DepthwiseConv1D, 1, (7, 4), kernel_size=4),
    _conv("DepthwiseConv2D", layers.DepthwiseConv2D, 2, (5, 5, 4), kernel_size=2),
    _conv("SeparableConv1D", layers.SeparableConv1D, 1, (7, 4), kernel_size=3),
    _conv("SeparableConv2D", layers.SeparableConv2D, 2, (5, 5, 4), kernel_size=3),
]

_SAME2D = {"padding": "same", "kernel_size": 3}

# Their geometries, each with the padding that its arguments ask for.
GEOMETRIES = [
    LayerCase("tokens", layers.Dense, {"units": 5}, (3, 2, 10), Operand((-1,)), _DENSE),
    LayerCase(
        "relu without bias",
        layers.Dense,
        {"units": 5, "use_bias": False, "activation": "relu"},
        (10,),
        Operand((-1,)),
        _DENSE,
    ),
    _einsum("two contraction axes", "abcd,cde->abe", (None, 5), (3, 2, 4), (2, 3), (0, 1)),
    _einsum("contraction axes in reverse", "abcd,dce->abe", (None, 5), (3, 2, 4), (3, 2), (0, 1)),
    _einsum("contraction axes apart", "abcd,bde->ace", (None, 5), (2, 3, 4), (1, 3), (0, 1)),
    _einsum("two output axes", "abc,cde->abde", (None, 2, 3), (3, 8), (2,), (0,)),
    _einsum("kernel reversed", "abc,dc->abd", (None, 5), (3, 8), (2,), (1,)),
    _einsum("shared letter", "abc,bcd->abd", (3, 5), (3, 8), (2,), (1,)),
    _einsum("ellipsis before", "...x,xy->...y", 5, (2, 3, 8), (3,), (0,)),
    _einsum("ellipsis after", "ax...,xy->ay...", (5, 2, 3), (8, 2, 3), (1,), (0,)),
    _conv("same", layers.Conv1D, 1, (7, 4), ((1, 1),), kernel_size=3, padding="same"),
    _conv("same, even kernel", layers.Conv1D, 1, (7, 4), ((0, 1),), kernel_size=2, padding="same"),
    _conv(
        "causal",
        layers.Conv1D,
        1,
        (7, 4),
        ((4, 0),),
        kernel_size=3,
        padding="causal",
        dilation_rate=2,
    ),
    _conv("strides", layers.Conv2D, 2, (7, 6, 4), kernel_size=3, strides=2),
    _conv(
        "same, strides, odd", layers.Conv2D, 2, (7, 5, 4), ((1, 1), (1, 1)), strides=2, **_SAME2D
    ),
    _conv(
        "same, strides, even", layers.Conv2D, 2, (8, 6, 4), ((0, 1), (0, 1)), strides=2, **_SAME2D
    ),
    _conv(
        "same, dilation",
        layers.Conv2D,
        2,
        (6, 5, 4),
        ((2, 2), (2, 2)),
        dilation_rate=2,
        **_SAME2D,
    ),
    _conv(
        "same, stride beyond the kernel",
        layers.Conv2D,
        2,
        (7, 5, 4),
        ((0, 0), (0, 0)),
        kernel_size=1,
        strides=3,
        padding="same",
    ),
    _conv("groups", layers.Conv2D, 2, (5, 5, 8), filters=4, kernel_size=3, groups=2),
    _conv(
        "channels first",
        layers.Conv2D,
        2,
        (4, 6, 5),
        ((1, 1), (1, 1)),
        data_format="channels_first",
        **_SAME2D,
    ),
    _conv(
        "same in 3D",
        layers.Conv3D,
        3,
        (4, 3, 5, 4),
        ((0, 1), (0, 0), (0, 1)),
        kernel_size=(2, 1, 2),
        padding="same",
    ),
    _conv(
        "depthwise, multiplier, same",
        layers.DepthwiseConv2D,
        2,
        (6, 5, 4),
        ((1, 1), (1, 1)),
        depth_multiplier=2,
        **_SAME2D,
    ),
    _conv(
        "depthwise, strides",
        layers.DepthwiseConv2D,
        2,
        (6, 6, 4),
        ((0, 1), (0, 1)),
        strides=2,
        **_SAME2D,
    ),
    _conv(
        "depthwise, channels first",
        layers.DepthwiseConv2D,
        2,
        (4, 6, 5),
        kernel_size=3,
        data_format="channels_first",
    ),
    _conv(
        "depthwise 1D, dilation",
        layers.DepthwiseConv1D,
        1,
        (9, 4),
        ((2, 2),),
        kernel_size=3,
        padding="same",
        dilation_rate=2,
    ),
    _conv(
        "separable, same, strides",
        layers.SeparableConv2D,
        2,
        (6, 6, 4),
        ((0, 1), (0, 1)),
        strides=2,
        depth_multiplier=2,
        **_SAME2D,
    ),
    _conv(
        "separable 1D, same",
        layers.SeparableConv1D,
        1,
        (7, 4),
        ((1, 1),),
        kernel_size=3,
        padding="same",
    ),
    _conv(
        "transposed, same, strides",
        layers.Conv2DTranspose,
        2,
        (4, 3, 4),
        strides=2,
        **_SAME2D,
    ),
    _conv(
        "transposed, output padding",
        layers.Conv2DTranspose,
        2,
        (4, 3, 4),
        kernel_size=3,
        strides=2,
        output_padding=1,
    ),
    _conv(
        "transposed, channels first",
        layers.Conv2DTranspose,
        2,
        (4, 3, 5),
        kernel_size=3,
        data_format="channels_first",
    ),
]


def away_from_ties(
    draw: Callable[[np.random.Generator], np.ndarray], quantizer: Quantizer | None, operand: Operand
) -> np.ndarray:
    """Random values of which none lies where float32 might round otherwise than float64."""
    for seed in range(20):
        x = draw(np.random.default_rng(seed)).astype(np.float32)
        if quantized(x, quantizer, operand).tie_distance.min() > 1e-5:
            return x
    raise AssertionError("no draw without a rounding tie")
