"""`calibrate`: a pass of its own over data, which gives the inputs of layers their ranges.

Layers run in float while they are observed, so that no layer is fitted to the errors of another
that has not been calibrated, and the model's forward pass updates nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import keras
import numpy as np
from keras import ops
from keras.src.trainers import data_adapters
from keras.src.trainers.data_adapters import data_adapter_utils

from keras_rq import backend
from keras_rq.layers import parameters, paths
from keras_rq.layers.base import QuantizedLayer, all_lowered_by, is_quantized
from keras_rq.training import optimizers
from keras_rq.training.guards import remove_guards
from keras_rq.training.observers import METHODS, Observer, observable
from keras_rq.training.surgery import forget_compiled_functions

_Observers = dict[tuple[int, str], Observer]
_LOOKED_UP = ""  # in place of a kernel's name


def calibrate(
    model: keras.layers.Layer,
    data: Any,
    *,
    method: str | None = None,
    batches: int | None = None,
    batch_size: int | None = None,
    verbose: bool = True,
) -> dict[str, dict[str, float]]:
    """Gives the inputs of quantized layers their ranges, from data.

    Inputs with `calibration="static"` get a fixed range and dequantizer, inputs of quantizers that
    learn get their first range. Everything else stays as it is. Calling it again starts anew.

    A table that the data only looks up, and never multiplies, has no input to quantize.

    Calibrate a model that has been trained in float: activations grow in the first steps of
    training, a static range does not follow, and a learned one slowly.

    Args:
        model: a built, quantized Keras model (or layer).
        data: what the model takes: an array, or several in the structure of the model's inputs; or
            batches of it: a list, a generator, a `tf.data.Dataset`, a `keras.utils.PyDataset`, a
            PyTorch `DataLoader`. Batches that are tuples are `(x, y)` or `(x, y, weights)`, of
            which `x` counts.
        method: how the range is chosen. "minmax": the extremes; "moving_average": the extremes of
            batches, smoothed with momentum 0.9; "percentile": without the outermost 0.01 % on each
            side; "mse": the share of the extremes that gives the least squared error. None: what
            each quantizer does by itself, with the extremes where it says "minmax".
        batches: how many batches to take; None for all.
        batch_size: of arrays; 32 if left out.
        verbose: show a progress bar.

    Returns:
        The parameters that were set, by layer and kernel.

    Raises:
        TypeError, ValueError: wrong arguments, no layer that needs calibration, no data, or numbers
            that are not finite. The model is then as it was.

    Example:

    >>> import keras, numpy as np, keras_rq as rq
    >>> model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(4, name="d")])
    >>> static = rq.quantizers.Ridge(8, calibration="static")
    >>> policy = rq.QuantizationPolicy("W4", activations=static)
    >>> report = rq.quantize(model, policy, verbose=False)
    >>> found = rq.calibrate(model, np.linspace(-1, 1, 64).reshape(8, 8), verbose=False)
    >>> sorted(found["d/kernel"])
    ['offset', 'range_origin', 'range_scale', 'scale']
    """
    layers = _check(model, method, batches)
    paths.complete(model)
    observers: _Observers = {}
    observing = all_lowered_by(model, lambda layer: _observing(layer, observers))
    with backend.eagerly(), _without_remat(model), observing:
        for batch in _progress(_batches(model, data, batch_size), batches, verbose):
            model(batch, training=False)
    found = _found(layers, observers, method)
    dropped = [variable for layer in layers for variable in _assign(layer, found[layer])]
    optimizers.renew(model, dropped)
    remove_guards(model)
    for layer in model._flatten_layers():
        forget_compiled_functions(layer)
    return {
        f"{layer.path}/{name}": {key: float(value) for key, value in values.items()}
        for layer, kernels in found.items()
        for name, values in kernels.items()
    }


@contextmanager
def _without_remat(model: keras.layers.Layer) -> Iterator[None]:
    """Rematerialized layers are traced, and a trace has no values to observe."""
    modes = [(layer, layer._remat_mode) for layer in model._flatten_layers()]
    try:
        for layer, _ in modes:
            layer._remat_mode = None
        yield
    finally:
        for layer, mode in modes:
            layer._remat_mode = mode


def _observing(layer: QuantizedLayer, observers: _Observers) -> Callable[..., Any]:
    quantizer = layer.quantization.activations

    def observe(name: str, product: Any, x: Any) -> Any:
        x = ops.convert_to_tensor(x)
        if not product.input_axes:  # of a table that others may also multiply
            observers.setdefault((id(layer), _LOOKED_UP), Observer())
        elif parameters.of_kernel(layer, name).inputs:
            values = observable(quantizer, x, product.input_blocks(quantizer))
            if not np.isfinite(values).all():
                raise ValueError(
                    f"Layer {layer.path!r} receives values that are not finite. Check the data and "
                    "the model; nothing was calibrated."
                )
            if values.size:
                observers.setdefault((id(layer), name), Observer()).see(values)
        return product.apply(x, ops.cast(layer.float32_kernel(name), _dtype_of(layer, x)))

    return observe


def _dtype_of(layer: QuantizedLayer, x: Any) -> Any:
    """A table is looked up in float32, and cast afterwards."""
    return x.dtype if "float" in keras.backend.standardize_dtype(x.dtype) else "float32"


def _found(
    layers: list[QuantizedLayer], observers: _Observers, method: str | None
) -> dict[QuantizedLayer, dict[str, dict[str, Any]]]:
    found: dict[QuantizedLayer, dict[str, dict[str, Any]]] = {}
    for layer in layers:
        names = [name for name in layer.products() if parameters.of_kernel(layer, name).inputs]
        missing = [name for name in names if (id(layer), name) not in observers]
        if missing and (id(layer), _LOOKED_UP) in observers:
            found[layer] = {}
            continue
        if missing:
            raise ValueError(
                f"Layer {layer.path!r} has seen no data: the model does not call it on this data, "
                "or there is none. Nothing was calibrated. Give data that reaches every layer, or "
                "leave the layer in float with a rule."
            )
        quantizer = layer.quantization.activations
        found[layer] = {
            name: quantizer.calibrated(observers[id(layer), name].observation(quantizer, method))
            for name in names
        }
    return found


def _assign(layer: QuantizedLayer, found: dict[str, dict[str, Any]]) -> list[Any]:
    """Gives the variables of inputs their values; returns those that the layer has no more."""
    if not found:
        # The table of a text classifier, say, which has no use for the way back to tokens.
        dropped = parameters.release_inputs(layer)
        layer.take_quantization(layer.quantization.without_input)
        return dropped
    for name, values in found.items():
        for key, variable in parameters.of_kernel(layer, name).inputs.items():
            variable.assign(values[key])
    layer.mark_calibrated()
    return []


def _check(model: Any, method: str | None, batches: int | None) -> list[QuantizedLayer]:
    """Checks the arguments, and returns the layers that need calibration."""
    if not isinstance(model, keras.layers.Layer):
        raise TypeError(f"`model` must be a Keras model or layer. Received: {model!r}")
    if method is not None and method not in METHODS:
        raise ValueError(
            f"`method` must be one of {list(METHODS)}, or None. Received: method={method!r}"
        )
    is_count = isinstance(batches, int) and not isinstance(batches, bool)
    if batches is not None and not (is_count and batches > 0):
        raise ValueError(f"`batches` must be a positive integer. Received: batches={batches!r}")
    found = [
        layer
        for layer in model._flatten_layers()
        if is_quantized(layer) and parameters.inputs_of(layer)
    ]
    if not found:
        raise ValueError(
            f"Model {model.name!r} has nothing to calibrate: no layer has a static or a learned "
            "range for its input. Quantize it first, with activations=Ridge(bits, "
            "calibration='static') or LearnedStep(bits), for example."
        )
    return found


# Data.


def _progress(data: Iterable[Any], batches: int | None, verbose: bool) -> Iterator[Any]:
    total = batches if batches is not None else getattr(data, "count", None)
    bar = keras.utils.Progbar(total, unit_name="batch", verbose=int(verbose))
    seen = 0
    for batch in data:
        yield batch
        seen += 1
        bar.update(seen)
        if seen == batches:
            break
    bar.update(seen, finalize=True)


class _Batches:
    """The inputs of batches from one of Keras' data adapters; `count` None: not known."""

    def __init__(self, adapter: Any) -> None:
        self.adapter, self.count = adapter, adapter.num_batches

    def __iter__(self) -> Iterator[Any]:
        self.adapter.on_epoch_begin()
        for number, batch in enumerate(self.adapter.get_numpy_iterator(), 1):
            yield data_adapter_utils.unpack_x_y_sample_weight(batch)[0]
            if number == self.count:  # some adapters start over
                break
        self.adapter.on_epoch_end()


def _batches(model: keras.layers.Layer, data: Any, batch_size: int | None) -> _Batches:
    if isinstance(data, tuple) and not _are_inputs(model, data):
        raise TypeError(
            "`data` is a tuple, which does not say whether it holds inputs and targets or batches. "
            "Give the inputs alone, or a list of batches. "
            f"Received: a tuple of {len(data)} elements"
        )
    if (isinstance(data, list) and not _are_inputs(model, data)) or isinstance(data, Iterator):
        data = (batch if isinstance(batch, tuple) else (batch,) for batch in data)
    try:
        return _Batches(data_adapters.get_data_adapter(data, batch_size=batch_size))
    except ValueError as error:
        raise ValueError(
            "`data` must hold arrays in the structure that the model takes, or batches of them: a "
            "list, a generator, a tf.data.Dataset, a keras.utils.PyDataset or a PyTorch "
            f"DataLoader. Received: {type(data).__name__}. Keras says: {error}"
        ) from error


def _are_inputs(model: keras.layers.Layer, data: list[Any] | tuple[Any, ...]) -> bool:
    """Whether a list holds the several inputs of a model, rather than batches."""
    inputs = getattr(model, "inputs", None) or []
    return len(inputs) > 1 and len(data) == len(inputs) and all(hasattr(a, "shape") for a in data)
