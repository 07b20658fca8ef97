"""What an integer product in a TFLite file accepts, and how wide its weights are stored."""

from __future__ import annotations

from typing import Any

import numpy as np

_LARGEST_CODE = 128  # of an activation, by magnitude
_STORED_RANGE = {2: (-2, 1), 4: (-8, 7), 8: (-128, 127)}


def storage_bits(codes: np.ndarray, bits: float) -> int:
    """Returns the width, 2, 4 or 8, that weight codes of nominally `bits` bits are stored in.

    The narrowest type that is allowed for `bits` *and* holds all the codes wins: up to 2 bits
    may use INT2 (-2..1), up to 4 bits INT4 (-8..7), anything INT8. So {-1, 1}, {0, 1} and
    ternary codes take 2 bits, and the 2-bit codes {-1, 0, 1, 2} take 4, because INT2 has no 2.
    The width is never narrower than `bits`: the codes of an 8-bit layer may happen to be small
    today, but its file should not change its kernels after the next epoch.
    """
    low, high = int(codes.min()), int(codes.max())
    for width, (smallest, largest) in _STORED_RANGE.items():
        if bits <= width and smallest <= low and high <= largest:
            return width
    raise ValueError(
        f"Weight codes must lie within -128..127, and `bits` must be at most 8. "
        f"Received: codes from {low} to {high}, bits={bits}."
    )


def static_shape(tensor: Any, name: str) -> tuple[int, ...]:
    if not tensor.shape.rank or None in tensor.shape.as_list():
        raise ValueError(
            f"`codes` of {name!r} must have a static shape, batch included. Received: "
            f"{tensor.shape}. Trace with an input signature that fixes the batch size."
        )
    if tensor.dtype.name != "float32":
        raise ValueError(
            f"`codes` of {name!r} must be float32 that holds integers. Received: "
            f"{tensor.dtype.name}. Cast it."
        )
    return tuple(tensor.shape.as_list())


def checked(
    weight: np.ndarray, scale: np.ndarray, rank: int, name: str, channel_axes: int = 1
) -> tuple[np.ndarray, np.ndarray]:
    """Returns an integer weight, and a scale for each channel of its last `channel_axes`."""
    weight = np.asarray(weight)
    check_codes(weight, rank, name)
    merged = weight.reshape(*weight.shape[: rank - channel_axes], -1)
    scale = per_channel(scale, merged.shape[-1], "scale", name)
    merged, scale = revived(merged, scale, merged.ndim - 1, name)
    return merged.reshape(weight.shape), scale


def revived(
    codes: np.ndarray, scale: np.ndarray, axis: int, name: str
) -> tuple[np.ndarray, np.ndarray]:
    """Gives a dead channel, of scale 0, zero codes and scale 1: XNNPACK refuses scale 0."""
    dead = scale == 0
    codes = np.where(dead.reshape(along(codes, axis)), 0, codes)
    scale = np.where(dead, np.float32(1), scale)
    if not (np.isfinite(scale) & (scale >= np.finfo(np.float32).tiny)).all():
        raise ValueError(
            f"`scale` of {name!r} must be finite and positive (and not subnormal). Received: "
            f"values from {scale.min()} to {scale.max()}. Negate the codes of a channel whose "
            "scale is negative."
        )
    return codes, scale


def along(array: np.ndarray, axis: int) -> list[int]:
    """Returns the shape that makes a vector broadcast along `axis` of `array`."""
    return [size if i == axis else 1 for i, size in enumerate(array.shape)]


def check_codes(weight: np.ndarray, rank: int, name: str) -> None:
    if weight.ndim != rank or weight.dtype.kind not in "iu" or weight.size == 0:
        raise ValueError(
            f"The weight of {name!r} must be a non-empty array of integers with {rank} axes. "
            f"Received: shape {weight.shape}, dtype {weight.dtype}."
        )


def per_channel(values: np.ndarray, channels: int, what: str, name: str) -> np.ndarray:
    values = np.asarray(values, np.float32).reshape(-1)
    if values.size not in (1, channels):
        raise ValueError(
            f"`{what}` of {name!r} must hold one value, or one for each of {channels} channels. "
            f"Received: {values.size} values."
        )
    return np.broadcast_to(values, channels)


def check_accumulator(
    weight: np.ndarray, axes: tuple[int, ...], gain: int, limit: int, name: str
) -> None:
    """Raises if an accumulator of the product could reach `limit`."""
    largest = int(np.abs(weight.astype(np.int64)).sum(axis=axes).max()) * _LARGEST_CODE * gain
    if largest >= limit:
        raise ValueError(
            f"The accumulator of {name!r} can reach {largest}, but must stay below {limit}. "
            "Split the product along its contraction axis and add the parts."
        )
