"""Policies with the settings of published methods, from the same shorthand as any policy."""

from __future__ import annotations

from collections.abc import Sequence

from keras_rq import shorthand
from keras_rq.policy import QuantizationPolicy, Rule
from keras_rq.quantizers import BitNet, Quantizer, QuEST, Ridge
from keras_rq.shorthand import Wanted

__all__ = ["bitnet", "paper", "quest"]


def paper(
    spec: str, *, rules: Sequence[Rule] = (), forward: str | None = None
) -> QuantizationPolicy:
    """`Ridge` as in its paper (arXiv 2409.09245): blocks of 128, a penalty of 0.01, no trust mask.

    An offset for integer grids, none for ternary, FP4 and sparse operands. The paper leaves the
    range open; here it spans the data where there is an offset ("minmax") and reaches the largest
    magnitude where there is none ("absmax").

    Args:
        spec: as in `QuantizationPolicy`.
        rules: see `QuantizationPolicy`.
        forward: see `QuantizationPolicy`.

    Returns:
        The policy.

    Raises:
        TypeError, ValueError: see `QuantizationPolicy`.

    Example:

    >>> import keras_rq as rq
    >>> rq.presets.paper("A1W1").weights.range
    'minmax'
    """
    return _policy(spec, _paper, rules, forward)


def quest(
    spec: str, *, rules: Sequence[Rule] = (), forward: str | None = None
) -> QuantizationPolicy:
    """`QuEST` as in its paper (arXiv 2502.05003): rotated, one scale per token and channel.

    Its sparse weights are "-4:8-paired".

    Args:
        spec: as in `QuantizationPolicy`.
        rules: see `QuantizationPolicy`.
        forward: see `QuantizationPolicy`.

    Returns:
        The policy.

    Raises:
        TypeError, ValueError: see `QuantizationPolicy`.

    Example:

    >>> import keras_rq as rq
    >>> rq.presets.quest("A4W4-channel-4:8-paired").weights.sparsity
    '4:8-paired'
    """
    return _policy(spec, _quest, rules, forward)


def bitnet(
    spec: str, *, rules: Sequence[Rule] = (), forward: str | None = None
) -> QuantizationPolicy:
    """`BitNet` as in its papers: "A8W1" (arXiv 2310.11453), "A8W1.5" (b1.58, arXiv 2402.17764).

    Weights of two or three levels share one scale, activations have one per token. Activations of
    one bit, which the papers do not have, are `sign(x) * mean(|x|)`.

    Args:
        spec: as in `QuantizationPolicy`.
        rules: see `QuantizationPolicy`.
        forward: see `QuantizationPolicy`.

    Returns:
        The policy.

    Raises:
        TypeError, ValueError: see `QuantizationPolicy`.

    Example:

    >>> import keras_rq as rq
    >>> policy = rq.presets.bitnet("A8W1")
    >>> policy.weights.block_size, policy.activations.block_size
    ('tensor', 'channel')
    """
    return _policy(spec, _bitnet, rules, forward)


def _policy(
    spec: str, recipe: shorthand.Recipe, rules: Sequence[Rule], forward: str | None
) -> QuantizationPolicy:
    weights, activations = shorthand.read(spec, recipe)
    return QuantizationPolicy(
        weights=weights, activations=activations, rules=rules, forward=forward
    )


def _paper(wanted: Wanted) -> Quantizer:
    quantizer = Ridge(wanted.bits, block_size=wanted.block_size or 128, sparsity=wanted.sparsity)
    return quantizer.replace(range="minmax" if quantizer.has_offset else "absmax")


def _quest(wanted: Wanted) -> Quantizer:
    size = wanted.block_size or "channel"
    return QuEST(wanted.bits, block_size=size, sparsity=wanted.sparsity)


def _bitnet(wanted: Wanted) -> Quantizer:
    size = wanted.block_size or ("auto" if wanted.of_weights else "channel")
    return BitNet(
        wanted.bits, centered=wanted.of_weights, block_size=size, sparsity=wanted.sparsity
    )
