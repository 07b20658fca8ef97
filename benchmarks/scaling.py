"""How the cost of quantized training grows: one block, against its width and against tokens.

    python benchmarks/scaling.py --out benchmarks/results/scaling.json

A block is Dense(width), GELU, Dense(width), trained by plain gradient descent, so that no
optimizer's state adds to the time. The chart is written beside the JSON file.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import train_step

SETTINGS = ("A8W8-channel", "A4W4-128", "A1W1-128 unrotated", "A1W1-128")
# By device: the widths, the tokens they have, the numbers of tokens, and the width those have.
SIZES: dict[str, tuple[tuple[int, ...], int, tuple[int, ...], int]] = {
    "gpu": (
        (256, 512, 1024, 2048, 4096, 8192),
        4096,
        (1024, 2048, 4096, 8192, 16384, 32768, 65536),
        1024,
    ),
    "cpu": ((256, 512, 1024, 2048), 256, (128, 256, 512, 1024, 2048), 512),
}


def points(device: str) -> list[tuple[str, int, int]]:
    """What is measured, as (what varies, width, tokens)."""
    widths, tokens, many_tokens, width = SIZES[device]
    return [("width", w, tokens) for w in widths] + [("tokens", width, t) for t in many_tokens]


def block(width: int, name: str) -> Any:
    """The workload of one width; its batch is the number of tokens."""
    import keras
    import models

    def build() -> keras.Model:
        dense = keras.layers.Dense
        return keras.Sequential(
            [keras.Input((width,)), dense(width, activation="gelu"), dense(width)]
        )

    def batch(tokens: int, random: Any) -> models.Batch:
        return tuple(random.standard_normal((tokens, width), "float32") for _ in range(2))

    loss = keras.losses.MeanSquaredError
    return models.Workload(name, build, batch, {}, loss, lambda: keras.optimizers.SGD(1e-3))


def draw(rows: Sequence[dict[str, Any]], path: Path, title: str) -> None:
    """Step times against both sizes, on logarithmic axes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(10, 4.2), sharey=True, layout="constrained")
    for panel, axis, other in zip(panels, ("width", "tokens"), ("tokens", "width"), strict=True):
        here = [row for row in rows if row["axis"] == axis and "error" not in row]
        for index, setting in enumerate(dict.fromkeys(row["setting"] for row in here)):
            line = sorted((row for row in here if row["setting"] == setting), key=lambda r: r[axis])
            sizes = [row[axis] for row in line]
            style = {"color": "black", "linewidth": 2} if setting == "float" else {}
            style |= {"color": f"C{index - 1}"} if setting != "float" else {}
            panel.plot(sizes, [row["ms"] for row in line], marker="o", label=setting, **style)
            low, high = ([row[q] for row in line] for q in ("ms_q25", "ms_q75"))
            panel.fill_between(sizes, low, high, alpha=0.15, color=style["color"], linewidth=0)
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        panel.set_xlabel(f"{axis} ({other}: {here[0][other]:,})" if here else axis)
        ticks = sorted({row[axis] for row in here})
        panel.set_xticks(ticks, [f"{size:,}" for size in ticks])
        panel.grid(True, which="major", alpha=0.3)
    panels[0].set_ylabel("ms of a training step")
    panels[0].legend(frameon=False)
    figure.suptitle(title)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def main() -> None:
    """Measures every point, and draws the chart anew after each."""
    options = parse()
    os.environ.setdefault("KERAS_BACKEND", "jax")
    if options.device == "cpu":
        os.environ |= {"CUDA_VISIBLE_DEVICES": "", "JAX_PLATFORMS": "cpu"}
    import keras
    import models
    import steps

    if options.out is not None and not options.resume:
        options.out.unlink(missing_ok=True)
    results = train_step.begin(options)
    framework = keras.backend.backend()
    mode = options.mode or steps.MODES[framework][0]
    machine = results.provenance[framework]["machine"]
    title = f"Dense(width), GELU, Dense(width): {framework} {mode} on "
    title += f"{machine['gpu'] or machine['cpu']}, {models.DTYPES[options.device]}"
    for axis, width, tokens in points(options.device)[: options.points]:
        workload = block(width, f"block-{width}-by-{axis}")
        about = {"axis": axis, "width": width, "tokens": tokens}
        train_step.measure(options, results, workload, tokens, mode, about)
        if options.out is not None:
            draw(results.rows, options.out.with_suffix(".png"), title)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    train_step.add_options(parser)
    parser.set_defaults(settings=list(SETTINGS))
    parser.add_argument("--mode", help="of PyTorch: eager (the default) or compiled")
    parser.add_argument("--points", type=int, help="measure only so many points")
    return parser.parse_args()


if __name__ == "__main__":
    main()
