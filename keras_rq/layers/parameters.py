"""The variables that a layer keeps for its quantizers.

They are made when a built layer gets its quantization, or when a quantized layer is built. They
come after the layer's own variables, whenever those are made, so that an optimizer's state keeps
its order. In a file they are stored by name beside the layer's own, which the Keras class saves
and loads as ever: a float checkpoint loads into a quantized model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from keras import ops
from keras.src.backend import AutocastScope

from keras_rq.layers.products import Product
from keras_rq.numerics.blocks import BlockView
from keras_rq.quantizers import Quantizer
from keras_rq.quantizers.parameters import Parameter

if TYPE_CHECKING:
    from keras_rq.layers.base import QuantizedLayer

_PREFIX = "rq."
_KEPT = ""  # in place of a kernel's name: what belongs to no quantizer
_KEPT_PREFIX = "training_"


@dataclass(frozen=True)
class OfKernel:
    """The variables of one product: of the quantizer of its kernel, and of that of its input.

    Both by the name that the quantizer gives them.
    """

    weights: Mapping[str, Any]
    inputs: Mapping[str, Any]

    def __iter__(self) -> Iterator[Any]:
        return iter((*self.weights.values(), *self.inputs.values()))

    def values(self) -> tuple[Any, ...]:
        """Their values as float32 tensors."""
        with AutocastScope(None):
            return tuple(ops.convert_to_tensor(variable) for variable in self)

    def named(self, values: tuple[Any, ...]) -> OfKernel:
        """Values in the order of `values()`, by name."""
        count = len(self.weights)
        return OfKernel(
            dict(zip(self.weights, values[:count], strict=True)),
            dict(zip(self.inputs, values[count:], strict=True)),
        )


NONE = OfKernel({}, {})


def of_kernel(layer: QuantizedLayer, name: str) -> OfKernel:
    """The variables of the product with the kernel called `name`."""
    return layer.__dict__.get("_rq_parameters", {}).get(name, NONE)


def variables_of(layer: QuantizedLayer) -> list[Any]:
    """All variables that the layer keeps for its quantizers."""
    return [variable for of in layer.__dict__.get("_rq_parameters", {}).values() for variable in of]


def create(layer: QuantizedLayer) -> None:
    """Makes the variables of a built layer, unless it has them."""
    if "_rq_parameters" in layer.__dict__:
        return
    weights, activations = layer.quantization.weights, layer.quantization.activations
    made = layer.__dict__["_rq_parameters"] = {}
    was_locked = layer._tracker.locked
    layer._tracker.unlock()
    try:
        for name, product in layer.products().items():
            made[name] = OfKernel(of_weights := {}, of_inputs := {})
            if weights is not None:
                view = kernel_view(layer, name, product, weights)
                for parameter, spec in weights.kernel_parameters(view).items():
                    start = _from_kernel(layer, name, product, weights, parameter)
                    of_weights[parameter] = _add(layer, f"{name}_{parameter}", spec, start)
            if activations is not None and product.input_axes:
                for parameter, spec in activations.input_parameters().items():
                    variable = f"{name}_input_{parameter}"
                    of_inputs[parameter] = _add(layer, variable, spec, _unknown)
    except BaseException:
        release(layer)
        raise
    finally:
        if was_locked:
            layer._tracker.lock()
    keep_last(layer)


def keep(layer: QuantizedLayer, name: str, shape: tuple[int, ...]) -> Any:
    """A float32 variable, zero at first, that training keeps with a layer: made once, then found.

    No quantizer has it. It is saved with the layer's others, and made again where a file has it.
    Its name begins with "training_".
    """
    kept = layer.__dict__["_rq_parameters"].setdefault(_KEPT, OfKernel({}, {})).weights
    if name not in kept:
        was_locked = layer._tracker.locked
        layer._tracker.unlock()
        try:
            kept[name] = _add(layer, name, Parameter(shape, trainable=False), "zeros")
        finally:
            if was_locked:
                layer._tracker.lock()
        keep_last(layer)
    return kept[name]


def kept_with(layer: QuantizedLayer) -> list[Any]:
    """What `keep` made."""
    return list(of_kernel(layer, _KEPT))


def release(layer: QuantizedLayer) -> None:
    """Takes the variables from a layer: it then has those of the Keras layer."""
    for variable in variables_of(layer):
        layer._untrack_variable(variable)
    layer.__dict__.pop("_rq_parameters", None)


def release_inputs(layer: QuantizedLayer) -> list[Any]:
    """Takes the variables of its inputs from a layer, and returns them."""
    kept, released = layer.__dict__["_rq_parameters"], inputs_of(layer)
    for variable in released:
        layer._untrack_variable(variable)
    kept.update({name: OfKernel(of.weights, {}) for name, of in kept.items()})
    return released


@contextmanager
def aside(layer: QuantizedLayer) -> Iterator[None]:
    """Hides the variables from the Keras class while it saves or loads its own."""
    ours = {id(variable) for variable in variables_of(layer)}
    stores = [layer._trainable_variables, layer._non_trainable_variables]
    all_of = [list(store) for store in stores]
    try:
        for store in stores:
            store[:] = [variable for variable in store if id(variable) not in ours]
        yield
    finally:
        for store, variables in zip(stores, all_of, strict=True):
            store[:] = variables


def keep_last(layer: QuantizedLayer) -> None:
    """Puts the variables after the layer's own, of which one may have come later (LoRA)."""
    ours = {id(variable): place for place, variable in enumerate(variables_of(layer))}
    if not ours:
        return
    for store in (layer._trainable_variables, layer._non_trainable_variables):
        store.sort(key=lambda variable: ours.get(id(variable), -1))


def start_from_kernels(layer: QuantizedLayer) -> None:
    """Gives the variables of kernels the values that suit the kernels as they are now."""
    for name, product in layer.products().items():
        for parameter, variable in of_kernel(layer, name).weights.items():
            start = _from_kernel(layer, name, product, layer.quantization.weights, parameter)
            variable.assign(start(variable.shape))


def save(layer: QuantizedLayer, store: Any) -> None:
    """Stores the variables by name."""
    for variable in variables_of(layer):
        store[_PREFIX + variable.name] = variable


def load(layer: QuantizedLayer, store: Mapping[str, Any]) -> None:
    """Loads the variables by name; what a float checkpoint lacks suits the kernels then loaded."""
    for key in store.keys():  # noqa: SIM118 (stores can be asked for their keys, not iterated)
        if key.startswith(_PREFIX + _KEPT_PREFIX):
            keep(layer, key.removeprefix(_PREFIX), tuple(store[key].shape))
    kept = kept_with(layer)
    missing = False
    for variable in variables_of(layer):
        if _PREFIX + variable.name in store:
            variable.assign(store[_PREFIX + variable.name])
        elif not any(variable is one for one in kept):
            missing = True
    if missing:
        start_from_kernels(layer)


def without_ours(store: Any) -> dict[str, Any]:
    """What a store holds for the Keras class."""
    keys = store.keys()  # stores can be asked for their keys, not iterated
    return {key: store[key] for key in keys if not key.startswith(_PREFIX)}


def inputs_of(layer: QuantizedLayer) -> list[Any]:
    """The variables that hold what calibration found of the layer's inputs."""
    kept = layer.__dict__.get("_rq_parameters", {}).values()
    return [variable for of in kept for variable in of.inputs.values()]


def are_known(layer: QuantizedLayer) -> bool:
    """Whether all inputs have been calibrated; reads variables, so not within a trace."""
    arrays = [ops.convert_to_numpy(variable) for variable in inputs_of(layer)]
    return all(np.isfinite(array).all() for array in arrays)


def kernel_view(
    layer: QuantizedLayer, name: str, product: Product, weights: Quantizer
) -> BlockView:
    """The blocks of a kernel."""
    return product.kernel_blocks(weights).view(tuple(getattr(layer, name).shape))


def _add(layer: QuantizedLayer, name: str, spec: Any, start: Callable[..., Any]) -> Any:
    return layer.add_weight(
        name=name,
        shape=spec.shape,
        initializer=start,
        dtype="float32",
        trainable=spec.trainable,
        autocast=False,
    )


def _from_kernel(
    layer: QuantizedLayer, name: str, product: Product, weights: Quantizer, parameter: str
) -> Callable[..., Any]:
    def start(shape: tuple[int, ...], dtype: Any = None) -> Any:
        blocks = product.kernel_blocks(weights)
        kernel = weights.rotate(layer.kernel_to_quantize(name), blocks)
        view = blocks.view(tuple(kernel.shape))
        return ops.reshape(weights.start(view.split(kernel), view)[parameter], shape)

    return start


def _unknown(shape: tuple[int, ...], dtype: Any = None) -> Any:
    # Not a number until calibration: nobody takes it for a range, in a file neither.
    return ops.full(shape, float("nan"), dtype)
