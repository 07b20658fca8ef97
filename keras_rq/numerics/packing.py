"""Sub-byte storage, in NumPy: dense bit fields, five ternary digits to a byte, sparse codes.

Bit fields are little-endian within and across bytes, which at 1, 2 and 4 bits is the order of
LiteRT files: element 0 sits in the lowest bits of byte 0.
"""

from __future__ import annotations

import numpy as np

_POWERS_OF_THREE = np.array([1, 3, 9, 27, 81], np.uint8)


def pack_bits(indices: np.ndarray, bits: int) -> np.ndarray:
    """Packs unsigned `indices` below `2**bits` into `ceil(size * bits / 8)` bytes.

    Raises:
        ValueError: if an index does not fit.
    """
    flat = np.asarray(indices, np.uint8).reshape(-1)
    if flat.size and int(flat.max()) >> bits:
        raise ValueError(f"index {int(flat.max())} does not fit into {bits} bits.")
    if bits == 8:
        return flat.copy()
    fields = np.unpackbits(flat[:, None], axis=1, count=bits, bitorder="little")
    return np.packbits(fields.reshape(-1), bitorder="little")


def unpack_bits(packed: np.ndarray, bits: int, size: int) -> np.ndarray:
    """Inverse of `pack_bits`: `size` indices as uint8."""
    if bits == 8:
        return np.asarray(packed, np.uint8)[:size].copy()
    fields = np.unpackbits(np.asarray(packed, np.uint8), count=size * bits, bitorder="little")
    return np.packbits(fields.reshape(size, bits), axis=1, bitorder="little").reshape(-1)


def pack_trits(indices: np.ndarray) -> np.ndarray:
    """Packs digits 0, 1, 2 five to a byte (243 of 256 values): 1.6 bits each."""
    flat = np.asarray(indices, np.uint8).reshape(-1)
    if flat.size and flat.max() > 2:
        raise ValueError(f"a ternary digit is 0, 1 or 2. Received: {int(flat.max())}")
    padded = np.concatenate([flat, np.zeros(-flat.size % 5, np.uint8)]).reshape(-1, 5)
    return (padded * _POWERS_OF_THREE).sum(axis=1).astype(np.uint8)


def unpack_trits(packed: np.ndarray, size: int) -> np.ndarray:
    """Inverse of `pack_trits`."""
    digits = np.asarray(packed, np.uint8)[:, None] // _POWERS_OF_THREE % 3
    return digits.reshape(-1)[:size].astype(np.uint8)


def pack_indices(indices: np.ndarray, levels: int) -> np.ndarray:
    """Packs indices below `levels` at the fewest whole bits; three levels go five to a byte."""
    return pack_trits(indices) if levels == 3 else pack_bits(indices, (levels - 1).bit_length())


def unpack_indices(packed: np.ndarray, levels: int, size: int) -> np.ndarray:
    """Inverse of `pack_indices`."""
    if levels == 3:
        return unpack_trits(packed, size)
    return unpack_bits(packed, (levels - 1).bit_length(), size)
