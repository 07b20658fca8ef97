"""Quantization of single tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from keras import ops

from keras_rq.numerics.blocks import Blocks
from keras_rq.numerics.dequantizers import ridge_fit
from keras_rq.numerics.matmul import theorem1
from keras_rq.quantizers import get
from keras_rq.quantizers.base import Quantizer, check_nonnegative
from keras_rq.quantizers.tensor import QuantizedTensor

__all__ = ["affine_matmul", "fake_quantize", "quantize", "ridge_dequantize"]


def fake_quantize(
    x: Any, quantizer: Quantizer | int | float | str, axis: int | Sequence[int] = -1
) -> Any:
    """Quantizes and dequantizes a tensor, with the quantizer's gradient.

    Args:
        x: float tensor of any shape.
        quantizer: a quantizer, or a bit width for `Ridge` of that width.
        axis: the contraction axis that blocks run along; several count as one, in their order.

    Returns:
        A tensor of the shape and dtype of `x`.

    Raises:
        ValueError: if the axis lies outside the tensor.
        TypeError: if `x` holds integers.

    Example:

    >>> import numpy as np, keras_rq as rq
    >>> x = np.linspace(-1, 1, 256, dtype="float32")[None]
    >>> y = rq.ops.fake_quantize(x, rq.quantizers.Ridge(8, block_size=32))
    >>> bool(abs(np.asarray(y) - x).max() < 1e-3)
    True
    """
    x, quantizer = _check(x, quantizer)
    return quantizer.fake_quantize(x, quantizer.blocks(_axes(axis)))


def quantize(
    x: Any, quantizer: Quantizer | int | float | str, axis: int | Sequence[int] = -1
) -> QuantizedTensor:
    """Quantizes a tensor to integer codes with a scale and an offset per block.

    Args:
        x: float tensor of any shape.
        quantizer: a quantizer, or a bit width for `Ridge` of that width.
        axis: the contraction axis that blocks run along; several count as one, in their order.

    Returns:
        A `QuantizedTensor`; unpack it as `codes, scale, offset`.

    Raises:
        ValueError: if the axis lies outside the tensor.
        TypeError: if `x` holds integers.

    Example:

    >>> import numpy as np, keras_rq as rq
    >>> t = rq.ops.quantize(np.ones((4, 256), "float32"), rq.quantizers.Ridge(1))
    >>> t.codes.shape == (4, 256), tuple(t.scale.shape), t.nbytes
    (True, (4, 2), 192)
    """
    x, quantizer = _check(x, quantizer)
    return quantizer.quantize(x, quantizer.blocks(_axes(axis)))


def ridge_dequantize(
    x: Any,
    codes: Any,
    *,
    axis: int | Sequence[int] = -1,
    affine: bool = True,
    ridge_lambda: float = 0.01,
) -> Any:
    """Regresses data onto its codes and returns the fitted values (arXiv 2409.09245).

    Args:
        x: float tensor.
        codes: tensor of the same shape, of any dtype.
        axis: axes whose elements share one slope (and offset).
        affine: fit an offset too.
        ridge_lambda: mean-normalised penalty on the slope, >= 0, in squared code units.

    Returns:
        float32 tensor shaped like `x`. Differentiable in both arguments.

    Raises:
        ValueError: for a negative penalty or an axis outside the tensor.

    Example:

    >>> import numpy as np, keras_rq as rq
    >>> x = np.array([0.0, 1.0, 3.0, 4.0], "float32")
    >>> y = rq.ops.ridge_dequantize(x, np.array([0, 0, 1, 1]), ridge_lambda=0.0)
    >>> [float(v) for v in y]
    [0.5, 0.5, 3.5, 3.5]
    """
    ridge_lambda = check_nonnegative("ridge_lambda", ridge_lambda)
    x, codes = ops.convert_to_tensor(x), ops.convert_to_tensor(codes)
    x, codes = ops.cast(x, "float32"), ops.cast(codes, "float32")
    view = Blocks(_axes(axis), (), "channel").view(tuple(x.shape))
    return ridge_fit(x, codes, view, affine, ridge_lambda)(codes)


def affine_matmul(x: QuantizedTensor, w: QuantizedTensor) -> Any:
    """Multiplies quantized matrices: one integer product, two rank-1 corrections (Theorem 1).

    Args:
        x: (..., K), quantized along its last axis.
        w: (K, N), quantized along axis 0.

    Returns:
        float32 (..., N), the product of the dequantized operands. With blocks, one integer product
        per block, summed.

    Raises:
        ValueError: if shapes, axes, blocks or rotations do not belong together.

    Example:

    >>> import numpy as np, keras_rq as rq
    >>> x = rq.ops.quantize(np.eye(2, 4, dtype="float32"), 8)
    >>> w = rq.ops.quantize(np.ones((4, 3), "float32"), 8, axis=0)
    >>> rq.ops.affine_matmul(x, w).shape == (2, 3)
    True
    """
    return matmul_with_sums(x, w)


def matmul_with_sums(
    x: QuantizedTensor, w: QuantizedTensor, sums_x: Any = None, sums_w: Any = None
) -> Any:
    """`affine_matmul`, where the sums of the codes of every block may be known.

    Args:
        x: see `affine_matmul`.
        w: see `affine_matmul`.
        sums_x: of `x`, as `Quantizer.quantize_and_sum` returns them.
        sums_w: of `w`, likewise.
    """
    _check_operands(x, w)
    length = w.shape[0]
    blocks_x, blocks_w = x.scale.shape[-1], w.scale.shape[0]
    blocks = max(blocks_x, blocks_w)
    size = getattr(x.view if blocks_x >= blocks_w else w.view, "block", length)
    cx, cw = _split_codes(x.codes, -1, blocks, size), _split_codes(w.codes, 0, blocks, size)
    total = None
    for b in range(blocks):
        count = min(size, length - size * b)
        of_x, of_w = (b if n > 1 else 0 for n in (blocks_x, blocks_w))
        term = theorem1(
            ops.einsum("...k,kn->...n", cx[..., b, :], cw[b]),  # int8 into int32
            _code_sums(x, cx[..., b, :], sums_x, b, blocks)[..., None],
            _code_sums(w, cw[b], sums_w, b, blocks),
            ops.convert_to_tensor(np.int32(count)),
            x.scale[..., of_x, None],
            x.offset[..., of_x, None],
            w.scale[of_w],
            w.offset[of_w],
        )
        total = term if total is None else total + term
    return total


def _code_sums(tensor: QuantizedTensor, codes: Any, known: Any, block: int, blocks: int) -> Any:
    """Sums along the contraction of the codes of one block, which `codes` are alone."""
    axis = tensor.axes[0] % len(tensor.shape)
    others = [n for a, n in enumerate(codes.shape) if a != axis]
    if known is not None and tensor.scale.shape[axis] == blocks:
        known = tensor.view.statistic(known)
        known = known[..., block] if axis else known[block]
        if list(known.shape) == others:  # else a block spans several rows
            return known
    return ops.sum(ops.cast(codes, "int32"), axis=axis)


# XLA's GPU kernels multiply int8 wrongly where the contraction is no multiple of 8 (jaxlib 0.11.2,
# 70 terms); zeros change nothing.
_ALIGNMENT = 16


def _split_codes(codes: Any, axis: int, blocks: int, size: int) -> Any:
    """(..., K) -> (..., blocks, size), or (K, N) -> (blocks, size, N), zero-padded."""
    axis %= len(codes.shape)
    split = _pad_axis(codes, axis, blocks * size)
    sizes = list(ops.shape(split))
    split = ops.reshape(split, [*sizes[:axis], blocks, size, *sizes[axis + 1 :]])
    return _pad_axis(split, axis + 1, -(-size // _ALIGNMENT) * _ALIGNMENT)


def _pad_axis(x: Any, axis: int, size: int) -> Any:
    missing = size - x.shape[axis]
    pads = [[0, missing if a == axis else 0] for a in range(len(x.shape))]
    return ops.pad(x, pads) if missing else x


def _check_operands(x: Any, w: Any) -> None:
    for name, operand in (("x", x), ("w", w)):
        if not isinstance(operand, QuantizedTensor):
            raise TypeError(
                f"`{name}` must be a QuantizedTensor, as `rq.ops.quantize` returns. "
                f"Received: {name}={type(operand).__name__}"
            )
    on_last = [a % len(x.shape) for a in x.axes] == [len(x.shape) - 1]
    on_first = len(w.shape) == 2 and [a % 2 for a in w.axes] == [0]
    if not (on_last and on_first and x.shape[-1] == w.shape[0]):
        raise ValueError(
            "`x` must be (..., K), quantized with axis=-1, and `w` (K, N), quantized with axis=0. "
            f"Received: x of shape {x.shape} and axes {x.axes}, "
            f"w of shape {w.shape} and axes {w.axes}."
        )
    sizes = {getattr(t.view, "block", None) for t in (x, w)}
    if len(sizes - {None}) > 1:
        raise ValueError(f"Blocks of x and w must have one size. Received: {sorted(sizes)}")
    if x.rotated != w.rotated:
        raise ValueError("Either both operands are rotated or neither is.")


def _axes(axis: int | Sequence[int]) -> tuple[int, ...]:
    return (axis,) if isinstance(axis, int) else tuple(axis)


def _check(x: Any, quantizer: Any) -> tuple[Any, Quantizer]:
    quantizer = get(quantizer)
    if quantizer is None:
        raise TypeError("`quantizer` must be a quantizer or a bit width. Received: None")
    x = ops.convert_to_tensor(x)
    if "float" not in str(x.dtype):
        raise TypeError(f"`x` must hold floating-point numbers. Received: dtype={x.dtype}")
    return x, quantizer
