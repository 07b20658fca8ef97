"""Rows of a benchmark in a JSON file that is whole at any time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

Row = dict[str, Any]


class RowsFile:
    """Rows and what they belong to.

    Args:
        path: the file, read if it exists; None keeps the rows in memory only.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        exists = path is not None and path.exists()
        content = json.loads(path.read_text()) if exists else {}
        self.provenance: dict[str, Any] = content.get("provenance", {})
        self.rows: list[Row] = content.get("rows", [])

    def write(self) -> None:
        """Replaces the file in one move, so that an interruption leaves the old one."""
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        new = self.path.with_name(self.path.name + ".new")
        new.write_text(json.dumps({"provenance": self.provenance, "rows": self.rows}, indent=1))
        new.replace(self.path)
