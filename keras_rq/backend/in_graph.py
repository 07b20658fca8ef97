"""Methods that a compiler of Python code must not look into; most backends have none."""

from __future__ import annotations

from typing import Any


def call_in_graph(owner: Any, method: str, x: Any, parameter: Any, name: str) -> Any:
    """`owner.method(x, parameter, name)`."""
    return getattr(owner, method)(x, parameter, name)


def make_known(owner: Any) -> None:
    """Prepares an owner for `call_in_graph`."""
