"""The check that every exported file passes before it reaches its name.

Two steps. Each product of a quantized layer is run by itself, on the input that it has inside the
model, and must give what the model's layer gives, within `rtol` or what a float32 sum of that many
terms is uncertain by, in the median of several samples: this is where an error of the lowering
shows. Then the whole file is run.

Between layers the two programs round differently in the last bit, and now and then such a bit
decides on which side of a rounding tie an activation falls. That one code then differs by a step,
and the output by far more than float32 rounding, in the exported file exactly as between two
backends or two devices. How much the model itself moves when its activations move by a last bit is
measured, batch by batch, and the file may differ by twice that: at most by twice the largest
change, and in the median by twice the median one. On a backend other than TensorFlow kernels are
quantized once more by the process that converts them; a tie among the weights shows in every
sample, and only the first of the two bounds holds.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_rq.export import folding, signatures
from keras_rq.layers.base import QuantizedLayer, all_lowered_by
from keras_rq.layers.sharing import calls_as_one, in_loop
from keras_rq.quantizers.parametric import forward_only

# What float32 dot products of a few hundred terms are uncertain by, relative to the largest value.
_LAST_BITS = 2.0**-21
# What a float32 sum is uncertain by for each of its terms, where values are few and repeat and
# rounding errors do not cancel. The integer kernel has no such error; the trained model has.
_ROUNDING = 2.0**-25
_DRAWS = 4
_SENSITIVITY_BATCHES = 16
_PART_BATCHES = 5

Run = Callable[[Sequence[np.ndarray]], list[np.ndarray]]


class ExportMismatch(ValueError):
    """An exported file does not compute what the model computes; no file was written."""


@dataclass(frozen=True)
class Verification:
    """How a file compares with its model. Differences are relative to the largest output.

    Attributes:
        samples: number of samples compared.
        difference: largest difference of the file's outputs.
        median_difference: median over samples of the largest difference of each.
        own_sensitivity: largest change of the model's own outputs when its activations move in
            the last bits.
        product_difference: of single products of quantized layers, the largest median over samples.
        magnitude: the largest output.
    """

    samples: int
    difference: float
    median_difference: float
    own_sensitivity: float
    product_difference: float
    magnitude: float


@forward_only()
@calls_as_one()
def verify(
    model: keras.Model, run_file: Run, run_parts: Run | None, inputs: Any, batch: int, rtol: float
) -> Verification:
    """Compares a file with the model it came from.

    Args:
        model: the model, on the user's backend.
        run_file: runs the file on flat inputs.
        run_parts: runs every product of a quantized layer by itself; None without any.
        inputs: sample arrays in the model's structure, whole batches of them.
        batch: samples per run.
        rtol: accepted difference, relative to the largest output.

    Returns:
        A `Verification`.

    Raises:
        ExportMismatch: if a product or the whole differs by more.
    """
    batches = list(_batches(inputs, batch))
    expected = [_outputs(model, b) for b in batches]
    if not all(np.isfinite(y).all() for ys in expected for y in ys):
        raise ValueError(
            f"Model {model.name!r} answers the sample inputs with values that are not finite, so a "
            "file cannot be compared with it. Check `inputs` and the model."
        )
    part = 0.0
    if run_parts is not None:
        part = _check_parts(model, run_parts, batches[:_PART_BATCHES], rtol)
    magnitude = max(float(np.abs(y).max(initial=0.0)) for ys in expected for y in ys) or 1.0
    gaps = [
        _gap(ys, run_file(signatures.flatten(b))) / magnitude
        for ys, b in zip(expected, batches, strict=True)
    ]
    own = np.zeros(1)
    if run_parts is not None:
        observed = list(zip(batches, expected, strict=True))[:_SENSITIVITY_BATCHES]
        own = np.concatenate([_own_gaps(model, b, ys) for b, ys in observed]) / magnitude
    result = Verification(
        len(batches) * batch, max(gaps), float(np.median(gaps)), float(own.max()), part, magnitude
    )
    # The largest difference may come from a rounding tie; the median must not be that large.
    typical = rtol + 2 * float(np.median(own) if _same_kernels() else own.max())
    if not (result.difference <= rtol + 2 * own.max() and result.median_difference <= typical):
        raise ExportMismatch(
            f"The exported file does not match the model: over {result.samples} samples its output "
            f"differs by {result.difference:.2g} of the largest output (median "
            f"{result.median_difference:.2g}). Accepted are rtol={rtol:g} "
            f"and twice the model's own sensitivity to the last bits of its activations, "
            f"{result.own_sensitivity:.2g}. Its quantized layers are right one by one (within "
            f"{part:.2g}); a float layer in between is not. No file was written."
        )
    return result


def _check_parts(model: keras.Model, run_parts: Run, batches: list[Any], rtol: float) -> float:
    """Checks every product by itself and returns the largest median difference."""
    calls = [_observe_calls(model, batch) for batch in batches]
    received = [run_parts([call.x for call in batch_calls]) for batch_calls in calls]
    worst = 0.0
    for position, first in enumerate(calls[0]):
        same = [batch_calls[position] for batch_calls in calls]
        largest = max(float(np.abs(call.y).max(initial=0.0)) for call in same) or 1.0
        gaps = [_gap([c.y], [ys[position]]) / largest for c, ys in zip(same, received, strict=True)]
        accepted = max(rtol, first.terms * _ROUNDING)
        tie = 2 * max(call.own_gap for call in same) / largest
        typical = accepted if _same_kernels() else accepted + tie
        if not (np.median(gaps) <= typical and max(gaps) <= accepted + tie):
            raise ExportMismatch(
                f"Layer {first.label} does not survive the export: run by itself in LiteRT its "
                f"product differs by {max(gaps):.2g} of its largest output (median "
                f"{np.median(gaps):.2g}); accepted is {accepted:.2g}, and {tie:.2g} more for a "
                "rounding tie. No file was written. This is a bug of keras_rq or of the LiteRT "
                "runtime; please report it with the layer's configuration."
            )
        worst = max(worst, float(np.median(gaps)))
    return worst


@dataclass(frozen=True)
class _Observed:
    """One product of a run: its operands' size, what it gave, and how sensitive that is."""

    label: str
    x: np.ndarray
    y: np.ndarray
    terms: int
    own_gap: float


def _same_kernels() -> bool:
    """Whether the file's kernels were quantized by the arithmetic that the model runs on.

    From another backend a TensorFlow process quantizes them anew, and a weight that falls on a
    rounding tie there differs by a step in every sample alike.
    """
    return keras.backend.backend() == "tensorflow"


def _observe_calls(model: keras.Model, batch: Any) -> list[_Observed]:
    calls: list[_Observed] = []
    folds = folding.folds_of(model)
    generator = np.random.default_rng(0)

    def observer(layer: QuantizedLayer) -> Callable[..., Any]:
        def observe(name: str, product: Any, x: Any) -> Any:
            y = layer.multiply_quantized(name, x)
            if in_loop():
                return y

            fold = folds.get(id(layer))

            def as_in_file(y: Any) -> np.ndarray:
                array = ops.convert_to_numpy(y)
                return array if fold is None or fold.name != name else fold.scaled(array)

            arrays = ops.convert_to_numpy(x), as_in_file(y)
            moved = [
                as_in_file(layer.multiply_quantized(name, _disturbed(product, x, generator)))
                for _ in range(_DRAWS)
            ]
            own = max(_gap([arrays[1]], [z]) for z in moved)
            shape = getattr(layer, name).shape
            terms = math.prod(shape[a] for a in (*product.kernel_axes, *product.kernel_shared))
            calls.append(_Observed(f"{layer.path}/{name}", *arrays, terms, own))
            return y

        return observe

    with all_lowered_by(model, observer):
        _outputs(model, batch)
    return calls


def _disturbed(product: Any, x: Any, generator: np.random.Generator) -> Any:
    """The input of a product, moved in its last bits; indices stay."""
    if not product.input_axes or "float" not in keras.backend.standardize_dtype(x.dtype):
        return x
    noise = generator.uniform(-_LAST_BITS, _LAST_BITS, tuple(x.shape))
    return x + ops.max(ops.abs(x)) * ops.convert_to_tensor(noise, dtype=x.dtype)


def _own_gaps(model: keras.Model, batch: Any, expected: list[np.ndarray]) -> list[float]:
    """How far the outputs go, in several draws, when products' inputs move in their last bits."""
    generator = np.random.default_rng(0)

    def disturber(layer: QuantizedLayer) -> Callable[..., Any]:
        def disturb(name: str, product: Any, x: Any) -> Any:
            return layer.multiply_quantized(name, _disturbed(product, x, generator))

        return disturb

    with all_lowered_by(model, disturber):
        return [_gap(expected, _outputs(model, batch)) for _ in range(_DRAWS)]


def _batches(inputs: Any, batch: int) -> Iterator[Any]:
    for start in range(0, len(signatures.flatten(inputs)[0]), batch):
        yield signatures.map_structure(lambda a, s=start: a[s : s + batch], inputs)


def _outputs(model: keras.Model, batch: Any) -> list[np.ndarray]:
    return [ops.convert_to_numpy(y) for y in signatures.flatten(model(batch, training=False))]


def _gap(expected: Sequence[np.ndarray], received: Sequence[np.ndarray]) -> float:
    """Largest absolute difference; infinite where shapes differ or a value is not finite."""
    if [y.shape for y in expected] != [y.shape for y in received]:
        return float("inf")
    gaps = [np.abs(a.astype(np.float64) - b) for a, b in zip(expected, received, strict=True)]
    return max(float(np.where(np.isfinite(g), g, np.inf).max(initial=0.0)) for g in gaps)


def check_destination(path: str | os.PathLike[str]) -> Path:
    """The path of the file to be; raises before any work if its folder does not exist."""
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(
            f"The folder {str(path.parent)!r} does not exist, so {path.name!r} cannot be written "
            "there. Create it, or choose another path."
        )
    if path.is_dir():
        raise IsADirectoryError(f"`path` must name a file. Received a folder: {str(path)!r}")
    return path
