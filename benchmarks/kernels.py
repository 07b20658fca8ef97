"""One tensor's fake quantization, forward and backward: as a kernel and as array operations.

    KERAS_BACKEND=jax python benchmarks/kernels.py [--out FILE.json] [--tiles]

Times are of one tensor among several in one compiled program, so that no launch from Python is in
them and no tensor waits in a cache. The floor is what the same program takes to read and write the
bytes that must move: x in and out forward, x and the gradient in and a gradient out backward.
`--tiles` times other tile sizes as well. Needs a GPU and JAX.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import jax

import keras_rq as rq
from keras_rq.backend import pallas
from keras_rq.demo.results import provenance

# Activations of nanoGPT, and its kernels: shape, contraction axis, dtype, how many at once.
TENSORS = (
    ((64, 256, 1536), -1, "bfloat16", 4),
    ((64, 256, 384), -1, "bfloat16", 16),
    ((384, 1536), 0, "float32", 16),
    ((1536, 384), 0, "float32", 16),
)
QUANTIZERS = {
    "8 bits, channel": rq.quantizers.Ridge(8, block_size="channel"),
    "4 bits, 128": rq.quantizers.Ridge(4),
    "1 bit, 128": rq.quantizers.Ridge(1),
    # As in a product of two operands that are rotated alike.
    "1 bit, 128, rotated": rq.QuantizationPolicy("A1W1").weights,
}


def microseconds(function: Callable[..., Any], *arguments: Any, count: int) -> float:
    """Median time of a compiled function, over the number of tensors it works on."""
    run, taken = jax.jit(function), []
    jax.block_until_ready(run(*arguments))
    for _ in range(7):
        start = time.perf_counter()
        for _ in range(10):
            result = run(*arguments)
        jax.block_until_ready(result)
        taken.append((time.perf_counter() - start) / 10)
    return 1e6 * sorted(taken)[3] / count


def measure(quantizer: Any, axis: int, xs: list[Any], gs: list[Any]) -> dict[str, float]:
    """Forward and backward time of one tensor."""

    def fake(x: Any) -> Any:
        return quantizer.fake_quantize(x, quantizer.blocks((axis,)), unrotate=False)

    def pull(xs: list[Any], gs: list[Any]) -> list[Any]:
        return [jax.vjp(fake, x)[1](g)[0] for x, g in zip(xs, gs, strict=True)]

    return {
        "forward_us": microseconds(lambda xs: [fake(x) for x in xs], xs, count=len(xs)),
        "backward_us": microseconds(pull, xs, gs, count=len(xs)),
    }


def rows(tiles: bool) -> Any:
    """Measures every tensor with every quantizer."""
    sizes = list(itertools.product((2048, 4096, 8192), (256, 512, 1024))) if tiles else []
    for shape, axis, dtype, count in TENSORS:
        xs = [jax.random.normal(jax.random.key(i), shape).astype(dtype) for i in range(count)]
        gs = [x[::-1] * 1 for x in xs]
        copy = microseconds(lambda xs: [2 * x + 1 for x in xs], xs, count=count)
        for name, quantizer in QUANTIZERS.items():
            about = {"shape": shape, "dtype": dtype, "quantizer": name, "copy_us": copy}
            about |= {"floor_forward_us": copy, "floor_backward_us": 1.5 * copy}
            for kernels in ("1", "0"):
                os.environ["KERAS_RQ_KERNELS"] = kernels
                yield about | {"kernels": kernels == "1"} | measure(quantizer, axis, xs, gs)
            os.environ["KERAS_RQ_KERNELS"] = "1"
            for tile, share in sizes:
                with tile_size(tile, share):
                    yield about | {"tile": tile, "share": share} | measure(quantizer, axis, xs, gs)


@contextlib.contextmanager
def tile_size(tile: int, share: int) -> Iterator[None]:
    """Other tiles and shares of a warp than the ones that ran fastest."""
    sizes = {"_ROW_TILE": tile, "_COLUMN_TILE": tile, "_SHARE": share, "_LONG_SHARE": share}
    with contextlib.ExitStack() as stack:
        jax.clear_caches()  # a traced function keeps the sizes that it met
        for name, size in sizes.items():
            stack.enter_context(mock.patch.object(pallas, name, size))
        yield


def main() -> None:
    """Prints a line for each measurement; writes them all at the end."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--tiles", action="store_true")
    options = parser.parse_args()
    if not pallas.on_gpu():
        parser.error(f"no GPU: JAX runs on {jax.default_backend()!r}.")
    found = []
    for row in rows(options.tiles):
        found.append(row)
        print(row, flush=True)
    if options.out is not None:
        text = json.dumps({"provenance": provenance(), "rows": found}, indent=1)
        options.out.write_text(text)


if __name__ == "__main__":
    main()
