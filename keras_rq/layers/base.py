"""The mix-in that makes a Keras layer quantized.

A quantized class is `class QuantizedX(QuantizedLayer, keras.layers.X)`. It has the variables of X
and no others, so optimizer states, checkpoints and parameter counts are those of the float layer.
Quantizers that learn, or have static ranges, add theirs (`keras_rq.layers.parameters`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any, ClassVar

import keras
from keras import ops
from keras.src.backend import AutocastScope
from keras.src.backend.common.symbolic_scope import in_symbolic_scope

from keras_rq import backend
from keras_rq.layers import folding, parameters
from keras_rq.layers.integer import IntegerForward, reason_for_float
from keras_rq.layers.products import Product
from keras_rq.layers.sharing import once_per_call
from keras_rq.numerics.grids import Bits
from keras_rq.policy import LayerQuantization


class QuantizedLayer:
    """Quantized operands for a Keras layer.

    Subclasses define `products`, and a `call` with the signature of the Keras layer's: Keras caches
    that signature when a layer is made, and the class of a living layer is swapped by
    `keras_rq.quantize`.
    """

    quantization: LayerQuantization
    kernel_names: ClassVar[tuple[str, ...]] = ("kernel",)  # of the products
    ends_in_bias: ClassVar[bool] = False  # whether only bias and activation follow the last product

    def __init__(self, *args: Any, quantization: Any = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if not isinstance(quantization, LayerQuantization):
            quantization = read_quantization(self.name, quantization)
        self.take_quantization(quantization)

    def take_quantization(self, quantization: LayerQuantization) -> None:
        """Sets what the layer does with its operands."""
        self.quantization = quantization
        backend.make_known(self)
        if self.built:
            parameters.create(self)

    def drop_quantization(self) -> None:
        """Undoes `take_quantization`, before the layer gets its Keras class back."""
        parameters.release(self)
        self.__dict__.pop("quantization", None)
        self.__dict__.pop("_rq_number", None)  # of `make_known`

    def _post_build(self) -> None:
        parameters.create(self)
        super()._post_build()

    def _track_variable(self, variable: Any) -> None:
        super()._track_variable(variable)
        parameters.keep_last(self)

    def save_own_variables(self, store: Any) -> None:
        own: dict[str, Any] = {}
        with parameters.aside(self):
            super().save_own_variables(own)
        for key, value in own.items():
            store[key] = value
        parameters.save(self, store)

    def load_own_variables(self, store: Any) -> None:
        with parameters.aside(self):
            super().load_own_variables(parameters.without_ours(store))
        parameters.load(self, store)
        if parameters.inputs_of(self):
            self.mark_calibrated(parameters.are_known(self))

    def mark_calibrated(self, is_calibrated: bool = True) -> None:
        """Says whether the layer's variables hold ranges of its inputs."""
        self.quantization = replace(self.quantization, is_calibrated=is_calibrated)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "quantization": self.quantization.get_config()}

    def count_params(self) -> int:
        return LabelledCount(super().count_params(), self.label)

    @property
    def label(self) -> str:
        """What is quantized, in short: "A4W1", "W4" or "M8"."""
        has_input = any(product.input_axes for product in self.products().values())
        return (self.quantization if has_input else self.quantization.without_input).label

    # What a subclass is.

    def products(self) -> dict[str, Product]:
        """The layer's products, by the name of the attribute that holds the kernel."""
        return {}

    def pairs(self) -> dict[str, Product]:
        """The layer's products of two activations, by names of their own."""
        return {}

    def pair_shapes(self) -> dict[str, tuple[Any, Any]]:
        """Shapes of the operands of `pairs`, for reports."""
        return {}

    def output_shape_of(self, input_shape: tuple[int | None, ...]) -> tuple[int | None, ...]:
        """Shape of the output, for reports."""
        return self.compute_output_shape(input_shape)

    # What a subclass uses.

    @property
    def lowered(self) -> Callable[[str, Product, Any], Any] | None:
        """What computes the products instead, while an exporter traces or observes the layer."""
        return self.__dict__.get("_rq_lowered")

    def multiply(self, name: str, x: Any, product: Product | None = None) -> Any:
        """The product of an input and the kernel called `name`, both quantized.

        `product` says what it is where that is not the one of `products`.
        """
        self.note_product(name)
        if (lowered := self.lowered) is not None:
            return lowered(name, product or self.products()[name], x)
        return self.multiply_quantized(name, x)

    def note_product(self, name: str) -> None:
        """Called before every product of the layer."""

    def multiply_quantized(self, name: str, x: Any) -> Any:
        """What `multiply` does when nothing stands in for it."""
        self.require_calibration()
        self.require_norm()
        x, values = ops.convert_to_tensor(x), parameters.of_kernel(self, name).values()
        kernel, fold = self.folded_kernel(name)
        folds = () if fold is None else (fold,)
        return backend.call_in_graph(self, "multiply_by", x, kernel, name, *values, *folds)

    def multiply_by(self, x: Any, master: Any, name: str, *values: Any) -> Any:
        """The product of an input and the float32 kernel `master`, called `name`.

        `values` are those of the quantizers' parameters, and what is folded into `master` if
        anything is.
        """
        of = parameters.of_kernel(self, name)
        count = len(list(of))
        given, fold = of.named(values[:count]), next(iter(values[count:]), None)
        kernel = self.quantized_kernel(name, master, given.weights, fold)
        forward = self._integer_forward(name, master, fold)
        return self.apply_product(name, x, kernel, given.inputs, forward)

    def apply_product(
        self,
        name: str,
        x: Any,
        kernel: Any,
        given: Mapping[str, Any] | None = None,
        forward: IntegerForward | None = None,
    ) -> Any:
        """The product of an input, to be quantized, and of what `quantized_kernel` made.

        `given` are the values of the input's parameters, those of the layer if left out.
        """
        product, activations = self.products()[name], self.quantization.activations
        kernel = ops.cast(kernel, x.dtype)
        if activations is None or not product.input_axes:
            return product.apply(x, kernel)
        return activations.multiply(
            x,
            kernel,
            product.apply,
            product.input_blocks(activations),
            self.input_parameters(name) if given is None else given,
            unrotate=not self._rotates_alike(product, kernel.shape),
            forward=forward,
        )

    def multiply_pair(self, name: str, x: Any, y: Any) -> Any:
        """The product of two activations, both quantized."""
        self.note_product(name)
        x, y = ops.convert_to_tensor(x), ops.convert_to_tensor(y)
        return backend.call_in_graph(self, "multiply_pair_by", x, y, name)

    def multiply_pair_by(self, x: Any, y: Any, name: str) -> Any:
        """What `multiply_pair` computes."""
        product, quantizer = self.pairs()[name], self.quantization.matmuls
        if quantizer is None:
            return product.apply(x, y)
        if not product.shares_rotation(y.shape):
            quantizer = quantizer.replace(rotation=None)
        blocks = product.input_blocks(quantizer), product.kernel_blocks(quantizer)
        y = quantizer.fake_quantize(y, blocks[1], unrotate=False)
        quantized = quantizer.fake_quantize(x, blocks[0], unrotate=False)
        return product.apply(product.restore_zeros(x, quantized), y)

    def quantized_kernel(
        self,
        name: str,
        master: Any,
        given: Mapping[str, Any] | None = None,
        fold: Any = None,
    ) -> Any:
        """The kernel that enters the product: rotated where its input will be.

        `given` are the values of the kernel's parameters, those of the layer if left out. `fold` is
        the factor that `master` holds, and the result no more.
        """
        weights, product = self.quantization.weights, self.products()[name]
        if weights is None:
            return master
        given = self.kernel_parameters(name) if given is None else given
        blocks = product.kernel_blocks(weights)
        unrotate = not self._rotates_alike(product, master.shape)

        def make() -> Any:
            quantized = weights.fake_quantize(master, blocks, given, unrotate=unrotate)
            return quantized if fold is None else quantized / fold

        return once_per_call((id(self), name), make)

    def dequantized_kernel(self, name: str) -> Any:
        """The quantized kernel itself, in float32 and not rotated."""
        weights, (kernel, fold) = self.quantization.weights, self.folded_kernel(name)
        blocks, given = self.products()[name].kernel_blocks(weights), self.kernel_parameters(name)
        quantized = weights.fake_quantize(kernel, blocks, given)
        return quantized if fold is None else quantized / fold

    def kernel_parameters(self, name: str) -> dict[str, Any]:
        """Values of the variables that the quantizer of the kernel `name` has, by name."""
        of = parameters.of_kernel(self, name)
        return of.named(of.values()).weights

    def input_parameters(self, name: str) -> dict[str, Any]:
        """Values of the variables that the quantizer of the input that meets kernel `name` has."""
        of = parameters.of_kernel(self, name)
        return of.named(of.values()).inputs

    def bits_now(self, name: str) -> tuple[Bits | None, Bits | None]:
        """Bits that the kernel `name` and its input take now; None: float, or no input.

        They differ from those of the quantizers where a width is trained and still too large.
        """
        product, weights = self.products()[name], self.quantization.weights
        of_kernel = of_input = None
        if weights is not None:
            blocks = product.kernel_blocks(weights)
            given = self.kernel_parameters(name)
            of_kernel = weights.kernel_bits(self.kernel_to_quantize(name), blocks, given)
        if self.quantization.activations is not None and product.input_axes:
            of_input = self.quantization.activations.input_bits(self.input_parameters(name))
        return of_kernel, of_input

    def require_target(self) -> None:
        """Raises if a width that is trained has not come down to its target.

        Raises:
            ValueError: names the layer, the widths and what to do.
        """
        weights, activations = self.quantization.weights, self.quantization.activations
        for name in self.products():
            for operand, quantizer, now in zip(
                ("kernel", "input"), (weights, activations), self.bits_now(name), strict=True
            ):
                if now is not None and now != quantizer.bits:
                    raise ValueError(
                        f"Layer {self.path!r}: its {operand} takes {now:.2f} bits so far, and "
                        f"{quantizer.bits} is the target. Train on with keras_rq.callbacks.GDNSQ "
                        "until its `converged` is true."
                    )

    @property
    def needs_calibration(self) -> bool:
        """Whether a quantizer takes a range for the layer's input from data, and has none yet."""
        return not self.quantization.is_calibrated and bool(parameters.inputs_of(self))

    def require_calibration(self) -> None:
        """Raises if the layer is called on data and has no range for its input.

        Raises:
            ValueError: names the layer and what to do.
        """
        if self.needs_calibration and not in_symbolic_scope():
            raise ValueError(
                f"Layer {self.path!r} has no range for its input yet: "
                f"{self.quantization.activations!r} takes it from data. Call "
                "keras_rq.calibrate(model, data) with some batches of training data first."
            )

    def require_norm(self) -> None:
        """Raises if the layer is called on data and what it folds is not behind it.

        Raises:
            ValueError: names the layer and what to do.
        """
        if not self.quantization.fold_batch_norm or in_symbolic_scope():
            return
        if folding.norm_behind(self) is None:
            raise ValueError(
                f"Layer {self.path!r} is quantized with the BatchNormalization behind it "
                "(fold_batch_norm=True), and there is none where it is called now. Keep the two "
                "together in a Sequential or Functional model, or call keras_rq.dequantize(model) "
                "and quantize what you have made of it."
            )

    def prepare_for_loop(self) -> None:
        """Quantizes the kernels in the trace around a loop that will multiply them."""
        if self.lowered is None:
            for name in self.products():
                master = self.float32_kernel(name)
                self.quantized_kernel(name, master)
                self._integer_forward(name, master)

    def _integer_forward(self, name: str, master: Any, fold: Any = None) -> IntegerForward | None:
        product, quantization = self.products()[name], self.quantization
        if quantization.forward != "int8" or reason_for_float(product, quantization):
            return None
        return once_per_call(
            (id(self), name, "codes"),
            lambda: IntegerForward.create(product, quantization, ops.stop_gradient(master), fold),
        )

    def _rotates_alike(self, product: Product, kernel_shape: tuple[int, ...]) -> bool:
        """Whether the operands, both rotated, keep their product: no way back is needed."""
        weights, activations = self.quantization.weights, self.quantization.activations
        if weights is None or activations is None or weights.rotation != activations.rotation:
            return False
        return product.shares_rotation(kernel_shape)

    def float32_kernel(self, name: str) -> Any:
        """The master kernel: quantizers see it before any cast to the compute dtype."""
        with AutocastScope(None):
            return ops.cast(ops.convert_to_tensor(getattr(self, name)), "float32")

    def kernel_to_quantize(self, name: str) -> Any:
        """The float32 kernel that quantizers see: what is folded into it included."""
        return self.folded_kernel(name)[0]

    def folded_kernel(self, name: str) -> tuple[Any, Any]:
        """The float32 kernel times what is folded into it, and that (see `fold_of`)."""
        kernel, fold = self.float32_kernel(name), self.fold_of(name)
        return (kernel if fold is None else kernel * fold), fold

    def fold_of(self, name: str) -> Any:
        """The factor of the kernel `name` when it is quantized, one per channel; None without.

        It is that of the BatchNormalization behind the layer, if the layer folds it.
        """
        quantization = self.quantization
        if not quantization.fold_batch_norm or quantization.weights is None:
            return None
        products = self.products()
        if name != list(products)[-1] or (norm := folding.norm_behind(self)) is None:
            return None
        return folding.factor(norm, products[name], tuple(getattr(self, name).shape))

    def add_bias_and_activate(self, outputs: Any, channel_axis: int = -1) -> Any:
        """The part of a layer that stays in float."""
        if self.bias is not None:
            bias = self.bias
            if channel_axis != -1:
                shape = [1] * len(outputs.shape)
                shape[channel_axis] = -1
                bias = ops.reshape(bias, shape)
            outputs = ops.add(outputs, bias)
        return outputs if self.activation is None else self.activation(outputs)


def read_quantization(name: str, saved: Any) -> LayerQuantization:
    """The quantization that the configuration of a layer holds.

    Args:
        name: of the layer.
        saved: what `LayerQuantization.get_config` returned.

    Raises:
        ValueError: names the layer and what is wrong.
    """
    try:
        return LayerQuantization.from_config(saved)
    except ValueError as error:
        raise ValueError(f"Layer {name!r}, as it is saved: {error}") from error


class LabelledCount(int):
    """A number of parameters that `model.summary()` prints with the bit widths behind it.

    Keras prints the class of each layer, which must keep the name of the Keras class (it is part of
    the path of every weight in a file), its shape and this number, by the format ",".
    """

    def __new__(cls, count: int, label: str) -> LabelledCount:
        made = super().__new__(cls, count)
        made.label = label
        return made

    def __format__(self, spec: str) -> str:
        text = format(int(self), spec)
        return f"{text} {self.label}" if spec == "," else text


def is_quantized(layer: keras.layers.Layer) -> bool:
    """Whether keras_rq has quantized this layer."""
    return isinstance(layer, QuantizedLayer)


@contextmanager
def lowered_by(
    layer: QuantizedLayer, compute: Callable[[str, Product, Any], Any]
) -> Iterator[None]:
    """Lets `compute(kernel name, product, input)` stand in for the layer's products."""
    layer.__dict__["_rq_lowered"] = compute
    try:
        yield
    finally:
        del layer.__dict__["_rq_lowered"]


@contextmanager
def all_lowered_by(
    model: keras.layers.Layer,
    make: Callable[[QuantizedLayer], Callable[[str, Product, Any], Any]],
) -> Iterator[None]:
    """Lets `make(layer)` stand in for the products of every quantized layer of a model."""
    with ExitStack() as stack:
        for layer in model._flatten_layers():
            if is_quantized(layer):
                stack.enter_context(lowered_by(layer, make(layer)))
        yield
