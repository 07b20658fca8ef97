"""The shorthand of a policy, such as "A4W1-128-2:4", and the quantizers that it stands for."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from keras_rq.numerics.blocks import BlockSize, check_block_size
from keras_rq.numerics.grids import Bits, check_bits
from keras_rq.numerics.sparsity import Sparsity, check_sparsity
from keras_rq.quantizers import Quantizer, Ridge

_SHORTHAND = re.compile(
    r"(?:A(?P<activations>[0-9.]+|fp4))?W(?P<weights>[0-9.]+|fp4)"
    r"(?:-(?P<block>[0-9]+|channel|tensor))?(?:-(?P<sparsity>[0-9]+:[0-9]+(?:-paired)?))?"
)
_GRAMMAR = (
    "A<bits>W<bits>[-<block>|-channel|-tensor][-<N>:<M>[-paired]], for example 'A4W1', "
    "'A1W1-channel', 'A4W1-128-2:4' or 'W4' (weights only); bits are 1, 1.5 (ternary), 2 to 8 or "
    "fp4"
)


@dataclass(frozen=True)
class Wanted:
    """What a shorthand says of one operand.

    Attributes:
        bits: how many.
        other_bits: those of the other operand; None where that stays in float.
        of_weights: whether the operand is a layer's weights or its input.
        block_size: None where the shorthand leaves it open.
        sparsity: None for dense, as inputs are.
    """

    bits: Bits
    other_bits: Bits | None
    of_weights: bool
    block_size: BlockSize | None
    sparsity: Sparsity | None


Recipe = Callable[[Wanted], Quantizer]


# Up to two bits, gradients fade with the distance from the outermost threshold. Widths by bits that
# were best of four or five in `benchmarks/nanogpt.py`, after 2,000 steps (three levels and four
# while their ranges still reached beyond the data).
_FADES = {1: 1.6, 1.5: 1.0, 2: 1.3}
# Fields by the bits of both operands. With one bit each, rotations were worth 0.03 of nanoGPT's
# accuracy after 5,000 steps at the rate 0.004 (0.002 after 2,000 at 0.001). With two bits each they
# are worth nothing there (2,000 steps, a fade of 2.5: 0.558 without, 0.557 with), and much to
# ResNet-20, whose inputs a ReLU has made (`benchmarks/resnet20.py`, 30 epochs: without, 0.862 and
# 0.843 with fades of 1.3 and 2.5; with, 0.889, 0.893 and 0.892 with fades of 1.6, 2.5 and 4). With
# three levels they cost nanoGPT 0.013 to 0.015 and gave ResNet-20 0.05.
_OF_BOTH = {
    (1, 1): {"fade": 1.2, "rotation": "hadamard"},
    (2, 2): {"fade": 2.5, "rotation": "hadamard"},
}


def default(wanted: Wanted) -> Quantizer:
    """What `QuantizationPolicy` makes of a shorthand; `keras_rq.presets` has other recipes."""
    fields: dict[str, Any] = {"fade": _FADES.get(wanted.bits)}
    if wanted.bits == 1.5 and not wanted.of_weights:
        # Around zero, one level of three would be lost on what a ReLU has made.
        fields["affine"] = True
    fields |= _OF_BOTH.get((wanted.bits, wanted.other_bits), {})
    size = wanted.block_size or 128
    return Ridge(wanted.bits, block_size=size, sparsity=wanted.sparsity, **fields)


def is_shorthand(text: str) -> bool:
    """Whether a string has the form of a policy's shorthand (its numbers may still be wrong)."""
    return _SHORTHAND.fullmatch(text) is not None


def read(
    spec: Any,
    recipe: Recipe = default,
    *,
    beside: tuple[Quantizer | None, Quantizer | None] = (None, None),
) -> tuple[Quantizer, Quantizer | None]:
    """The quantizers of weights and of activations; None where the shorthand has no activations.

    Args:
        spec: the shorthand.
        recipe: makes quantizers of what it says.
        beside: what takes the place of weights and of activations: the other operand is made to
            suit its bits, and is not rotated alone.

    Raises:
        ValueError: quotes what was received and says what is accepted.
    """
    match = _SHORTHAND.fullmatch(spec) if isinstance(spec, str) else None
    if match is None:
        raise ValueError(f"`spec` must read {_GRAMMAR}. Received: spec={spec!r}")
    try:
        block = match["block"]
        size = block and check_block_size(int(block) if block.isdigit() else block)
        pattern = check_sparsity(match["sparsity"])
        of_weights = _bits(match["weights"])
        of_input = match["activations"] and _bits(match["activations"])
        bits = [
            said if given is None else given.bits
            for said, given in zip((of_weights, of_input), beside, strict=True)
        ]
        weights = _along(recipe(Wanted(of_weights, bits[1], True, size, pattern)), beside[1])
        if of_input is None:
            return weights, None
        return weights, _along(recipe(Wanted(of_input, bits[0], False, size, None)), beside[0])
    except ValueError as error:
        raise ValueError(f"In the shorthand {spec!r}: {error}") from None


def _along(made: Quantizer, other: Quantizer | None) -> Quantizer:
    """What is made, without a rotation that the given other operand does not have."""
    is_alone = other is not None and other.rotation != made.rotation
    return made.replace(rotation=None) if is_alone else made


def _bits(text: str) -> Bits:
    try:
        bits: Any = int(text) if text.isdigit() else float(text)
    except ValueError:
        bits = text
    return check_bits(bits)
