"""What quantizers with a trained range have in common."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

from keras import ops

from keras_rq.numerics.blocks import BlockView
from keras_rq.numerics.grids import Bits
from keras_rq.quantizers.base import Quantizer


class Learned(Quantizer):
    """Fields of quantizers whose range is trained: those that it stands in for are refused.

    Args:
        bits: see `Quantizer`.
        block_size: elements of a kernel along the contraction axis that share parameters; "channel"
            gives every output channel its own. An input has one set for the whole tensor.
        rotation: see `Quantizer`.
        trust: see `Quantizer`; None stops gradients at the edge of the range, as the papers do.
        sparsity: see `Quantizer`.
        conv_block_size: like `block_size`, along the input channels of a convolution's kernel.
        others: refused, with what to do instead.
    """

    refused: ClassVar[Mapping[str, str]] = {
        "affine": "its dequantizer is linear",
        "range": "its range is trained",
        "calibration": "`keras_rq.calibrate` gives its inputs their first range",
        "ridge_lambda": "it fits no regression",
        "fade": "its gradients end at the edge of the range, or at `trust`",
    }

    def __init__(
        self,
        bits: Bits,
        *,
        block_size: int | str = "channel",
        rotation: str | None = None,
        trust: float | None = None,
        sparsity: Any = None,
        conv_block_size: int | str = "channel",
        **others: Any,
    ) -> None:
        if sparsity is not None:
            self._refuse({"sparsity": sparsity})
        self._refuse(others)
        for name in others:
            raise TypeError(f"{type(self).__name__} has no argument {name!r}.")
        super().__init__(
            bits,
            affine=False,
            block_size=block_size,
            rotation=rotation,
            trust=trust,
            sparsity=sparsity,
            conv_block_size=conv_block_size,
        )

    def _refuse(self, fields: Mapping[str, Any]) -> None:
        for name in fields:
            if name in self.refused:
                raise ValueError(
                    f"{type(self).__name__} takes no `{name}`: {self.refused[name]}. "
                    f"Received: {name}={fields[name]!r}. Leave it out."
                )

    @property
    def has_parameters(self) -> bool:
        return True

    def reach(self) -> float:
        """How far beyond the outermost codes, in code units, gradients still pass."""
        return 0.0 if self.trust is None else self.trust * 0.5 * self.grid.edge_step

    def get_config(self) -> dict[str, Any]:
        return {k: v for k, v in super().get_config().items() if k not in self.refused}


def element_count(values: Any, view: BlockView) -> Any:
    """How many elements a tensor has whose blocks are `values`, without padding; float32."""
    if None in view.shape:
        return ops.cast(ops.size(values), "float32")  # the size of a batch; nothing is padded
    return ops.cast(math.prod(view.shape), "float32")
