"""Subclasses of known layers that nobody registered, and that are like their parents.

Most subclasses in the field change no product: they set defaults in their constructor, do something
to what `super().call()` returns, or, in attention with a cache, bring other keys to the products of
their parent. The code of their methods says so, and they are quantized as their parents are. Of any
other one the report says what speaks against it, and `register_layer` overrules that.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import CodeType
from typing import Any

import keras

from keras_rq.layers import registry
from keras_rq.layers.base import QuantizedLayer
from keras_rq.layers.bytecode import codes_of, names_in, operations_in
from keras_rq.layers.registration import OwnCall, class_like
from keras_rq.policy import LayerQuantization

_NAME = "QuantizedSubclass"
PRODUCTS = {
    *("matmul", "einsum", "tensordot", "dot", "vdot", "inner", "dot_product_attention"),
    *("conv", "conv_transpose", "depthwise_conv", "separable_conv"),
}
_MAKE_WEIGHTS = {"add_weight", "add_variable", "Variable"}
# What a subclass may replace: construction, shapes and files, and no computation.
_HARMLESS = {
    *("__init__", "build", "get_config", "from_config", "get_build_config", "build_from_config"),
    *("compute_output_shape", "compute_output_spec", "compute_mask", "supports_masking"),
    *("save_own_variables", "load_own_variables", "variable_serialization_spec", "enable_lora"),
    *("quantize", "quantized_build", "quantized_call"),
}


def reason_against(cls: type) -> str:
    """Why a subclass of a known layer is not quantized as its parent is."""
    base = base_of(cls)
    why = next(_objections(cls, base))
    return (
        f"{cls.__name__} is a subclass of {base.__name__} {why}; keras_rq.register_layer("
        f"{cls.__name__}, like=keras.layers.{base.__name__}) says that it is like one all the same"
    )


def base_of(cls: type) -> type | None:
    """The nearest class above `cls` that keras_rq knows."""
    return next((one for one in cls.__mro__[1:] if one in registry.supported_layers()), None)


def _objections(cls: type, base: type) -> Iterator[str]:
    parent = registry.quantized_class(base)
    if issubclass(parent, OwnCall):
        yield "that is registered itself"
    own = [one for one in cls.__mro__ if one not in base.__mro__]
    hooks = _replaced(parent, base)
    for codes in map(codes_of, own):
        for method, code in codes.items():
            yield from _objections_to(method, code, parent.kernel_names)
        for method in sorted((set(codes) & _computes(base)).difference(parent.kernel_names)):
            yield from _objections_to_override(method, codes[method], hooks)
    replaced = {name for one in own for name in vars(one)} & set(parent.kernel_names)
    yield from (f"that replaces its {name!r}" for name in sorted(replaced))


def _objections_to(method: str, code: CodeType, kernels: tuple[str, ...]) -> Iterator[str]:
    used = names_in(code)
    for operation in operations_in(code, PRODUCTS):
        yield f"whose {method}() calls {operation if operation == '@' else f'ops.{operation}'}"
    for name in sorted(used & set(kernels)) if method not in ("__init__", "build") else ():
        yield f"whose {method}() uses {name!r} itself"
    if used & _MAKE_WEIGHTS:
        yield "that has weights of its own"


def _objections_to_override(method: str, code: CodeType, hooks: set[str]) -> Iterator[str]:
    used = names_in(code)
    if method in hooks and not {"super", method} <= used:
        yield f"whose {method}() does without super().{method}()"
    elif method not in hooks and not (method == "call" and used & hooks):
        yield f"that replaces {method}()"


def _replaced(parent: type, base: type) -> set[str]:
    """The methods of a Keras layer in whose place its quantized class computes."""
    ours = [c for c in parent.__mro__ if c not in base.__mro__ and c not in QuantizedLayer.__mro__]
    return {name for one in ours for name in vars(one)} & _computes(base)


def _computes(base: type) -> set[str]:
    """What a Keras layer class and those above it define, `Layer` itself left out."""
    above = [one for one in base.__mro__ if one not in keras.layers.Layer.__mro__]
    return {name for one in above for name in vars(one) if not _is_special(name)} - _HARMLESS


def _is_special(name: str) -> bool:
    return name.startswith("__")


class _Subclass(OwnCall):
    """A quantized layer of a class that was found to be like its parent.

    It is saved under one name for all of them, with the name of its class: another process has to
    find the class, as for the float layer, and finds again what it is like.
    """

    def get_config(self) -> dict[str, Any]:
        cls = registry.float_class(type(self))
        of_class = {
            "module": cls.__module__,
            "class_name": cls.__name__,
            "registered_name": keras.saving.get_registered_name(cls),
        }
        return {**super().get_config(), "keras_class": of_class}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> keras.layers.Layer:
        return QuantizedSubclass.from_config(config)


@keras.saving.register_keras_serializable("keras_rq")
class QuantizedSubclass:
    """The name under which such layers are saved. `from_config` gives the layer back."""

    def get_config(self) -> dict[str, Any]:
        raise NotImplementedError("The layers save themselves; this class only loads them.")

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> keras.layers.Layer:
        config = dict(config)
        of_class = config.pop("keras_class")
        quantization = LayerQuantization.from_config(config.pop("quantization"))
        layer = keras.saving.deserialize_keras_object({**of_class, "config": config})
        quantized = registry.quantized_class(type(layer))
        if quantized is None:
            raise ValueError(
                f"The saved layer {layer.name!r} was quantized, but the class {type(layer)} "
                f"as it is now is not known. Load the file with the code that saved it."
            )
        object.__setattr__(layer, "__class__", quantized)
        layer.take_quantization(quantization)
        return layer


def _derive(cls: type) -> type | None:
    base = base_of(cls)
    if base is None or issubclass(cls, QuantizedLayer) or any(_objections(cls, base)):
        return None
    made = class_like(_Subclass, cls, registry.quantized_class(base))
    register = keras.saving.register_keras_serializable("keras_rq", _NAME)
    register(registry.stands_for(cls)(made))
    register(QuantizedSubclass)
    return made


registry.derives(_derive)
