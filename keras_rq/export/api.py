"""`export`: convert, check against the model, then write."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_rq.export import folding, litert, signatures
from keras_rq.export.interpreter import IntegerKernel, integer_kernels
from keras_rq.export.lowering import Lowered
from keras_rq.export.verification import Verification, check_destination, verify
from keras_rq.layers import paths
from keras_rq.layers.base import is_quantized
from keras_rq.layers.registry import refuse_keras_quantization
from keras_rq.training.files import write_atomically

_SUFFIXES = {".tflite": "litert", ".litert": "litert"}
_SAMPLES = 8


@dataclass(frozen=True)
class ExportResult:
    """What was written, and how it was checked.

    Attributes:
        path: of the file.
        nbytes: its size.
        products: how each product of a quantized layer runs, with the reason where in float.
        kernels: products of the file with integer weights; whether XNNPACK runs them.
        verification: how its outputs compare with the model's.
        folded: paths of the BatchNormalization layers that became a part of the quantized layers
            before them.
        not_folded: the other ones of a model with quantized layers, and why.
    """

    path: Path
    nbytes: int
    products: tuple[Lowered, ...]
    kernels: tuple[IntegerKernel, ...]
    verification: Verification
    folded: tuple[str, ...] = ()
    not_folded: dict[str, str] = field(default_factory=dict)

    def summary(self) -> str:
        """What runs as integers and what does not, in a few lines."""
        integers = sum(1 for p in self.products if p.kernel == "integer")
        check = self.verification
        lines = [
            f"{self.path}: {self.nbytes:,} bytes, {integers} of {len(self.products)} quantized "
            f"products in integer arithmetic",
            f"  checked on {check.samples} samples: each product within "
            f"{check.product_difference:.0e} of the model, outputs within {check.difference:.0e} "
            f"(median {check.median_difference:.0e}; the model itself is uncertain by "
            f"{check.own_sensitivity:.0e})",
        ]
        lines += [f"  float: {p.path} ({p.reason})" for p in self.products if p.reason]
        if self.folded:
            lines.append(f"  folded: {len(self.folded)} BatchNormalization layers")
        lines += [f"  not folded: {path} ({reason})" for path, reason in self.not_folded.items()]
        idle = [k for k in self.kernels if not k.delegated]
        lines += [f"  slow: {k.weight} ({k.op} outside XNNPACK)" for k in idle]
        return "\n".join(lines)


def export(
    model: keras.Model,
    path: str | os.PathLike[str],
    *,
    format: str | None = None,
    inputs: Any = None,
    batch_size: int = 1,
    optimize: str = "size",
    rtol: float = 1e-5,
    verbose: bool = True,
) -> ExportResult:
    """Writes a model as a file that runs in integer arithmetic, after checking it.

    The file is run on sample inputs and compared with the model before it gets its name, each
    quantized layer by itself and the file as a whole. If it differs, an `ExportMismatch` says where
    and by how much, and nothing is written.

    Matrix products and convolutions whose two operands are quantized run on integer kernels of
    XNNPACK, on exactly the scales of training: weights are INT8, INT4 or INT2 in the file by their
    bit width. A BatchNormalization behind a quantized Dense, EinsumDense or convolution becomes a
    part of it, where all that the layer returns goes there. Everything else runs in float32. What
    of a quantized layer does not run as integers is printed and reported with the reason.

    Args:
        model: a built Keras model, quantized or not, from any backend. Without TensorFlow as the
            backend, a child process with TensorFlow converts it; layer classes of one's own must
            then live in an importable module.
        path: of the file; its folder must exist.
        format: "litert"; None goes by the suffix (.tflite).
        inputs: sample arrays in the structure that the model takes, batch axis first: they check
            the file, and fix sizes that the model leaves open. None: standard normal numbers.
        batch_size: of the file; LiteRT files have a fixed one.
        optimize: "size" stores the kernels of convolutions in as few bits as they have;
            "latency" stores them as INT8, which runs faster. Matrix products are unaffected.
        rtol: accepted difference from the model, relative to the largest output: of every product
            of a quantized layer, and of the file as a whole beyond the model's own sensitivity to
            the last bits of its activations (see `keras_rq.export.verification`).
        verbose: print what runs as integers and what does not.

    Returns:
        An `ExportResult`.

    Raises:
        FileNotFoundError: if the folder of `path` does not exist.
        ImportError: without TensorFlow or ai-edge-litert; names the extra to install.
        ExportMismatch: if the file does not compute what the model computes.
        TypeError, ValueError: wrong arguments, a model that cannot be traced or that LiteRT lacks
            operators for, a layer that Keras itself has quantized, or a stateful recurrent one.

    Example:

    ```python
    model.quantize(rq.QuantizationPolicy("A4W1"))
    model.fit(x, y)
    rq.export(model, "model.tflite", inputs=x[:64])
    ```
    """
    path = check_destination(path)
    _check_arguments(model, path, format, optimize, rtol)
    paths.complete(model)
    specs = signatures.input_specs(model, inputs, batch_size)
    built = litert.build(model, specs, optimize)
    if inputs is None:
        inputs = signatures.random_inputs(specs, _SAMPLES * batch_size, model)
    else:
        inputs = signatures.check_inputs(inputs, specs, batch_size)
    run_parts = litert.runner(built.parts, built.part_names) if built.parts else None
    run_file = litert.runner(built.content, [spec.name for spec in signatures.flatten(specs)])
    verification = verify(model, run_file, run_parts, inputs, batch_size, rtol)
    kernels = tuple(integer_kernels(built.content))
    write_atomically(path, built.content)
    result = ExportResult(
        path, len(built.content), built.products, kernels, verification, *folding.summary(model)
    )
    if verbose:
        print(result.summary())
    return result


def _check_arguments(
    model: Any, path: Path, format: str | None, optimize: str, rtol: float
) -> None:
    if not isinstance(model, keras.Model):
        raise TypeError(f"`model` must be a Keras model. Received: {model!r}")
    if not model.built:
        raise ValueError(
            f"Model {model.name!r} is not built. Call it on a batch of data, or "
            "model.build(input_shape), first."
        )
    found = format or _SUFFIXES.get(path.suffix)
    if found != "litert":
        raise ValueError(
            "`format` must be 'litert', or the path must end in .tflite. "
            f"Received: format={format!r}, path={str(path)!r}"
        )
    if optimize not in ("size", "latency"):
        raise ValueError(f"`optimize` must be 'size' or 'latency'. Received: optimize={optimize!r}")
    if not (isinstance(rtol, (int, float)) and rtol >= 0):
        raise ValueError(f"`rtol` must be a number >= 0. Received: rtol={rtol!r}")
    for layer in model._flatten_layers():
        refuse_keras_quantization(layer)
        if is_quantized(layer):
            layer.require_calibration()
            layer.require_target()
        if getattr(layer, "stateful", False) and isinstance(layer, keras.layers.RNN):
            raise ValueError(
                f"Layer {layer.path!r} is stateful, and a LiteRT file keeps nothing from one call "
                "to the next. Load the weights into a model with stateful=False that takes and "
                "returns the state (`initial_state=`, return_state=True)."
            )
    for variable in model.variables:
        if "float" in variable.dtype and not np.isfinite(ops.convert_to_numpy(variable)).all():
            raise ValueError(f"Variable {variable.path!r} holds values that are not finite.")
    for layer in model._flatten_layers():
        if getattr(layer, "compute_dtype", "float32") in ("float16", "bfloat16"):
            raise ValueError(
                f"Layer {layer.name!r} computes in {layer.compute_dtype}; LiteRT files compute in "
                "float32. Load the weights into a model with the dtype policy 'float32'."
            )
