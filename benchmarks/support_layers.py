"""Every public Keras layer, found rather than listed, and how one with weights is made.

A layer that nobody described is an error: either its class can be made and built without weights,
or it has a case here.
"""

from __future__ import annotations

import inspect
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import numpy as np
from keras import layers

SAMPLES = 16
TOKENS = 9  # indices are smaller than that
SERIES, IMAGE, VOLUME = (6, 4), (5, 5, 4), (3, 4, 3, 2)


@dataclass(frozen=True)
class Case:
    """A layer with weights, and an input for it.

    Attributes:
        make: returns a new layer of a name.
        shape: of one sample of its input.
        inputs: how often the layer takes that input (an attention layer: query, value).
        as_list: whether it takes them as a list.
        dtype: of the input: "float32", or "int32" for indices.
        backends: those that Keras has the layer on.
        spoken: what the layer does in this case, where its name does not say it.
    """

    make: Callable[[str], layers.Layer]
    shape: tuple[int, ...]
    inputs: int = 1
    as_list: bool = False
    dtype: str = "float32"
    backends: tuple[str, ...] = ("tensorflow", "jax", "torch")
    spoken: str = ""

    def data(self) -> np.ndarray:
        """Random samples of the input."""
        generator, shape = np.random.default_rng(0), (SAMPLES, *self.shape)
        if self.dtype == "int32":
            return generator.integers(0, TOKENS, shape).astype(np.int32)
        return generator.normal(size=shape).astype(np.float32)

    def model(self, name: str) -> keras.Model:
        """A model called `name` of the layer, called `layer_<name>`, and a Dense, `head_<name>`."""
        inputs = keras.Input(self.shape, dtype=self.dtype)
        layer, taken = self.make(f"layer_{name}"), [inputs] * self.inputs
        outputs = layer(taken) if self.as_list else layer(*taken)
        flat = layers.Flatten()(outputs) if len(outputs.shape) > 2 else outputs
        return keras.Model(inputs, layers.Dense(2, name=f"head_{name}")(flat), name=name)


def _adapted(name: str) -> layers.Layer:
    layer = layers.Normalization(name=name)
    layer.adapt(np.random.default_rng(1).normal(1, 2, (64, 8)).astype(np.float32))
    return layer


def _jax_layer(name: str) -> layers.Layer:
    return layers.JaxLayer(_jax_call, _jax_init, name=name)


@keras.saving.register_keras_serializable("support_layers")
def _jax_call(params: Any, inputs: Any) -> Any:
    return inputs @ params


@keras.saving.register_keras_serializable("support_layers")
def _jax_init(rng: Any, inputs: Any) -> Any:
    import jax

    return jax.random.normal(rng, (inputs.shape[-1], 6))


def _flax_layer(name: str) -> layers.Layer:
    import flax.linen

    return layers.FlaxLayer(flax.linen.Dense(6), name=name)


def _torch_module(name: str) -> layers.Layer:
    import torch

    return layers.TorchModuleWrapper(torch.nn.Linear(8, 6), output_shape=(None, 6), name=name)


def _saved_function(name: str) -> layers.Layer:
    with tempfile.TemporaryDirectory() as folder:
        model = keras.Sequential([keras.Input((8,)), layers.Dense(6)])
        path = str(Path(folder) / "saved")
        model.export(path, verbose=False)
        return layers.TFSMLayer(path, call_endpoint="serve", name=name)


def _of(
    cls: str, *arguments: Any, shape: tuple[int, ...], case: dict[str, Any] | None = None, **kwargs
) -> Case:
    return Case(
        lambda name: getattr(layers, cls)(*arguments, name=name, **kwargs), shape, **(case or {})
    )


def _around(cls: str, make: Callable[[], Any], shape: tuple[int, ...], spoken: str) -> Case:
    """A layer that holds another."""
    return Case(lambda name: getattr(layers, cls)(make(), name=name), shape, spoken=spoken)


def _cell(make: Callable[[], Any]) -> Case:
    return Case(lambda name: layers.RNN(make(), name=name), SERIES, spoken="in RNN")


_PAIR = {"inputs": 2, "as_list": True}
_INDICES = {"dtype": "int32"}
_SAME = {"padding": "same"}

CASES: dict[str, Case] = {
    "Dense": _of("Dense", 6, shape=(8,)),
    "EinsumDense": _of("EinsumDense", "abc,cd->abd", (6, 5), bias_axes="d", shape=SERIES),
    "Embedding": _of("Embedding", TOKENS, 8, shape=(6,), case=_INDICES),
    "ReversibleEmbedding": _of("ReversibleEmbedding", TOKENS, 8, shape=(6,), case=_INDICES),
    "Conv1D": _of("Conv1D", 4, 3, shape=SERIES, **_SAME),
    "Conv2D": _of("Conv2D", 4, 3, shape=IMAGE, **_SAME),
    "Conv3D": _of("Conv3D", 4, 2, shape=VOLUME, **_SAME),
    "Conv1DTranspose": _of("Conv1DTranspose", 4, 3, shape=SERIES),
    "Conv2DTranspose": _of("Conv2DTranspose", 4, 3, shape=IMAGE),
    "Conv3DTranspose": _of("Conv3DTranspose", 4, 2, shape=VOLUME),
    "DepthwiseConv1D": _of("DepthwiseConv1D", 3, shape=SERIES, **_SAME),
    "DepthwiseConv2D": _of("DepthwiseConv2D", 3, shape=IMAGE, **_SAME),
    "SeparableConv1D": _of("SeparableConv1D", 4, 3, shape=SERIES, **_SAME),
    "SeparableConv2D": _of("SeparableConv2D", 4, 3, shape=IMAGE, **_SAME),
    "SimpleRNN": _of("SimpleRNN", 4, shape=SERIES),
    "LSTM": _of("LSTM", 4, shape=SERIES),
    "GRU": _of("GRU", 4, shape=SERIES),
    "SimpleRNNCell": _cell(lambda: layers.SimpleRNNCell(4)),
    "LSTMCell": _cell(lambda: layers.LSTMCell(4)),
    "GRUCell": _cell(lambda: layers.GRUCell(4)),
    "RNN": _around("RNN", lambda: layers.SimpleRNNCell(4), SERIES, "of a SimpleRNNCell"),
    "StackedRNNCells": _cell(
        lambda: layers.StackedRNNCells([layers.GRUCell(4), layers.SimpleRNNCell(3)])
    ),
    "ConvLSTM1D": _of("ConvLSTM1D", 2, 3, shape=(3, 5, 2), **_SAME),
    "ConvLSTM2D": _of("ConvLSTM2D", 2, 2, shape=(3, 4, 4, 2), **_SAME),
    "ConvLSTM3D": _of("ConvLSTM3D", 2, 2, shape=(2, 3, 3, 3, 2), **_SAME),
    "Bidirectional": _around("Bidirectional", lambda: layers.GRU(3), SERIES, "of a GRU"),
    "TimeDistributed": _around("TimeDistributed", lambda: layers.Dense(5), SERIES, "of a Dense"),
    "MultiHeadAttention": _of("MultiHeadAttention", 2, 4, shape=(5, 8), case={"inputs": 2}),
    "GroupQueryAttention": _of("GroupQueryAttention", 4, 4, 2, shape=(5, 8), case={"inputs": 2}),
    "Attention": _of(
        "Attention", shape=(5, 8), use_scale=True, case={**_PAIR, "spoken": "with a scale"}
    ),
    "AdditiveAttention": _of("AdditiveAttention", shape=(5, 8), case=_PAIR),
    "BatchNormalization": _of("BatchNormalization", shape=IMAGE),
    "GroupNormalization": _of("GroupNormalization", 2, shape=IMAGE),
    "LayerNormalization": _of("LayerNormalization", shape=SERIES),
    "RMSNormalization": _of("RMSNormalization", shape=SERIES),
    "Normalization": Case(_adapted, (8,), spoken="adapted"),
    "SpectralNormalization": _around(
        "SpectralNormalization", lambda: layers.Dense(6), (8,), "of a Dense"
    ),
    "PReLU": _of("PReLU", shape=IMAGE),
    "STFTSpectrogram": _of("STFTSpectrogram", shape=(32, 1), frame_length=8, frame_step=4),
    "JaxLayer": Case(
        _jax_layer, (8,), backends=("tensorflow", "jax"), spoken="of a matrix product"
    ),
    "FlaxLayer": Case(
        _flax_layer, (8,), backends=("tensorflow", "jax"), spoken="of a flax.linen.Dense"
    ),
    "TorchModuleWrapper": Case(_torch_module, (8,), backends=("torch",), spoken="of a Linear"),
    "TFSMLayer": Case(
        _saved_function, (8,), backends=("tensorflow",), spoken="of an exported Dense"
    ),
}

# What layers without weights ask for.
ARGUMENTS: dict[str, tuple[Any, ...]] = {
    **{
        f"{kind}Pooling{rank}D": (2,)
        for kind in ("AdaptiveAverage", "AdaptiveMax", "Average")
        for rank in (1, 2, 3)
    },
    **{f"SpatialDropout{rank}D": (0.1,) for rank in (1, 2, 3)},
    **dict.fromkeys(["AlphaDropout", "Dropout", "GaussianDropout", "GaussianNoise"], (0.1,)),
    **dict.fromkeys(["RandomBrightness", "RandomContrast", "RandomRotation"], (0.1,)),
    **dict.fromkeys(["RandomColorDegeneration", "RandomHue", "RandomSaturation"], (0.5,)),
    **dict.fromkeys(["RandomShear", "RandomTranslation", "RandomZoom"], (0.1, 0.1)),
    **dict.fromkeys(["CenterCrop", "RandomCrop", "Resizing"], (2, 2)),
    **dict.fromkeys(["CategoryEncoding", "HashedCrossing", "Hashing"], (3,)),
    **dict.fromkeys(["MaxNumBoundingBoxes", "RandomPosterization", "RepeatVector"], (3,)),
    "Activation": ("relu",),
    "Discretization": ((0.0, 1.0),),
    "Dot": (1,),
    "InputLayer": ((4,),),
    "Lambda": (abs,),
    "Permute": ((2, 1),),
    "Pipeline": ([],),
    "RandomSharpness": (0.5,),
    "Rescaling": (0.5,),
    "Reshape": ((-1,),),
}
_SHAPES = ((2, 4), (2, 6, 4), (2, 5, 5, 3), (2, 3, 4, 3, 2))


def public_layers() -> dict[str, type]:
    """Every public layer class by one name: no aliases, no classes to derive from only."""
    names: dict[type, list[str]] = {}
    for name, cls in sorted(vars(layers).items()):
        if inspect.isclass(cls) and issubclass(cls, layers.Layer):
            names.setdefault(cls, []).append(name)
    return {
        cls.__name__ if cls.__name__ in aliases else aliases[0]: cls
        for cls, aliases in names.items()
        if cls.call is not layers.Layer.call
    }


def layers_with_weights() -> dict[str, Case]:
    """A case for every public layer that has weights.

    Raises:
        LookupError: names the layers that have weights and no case, and those of which nobody
            knows, because they cannot be made or built.
    """
    unknown = {
        name: reason
        for name, cls in public_layers().items()
        if name not in CASES and (reason := _why_it_needs_a_case(name, cls)) is not None
    }
    unknown |= {name: "no public layer" for name in CASES if name not in public_layers()}
    if unknown:
        raise LookupError(
            f"Describe these layers in CASES, or their arguments in ARGUMENTS: {unknown}"
        )
    return CASES


def _why_it_needs_a_case(name: str, cls: type) -> str | None:
    makers = [base.__name__ for base in _keras_bases(cls) if "self.add_weight" in _source(base)]
    if makers:
        return f"{makers[0]} adds weights"
    try:
        layer = cls(*ARGUMENTS.get(name, ()))
    except Exception as error:
        return f"cannot be made: {error}"
    failures = []
    for shape in _SHAPES:
        for given in (shape, [shape, shape]):
            try:
                layer.build(given)
            except Exception as error:
                failures.append(f"cannot be built for {given}: {error}")
            if layer.weights:
                return f"has weights: {[weight.path for weight in layer.weights]}"
    return failures[0] if len(failures) == 2 * len(_SHAPES) else None


def _keras_bases(cls: type) -> Iterator[type]:
    for base in cls.__mro__:
        if base is layers.Layer:
            return
        yield base


def _source(cls: type) -> str:
    try:
        return inspect.getsource(cls)
    except (OSError, TypeError):
        return ""
