r"""Ridge-regression dequantizers and their gradient (arXiv 2409.09245, Eq. for `g`).

With `q = f(x) + delta` the noisy codes of a block, the dequantizer is the ridge regression of the
data onto its own codes,

    affine   g(q) = Cov_xq / (Var_q + lambda) * (q - mean(q)) + mean(x)
    linear   g(q) = mean(x q) / (mean(q^2) + lambda) * q

The penalty is mean-normalised and falls on the slope alone. Only `delta` is a constant for the
gradient; slope and offset are statistics of `q` and carry it. With the range `s_f` a constant too,
the derivative has a closed form. For a block of N elements with upstream gradient G, slope s,
`D = Var_q + lambda`, `r = s / s_f`, `A = sum(G q~)`, and `~` for "minus the block's mean":

    affine   dL/dx = mean(G) + r G~ + A / (N D) * (2 (1 - r) q~ - delta~)
    linear   dL/dx = r G + A / (N D) * (2 (1 - r) q - delta),   D = mean(q^2) + lambda, A = sum(G q)

A pruned element has code 0 and `delta = -f(x)`: the same formula hands it its dense gradient.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from keras import ops

from keras_rq.numerics.blocks import BlockView

# Keeps 0 / 0 away when lambda is 0: below the variance of any block whose codes differ (half a code
# in one of 1e8 elements), above that of equal codes whose mean was rounded.
_FLAT = 1e-9


class Line(NamedTuple):
    """A dequantizer `scale * code + offset`, one per block (`offset` None: zero).

    An affine ridge regression passes through the means of codes and of values; it says so, because
    Theorem 1 needs them and not the offset.
    """

    scale: Any
    offset: Any
    code_mean: Any = None
    value_mean: Any = None

    def __call__(self, codes: Any) -> Any:
        scaled = self.scale * codes
        return scaled if self.offset is None else scaled + self.offset

    def times(self, factor: Any) -> Line:
        """`factor` times the values, from the same codes; it broadcasts against statistics."""
        offset, value_mean = (
            None if part is None else part * factor for part in (self.offset, self.value_mean)
        )
        return Line(self.scale * factor, offset, self.code_mean, value_mean)

    def for_multiplied_codes(self, factor: int) -> Line:
        """The same values from codes that are `factor` times as large."""
        if factor == 1:
            return self
        mean = None if self.code_mean is None else self.code_mean * float(factor)
        return Line(self.scale * (1.0 / factor), self.offset, mean, self.value_mean)


def ridge_fit(values: Any, codes: Any, view: BlockView, affine: bool, ridge_lambda: float) -> Line:
    """Fits the dequantizer of every block.

    Args:
        values: float32 data, split into blocks by `view`.
        codes: float32 codes, split likewise; 0 where the view holds padding.
        view: the blocks.
        affine: fit an offset too.
        ridge_lambda: the mean-normalised penalty on the slope, >= 0, in squared code units.

    Returns:
        The `Line` of every block: float32, reduced axes kept.
    """
    if not affine:
        slope = view.mean(values * codes) / _denominator(view.mean(codes * codes), ridge_lambda)
        return Line(slope, None)
    value_mean, code_mean = view.mean(values), view.mean(codes)
    centered = codes - code_mean
    variance = view.mean(centered * centered)
    slope = view.mean((values - value_mean) * centered) / _denominator(variance, ridge_lambda)
    return Line(slope, value_mean - slope * code_mean, code_mean, value_mean)


class RidgeFit(NamedTuple):
    """The regression of positions `f(x)` onto codes, in units of the width of one code.

    Its statistics are all that the backward pass needs of a block. One per block each, float32.

    Attributes:
        slope: `r = s / s_f`, the fitted scale over the width of one code.
        moment: `D`, the variance of the codes (linear: their mean square) plus the penalty.
        code_mean: mean code; None for a linear dequantizer.
        noise_mean: mean noise, likewise.
    """

    slope: Any
    moment: Any
    code_mean: Any = None
    noise_mean: Any = None


def ridge_fit_noise(
    codes: Any, noise: Any, view: BlockView, affine: bool, ridge_lambda: float
) -> RidgeFit:
    """Fits the dequantizer of every block from codes and their noise.

    The same regression as `ridge_fit` of the positions `codes - noise`, from sums that need one
    pass over the data: with `Cov(f(x), q) = Var(q) - Cov(delta, q)` the large terms are exact,
    and what is rounded is of the size of the noise. Codes are counted from one of the block's
    own (shifted data), so that a block of equal codes has a variance of exactly zero.

    Args:
        codes: float32 codes, split into blocks by `view`; 0 where the view holds padding.
        noise: `delta = codes - f(x)`, with `f(x)` counted from the code 0.
        view: the blocks.
        affine: fit an offset too.
        ridge_lambda: the mean-normalised penalty on the slope, >= 0, in squared code units.
    """
    noise = view.present(noise)
    if not affine:
        square, mixed = _means(view, codes * codes, noise * codes)
        moment = _denominator(square, ridge_lambda)
        return RidgeFit((square - mixed) / moment, moment)
    pivot = view.pivot(codes)
    shifted = view.present(codes - pivot)
    shift, noise_mean, square, mixed = _means(
        view, shifted, noise, shifted * shifted, noise * shifted
    )
    variance, covariance = square - shift * shift, mixed - noise_mean * shift
    moment = _denominator(variance, ridge_lambda)
    return RidgeFit((variance - covariance) / moment, moment, pivot + shift, noise_mean)


def ridge_pull(
    fit: RidgeFit, codes: Any, upstream: Any, view: BlockView
) -> tuple[Any, Any] | tuple[Any]:
    """`A / (N D)` of the module docstring, and with an offset the mean of the upstream gradient.

    Args:
        fit: what `ridge_fit_noise` found.
        codes: float32 codes, split into blocks by `view`; 0 where the view holds padding.
        upstream: float32 gradient to the dequantized data, likewise.
        view: the blocks.
    """
    if fit.code_mean is None:
        return (view.mean_of_present(upstream * codes) / fit.moment,)
    mixed, upstream_mean = _means(view, upstream * (codes - fit.code_mean), upstream)
    return mixed / fit.moment, upstream_mean


def ridge_gradient(
    fit: RidgeFit, codes: Any, noise: Any, upstream: Any, pull: Any, upstream_mean: Any = None
) -> Any:
    """Gradient of the loss to the data, in closed form (module docstring).

    Args:
        fit: what `ridge_fit_noise` found.
        codes: float32 codes, split into blocks.
        noise: `delta = codes - f(x)`, likewise.
        upstream: float32 gradient to the dequantized data, likewise.
        pull: what `ridge_pull` found.
        upstream_mean: likewise.

    Returns:
        float32, split into blocks.
    """
    rest = 1.0 - fit.slope
    if fit.code_mean is None:
        return fit.slope * upstream + pull * (2.0 * rest * codes - noise)
    # What is one number per block comes last: an addition an element.
    moved = 2.0 * rest * (codes - fit.code_mean) - noise
    return fit.slope * upstream + pull * moved + (rest * upstream_mean + pull * fit.noise_mean)


def _means(view: BlockView, *values: Any) -> tuple[Any, ...]:
    return view.at_once(*(("mean_of_present", one) for one in values))


def _denominator(moment: Any, ridge_lambda: float) -> Any:
    return moment + ridge_lambda if ridge_lambda >= _FLAT else ops.maximum(moment, _FLAT)
