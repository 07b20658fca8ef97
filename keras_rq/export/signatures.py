"""The inputs of a model with all sizes fixed: shapes, dtypes, names, in the model's structure."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
from keras import tree
from keras.src.export.export_utils import get_input_signature


@dataclass(frozen=True)
class InputSpec:
    """One input array.

    Attributes:
        shape: with the batch size, all sizes fixed.
        dtype: "float32", "int32", ...
        name: what the file calls it.
    """

    shape: tuple[int, ...]
    dtype: str
    name: str


def input_specs(model: keras.Model, inputs: Any, batch_size: int) -> Any:
    """The structure of a model's inputs as `InputSpec`.

    Args:
        model: a built Keras model.
        inputs: arrays in the structure that the model takes, batch axis first, or None. They fix
            sizes that the model leaves open.
        batch_size: of the file.

    Returns:
        `InputSpec` objects in the same structure.

    Raises:
        TypeError: if `inputs` holds anything but arrays.
        ValueError: if `inputs` do not fit the model, if sizes are open and `inputs` is None, or if
            `batch_size` is not positive.
    """
    if not isinstance(batch_size, int) or isinstance(batch_size, bool) or batch_size < 1:
        raise ValueError(
            f"`batch_size` must be a positive integer. Received: batch_size={batch_size!r}"
        )
    declared = list(getattr(model, "inputs", None) or [])
    structure = _declared(model) if inputs is None else inputs
    leaves = tree.flatten(structure)
    if inputs is not None:
        _check_samples(inputs, leaves, declared, model)
    names = _unique_names([getattr(leaf, "name", None) for leaf in declared or leaves])
    # Where the model declares its inputs their dtypes count, not those of the samples.
    dtypes = [leaf.dtype for leaf in declared or leaves]
    specs = [
        _spec(tuple(leaf.shape), dtype, name, model, batch_size)
        for leaf, dtype, name in zip(leaves, dtypes, names, strict=True)
    ]
    return tree.pack_sequence_as(structure, specs)


def _check_samples(inputs: Any, arrays: list[Any], declared: list[Any], model: keras.Model) -> None:
    if not all(hasattr(array, "shape") and hasattr(array, "dtype") for array in arrays):
        raise TypeError(
            "`inputs` must hold arrays, batch axis first, in the structure that the model takes. "
            f"Received: {type(inputs).__name__}"
        )
    wanted = [tuple(leaf.shape) for leaf in declared]
    shapes = [tuple(array.shape) for array in arrays]
    fits = len(shapes) == len(wanted) and all(
        len(shape) == len(want)
        and all(b in (None, a) for a, b in zip(shape[1:], want[1:], strict=True))
        for shape, want in zip(shapes, wanted, strict=True)
    )
    if declared and not fits:
        raise ValueError(
            f"`inputs` do not fit model {model.name!r}, which takes arrays of the shapes {wanted}. "
            f"Received: {shapes}"
        )


def random_inputs(specs: Any, samples: int, model: keras.Model) -> Any:
    """Arrays to try a model on: standard normal numbers, and indices that its tables have."""
    generator = np.random.default_rng(0)
    tables = [
        layer.input_dim
        for layer in model._flatten_layers()
        if isinstance(layer, keras.layers.Embedding)
    ]
    highest = min(tables, default=2)

    def draw(spec: InputSpec) -> np.ndarray:
        shape = (samples, *spec.shape[1:])
        if "int" in spec.dtype or spec.dtype == "bool":
            return generator.integers(0, highest, shape).astype(spec.dtype)
        return generator.standard_normal(shape).astype(spec.dtype)

    return map_structure(draw, specs)


def check_inputs(inputs: Any, specs: Any, batch_size: int) -> Any:
    """Sample arrays in the dtypes of the specs, cut to whole batches."""
    count = min(len(array) for array in tree.flatten(inputs)) // batch_size * batch_size
    if count == 0:
        raise ValueError(
            f"`inputs` must hold at least one batch of {batch_size} samples to check the file with."
        )
    arrays = [
        np.asarray(a, s.dtype)[:count]
        for a, s in zip(tree.flatten(inputs), flatten(specs), strict=True)
    ]
    return tree.pack_sequence_as(inputs, arrays)


def flatten(structure: Any) -> list[Any]:
    """The leaves of a nested structure."""
    return tree.flatten(structure)


def pack_like(structure: Any, flat: Sequence[Any]) -> Any:
    """Leaves in the nesting of `structure`."""
    return tree.pack_sequence_as(structure, list(flat))


def map_structure(function: Any, structure: Any) -> Any:
    """`structure` with `function` applied to its leaves."""
    return tree.map_structure(function, structure)


def to_json(structure: Any) -> Any:
    """A structure of specs as JSON: lists, tuples and dictionaries are told apart."""
    if isinstance(structure, InputSpec):
        return {"spec": [list(structure.shape), structure.dtype, structure.name]}
    if isinstance(structure, dict):
        return {"dict": {key: to_json(value) for key, value in structure.items()}}
    kind = "tuple" if isinstance(structure, tuple) else "list"
    return {kind: [to_json(value) for value in structure]}


def from_json(data: dict[str, Any]) -> Any:
    """Inverse of `to_json`."""
    ((kind, value),) = data.items()
    if kind == "spec":
        return InputSpec(tuple(value[0]), value[1], value[2])
    if kind == "dict":
        return {key: from_json(item) for key, item in value.items()}
    items = [from_json(item) for item in value]
    return tuple(items) if kind == "tuple" else items


def _declared(model: keras.Model) -> Any:
    signature = get_input_signature(model)
    return signature[0] if len(signature) == 1 else list(signature)


def _spec(
    shape: tuple[int | None, ...], dtype: Any, name: str, model: keras.Model, batch_size: int
) -> InputSpec:
    if any(size is None for size in shape[1:]):
        raise ValueError(
            f"Input {name!r} of model {model.name!r} has the open shape {shape}; a LiteRT file "
            "needs fixed sizes. Pass `inputs=`, sample arrays of the size wanted."
        )
    dtype = keras.backend.standardize_dtype(dtype)
    return InputSpec((batch_size, *shape[1:]), "float32" if dtype == "float64" else dtype, name)


def _unique_names(names: Sequence[str | None]) -> list[str]:
    found: list[str] = []
    for i, name in enumerate(names):
        # A TensorFlow argument name; anything else is replaced.
        clean = re.sub(r"\W", "_", name or f"input_{i}")
        clean = clean if re.match(r"[A-Za-z]", clean) else f"input_{i}"
        found.append(clean if clean not in found else f"{clean}_{i}")
    return found
