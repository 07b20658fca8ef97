"""Layers of a user's own: `register_layer` and `multiply`."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import keras
from keras import ops
from keras.src.backend.common import global_state

from keras_rq.layers.base import QuantizedLayer, is_quantized, read_quantization
from keras_rq.layers.products import Einsum, KernelOnly, MatMul, Product
from keras_rq.layers.registry import (
    float_class,
    products_of,
    quantized_class,
    quantizes,
    supported_layers,
)
from keras_rq.layers.sharing import once_per_call

Description = str | int | tuple[int, ...] | Product | Callable[[Any], Any]


def register_layer(
    keras_layer_class: type,
    *,
    like: type | None = None,
    products: Mapping[str, Description] | None = None,
) -> type:
    """Teaches keras_rq a layer class of one's own, so that policies reach it.

    The class needs no other `call`. What it says is either that it is like a layer that keras_rq
    knows, or which kernels it holds.

    - `like=keras.layers.Dense`: a subclass whose kernels are those of its parent, and whose `call`,
      if it has one, gets their products from `super().call(...)`.
    - `products={"kernel": ...}`: a layer with kernels of its own, by the names of the attributes.
      While the layer's `call` runs, such an attribute reads as the quantized kernel. A description
      says how it is multiplied:

      - `"matmul"` or an einsum equation (`"abc,cd->abd"`, the kernel second): `call` computes that
        product by `keras_rq.layers.multiply(self, "kernel", x)`, which quantizes `x` as well. On a
        float layer it is `keras.ops.matmul(x, self.kernel)`, or the einsum.
      - an int, or a tuple of them: the axes of the kernel that are contracted. The kernel alone is
        quantized, and `call` multiplies it as it likes, with an input that stays in float.
      - a function that takes the layer and returns one of these, where it depends on the layer.

    Call it in the module that defines the class. A process that loads a saved model must import
    that module first.

    Args:
        keras_layer_class: a subclass of `keras.layers.Layer`.
        like: a class that keras_rq knows, of which it is a subclass.
        products: descriptions of products by the name of the kernel's attribute. An attribute that
            is None, as an optional kernel may be, is left out.

    Returns:
        The class itself, so that this can stand where the class is defined.

    Raises:
        TypeError, ValueError: wrong arguments.

    Example:

    >>> import keras, numpy as np, keras_rq as rq
    >>> class LowRank(keras.layers.Layer):
    ...     def __init__(self, units, rank, **kwargs):
    ...         super().__init__(**kwargs)
    ...         self.units, self.rank = units, rank
    ...
    ...     def build(self, input_shape):
    ...         self.down = self.add_weight((input_shape[-1], self.rank), name="down")
    ...         self.up = self.add_weight((self.rank, self.units), name="up")
    ...
    ...     def call(self, x):  # the product of x, down and up
    ...         return rq.layers.multiply(self, "up", rq.layers.multiply(self, "down", x))
    ...
    ...     def get_config(self):
    ...         return {**super().get_config(), "units": self.units, "rank": self.rank}
    >>> rq.register_layer(LowRank, products={"down": "matmul", "up": "matmul"}) is LowRank
    True
    >>> model = keras.Sequential([keras.Input((8,)), LowRank(4, 2, name="thin")])
    >>> rq.quantize(model, rq.QuantizationPolicy("A4W1"), verbose=False).rows[0].weight_bits
    1

    A subclass of a layer that keras_rq knows:

    >>> class Scaled(keras.layers.Dense):
    ...     def call(self, inputs):
    ...         return 2.0 * super().call(inputs)
    >>> rq.register_layer(Scaled, like=keras.layers.Dense) is Scaled
    True

    Of a layer whose `call` nobody can change, the kernels still can be quantized:

    >>> class Foreign(keras.layers.Layer):
    ...     def build(self, input_shape):
    ...         self.kernel = self.add_weight((input_shape[-1], 4), name="kernel")
    ...
    ...     def call(self, x):
    ...         return keras.ops.matmul(x, self.kernel)
    >>> rq.register_layer(Foreign, products={"kernel": 0}) is Foreign
    True
    """
    _check_class(keras_layer_class)
    if (like is None) == (products is None):
        raise ValueError(
            "Say either `like=`, a layer class that keras_rq knows, or `products=`, which kernels "
            f"the layer has. Received: like={like!r}, products={products!r}"
        )
    if like is not None:
        _check_like(keras_layer_class, like)
        made = class_like(OwnCall, keras_layer_class, quantized_class(like))
    else:
        described = _check_products(products)
        of_layer = functools.partialmethod(_products, described)
        body = {"products": of_layer, "kernel_names": tuple(described)}
        made = _quantized(keras_layer_class, (OwnCall, keras_layer_class), body)
    quantizes(keras_layer_class)(made)
    return keras_layer_class


def multiply(layer: keras.layers.Layer, name: str, x: Any) -> Any:
    """The product of `x` and a kernel of a registered layer, both quantized if the layer is.

    Args:
        layer: the layer, which is `self` in its `call`.
        name: of the attribute that holds the kernel.
        x: float tensor.

    Returns:
        The product that `register_layer` was told of.

    Raises:
        ValueError: if the layer's class has no such product.
    """
    product = products_of(layer).get(name)
    if product is None or not product.input_axes:
        raise ValueError(
            f"Layer {layer.name!r} multiplies {name!r} by keras_rq.layers.multiply, but its class "
            f"is not registered with such a product. Call keras_rq.register_layer("
            f"{type(layer).__name__}, products={{{name!r}: 'matmul'}}) where the class is defined, "
            "or give the equation of the product instead of 'matmul'."
        )
    if is_quantized(layer):
        return layer.multiply(name, x)
    return product.apply(ops.convert_to_tensor(x), ops.convert_to_tensor(getattr(layer, name)))


# A quantized class.


@dataclass
class _Reads:
    """What the `call` of a layer that is running has asked for."""

    kernels: set[str] = field(default_factory=set)
    products: set[str] = field(default_factory=set)
    as_stored: bool = False


def _running() -> dict[int, _Reads]:
    """Layers of this thread whose `call` is running, by id."""
    found = global_state.get_global_attribute("keras_rq_running")
    if found is None:
        found = {}
        global_state.set_global_attribute("keras_rq_running", found)
    return found


class OwnCall(QuantizedLayer):
    """A quantized layer that runs the `call` of the class it was made from."""

    ends_in_bias = False  # nobody knows

    def call(self, *args: Any, **kwargs: Any) -> Any:
        running = _running()
        outer, reads = running.get(id(self)), _Reads()
        running[id(self)] = reads
        try:
            outputs = super().call(*args, **kwargs)
        finally:
            running.pop(id(self))
            if outer is not None:
                running[id(self)] = outer
        self._check_reads(reads)
        return outputs

    def _check_reads(self, reads: _Reads) -> None:
        for name in self.pairs():
            if self.quantization.matmuls is not None and name not in reads.products:
                raise ValueError(
                    f"Layer {self.path!r} ({type(self).__name__}) computes the attention {name} by "
                    "itself, so that they stay in float. Leave it out with a keras_rq.Rule, or do "
                    "not override _compute_attention()."
                )
        if self.quantization.activations is None:
            return
        for name, product in self.products().items():
            if name in reads.kernels and name not in reads.products and product.input_axes:
                raise ValueError(
                    f"Layer {self.path!r} ({type(self).__name__}) multiplies its {name!r} by "
                    "itself, so that the input of the product stays in float. In its call(), "
                    f"write keras_rq.layers.multiply(self, {name!r}, x) for the product, or "
                    f"register the kernel alone: products={{{name!r}: {product.kernel_axes}}}."
                )

    def note_product(self, name: str) -> None:
        if (reads := _running().get(id(self))) is not None:
            reads.products.add(name)

    def kernel_in_call(self, name: str) -> Any:
        """What `call` gets where it reads the attribute of a kernel."""
        if self.quantization.weights is None:
            kernel = self.float32_kernel(name)
        else:
            key = (id(self), name, "unrotated")
            kernel = once_per_call(key, lambda: self.dequantized_kernel(name))
        return ops.cast(kernel, self.compute_dtype)

    def float32_kernel(self, name: str) -> Any:
        with _as_stored(self):
            return super().float32_kernel(name)

    def get_config(self) -> dict[str, Any]:
        cls = type(self)
        _become(self, float_class(cls))
        try:
            config = self.get_config()
        finally:
            _become(self, cls)
        return {**config, "quantization": self.quantization.get_config()}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> keras.layers.Layer:
        config = dict(config)
        quantization = read_quantization(config.get("name"), config.pop("quantization", None))
        layer = float_class(cls).from_config(config)
        _become(layer, cls)
        layer.take_quantization(quantization)
        return layer


class _Kernel:
    """The attribute that holds a kernel: as stored, and quantized while `call` runs."""

    def __init__(self, original: type, name: str) -> None:
        self.of_class, self.name = inspect.getattr_static(original, name, None), name

    def __get__(self, layer: Any, owner: type | None = None) -> Any:
        if layer is None:
            return self.of_class
        reads = _running().get(id(layer))
        if reads is not None and not reads.as_stored:
            reads.kernels.add(self.name)
            return layer.kernel_in_call(self.name)
        if hasattr(self.of_class, "__get__"):
            return self.of_class.__get__(layer, owner)
        if self.name not in layer.__dict__:
            raise AttributeError(f"{type(layer).__name__} has no attribute {self.name!r}")
        return layer.__dict__[self.name]

    def __set__(self, layer: Any, value: Any) -> None:
        if hasattr(self.of_class, "__set__"):
            self.of_class.__set__(layer, value)
        else:
            layer.__dict__[self.name] = value


@contextmanager
def _as_stored(layer: keras.layers.Layer) -> Iterator[None]:
    reads = _running().get(id(layer), _Reads())
    before, reads.as_stored = reads.as_stored, True
    try:
        yield
    finally:
        reads.as_stored = before


def class_like(mixin: type, original: type, parent: type) -> type:
    """The quantized class of a subclass whose products are those of `parent`, a quantized class."""
    body = {"products": parent.products, "kernel_names": parent.kernel_names}
    return _quantized(original, (mixin, original, parent), body)


def _quantized(original: type, bases: tuple[type, ...], body: dict[str, Any]) -> type:
    # Keras asks for the signature, which is that of the user's `call`.
    call = functools.wraps(original.call)(lambda self, *a, **k: OwnCall.call(self, *a, **k))
    kernels = {name: _Kernel(original, name) for name in body["kernel_names"]}
    body = {"__module__": __name__, "call": call, **kernels, **body}
    # Two packages may have classes of one name.
    return type(f"Quantized{keras.saving.get_registered_name(original)}", bases, body)


def _become(layer: keras.layers.Layer, cls: type) -> None:
    object.__setattr__(layer, "__class__", cls)


# Products.


def _products(
    layer: keras.layers.Layer, described: Mapping[str, Description]
) -> dict[str, Product]:
    with _as_stored(layer):
        present = [name for name in described if getattr(layer, name, None) is not None]
    return {name: _product(layer, described[name]) for name in present}


def _product(layer: keras.layers.Layer, description: Description) -> Product:
    if callable(description) and not isinstance(description, Product):
        description = description(layer)
    if isinstance(description, Product):
        return description
    if description == "matmul":
        return MatMul()
    if isinstance(description, str):
        if "..." in description:
            raise ValueError("an ellipsis hides which axes there are")
        return Einsum.create(description, 0)
    return KernelOnly.create(description)


# Arguments.


def _check_class(cls: Any) -> None:
    if not (isinstance(cls, type) and issubclass(cls, keras.layers.Layer)):
        raise TypeError(f"`keras_layer_class` must be a Keras layer class. Received: {cls!r}")
    if issubclass(cls, QuantizedLayer):
        raise ValueError(f"{cls.__name__} is a quantized class itself. Register its Keras class.")
    known = quantized_class(cls)
    if known is not None and not issubclass(known, OwnCall):
        raise ValueError(f"keras_rq knows {cls.__name__} already.")


def _check_like(cls: type, like: Any) -> None:
    names = ", ".join(sorted(known.__name__ for known in supported_layers()))
    if not isinstance(like, type) or like not in supported_layers():
        raise ValueError(f"`like` must be one of {names}. Received: like={like!r}")
    if not issubclass(cls, like) or cls is like:
        raise ValueError(
            f"{cls.__name__} is no subclass of {like.__name__}. Name the class it derives from as "
            f"`like`, or its kernels as `products`. Received: like={like!r}"
        )


def _check_products(products: Any) -> dict[str, Description]:
    if not isinstance(products, Mapping) or not products:
        raise TypeError(
            "`products` must be a dictionary from the names of kernels to descriptions, such as "
            f"{{'kernel': 'matmul'}}. Received: products={products!r}"
        )
    for name, description in products.items():
        if not isinstance(name, str):
            raise TypeError(f"`products` must have names as keys. Received: {name!r}")
        if not callable(description):
            try:
                _product(None, description)
            except (ValueError, TypeError) as error:
                raise ValueError(
                    f"The product of {name!r} must be 'matmul', an einsum equation without an "
                    "ellipsis and with the kernel second, or the contracted axes of the kernel. "
                    f"Received: {description!r} ({error})"
                ) from error
    return dict(products)
