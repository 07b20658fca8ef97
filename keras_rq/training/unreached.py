"""Which products of activations a policy cannot reach: those that a layer computes by itself."""

from __future__ import annotations

import dis
from collections.abc import Iterator
from types import CodeType

import keras

from keras_rq.layers.registry import quantized_class

_FUSED = "dot_product_attention"
_PRODUCTS = {_FUSED, "matmul", "einsum", "tensordot"}
_BY_SELF = ("LOAD_FAST", "LOAD_DEREF")  # what may load `self`
_OF_KERAS = (keras.layers.Attention, keras.layers.AdditiveAttention, keras.layers.Dot)


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
        return (
            f"{name} is a subclass of {base.__name__} and may multiply activations in other ways; "
            f"keras_rq.register_layer({name}, like=keras.layers.{base.__name__}) says that it does "
            "not"
        )
    called = sorted({op for cls in _own_classes(layer) for op in _operations(cls)})
    if not called:
        return None
    names = ", ".join(f"ops.{op}" if op != "@" else op for op in called)
    how = (
        "two keras_rq.layers.Matmul with a softmax between"
        if _FUSED in called
        else ("keras_rq.layers.Matmul or Einsum")
    )
    return f"{name} calls {names} itself, which `matmuls` does not reach; {how} would be reached"


def _own_classes(layer: keras.layers.Layer) -> Iterator[type]:
    for cls in type(layer).__mro__:
        if issubclass(cls, keras.layers.Layer) and not cls.__module__.startswith("keras."):
            yield cls


def _operations(cls: type) -> Iterator[str]:
    for member in vars(cls).values():
        if isinstance(code := getattr(member, "__code__", None), CodeType):
            yield from _operations_in(code)


def _operations_in(code: CodeType) -> Iterator[str]:
    before = None
    for step in dis.get_instructions(code):
        is_method_of_self = step.opname != "LOAD_GLOBAL" and before in _BY_SELF
        if step.opname.startswith("LOAD_") and step.argval in _PRODUCTS and not is_method_of_self:
            yield step.argval
        if step.opname == "BINARY_OP" and step.argrepr.startswith("@"):
            yield "@"
        before = step.opname
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _operations_in(constant)
