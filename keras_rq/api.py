"""What users call on whole models, composed from the rooms."""

from __future__ import annotations

import functools
from typing import Any

import keras

from keras_rq.layers.base import is_quantized
from keras_rq.policy import QuantizationPolicy
from keras_rq.reports.report import Report, report
from keras_rq.shorthand import is_shorthand
from keras_rq.training import dequantization, surgery


def quantize(
    model: keras.layers.Layer,
    policy: QuantizationPolicy,
    filters: surgery.Filters = None,
    *,
    verbose: bool = True,
) -> Report:
    """Makes a float model trainable and quantized, in place. Also: `model.quantize(policy)`.

    Layers keep their identity, names, variables and place in the graph. An optimizer's state stays
    valid. What stays in float is printed and reported, with the reason.

    Quantizers that learn add variables to their layers: a model that was trained before then gets
    an optimizer that knows them. Those that learn or have a static range for inputs need
    `keras_rq.calibrate` before the model is used.

    Args:
        model: a built Keras model (or layer) of any kind: Sequential, Functional, subclassed,
            nested, with shared layers.
        policy: which layer gets which quantizers.
        filters: as in `keras.Model.quantize`: a regular expression or several, searched in layer
            names, or a callable that takes a layer; other layers stay in float.
        verbose: print what was quantized and what was not.

    Returns:
        The model's `Report`.

    Raises:
        TypeError, ValueError: wrong arguments, an unbuilt model, a model quantized before, or
            quantizers that a layer cannot have. The model is then as it was.

    Example:

    >>> import keras, keras_rq as rq
    >>> model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(4, name="d")])
    >>> rq.quantize(model, rq.QuantizationPolicy("A4W1"), verbose=False).rows[0].weight_bits
    1
    """
    plan = surgery.quantize(model, policy, filters)
    result = report(model, kept={id(layer): reason for layer, reason in plan.kept})
    if verbose:
        print(result.summary())
    return result


def dequantize(model: keras.layers.Layer, *, baked: bool = False) -> keras.layers.Layer:
    """Makes a quantized model a plain float model again, in place: the way back of `quantize`.

    Layers keep their identity, names, place in the graph and variables, and an optimizer's state
    stays valid. A file that is saved afterwards needs keras_rq no more.

    Args:
        model: a model (or layer) that `keras_rq.quantize` quantized.
        baked: replace every kernel by its quantized value, so that a model of quantized weights
            and float activations goes on computing what it computed. A kernel that was rotated is
            rotated back, and has no few levels or zeros then. Otherwise kernels stay the float
            ones that were trained.

    Returns:
        The model.

    Raises:
        TypeError: if `model` is no Keras model or layer.
        ValueError: if nothing in it is quantized.

    Example:

    >>> import keras, keras_rq as rq
    >>> model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(4, name="d")])
    >>> report = rq.quantize(model, rq.QuantizationPolicy("A4W1"), verbose=False)
    >>> rq.report(rq.dequantize(model)).rows[0].weight_bits
    32
    """
    dequantization.dequantize(model, baked)
    return model


class _QuantizeDescriptor:
    """`keras.Model.quantize` that understands a `QuantizationPolicy` and delegates all else.

    A data descriptor: Keras puts a wrapped `quantize` into every model's `__dict__`, and only a
    data descriptor on the class comes before that, for models made before keras_rq was imported
    too.
    """

    def __init__(self, original: Any) -> None:
        self.original = original

    def __get__(self, model: Any, owner: type | None = None) -> Any:
        if model is None:
            return self.original
        wrapped = model.__dict__.get("quantize")
        # Layer.__new__ asks for the method that it is about to wrap, and a class with a `quantize`
        # of its own asks for the one of its base.
        if wrapped is None or type(model).quantize is not self.original:
            return self.original.__get__(model)

        @functools.wraps(self.original)
        def quantize_model(
            mode: Any = None, config: Any = None, filters: Any = None, **kwargs: Any
        ) -> Any:
            policy = mode if isinstance(mode, QuantizationPolicy) else config
            if isinstance(mode, str) and config is None and is_shorthand(mode):
                policy = QuantizationPolicy(mode)
            if isinstance(policy, QuantizationPolicy):
                return quantize(model, policy, filters, **kwargs)
            if any(is_quantized(layer) for layer in model._flatten_layers()):
                raise ValueError(
                    f"Model {model.name!r} is quantized by keras_rq; Keras's own quantization "
                    f"needs a float model. Received: mode={mode!r}, config={config!r}"
                )
            if filters is not None:
                kwargs["filters"] = filters
            return wrapped(mode, config=config, **kwargs)

        return quantize_model

    def __set__(self, model: Any, value: Any) -> None:
        model.__dict__["quantize"] = value


def install() -> None:
    """Lets `model.quantize(policy)` work. The one thing that importing keras_rq changes."""
    current = keras.Model.__dict__["quantize"]
    if not isinstance(current, _QuantizeDescriptor):
        keras.Model.quantize = _QuantizeDescriptor(current)
