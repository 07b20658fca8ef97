"""Size and latency of single layers as LiteRT files, against the float32 file of the same layer.

    python benchmarks/litert_layers.py [--out benchmarks/results/litert_layers.json] [--quick]

One thread; the files take turns, and medians are compared. Every file is checked against its Keras
layer by `rq.export` before it is timed.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import keras
import numpy as np

import keras_rq as rq
from keras_rq.demo.results import provenance
from keras_rq.export import interpreter

SPECS = ("A8W8-channel", "A4W4-channel", "A4W1-channel", "A1W1-channel", "A4W1-128")
LAYERS: dict[str, tuple[tuple[int, ...], Callable[[], keras.layers.Layer]]] = {
    "Dense 512, 1 token": ((512,), lambda: keras.layers.Dense(512)),
    "Dense 2048, 1 token": ((2048,), lambda: keras.layers.Dense(2048)),
    "Dense 512, 128 tokens": ((128, 512), lambda: keras.layers.Dense(512)),
    "Conv2D 3x3, 28x28x64": ((28, 28, 64), lambda: keras.layers.Conv2D(64, 3, padding="same")),
    "Conv2D 3x3, 14x14x256": ((14, 14, 256), lambda: keras.layers.Conv2D(256, 3, padding="same")),
    "Conv2D 1x1, 14x14x256": ((14, 14, 256), lambda: keras.layers.Conv2D(256, 1)),
    "DepthwiseConv2D 3x3, 28x28x64": (
        (28, 28, 64),
        lambda: keras.layers.DepthwiseConv2D(3, padding="same"),
    ),
}


def measure(name: str, folder: Path, specs: tuple[str, ...]) -> list[dict]:
    """Exports one layer at every setting and times the files in turns."""
    shape, make = LAYERS[name]
    inputs = np.random.default_rng(0).normal(size=(2, *shape)).astype("float32")
    buffers: dict[str, bytes] = {}
    for spec in ("float32", *specs):
        for optimize in (
            ("size", "latency") if "Conv2D 3x3" in name and spec != "float32" else ("size",)
        ):
            keras.utils.set_random_seed(0)
            model = keras.Sequential([keras.Input(shape), make()])
            if spec != "float32":
                rq.quantize(model, rq.QuantizationPolicy(spec), verbose=False)
            path = folder / "layer.tflite"
            rq.export(model, path, inputs=inputs, optimize=optimize, verbose=False)
            key = spec if optimize == "size" else f"{spec}, optimize='latency'"
            buffers[key] = path.read_bytes()
    seconds = interpreter.time_buffers(buffers, [inputs[:1]], repeats=9)
    return [
        {
            "layer": name,
            "setting": key,
            "nbytes": len(buffer),
            "size_ratio": len(buffer) / len(buffers["float32"]),
            "microseconds": 1e6 * seconds[key],
            "time_ratio": seconds[key] / seconds["float32"],
        }
        for key, buffer in buffers.items()
    ]


def main() -> None:
    """Prints a row per file and writes them as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--quick", action="store_true", help="one layer, one setting")
    options = parser.parse_args()
    names = list(LAYERS)[:1] if options.quick else list(LAYERS)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            found = measure(name, Path(folder), SPECS[:1] if options.quick else SPECS)
            rows += found
            for row in found:
                size = f"{row['nbytes']:>10,} bytes {row['size_ratio']:5.2f}x"
                time = f"{row['microseconds']:9.1f} us {row['time_ratio']:5.2f}x"
                print(f"{row['layer']:32} {row['setting']:36} {size} {time}", flush=True)
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps({**provenance(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
