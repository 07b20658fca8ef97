"""A layer that cannot be made has a row that says so, and the rows of others are made."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import support
import support_layers

pytestmark = pytest.mark.once


def test_errors_are_outcomes_of_their_own_row(monkeypatch):
    import support_models

    def make(name):
        raise RuntimeError(f"{name} cannot be made")

    def half(name):
        made = support_layers.CASES["Dense"].make(name)
        if made.dtype_policy.name == "mixed_float16":
            raise RuntimeError("not at half precision")
        return made

    monkeypatch.setattr(support_models, "EPOCHS", 2)
    monkeypatch.setattr(support_models.Group, "export", lambda self: {})
    cases = {
        "Broken": support_layers.Case(make, (8,)),
        "Half": support_layers.Case(half, (8,)),
    }
    rows = support.measure(cases)
    assert rows["Broken"]["absent"] == "RuntimeError: layer_Broken cannot be made"
    assert not rows["Broken"]["checks"]
    checks = rows["Half"]["checks"]
    assert set(checks) == set(support.CHECKS)
    failed = {name: one["note"] for name, one in checks.items() if not one["works"]}
    assert failed == {"mixed_float16": "RuntimeError: not at half precision"}
