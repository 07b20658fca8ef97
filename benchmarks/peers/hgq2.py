"""HGQ2: fixed-point layers whose bit widths are learned, on Keras with JAX or TensorFlow."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any

import common
import keras_models

FRAMEWORKS = ("jax", "tensorflow")
OPTIONS = common.arguments(FRAMEWORKS)
os.environ["KERAS_BACKEND"] = OPTIONS.framework

import keras  # noqa: E402
from hgq.config import LayerConfigScope, QuantizerConfigScope  # noqa: E402
from hgq.layers import QConv2D, QDense  # noqa: E402

CHANNEL, TENSOR, ELEMENT = "per channel", "per tensor", "per weight"
KERNEL_INTEGER = -3  # kernels begin within ±1/8: with more range, few bits round them to 0
# Activation bits, weight bits (both with the sign), granularity of the kernel, EBOPs.
SETTINGS = {
    "A8W8": (8, 8, CHANNEL, False),
    "A8W8, EBOPs": (8, 8, CHANNEL, True),
    "A8W8 tensor": (8, 8, TENSOR, False),
    "A8W8 element": (8, 8, ELEMENT, False),
    "A8W8 element, EBOPs": (8, 8, ELEMENT, True),
    "A4W4": (4, 4, CHANNEL, False),
    "A4W1.5": (4, 2, CHANNEL, False),
    "A1.5W1.5": (2, 2, CHANNEL, False),
}


def variants(job: common.Job, framework: str, mode: str) -> Iterator[common.Variant]:
    """The settings; the smallest signed grid is a bit and a sign, which is ternary."""
    yield common.Variant(common.FLOAT, "keras.layers", _step(job, framework, None))
    for setting, (a, w, grain, ebops) in SETTINGS.items():
        inputs = "per element" if grain == ELEMENT else "per tensor"
        as_set = (
            f"kernel kbi k0=1 b0={w - 1} i0={KERNEL_INTEGER} SAT_SYM {grain}, "
            f"inputs kif k0=1 i0={_integer(a)} f0={a - 1 - _integer(a)} WRAP {inputs}, "
            f"bias kbi b0=8, widths learned, enable_ebops={ebops}{' beta0=1e-5' if ebops else ''}"
        )
        yield common.Variant(setting, as_set, _step(job, framework, (a, w, grain, ebops)))


def _integer(bits: int) -> int:
    return min(2, bits - 1)


def _step(job: common.Job, framework: str, kind: Any) -> Callable[[], common.Training]:
    def make() -> Any:
        if kind is None:
            return keras_models.build(job, keras_models.plain(keras))
        with contextlib.ExitStack() as scopes:
            for scope in _scopes(*kind):
                scopes.enter_context(scope)
            plain = keras_models.plain(keras)
            return keras_models.build(job, keras_models.Layers(keras, QDense, QConv2D, plain.relu))

    return lambda: keras_models.train_step(job, framework, make)


def _scopes(a: int, w: int, grain: str, ebops: bool) -> list[Any]:
    """The configuration scopes that the layers are made in, as HGQ2's README shows them."""
    kernel = {CHANNEL: (-1,), TENSOR: ()}.get(grain)
    axes = {"heterogeneous_axis": kernel, "homogeneous_axis": None} if grain != ELEMENT else {}
    inputs = {"heterogeneous_axis": (), "homogeneous_axis": None} if grain != ELEMENT else {}
    return [
        QuantizerConfigScope(place="all", default_q_type="kbi", overflow_mode="SAT_SYM"),
        QuantizerConfigScope(place="weight", b0=w - 1, i0=KERNEL_INTEGER, **axes),
        QuantizerConfigScope(place="datalane", default_q_type="kif", overflow_mode="WRAP"),
        QuantizerConfigScope(place="datalane", i0=_integer(a), f0=a - 1 - _integer(a), **inputs),
        LayerConfigScope(enable_ebops=ebops, beta0=1e-5),
    ]


if __name__ == "__main__":
    peer = common.Peer("HGQ2", FRAMEWORKS, keras_models.MODES, variants, keras_models.wait)
    common.run(peer, OPTIONS)
