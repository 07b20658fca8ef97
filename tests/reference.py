"""Quantization in float64 NumPy, one block at a time, from the formulas of the papers.

It shares no code with the package. It is slow on purpose: every block is a vector, and every
formula stands as it is printed. `Spec` says what to compute; codes may be handed in, so that a
value next to a rounding tie does not hide what comes after the rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


@dataclass(frozen=True)
class Spec:
    """What to compute. `ridge_lambda` None stands for the straight-through estimator."""

    bits: Any
    affine: bool
    rule: str
    ridge_lambda: float | None = 0.01
    block: Any = "channel"
    axes: tuple[int, ...] = (-1,)
    shared: tuple[int, ...] = ()
    keep: tuple[int, int] | None = None
    paired: bool = False
    trust: float | None = None
    fade: float | None = None
    rotated: bool = False
    edge: float = 1.0
    midrise: bool = False  # QuEST

    @property
    def codes(self) -> np.ndarray:
        """All codes in ascending order."""
        is_midrise = self.midrise and self.bits in range(1, 9)
        if not is_midrise or (self.bits == 8 and self.keep):
            return levels(self.bits, self.affine)
        half = np.arange(2**self.bits) - (2**self.bits - 1) / 2
        return 2 * half if self.bits == 1 or self.keep else half - 0.5

    @property
    def has_tie_at_zero(self) -> bool:
        return self.midrise and len(self.codes) % 2 == 0


def levels(bits: Any, affine: bool) -> np.ndarray:
    """All codes in ascending order."""
    if bits == "fp4":
        return np.array([-v for v in E2M1[:0:-1]] + list(E2M1))
    if bits == 1.5:
        return np.array([-1.0, 0.0, 1.0])
    if affine:
        low = 0 if bits == 1 else -(2 ** (bits - 1))
        return np.arange(low, low + 2**bits, dtype=float)
    if bits in (1, 2):
        return np.arange(-(2**bits - 1), 2**bits, 2, dtype=float)
    reach = 2 ** (bits - 1) - 1
    return np.arange(-reach, reach + 1, dtype=float)


# Lines: the contraction axes merged, in the order given.


def to_lines(x: np.ndarray, axes: tuple[int, ...]) -> np.ndarray:
    axes = tuple(a % x.ndim for a in axes)
    rest = [a for a in range(x.ndim) if a not in axes]
    return x.transpose(*rest, *axes).reshape(-1, math.prod(x.shape[a] for a in axes))


def from_lines(lines: np.ndarray, shape: tuple[int, ...], axes: tuple[int, ...]) -> np.ndarray:
    axes = tuple(a % len(shape) for a in axes)
    order = [a for a in range(len(shape)) if a not in axes] + list(axes)
    return lines.reshape([shape[a] for a in order]).transpose(np.argsort(order))


def block_labels(shape: tuple[int, ...], spec: Spec) -> np.ndarray:
    """An integer for every element; equal integers share statistics."""
    if spec.block == "tensor":
        return np.zeros(shape, int)
    axes = [a % len(shape) for a in spec.axes]
    shared = [a % len(shape) for a in spec.shared]
    where = np.indices(shape)
    place = np.ravel_multi_index([where[a] for a in axes], [shape[a] for a in axes])
    block = np.zeros(shape, int) if spec.block == "channel" else place // spec.block
    own = [where[a] for a in range(len(shape)) if a not in (*axes, *shared)]
    keys = np.stack([block, *own]).reshape(len(own) + 1, -1)
    return np.unique(keys, axis=1, return_inverse=True)[1].reshape(shape)


def blocks(shape: tuple[int, ...], spec: Spec) -> Iterator[np.ndarray]:
    labels = block_labels(shape, spec)
    for label in range(labels.max() + 1):
        yield labels == label


def hadamard(x: np.ndarray, axes: tuple[int, ...]) -> np.ndarray:
    lines = to_lines(x, axes)
    length = lines.shape[1]
    size = max(s for s in (1, 2, 4, 8, 16, 32, 64, 128) if length % s == 0)
    i = np.arange(size)
    signs = [[(-1) ** bin(a & b).count("1") for b in i] for a in i]  # Sylvester
    rotated = lines.reshape(-1, size) @ (np.array(signs) / math.sqrt(size))
    return from_lines(rotated.reshape(lines.shape), x.shape, axes)


def keep_mask(
    x: np.ndarray, keep: tuple[int, int], axes: tuple[int, ...], paired: bool = False
) -> np.ndarray:
    """N:M along the lines; of equal magnitudes the earlier survives."""
    n, m = keep
    lines = np.abs(to_lines(x, axes))
    if paired:
        length = lines.shape[1]
        pairs = np.hypot(lines[:, 0::2], np.pad(lines, ((0, 0), (0, length % 2)))[:, 1::2])
        kept = keep_mask(pairs, (n // 2, m // 2), (1,))
        return from_lines(np.repeat(kept, 2, axis=1)[:, :length], x.shape, axes)
    mask = np.zeros_like(lines)
    for start in range(0, lines.shape[1], m):
        order = np.argsort(-lines[:, start : start + m], axis=1, kind="stable")[:, :n]
        np.put_along_axis(mask, order + start, 1.0, axis=1)
    return from_lines(mask, x.shape, axes)


# One block.


def lay_grid(v: np.ndarray, spec: Spec) -> tuple[float, float]:
    """(step, value of code 0) of the transform `f`."""
    codes = spec.codes
    center = v.mean() if spec.affine and spec.rule in ("rms", "absmean") else 0.0
    reach = {
        "absmean": math.sqrt(max(1, (len(codes) - 1) / 2)) * np.abs(v).mean(),
        "absmax": np.abs(v).max(),
        "rms": spec.edge * math.sqrt(np.mean((v - center) ** 2)),
        "minmax": np.nan,
    }[spec.rule]
    if not spec.affine:
        # The step is the range times the float32 reciprocal: the package's declared choice.
        top = (codes[-1] - codes[0]) / 2
        step = reach * float(np.float32(1) / np.float32(top))
        return step, step * (top - codes[-1])
    low, high = (v.min(), v.max()) if spec.rule == "minmax" else (center - reach, center + reach)
    if spec.rule == "rms" and spec.bits not in (1, "fp4"):  # moved to lie within the data
        up = max(v.min() - low, 0.0)
        down = max(high + up - v.max(), 0.0)
        low, high = max(low + up - down, v.min()), high + up - down
    step = (high - low) * float(np.float32(1) / np.float32(codes[-1] - codes[0]))
    return step, low - step * codes[0]


def nearest(position: np.ndarray, codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Nearest codes, and how far each position lies from the nearest tie."""
    rounded = codes[np.abs(position[:, None] - codes).argmin(axis=1)]
    ties = (codes[1:] + codes[:-1]) / 2
    return rounded, np.abs(position[:, None] - ties).min(axis=1)


def dequantize(v: np.ndarray, q: np.ndarray, spec: Spec, step: float, zero: float) -> np.ndarray:
    if spec.ridge_lambda is None:
        return step * q + zero
    if not spec.affine:
        return np.mean(v * q) / (np.mean(q * q) + spec.ridge_lambda) * q
    cov = np.mean((v - v.mean()) * (q - q.mean()))
    return cov / (q.var() + spec.ridge_lambda) * (q - q.mean()) + v.mean()


def closed_form(
    v: np.ndarray, q: np.ndarray, g: np.ndarray, spec: Spec, step: float, zero: float
) -> np.ndarray:
    """The vector-Jacobian product that follows from the regression, in closed form."""
    if spec.ridge_lambda is None:
        return g
    n, delta = len(v), q - (v - zero) / step
    if not spec.affine:
        moment = np.mean(q * q) + spec.ridge_lambda
        r = np.mean(v * q) / moment / step
        return r * g + np.sum(g * q) / (n * moment) * (2 * (1 - r) * q - delta)
    qt, dt = q - q.mean(), delta - delta.mean()
    moment = q.var() + spec.ridge_lambda
    r = np.mean((v - v.mean()) * qt) / moment / step
    correction = np.sum(g * qt) / (n * moment) * (2 * (1 - r) * qt - dt)
    return g.mean() + r * (g - g.mean()) + correction


# A tensor.


@dataclass
class Result:
    """`y`, the codes behind it, and the distance of every position from a rounding tie."""

    y: np.ndarray
    codes: np.ndarray
    tie_distance: np.ndarray


def quantize(x: np.ndarray, spec: Spec, codes: np.ndarray | None = None) -> Result:
    """Forward pass; with `codes`, those replace the rounding."""
    x = hadamard(x, spec.axes) if spec.rotated else x
    mask = keep_mask(x, spec.keep, spec.axes, spec.paired) if spec.keep else np.ones_like(x)
    y, rounded, distance = np.empty_like(x), np.empty_like(x), np.empty_like(x)
    for at in blocks(x.shape, spec):
        step, zero = lay_grid(x[at], spec)
        own, distance[at] = nearest((x[at] - zero) / step, spec.codes)
        if spec.has_tie_at_zero:  # which is the same on every machine, and goes up
            above = spec.codes[spec.codes * step + zero > 0].min()
            own = np.where(x[at] == 0, above, own)
            distance[at] = np.where(x[at] == 0, np.inf, distance[at])
        rounded[at] = own * mask[at]
        q = rounded[at] if codes is None else codes[at]
        y[at] = dequantize(x[at], q, spec, step, zero)
    return Result(hadamard(y, spec.axes) if spec.rotated else y, rounded, distance)


def trusted(x: np.ndarray, spec: Spec) -> np.ndarray:
    """What of the gradient passes.

    1 at most `trust` half steps beyond the outermost code and else 0, times a Gaussian of the half
    steps beyond the outermost of the points where the code changes.
    """
    x = hadamard(x, spec.axes) if spec.rotated else x
    codes, mask = spec.codes, np.ones_like(x)
    half_step = (codes[-1] - codes[-2]) / 2
    pruned = np.zeros(x.shape, bool)
    if spec.midrise and spec.keep:
        pruned = keep_mask(x, spec.keep, spec.axes, spec.paired) == 0
    for at in blocks(x.shape, spec):
        step, zero = lay_grid(x[at], spec)
        position = (x[at] - zero) / step
        beyond = np.maximum(position - codes[-1], codes[0] - position)
        if spec.trust is not None:
            near_zero = np.abs(x[at]) <= max(1.0, spec.trust) * half_step * step
            mask[at] = (beyond <= spec.trust * half_step + 1e-9) & (near_zero | ~pruned[at])
        if spec.fade is not None:
            mask[at] *= np.exp(-(np.maximum(beyond / half_step + 1, 0) ** 2) / (2 * spec.fade**2))
    return mask


def gradient(x: np.ndarray, g: np.ndarray, spec: Spec, codes: np.ndarray) -> np.ndarray:
    """Closed form, with the trust mask."""
    if spec.rotated:
        x, g = hadamard(x, spec.axes), hadamard(g, spec.axes)
    result = np.empty_like(x)
    for at in blocks(x.shape, spec):
        step, zero = lay_grid(x[at], spec)
        result[at] = closed_form(x[at], codes[at], g[at], spec, step, zero)
    return _masked(result, x, spec)


def finite_differences(x: np.ndarray, g: np.ndarray, spec: Spec, codes: np.ndarray) -> np.ndarray:
    """Central differences of `sum(g * y)` with noise and range frozen, with the trust mask."""
    if spec.rotated:
        x, g = hadamard(x, spec.axes), hadamard(g, spec.axes)
    result = np.empty_like(x)
    for at in blocks(x.shape, spec):
        step, zero = lay_grid(x[at], spec)
        result[at] = _differences(_frozen(x[at], codes[at], g[at], spec, step, zero), x[at])
    return _masked(result, x, spec)


def _frozen(
    v: np.ndarray, q: np.ndarray, g: np.ndarray, spec: Spec, step: float, zero: float
) -> Callable[[np.ndarray], float]:
    delta = q - (v - zero) / step

    def loss(w: np.ndarray) -> float:
        return float(np.sum(g * dequantize(w, (w - zero) / step + delta, spec, step, zero)))

    return loss


def _differences(loss: Callable[[np.ndarray], float], v: np.ndarray) -> np.ndarray:
    # At the cube root of the precision the error of central differences is about 1e-10.
    width = 1e-5 * max(np.abs(v).max(), 1e-300)
    steps = width * np.eye(len(v))
    return np.array([(loss(v + s) - loss(v - s)) / (2 * width) for s in steps])


def _masked(gradient: np.ndarray, rotated: np.ndarray, spec: Spec) -> np.ndarray:
    if spec.trust is not None or spec.fade is not None:
        unrotated = Spec(**{**spec.__dict__, "rotated": False})
        gradient = gradient * trusted(rotated, unrotated)
    return hadamard(gradient, spec.axes) if spec.rotated else gradient


# A standard normal.


def gaussian_error(codes: np.ndarray, step: float) -> float:
    """Mean squared error of rounding a standard normal to `step * codes`, in closed form."""
    values = step * np.asarray(codes, float)
    edges = np.concatenate([[-np.inf], (values[1:] + values[:-1]) / 2, [np.inf]])
    cdf = np.array([0.5 * (1 + math.erf(e / math.sqrt(2))) for e in edges])
    pdf = np.exp(-(edges**2) / 2) / math.sqrt(2 * math.pi)
    with np.errstate(invalid="ignore"):
        tail = np.where(np.isinf(edges), 0.0, edges * pdf)
    # Over a cell: E[x^2] - 2 v E[x] + v^2 P.
    second = np.diff(cdf) - np.diff(tail)
    return float(np.sum(second + 2 * values * np.diff(pdf) + values**2 * np.diff(cdf)))


def gaussian_step(codes: np.ndarray) -> float:
    """The step with the least `gaussian_error`, by golden-section search."""
    ratio = (math.sqrt(5) - 1) / 2
    low, high = 0.5 / max(codes), 6.0 / max(codes)
    while high - low > 1e-9 * high:
        a, b = high - ratio * (high - low), low + ratio * (high - low)
        low, high = (low, b) if gaussian_error(codes, a) < gaussian_error(codes, b) else (a, high)
    return (low + high) / 2
