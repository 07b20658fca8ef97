"""A sample of the cross product of the quantizers' fields that holds every pair that matters."""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import numpy as np
from reference import Spec

from keras_rq import quantizers
from keras_rq.numerics.blocks import Blocks

BITS = (1, 1.5, 2, 3, 4, 8, "fp4")


class Case(NamedTuple):
    """A quantizer, how it is applied, and the same thing in the reference's words."""

    name: str
    quantizer: quantizers.Quantizer
    blocks: Blocks
    spec: Spec
    shape: tuple[int, ...]

    def fake_quantize(self, x: Any) -> Any:
        return self.quantizer.fake_quantize(x, self.blocks)

    def data(self, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """(x, upstream gradient), float32; x has a mean and a few outliers."""
        rng = np.random.default_rng(seed)
        x = rng.normal(size=self.shape) + 0.4
        x = np.where(rng.random(self.shape) < 0.02, 3 * x, x)
        return x.astype("float32"), rng.normal(size=self.shape).astype("float32")


def make(
    estimator: str,
    bits: Any,
    affine: bool,
    rule: str,
    *,
    block: Any = "channel",
    axes: tuple[int, ...] = (-1,),
    shared: tuple[int, ...] = (),
    shape: tuple[int, ...] = (3, 6, 40),
    keep: tuple[int, int] | None = None,
    trust: float | None = None,
    fade: float | None = None,
    rotated: bool = False,
    paired: bool = False,
    ridge_lambda: float = 0.01,
) -> Case:
    fields: dict[str, Any] = {"affine": affine, "range": rule, "block_size": block, "trust": trust}
    fields |= {"fade": fade, "sparsity": keep, "rotation": "hadamard" if rotated else None}
    if paired:
        fields["sparsity"] = f"{keep[0]}:{keep[1]}-paired"
    if estimator == "QuEST":
        del fields["affine"]
    if estimator == "Ridge":
        fields["ridge_lambda"] = ridge_lambda
    quantizer = getattr(quantizers, estimator)(bits, **fields)
    spec = Spec(
        bits=bits,
        affine=affine,
        rule=rule,
        ridge_lambda=ridge_lambda if estimator == "Ridge" else None,
        block=block,
        axes=axes,
        shared=shared,
        keep=keep,
        paired=paired,
        trust=trust,
        fade=fade,
        midrise=estimator == "QuEST",
        rotated=rotated,
        edge=quantizer.grid.gaussian_edge,  # checked in numerics/test_grids.py
    )
    words = [estimator, bits, "affine" if affine else "linear", rule, block, f"axes{axes}"]
    words += [f"shared{shared}"] if shared else []
    words += [f"{keep[0]}:{keep[1]}{'-paired' if paired else ''}"] if keep else []
    words += [f"trust{trust}"] if trust is not None else []
    words += [f"fade{fade}"] if fade is not None else []
    words += ["rotated"] if rotated else []
    name = "-".join(str(w).replace(" ", "") for w in words)
    return Case(name, quantizer, quantizer.blocks(axes, shared), spec, shape)


def _dense() -> list[Case]:
    """Every grid with both dequantizers and both estimators; the other fields take turns."""
    rules = {True: itertools.cycle(("minmax", "rms", "absmax"))}
    rules[False] = itertools.cycle(("absmax", "rms"))
    sizes = itertools.cycle((32, "channel", "tensor", 128, 7))
    axes = itertools.cycle(((-1,), (0,), (1, 2), (0, 2), (2, 0), (2, 1)))
    trust = itertools.cycle((None, 1.0, None, 0.3))
    return [
        make(e, b, a, next(rules[a]), block=next(sizes), axes=next(axes), trust=next(trust))
        for e, b, a in itertools.product(("Ridge", "StraightThrough"), BITS, (True, False))
    ]


def _sparse() -> list[Case]:
    sizes = itertools.cycle((32, "channel", 128))
    axes = itertools.cycle(((-1,), (2, 0), (1,)))
    keep = itertools.cycle(((2, 4), (1, 4)))
    estimators = itertools.cycle(("Ridge", "Ridge", "StraightThrough"))
    return [
        make(next(estimators), b, False, r, block=next(sizes), axes=next(axes), keep=next(keep))
        for b, r in (
            (1, "rms"),
            (1.5, "rms"),
            (2, "rms"),
            (4, "absmax"),
            (8, "absmax"),
            ("fp4", "rms"),
        )
    ]


def _shaped() -> list[Case]:
    """Convolutions, rotations, no penalty, a vector."""
    image, kernel = (2, 4, 5, 12), (3, 3, 12, 5)
    return [
        make("Ridge", 4, True, "minmax", axes=(-1,), shared=(1, 2), shape=image),
        make("Ridge", 4, True, "rms", axes=(-1,), shared=(1, 2), shape=image, block=5),
        make("Ridge", 1, True, "rms", axes=(0, 1, 2), shape=kernel, trust=0.3),
        make("Ridge", 1.5, False, "rms", axes=(2,), shared=(0, 1), shape=kernel, block=4),
        make(
            "StraightThrough", 8, False, "absmax", axes=(2,), shared=(1, 0), shape=kernel, block=8
        ),
        make("Ridge", 4, True, "minmax", axes=(2, 0, 1), shape=kernel, block=32),
        make("Ridge", 1, True, "rms", rotated=True, trust=0.3, shape=(5, 64), block=32),
        make("Ridge", 4, True, "minmax", rotated=True, axes=(2, 0), shape=(4, 3, 24), block=32),
        make("StraightThrough", 4, False, "rms", rotated=True, trust=1.0, axes=(0,), shape=(48, 5)),
        make("Ridge", 4, False, "absmax", rotated=True, keep=(2, 4), shape=(4, 96), block=32),
        make("Ridge", 2, True, "minmax", ridge_lambda=0.0, shape=(4, 96), block=32),
        make("Ridge", 4, True, "minmax", shape=(70,), block=32),
        make("StraightThrough", 2, True, "rms", trust=0.0, shape=(4, 96), block=32),
        make("StraightThrough", 4, True, "minmax", trust=0.0, shape=(4, 96), block=32),
        make("Ridge", 1, True, "absmean", trust=1.0, shape=(4, 96), block=32),
        make("Ridge", 1.5, False, "absmean", shape=(4, 90), block=32),
        make("StraightThrough", 4, False, "absmean", trust=0.0, shape=(4, 96), block="tensor"),
        make("QuEST", 4, False, "absmean", trust=1.0, shape=(4, 96)),
        make("Ridge", 1, True, "rms", fade=1.6, shape=(4, 96), block=32),
        make("Ridge", 1, True, "rms", fade=1.0, rotated=True, shape=(4, 96), block=32),
        make("Ridge", 1, False, "rms", fade=1.6, keep=(2, 4), shape=(4, 96), block=32),
        make("Ridge", 2, True, "rms", fade=0.5, axes=(2, 0, 1), shape=kernel, block=32),
        make("StraightThrough", 1.5, False, "rms", fade=0.7, trust=1.0, shape=(4, 96), block=32),
        make("Ridge", "fp4", False, "absmax", fade=0.3, shape=(4, 96), block=32),
        make("QuEST", 1, False, "rms", fade=1.3, trust=1.0, shape=(4, 96)),
    ]


def _quest() -> list[Case]:
    """Every grid, dense and pruned; every other one rotated."""
    sizes = itertools.cycle(("channel", 32, 7, "tensor"))
    axes = itertools.cycle(((-1,), (0,), (2, 0)))
    trust = itertools.cycle((1.0, 0.3, None, 1.5))
    keep = itertools.cycle((None, (4, 8)))
    rotated = itertools.cycle((True, True, False, False))
    return [
        make(
            "QuEST",
            bits,
            False,
            next(rules),
            block=next(sizes),
            axes=next(axes),
            trust=next(trust),
            keep=(pattern := next(keep)),
            paired=pattern is not None,
            rotated=next(rotated),
        )
        for rules in (itertools.cycle(("rms", "rms", "absmax")),)
        for bits in BITS
        for _ in range(2)
    ]


CASES = [*_dense(), *_sparse(), *_shaped(), *_quest()]
