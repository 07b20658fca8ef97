"""Which weights survive: N of every M along the contraction axis, or the largest of all."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import numpy as np
from keras import ops

from keras_rq.numerics.blocks import MergedAxes

_SMALLEST = float(np.finfo(np.float32).tiny)  # keeps 0 / 0 away


@dataclass(frozen=True)
class NM:
    """Keep the `n` largest magnitudes of every `m` consecutive elements of the contraction axis.

    A last group shorter than `m` keeps its `n` largest too. With `paired`, the elements are pairs
    of neighbours, which stay or go together, by their 2-norm: "4:8-paired" keeps two pairs of four
    (QuEST, arXiv 2502.05003).
    """

    n: int
    m: int
    paired: bool = False

    @property
    def density(self) -> float:
        return self.n / self.m

    def __str__(self) -> str:
        return f"{self.n}:{self.m}-paired" if self.paired else f"{self.n}:{self.m}"


@dataclass(frozen=True)
class Unstructured:
    """Zero the given fraction of a whole tensor, smallest magnitudes first."""

    fraction: float

    @property
    def density(self) -> float:
        return 1.0 - self.fraction

    def __str__(self) -> str:
        return f"{self.fraction:g}"


Sparsity = NM | Unstructured


def check_sparsity(sparsity: Any) -> Sparsity | None:
    """Parses "2:4", (2, 4), "4:8-paired" or a fraction such as 0.5.

    Raises:
        ValueError: for anything else, and for patterns that keep nothing or everything.
    """
    if sparsity is None or isinstance(sparsity, (NM, Unstructured)):
        return sparsity
    if isinstance(sparsity, str) and (match := re.fullmatch(r"(\d+):(\d+)(-paired)?", sparsity)):
        return _check_nm(int(match[1]), int(match[2]), sparsity, paired=bool(match[3]))
    if isinstance(sparsity, (tuple, list)) and len(sparsity) == 2:
        n, m = sparsity
        if all(isinstance(v, int) and not isinstance(v, bool) for v in (n, m)):
            return _check_nm(n, m, sparsity)
    if isinstance(sparsity, float) and 0.0 < sparsity < 1.0:
        return Unstructured(sparsity)
    raise ValueError(
        "`sparsity` must be 'N:M' or (N, M) with 0 < N < M (keep N of every M), 'N:M-paired' (the "
        "same in pairs of neighbours), or a float between 0 and 1 (the fraction of zeros). "
        f"Received: sparsity={sparsity!r}"
    )


def _check_nm(n: int, m: int, received: Any, paired: bool = False) -> NM:
    if not 0 < n < m:
        raise ValueError(
            f"N:M sparsity keeps N of every M elements, so it needs 0 < N < M, as in '2:4'. "
            f"Received: sparsity={received!r}"
        )
    if paired and (n % 2 or m % 2):
        raise ValueError(
            "Paired sparsity keeps whole pairs of neighbours, so N and M must be even, as in "
            f"'4:8-paired'. Received: sparsity={received!r}"
        )
    return NM(n, m, paired)


def keep_mask(x: Any, sparsity: Sparsity, axes: tuple[int, ...]) -> Any:
    """1.0 where an element survives, 0.0 where it is pruned.

    Args:
        x: float32 tensor.
        sparsity: the pattern.
        axes: contraction axes, as in `Blocks.axes`; N:M groups run along them.

    Returns:
        float32, shaped like `x`. Exactly N survive in each full group: of equal magnitudes (or
        norms of pairs) the earlier one. Of equal magnitudes at the unstructured threshold all
        survive.
    """
    if isinstance(sparsity, Unstructured):
        return _largest_fraction(x, sparsity)
    merged = MergedAxes(tuple(x.shape), tuple(a % len(x.shape) for a in axes))
    flat = merged.merge(x)
    largest = _largest_pairs if sparsity.paired else _largest_n_of_m
    return merged.unmerge(largest(flat, sparsity, merged.position, merged.length))


def _largest_fraction(x: Any, sparsity: Unstructured) -> Any:
    magnitude = ops.abs(x)
    size = int(np.prod(x.shape))
    kept = max(1, round(size * sparsity.density))
    threshold = ops.sort(ops.reshape(magnitude, (-1,)))[size - kept]
    return ops.cast(magnitude >= threshold, "float32")


def _largest_n_of_m(x: Any, pattern: NM, axis: int, length: int) -> Any:
    # An element's rank is the number of elements of its group that beat it. Comparing all pairs of
    # the M slices costs M (M - 1) / 2 elementwise comparisons, which fuse, where a sort does not.
    n, m = pattern.n, pattern.m
    groups = -(-length // m)
    magnitude = _padded(ops.abs(x), axis, groups * m - length, -1.0)
    sizes = list(ops.shape(x))
    grouped = ops.reshape(magnitude, [*sizes[:axis], groups, m, *sizes[axis + 1 :]])
    members = [grouped[(slice(None),) * (axis + 1) + (i,)] for i in range(m)]
    ranks = [0.0] * m
    for i in range(m):
        for j in range(i):
            earlier_wins = ops.cast(members[j] >= members[i], "float32")
            ranks[i] = ranks[i] + earlier_wins
            ranks[j] = ranks[j] + (1.0 - earlier_wins)
    kept = ops.stack([ops.cast(rank < n, "float32") for rank in ranks], axis=axis + 1)
    kept = ops.reshape(kept, [*sizes[:axis], groups * m, *sizes[axis + 1 :]])
    return _first(kept, axis, length) if groups * m != length else kept


def _largest_pairs(x: Any, pattern: NM, axis: int, length: int) -> Any:
    pairs = -(-length // 2)
    magnitude = _padded(ops.abs(x), axis, length % 2, 0.0)
    sizes = list(ops.shape(x))
    shape = [*sizes[:axis], pairs, 2, *sizes[axis + 1 :]]
    both = ops.reshape(magnitude, shape)
    # Not the root of summed squares, which leave the range of float32 before their root does.
    larger = ops.max(both, axis=axis + 1)
    ratio = ops.min(both, axis=axis + 1) / ops.maximum(larger, _SMALLEST)
    norm = larger * ops.sqrt(1.0 + ratio * ratio)
    kept = _largest_n_of_m(norm, NM(pattern.n // 2, pattern.m // 2), axis, pairs)
    kept = ops.broadcast_to(ops.expand_dims(kept, axis + 1), shape)
    kept = ops.reshape(kept, [*sizes[:axis], 2 * pairs, *sizes[axis + 1 :]])
    return _first(kept, axis, length) if length % 2 else kept


def _padded(x: Any, axis: int, missing: int, value: float) -> Any:
    pads = [[0, missing if a == axis else 0] for a in range(len(x.shape))]
    return ops.pad(x, pads, constant_values=value) if missing else x


def _first(x: Any, axis: int, length: int) -> Any:
    return x[(slice(None),) * axis + (slice(0, length),)]
