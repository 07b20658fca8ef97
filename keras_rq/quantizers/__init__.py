"""Quantizers: one small class per estimator."""

from __future__ import annotations

from typing import Any

from keras_rq.quantizers.base import Quantizer
from keras_rq.quantizers.bitnet import BitNet
from keras_rq.quantizers.ewgs import EWGS
from keras_rq.quantizers.gdnsq import GDNSQ
from keras_rq.quantizers.learned_step import LearnedStep
from keras_rq.quantizers.pact import PACT
from keras_rq.quantizers.quest import QuEST
from keras_rq.quantizers.ridge import Ridge
from keras_rq.quantizers.straight_through import StraightThrough
from keras_rq.quantizers.stretched_elastic import StretchedElastic

__all__ = [
    "EWGS",
    "GDNSQ",
    "PACT",
    "BitNet",
    "LearnedStep",
    "QuEST",
    "Quantizer",
    "Ridge",
    "StraightThrough",
    "StretchedElastic",
    "get",
]


def get(spec: Any) -> Quantizer | None:
    """A quantizer from what users write: a `Quantizer`, a bit width (then `Ridge`), or None.

    Raises:
        ValueError: for an unknown bit width.
        TypeError: for anything else.
    """
    if spec is None or isinstance(spec, Quantizer):
        return spec
    if isinstance(spec, (int, float, str)):
        return Ridge(spec)
    raise TypeError(
        "A quantizer is given as a `keras_rq.quantizers` object, as a bit width such as 4, 1.5 or "
        f"'fp4', or as None for float. Received: {spec!r}"
    )
