"""Which weights survive: N of every M along the contraction axis, or the largest of all."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import numpy as np
from keras import ops

from keras_rq.numerics.blocks import MergedAxes


@dataclass(frozen=True)
class NM:
    """Keep the `n` largest magnitudes of every `m` consecutive elements of the contraction axis.

    A last group shorter than `m` keeps its `n` largest too.
    """

    n: int
    m: int

    @property
    def density(self) -> float:
        return self.n / self.m

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"


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
    """Parses "2:4", (2, 4) or a fraction such as 0.5.

    Raises:
        ValueError: for anything else, and for patterns that keep nothing or everything.
    """
    if sparsity is None or isinstance(sparsity, (NM, Unstructured)):
        return sparsity
    if isinstance(sparsity, str) and (match := re.fullmatch(r"(\d+):(\d+)", sparsity)):
        return _check_nm(int(match[1]), int(match[2]), sparsity)
    if isinstance(sparsity, (tuple, list)) and len(sparsity) == 2:
        n, m = sparsity
        if all(isinstance(v, int) and not isinstance(v, bool) for v in (n, m)):
            return _check_nm(n, m, sparsity)
    if isinstance(sparsity, float) and 0.0 < sparsity < 1.0:
        return Unstructured(sparsity)
    raise ValueError(
        "`sparsity` must be 'N:M' or (N, M) with 0 < N < M (keep N of every M), or a float between "
        f"0 and 1 (the fraction of zeros). Received: sparsity={sparsity!r}"
    )


def _check_nm(n: int, m: int, received: Any) -> NM:
    if not 0 < n < m:
        raise ValueError(
            f"N:M sparsity keeps N of every M elements, so it needs 0 < N < M, as in '2:4'. "
            f"Received: sparsity={received!r}"
        )
    return NM(n, m)


def keep_mask(x: Any, sparsity: Sparsity, axes: tuple[int, ...]) -> Any:
    """1.0 where an element survives, 0.0 where it is pruned.

    Args:
        x: float32 tensor.
        sparsity: the pattern.
        axes: contraction axes, as in `Blocks.axes`; N:M groups run along them.

    Returns:
        float32, shaped like `x`. Exactly N survive in each full group: of equal magnitudes the
        earlier one. Of equal magnitudes at the unstructured threshold all survive.
    """
    if isinstance(sparsity, Unstructured):
        return _largest_fraction(x, sparsity)
    merged = MergedAxes(tuple(x.shape), tuple(a % len(x.shape) for a in axes))
    flat = merged.merge(x)
    return merged.unmerge(_largest_n_of_m(flat, sparsity, merged.position, merged.length))


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
    magnitude = ops.abs(x)
    if groups * m != length:
        pads = [[0, 0] for _ in range(len(x.shape))]
        pads[axis][1] = groups * m - length
        magnitude = ops.pad(magnitude, pads, constant_values=-1.0)
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
    return kept[(slice(None),) * axis + (slice(0, length),)] if groups * m != length else kept
