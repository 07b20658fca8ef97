"""What a quantizer asks a layer to keep for it, and what calibration has seen."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Parameter:
    """A float32 variable that a layer keeps for a quantizer.

    Attributes:
        shape: of the variable: that of a statistic of every block (`BlockView.statistic_shape`),
            or `()` for the whole tensor.
        trainable: whether the optimizer sees it.
    """

    shape: tuple[int, ...] = ()
    trainable: bool = True


@dataclass(frozen=True)
class Observation:
    """What calibration has seen of one input of one layer.

    Attributes:
        low: lower end of the range that the observer chose.
        high: upper end.
        sample: a uniform sample of all elements, flat, float64: rotated and masked as the
            quantizer does.
        is_chosen: whether the user named the observer. If not, a quantizer with a rule of its own
            (the root mean square, the mean magnitude) takes it from the sample.
    """

    low: float
    high: float
    sample: np.ndarray
    is_chosen: bool = False
