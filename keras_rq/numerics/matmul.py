r"""Theorem 1: the product of two dequantized matrices from one integer product.

For `X~ = s_x Q_x + b_x` with statistics per row and `W~ = s_w Q_w + b_w` with statistics per
column, both of contraction length n, write `q` for the mean code of a row or column and
`m = s q + b` for the mean of its dequantized values. Then

    X~ W~ = s_x s_w * (Q_x Q_w - n q_x q_w) + n m_x m_w

(arXiv 2409.09245, Theorem 1; for ridge dequantizers `m` is the mean of the data itself). Both
corrections have rank one. With blocks along the contraction the products of the blocks are summed.

An outlier pushes all other codes of its row to one end of the grid. The two terms in parentheses
are then large and nearly equal, so the codes are centred on whole numbers before anything is
rounded: with `sum(q) = n a + r`,

    Q_x Q_w - n q_x q_w = (Q_x Q_w - a_x sum(q_w) - r_x a_w) - r_x r_w / n

where the parentheses are exact in int32.
"""

from __future__ import annotations

from typing import Any

from keras import ops


def theorem1(
    product: Any,
    code_sums_x: Any,
    code_sums_w: Any,
    count: Any,
    scale_x: Any,
    offset_x: Any,
    scale_w: Any,
    offset_w: Any,
) -> Any:
    """The float product from the integer product; arguments broadcast against `product`.

    Args:
        product: `Q_x Q_w` as int32.
        code_sums_x: sums of the codes of each row, as int32.
        code_sums_w: sums of the codes of each column, likewise.
        count: contraction length n, as int32.
        scale_x: dequantizer of each row,
        offset_x: with None for a linear one.
        scale_w: dequantizer of each column,
        offset_w: likewise.

    Returns:
        float32, shaped like `product`.
    """
    whole_x, rest_x = _split_mean(code_sums_x, count)
    whole_w, rest_w = _split_mean(code_sums_w, count)
    exact = ops.cast(product - whole_x * code_sums_w - rest_x * whole_w, "float32")
    count = ops.cast(count, "float32")
    rest_x, rest_w = ops.cast(rest_x, "float32"), ops.cast(rest_w, "float32")
    centered = exact - rest_x * (rest_w / count)
    mean_x = _dequantized(whole_x, scale_x, offset_x) + scale_x * (rest_x / count)
    mean_w = _dequantized(whole_w, scale_w, offset_w) + scale_w * (rest_w / count)
    return scale_x * scale_w * centered + count * mean_x * mean_w


def _split_mean(code_sums: Any, count: Any) -> tuple[Any, Any]:
    """The mean code rounded down, and what is left of the sum."""
    whole = ops.floor_divide(code_sums, count)
    return whole, code_sums - whole * count


def _dequantized(codes: Any, scale: Any, offset: Any) -> Any:
    codes = ops.cast(codes, "float32")
    if offset is None:
        return scale * codes
    # The product nearly cancels the offset. Half of the scale's digits multiply without rounding.
    upper = 4097.0 * scale
    upper = upper - (upper - scale)
    return (upper * codes + offset) + (scale - upper) * codes
