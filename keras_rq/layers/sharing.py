"""Kernels that are quantized once, though a layer is called many times: several uses, and loops."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from keras.src.backend.common import global_state

from keras_rq import backend


@dataclass
class _Made:
    """What was made in a call of the outermost layer.

    Attributes:
        tensors: the place where each was traced, and the tensor.
        held: keys of those that the loops at hand may use, though their bodies are other traces.
        loops: how many loops are around.
    """

    tensors: dict[Hashable, tuple[Any, Any]] = field(default_factory=dict)
    held: frozenset[Hashable] = frozenset()
    loops: int = 0


_MADE = "keras_rq_made"


def _made_in_this_call() -> _Made | None:
    call = global_state.get_global_attribute("current_call_ctx")
    if call is None:
        return None
    made = global_state.get_global_attribute(_MADE)
    if made is not None:
        return made
    made = call.get_value(_MADE)
    if made is None:
        made = _Made()
        call.set_value(_MADE, made)
    return made


def once_per_call(key: Hashable, make: Callable[[], Any]) -> Any:
    """What `make` makes, once in a call of the outermost layer.

    A layer that a model uses several times then quantizes its kernel once a step, and one gradient
    comes back to it. Tensors of another trace (the body of a loop, say) are not used, but those of
    `held_for_loop` are.
    """
    made, place = _made_in_this_call(), backend.where_traced()
    if made is None or place is None:
        return make()
    known = made.tensors.get(key)
    if known is None or (known[0] != place and key not in made.held):
        known = made.tensors[key] = (place, make())
    return known[1]


@contextmanager
def calls_as_one() -> Iterator[None]:
    """Lets calls that leave all weights as they are share what is made once per call."""
    before = global_state.get_global_attribute(_MADE)
    global_state.set_global_attribute(_MADE, _Made())
    try:
        yield
    finally:
        global_state.set_global_attribute(_MADE, before)


@contextmanager
def held_for_loop(prepare: Callable[[], None]) -> Iterator[None]:
    """Lets a loop within use what `prepare` makes with `once_per_call`.

    The body of a loop is a trace of its own, which may use tensors of the trace around it.
    """
    made, place = _made_in_this_call(), backend.where_traced()
    if made is None or place is None:
        yield
        return
    prepare()
    outer = made.held
    made.held = outer | {key for key, (where, _) in made.tensors.items() if where == place}
    made.loops += 1
    try:
        yield
    finally:
        made.held = outer
        made.loops -= 1


def in_loop() -> bool:
    """Whether the body of a loop of `held_for_loop` is running or being traced."""
    made = _made_in_this_call()
    return made is not None and made.loops > 0
