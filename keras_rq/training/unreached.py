"""Why a layer, or what it multiplies by itself, stays in float: what a policy cannot reach."""

from __future__ import annotations

from collections.abc import Collection

import keras

from keras_rq.layers.bytecode import codes_of, operations_in
from keras_rq.layers.registry import quantized_class
from keras_rq.layers.subclasses import PRODUCTS, base_of, reason_against

_FUSED = "dot_product_attention"
_OF_ACTIVATIONS = {_FUSED, "matmul", "einsum", "tensordot"}
_OF_KERAS = (keras.layers.Attention, keras.layers.AdditiveAttention, keras.layers.Dot)


def reason_for_unknown(layer: keras.layers.Layer) -> str:
    """Why the weights of a layer stay in float whose class has no quantized counterpart."""
    name = type(layer).__name__
    if base_of(type(layer)) is not None:
        return reason_against(type(layer))
    tables = [v for v in layer._trainable_variables if len(v.shape) > 1]
    if not tables:  # attention with a scale, say; or normalization and the like, float by design
        return reason_for_float(layer) or "multiplies no matrix"
    multiplies = _operations(layer, PRODUCTS)
    if type(layer).__module__.startswith("keras."):
        if multiplies:
            return f"{name} has no quantized counterpart"
        return f"{name} multiplies no matrix by an operation of Keras"
    if multiplies:
        return (
            f"{name} is not known; keras_rq.register_layer({name}, products=...) says which "
            "kernels it multiplies"
        )
    ours = {id(table) for table in tables}
    names = [key for key, value in vars(layer).items() if id(value) in ours]
    example = dict.fromkeys(names, -1) or "..."
    return (
        f"{name} multiplies no matrix of its own; keras_rq.register_layer({name}, "
        f"products={example}) quantizes what it holds, with blocks along the last axis"
    )


def reason_for_float(layer: keras.layers.Layer) -> str | None:
    """Why products of two activations in a layer without weights stay in float; None: no such.

    Of a class of the user's own, the code of its methods says whether it calls an operation that
    may be such a product.
    """
    name = type(layer).__name__
    if isinstance(layer, _OF_KERAS):
        return f"the products of {name} have no quantized counterpart"
    base = next((c for c in type(layer).__mro__ if quantized_class(c) is not None), None)
    if base is not None and base is not type(layer):
        return reason_against(type(layer))
    called = _operations(layer, _OF_ACTIVATIONS)
    if not called:
        return None
    names = ", ".join(f"ops.{op}" if op != "@" else op for op in called)
    how = (
        "two keras_rq.layers.Matmul with a softmax between"
        if _FUSED in called
        else ("keras_rq.layers.Matmul or Einsum")
    )
    return f"{name} calls {names} itself, which `matmuls` does not reach; {how} would be reached"


def _operations(layer: keras.layers.Layer, names: Collection[str]) -> list[str]:
    """Which of some operations the layer's class, and those above it, call."""
    classes = [cls for cls in type(layer).__mro__ if issubclass(cls, keras.layers.Layer)]
    codes = [code for cls in classes for code in codes_of(cls).values()]
    return sorted({operation for code in codes for operation in operations_in(code, names)})
