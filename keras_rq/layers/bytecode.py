"""What the methods of a class do, as far as their code tells."""

from __future__ import annotations

import dis
import inspect
from collections.abc import Collection, Iterator
from types import CodeType
from typing import Any

_NAMED = ("LOAD_GLOBAL", "LOAD_ATTR", "LOAD_METHOD", "LOAD_DEREF", "IMPORT_FROM")


def codes_of(cls: type) -> dict[str, CodeType]:
    """The code of what a class defines itself, by name: methods of all kinds, and properties."""
    found = {name: _code(member) for name, member in vars(cls).items()}
    return {name: code for name, code in found.items() if code is not None}


def _code(member: Any) -> CodeType | None:
    if isinstance(member, property):
        member = member.fget
    if isinstance(member, (staticmethod, classmethod)):
        member = member.__func__
    return getattr(inspect.unwrap(member), "__code__", None) if callable(member) else None


def operations_in(code: CodeType, names: Collection[str]) -> Iterator[str]:
    """Which of some operations, and of "@", the code calls; methods of `self` are others."""
    loaded = None
    for step in dis.get_instructions(code):
        if step.opname in _NAMED and step.argval in names and loaded != "self":
            yield step.argval
        if step.opname == "BINARY_OP" and step.argrepr.startswith("@"):
            yield "@"
        loaded = step.argval
        if "FAST_LOAD_FAST" in step.opname:  # of newer Pythons: two variables
            loaded = loaded[-1]
    for inner in _inner(code):
        yield from operations_in(inner, names)


def names_in(code: CodeType) -> set[str]:
    """The names of globals and attributes that the code uses."""
    return set(code.co_names).union(*(names_in(inner) for inner in _inner(code)))


def _inner(code: CodeType) -> Iterator[CodeType]:
    """Functions and comprehensions within."""
    return (constant for constant in code.co_consts if isinstance(constant, CodeType))
