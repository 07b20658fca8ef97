"""Exact integer products inside a TFLite file.

TFLite has no operator that multiplies integers and returns the bare accumulator. XNNPACK has
kernels that come close: with float32 input and INT8, INT4 or INT2 weights a FULLY_CONNECTED or
CONV_2D quantizes its input at run time (per row; for a convolution per sample), multiplies
integers, and scales the int32 accumulator by `input scale * weight scale`. Our input already is
integer codes, so the run-time quantizer only has to leave them alone. It picks scale 1 and zero
point 0, exactly, when the smallest value it sees is -128 and the largest is 127. So each row
(each sample) gets two extra values, -128 and 127, the *range pins*, which contribute to no
result. What comes out is `float32(int32 accumulator) * scale`, bit for bit.

`IntegerGraph` emits such products as plain TensorFlow operations while a function is being
traced and keeps a record of each weight; `_litert_convert.convert` turns the traced function into
a TFLite file and swaps the weights for packed integers.

What is exact where (LiteRT 2.3.0 on x86, random codes that include the extremes):

| weights | XNNPACK | built-in kernel, when XNNPACK is switched off |
|---|---|---|
| INT8 matmul, codes -127..127 | exact | exact |
| INT8 matmul, a code is -128 | exact | wrong by 40 %: the kernel negates weights in 8 bits |
| INT8 convolution, -128..127 | exact | exact |
| INT4 matmul, codes -7..7 | exact | off by 0.4 %: it quantizes symmetrically, so the pins miss |
| INT4 matmul, a code is -8 | exact | wrong by 100 % |
| INT2 matmul, -2..1 | exact | exact |
| depthwise (float32 on codes) | exact | exact |

Above 2**24 an accumulator rounds once, when it becomes float32.
"""

from __future__ import annotations

import math
import uuid
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from keras_rq.export._flatbuffer import WeightPatch
from keras_rq.export._litert_checks import (
    along,
    check_accumulator,
    check_codes,
    checked,
    per_channel,
    revived,
    static_shape,
    storage_bits,
)
from keras_rq.export._litert_windows import Window, concat, resize
from keras_rq.export.interpreter import require

_PINS = (-128.0, 127.0)
_ALIGNMENT = 8  # XNNPACK leaves alone INT4 with odd K, and INT2 with K not a multiple of 4.
_SMALL_CONSTANT = 128  # elements; the operators that compute a larger one take less space
# Some XNNPACK kernels hold a sub-byte weight in the high bits of its byte. That multiplies the
# accumulator by this much until the very end.
_KERNEL_GAIN = {2: 64, 4: 16, 8: 1}


class IntegerGraph:
    """Emits exact integer products into the function being traced, and remembers their weights.

    Use one `IntegerGraph` for one trace of one function, and pass both to `convert`:

    ```python
    graph = IntegerGraph()

    @tf.function(input_signature=[tf.TensorSpec([1, 784], tf.float32)])
    def serve(x):
        codes = tf.clip_by_value(tf.round(x * 127.0), -128.0, 127.0)
        return graph.matmul(codes, weight, scale, bits=4, name="dense")

    buffer = convert(graph, serve.get_concrete_function())
    ```

    The traced function remains an ordinary TensorFlow function: run in TensorFlow it computes
    the same products in float32, equal up to float rounding.

    Codes outside [-128, 127] are the caller's error and give wrong results. A constant that is
    added directly to a product becomes the bias of the integer kernel, which then rounds once
    where a product and a sum would round twice; every other operation stays as it is traced.

    `optimize` decides about weights of at most 4 bits in convolutions larger than 1x1, which
    XNNPACK accelerates as CONV_2D in INT8 only. `"size"` keeps them INT4 or INT2 in the file:
    slices gather the pixels each output sees, and a FULLY_CONNECTED multiplies them.
    `"latency"` stores them as INT8 and uses CONV_2D. Measured (x86, 1 thread, batch 1) as the
    time relative to XNNPACK in float32, and the size of the whole file:

    | shape | float32 | `"size"`, INT4 | `"size"`, INT2 | `"latency"`, INT8 |
    |---|---|---|---|---|
    | 8x8x16 -> 32, 3x3 | 1, 19.6 kB | 2.0, 7.6 kB | 2.4, 6.4 kB | 0.7, 7.3 kB |
    | 28x28x64 -> 64, 3x3 | 1, 149 kB | 0.95, 24 kB | 1.3, 15 kB | 0.30, 40 kB |
    | 28x28x3 -> 64, 3x3 | 1, 8.2 kB | 3.4, 6.5 kB | 4.4, 6.0 kB | 1.3, 4.8 kB |

    The slices and their names cost about 2.5 kB for each convolution, so below some 5000
    weights `"latency"` makes the smaller file too. Likewise, `constant` stores INT4 and INT2
    for `"size"` only.

    Args:
        optimize: `"size"` or `"latency"`.

    Attributes:
        key: what the names of all its weights begin with while they are traced.
        patches: one `WeightPatch` per emitted product or constant: what it computes in (its
            `kernel`) and how its weight is stored (`storage`).
    """

    def __init__(self, optimize: Literal["size", "latency"] = "size"):
        if optimize not in ("size", "latency"):
            raise ValueError(
                f'`optimize` must be "size" or "latency". Received: optimize={optimize!r}.'
            )
        self.optimize = optimize
        self.patches: list[WeightPatch] = []
        self.key = f"keras_rq_weight_{uuid.uuid4().hex[:8]}"

    def matmul(
        self, codes: Any, weight: np.ndarray, scale: np.ndarray, bits: float, name: str
    ) -> Any:
        """Multiplies integer codes by an integer matrix.

        Args:
            codes: float32 tensor of shape `(..., K)`, all dimensions static, that holds integers
                within [-128, 127].
            weight: integer array of shape `(K, N)`.
            scale: float32 array of shape `(N,)`, or a single scale.
            bits: nominal bits of a weight, see `storage_bits`.
            name: name of the product, for the file and for messages.

        Returns:
            float32 tensor of shape `(..., N)`: `float32(int32(codes @ weight)) * scale`.
        """
        tf = require("tensorflow")
        weight, scale = checked(weight, scale, 2, name)
        shape = static_shape(codes, name)
        if shape[-1] != weight.shape[0]:
            raise ValueError(
                f"The last axis of `codes` must match the first axis of `weight` in {name!r}. "
                f"Received: codes of shape {shape}, weight of shape {weight.shape}."
            )
        # The converter makes a BATCH_MATMUL, which has no integer kernel, of more than two axes.
        rows = codes if len(shape) == 2 else tf.reshape(codes, (-1, shape[-1]))
        product = self._fully_connected([rows], weight, scale, bits, name)
        return product if len(shape) == 2 else tf.reshape(product, (*shape[:-1], scale.size))

    def conv2d(
        self,
        codes: Any,
        weight: np.ndarray,
        scale: np.ndarray,
        bits: float,
        *,
        strides: int | tuple[int, int] = 1,
        dilation: int | tuple[int, int] = 1,
        name: str,
    ) -> Any:
        """Convolves integer codes with an integer kernel, with VALID padding.

        Args:
            codes: float32 tensor of shape `(batch, height, width, channels)`, static, that holds
                integers within [-128, 127]. The caller pads it.
            weight: integer array of shape `(kh, kw, channels, filters)`.
            scale: float32 array of shape `(filters,)`, or a single scale.
            bits: nominal bits of a weight, see `storage_bits`.
            strides: an integer or a pair.
            dilation: an integer or a pair.
            name: name of the product, for the file and for messages.

        Returns:
            float32 tensor `float32(int32(convolution)) * scale`.
        """
        tf = require("tensorflow")
        weight, scale = checked(weight, scale, 4, name)
        window = Window(static_shape(codes, name), weight.shape, strides, dilation, name)
        pointwise = window.kernel == (1, 1)
        narrow = storage_bits(weight, bits) < 8
        if narrow and (pointwise or self.optimize == "size"):
            columns = window.columns(codes)
        elif pointwise and window.strides == (1, 1):
            columns = [tf.reshape(codes, (-1, weight.shape[2]))]
        else:
            return self._convolution(codes, weight, scale, window, name)
        matrix = weight.reshape(-1, weight.shape[3])
        product = self._fully_connected(columns, matrix, scale, bits, name)
        return tf.reshape(product, (*window.output_shape, weight.shape[3]))

    def depthwise_conv2d(
        self,
        codes: Any,
        weight: np.ndarray,
        scale: np.ndarray,
        bits: float,
        *,
        strides: int | tuple[int, int] = 1,
        dilation: int | tuple[int, int] = 1,
        name: str,
    ) -> Any:
        """Convolves each channel of integer codes with its own kernels, with VALID padding.

        **This is float32 arithmetic on integers, not an integer kernel**, and its patch says
        so (`kernel="float"`). It is exact all the same: every partial sum is an integer below
        2**24, which is checked. XNNPACK has no depthwise kernel with run-time quantized input;
        its static INT8 kernel rounds its output to 8 bits; and a dense CONV_2D with a block
        diagonal kernel took 6 times (64 channels) to 26 times (256 channels) as long as float32.

        The weights are stored as INT8 whatever `bits` says, because XNNPACK unpacks constants
        from INT8 only: stored as INT4 the whole convolution falls out of XNNPACK and takes 5.5
        times as long, to save half of `kh * kw * channels` bytes. As emitted it takes 1.3 times
        as long as float32, for the multiplication by `scale`.

        Args:
            codes: float32 tensor of shape `(batch, height, width, channels)`, static, that holds
                integers within [-128, 127]. The caller pads it.
            weight: integer array of shape `(kh, kw, channels, multiplier)`.
            scale: float32 array of shape `(channels * multiplier,)`, or a single scale.
            bits: nominal bits of a weight.
            strides: an integer or a pair.
            dilation: an integer or a pair.
            name: name of the product, for the file and for messages.

        Returns:
            float32 tensor `float32(int32(convolution)) * scale`.
        """
        tf = require("tensorflow")
        weight, scale = checked(weight, scale, 4, name, channel_axes=2)
        window = Window(static_shape(codes, name), weight.shape, strides, dilation, name)
        storage_bits(weight, bits)  # Only for its complaints.
        check_accumulator(weight, (0, 1), 1, 2**24, name)
        marked = self._mark(
            weight, np.ones(1, np.float32), 8, 0, "DEPTHWISE_CONV_2D", name, kernel="float"
        )
        result = tf.raw_ops.DepthwiseConv2dNative(
            input=codes,
            filter=marked,
            strides=[1, *window.strides, 1],
            dilations=[1, *window.dilation, 1],
            padding="VALID",
        )
        return result * scale

    def constant(
        self,
        weight_codes: np.ndarray,
        scale: np.ndarray,
        offset: np.ndarray | None,
        bits: float,
        axis: int,
        name: str,
    ) -> Any:
        """Emits the float32 weight `codes * scale + offset`, stored as integers in the file.

        For layers whose activations stay float32: a DEQUANTIZE operator unpacks the codes, and
        the operators that use the weight compute in float32. With `optimize="latency"` the
        storage is INT8. XNNPACK unpacks that once, while it loads the file, and it costs
        nothing afterwards. With `"size"` it is the narrowest type that holds the codes. INT4 and
        INT2 are unpacked once too, by TFLite, but XNNPACK then no longer knows that the weight
        never changes: a matrix product repacks it at each call, and a convolution runs
        TFLite's own kernel. Times relative to float32 weights:

        | | INT8 | INT4 | INT2 |
        |---|---|---|---|
        | matmul 512x512, batch 1 | 0.98 | 5.2 | 5.0 |
        | matmul 2048x2048, batch 1 | 0.87 | 8.9 | 9.3 |
        | matmul 512x512, batch 128 | 0.98 | 1.1 | 1.1 |
        | convolution 28x28x64 -> 64, 3x3 | 0.99 | 6.8 | 6.7 |

        A nonzero `offset` is added at run time, with the same consequence at any width.

        Args:
            weight_codes: integer array.
            scale: float32 array along `axis`, or a single scale.
            offset: float32 array along `axis`, a single offset, or `None`.
            bits: nominal bits of a weight, see `storage_bits`.
            axis: the axis of `weight_codes` that `scale` and `offset` run along.
            name: name of the weight, for the file and for messages.

        Returns:
            float32 tensor of the shape of `weight_codes`.
        """
        codes = np.asarray(weight_codes)
        if not -codes.ndim <= axis < codes.ndim:
            raise ValueError(
                f"`axis` of {name!r} must be an axis of `weight_codes`. Received: axis={axis}, "
                f"weight_codes of shape {codes.shape}."
            )
        axis %= codes.ndim
        check_codes(codes, codes.ndim, name)
        channels = codes.shape[axis]
        codes, scale = revived(codes, per_channel(scale, channels, "scale", name), axis, name)
        width = storage_bits(codes, bits)
        width = 8 if self.optimize == "latency" else width
        weight = self._mark(codes, scale, width, axis, "DEQUANTIZE", name, kernel="float")
        if offset is None or not np.any(offset):
            return weight
        offset = per_channel(offset, channels, "offset", name)
        return weight + offset.reshape(along(codes, axis))

    def _fully_connected(
        self,
        columns: Sequence[Any],
        weight: np.ndarray,
        scale: np.ndarray,
        bits: float,
        name: str,
    ) -> Any:
        """Multiplies the rows made of `columns`, side by side, by a matrix (K, N)."""
        tf = require("tensorflow")
        width = storage_bits(weight, bits)
        check_accumulator(weight, (0,), _KERNEL_GAIN[width], 2**31, name)
        extra = 2 + -(weight.shape[0] + 2) % _ALIGNMENT
        pinned = concat([*columns, _pins(columns[0], (columns[0].shape[0], extra))])
        stored = np.pad(weight.T, ((0, 0), (0, extra)))
        marked = self._mark(stored, scale, width, 0, "FULLY_CONNECTED", name)
        return tf.matmul(pinned, marked, transpose_b=True)

    def _convolution(
        self, codes: Any, weight: np.ndarray, scale: np.ndarray, window: Window, name: str
    ) -> Any:
        """Emits a CONV_2D with INT8 weights.

        Its run-time quantizer takes one range for a whole sample, so the pins need one more row
        below the image, not more channels in every pixel. Outputs that see that row are cut off.
        """
        tf = require("tensorflow")
        check_accumulator(weight, (0, 1, 2), _KERNEL_GAIN[8], 2**31, name)
        batch, _, width, channels = codes.shape
        rows = 1 if width * channels > 1 else 2
        pinned = tf.concat([codes, _pins(codes, (batch, rows, width, channels))], axis=1)
        marked = self._mark(weight, scale, 8, 3, "CONV_2D", name)
        result = tf.nn.conv2d(pinned, marked, window.strides, "VALID", dilations=window.dilation)
        return resize(result, 1, window.output_shape[1])

    def _mark(
        self,
        codes: np.ndarray,
        scale: np.ndarray,
        bits: int,
        axis: int,
        op: str,
        name: str,
        kernel: str = "integer",
    ) -> Any:
        """Emits a weight under a name that `convert` recognizes, and records it."""
        tf = require("tensorflow")
        marker = f"{self.key}_{len(self.patches)}"
        codes = np.ascontiguousarray(codes, np.int8)
        self.patches.append(WeightPatch(marker, name, op, kernel, codes, scale, axis, bits))
        values = codes * scale.reshape(along(codes, axis) if scale.size > 1 else ())
        return tf.constant(values, tf.float32, name=marker)


def _pins(like: Any, shape: tuple[int, ...]) -> Any:
    """Returns a tensor of `shape`, small along axis 1, whose rows hold both range pins.

    A large one is computed from `like`, which has the same shape but for axis 1, because a
    constant of that size would be stored element by element.
    """
    tf = require("tensorflow")
    pins = np.zeros((1, *shape[1:]), np.float32)
    pins.reshape(-1)[:2] = _PINS
    if len(shape) == 4 and shape[3] > 1:
        pins = pins[:, :1, :1]  # The same pins in every pixel of the row do no harm.
    if math.prod(shape) <= _SMALL_CONSTANT:
        return tf.constant(np.broadcast_to(pins, shape))
    first = tf.slice(like, [0] * len(shape), [shape[0], 1, *shape[2:]])
    return first * 0.0 + pins
