"""Tables for the README, from the JSON files that the benchmarks write.

    python benchmarks/summary.py benchmarks/results

Prints Markdown of `train_step_*.json`, `peers_*.json`, `nanogpt.json`, `resnet20.json` and
`support.json` in the folder; `--write README.md` puts it between the README's marks.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]
ORDER = ("mlp", "convnet", "nanogpt", "vit_tiny", "wide_block")


def table(head: Sequence[str], lines: Iterable[Sequence[str]], left: int) -> str:
    """A Markdown table; columns from `left` on are aligned to the right."""
    rule = ["---"] * left + ["---:"] * (len(head) - left)
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, rule, *lines))


def ratio(row: Row | None) -> str:
    """A row's step time over float's."""
    if row is None:
        return ""
    return "fails" if row.get("error") else f"{row['ratio']:.2f}"


def ours(rows: Sequence[Row]) -> str:
    """One line for each model and framework, one column for each setting."""
    settings = [s for s in dict.fromkeys(r["setting"] for r in rows) if s != "float"]
    places = dict.fromkeys((r["model"], r["batch"], r["framework"], r["mode"]) for r in rows)
    lines = []
    for place in sorted(places, key=lambda p: (ORDER.index(p[0]), p[1], p[2], p[3] != "eager")):
        found = {r["setting"]: r for r in rows if place == _place(r)}
        floating = found["float"].get("ms")
        lines.append(
            [f"{place[0]}, batch {place[1]}", f"{place[2]}, {place[3]}"]
            + [f"{floating:.2f}" if floating else "fails"]
            + [ratio(found.get(setting)) for setting in settings]
        )
    return table(["model", "framework", "float, ms", *settings], lines, left=2)


def peers(rows: Sequence[Row], setting: str = "A8W8") -> str:
    """One line for each library, framework and mode at one setting, one column for each model."""
    rows = [r for r in rows if r.get("setting") == setting]
    models = dict.fromkeys((r["model"], r["batch"]) for r in rows)
    lines = []
    for place in dict.fromkeys((r["peer"], r["framework"], r["mode"]) for r in rows):
        found = {
            (r["model"], r["batch"]): r
            for r in rows
            if (r["peer"], r["framework"], r["mode"]) == place
        }
        lines.append([place[0], f"{place[1]}, {place[2]}", *(ratio(found.get(m)) for m in models)])
    head = ["library", "framework", *(f"{model}, batch {batch}" for model, batch in models)]
    return table(head, lines, left=2)


def _place(row: Row) -> tuple[Any, ...]:
    return row["model"], row["batch"], row["framework"], row["mode"]


def section(folder: Path, device: str) -> str | None:
    """What was measured on a device ("cpu", "gpu"), or None if nothing was."""
    file = folder / f"train_step_{device}.json"
    if not file.exists():
        return None
    measured = json.loads(file.read_text())
    machine = next(iter(measured["provenance"].values()))["machine"]
    gpu = machine["gpu"] and machine["gpu"].split(",")[0]  # the driver comes after it
    where = gpu or f"CPU, {machine['cores']} cores"
    text = f"Step time on one {where}, over that of the float model (lower is better):\n\n"
    text += ours(measured["rows"])
    others = folder / f"peers_{device}.json"
    if others.exists():
        theirs = json.loads(others.read_text())
        names = {one["accelerator"] for one in theirs["provenance"]["packages"].values()}
        on = "there" if names == {gpu} else f"on one {', '.join(sorted(names))},"
        text += f"\n\nOther libraries {on} at 8 bits, each over its own float model:\n\n"
        text += peers(theirs["rows"])
    return text


def accuracy(folder: Path) -> str | None:
    """The tables of `nanogpt.py` and `resnet20.py`, without the runs that have no place there."""
    # Here, because their tables are made by a function of this module.
    import nanogpt
    import nanogpt_tables
    import resnet20
    import resnet20_tables

    made = []
    for task, tables in ((nanogpt, nanogpt_tables), (resnet20, resnet20_tables)):
        file = folder / f"{task.__name__}.json"
        if file.exists():
            rows = json.loads(file.read_text())["rows"]
            made.append(tables.tables(rows, task.Plans(), with_others=False))
    return "\n\n".join(made) or None


CHECKS = ("fit", "jit", "mixed_bfloat16", "mixed_float16", "save and load", "LiteRT export")
NAMES = {"tensorflow": "TensorFlow", "jax": "JAX", "torch": "PyTorch"}


def support(folder: Path) -> str | None:
    """One line for each layer, one column for each check, reasons as numbered notes."""
    file = folder / "support.json"
    if not file.exists():
        return None
    found: dict[str, dict[str, Row]] = {}
    for row in json.loads(file.read_text())["rows"]:
        found.setdefault(row["layer"], {})[row["backend"]] = row
    notes: dict[str, int] = {}
    lines = []
    for layer, rows in sorted(found.items()):
        spoken = next(iter(rows.values()))["spoken"]
        became = {b: r["quantized"] or f"no: {r['absent']}" for b, r in rows.items()}
        cells = [_cell({b: _outcome(r, check) for b, r in rows.items()}, notes) for check in CHECKS]
        lines.append([f"{layer} {spoken}".strip(), _cell(became, notes), *cells])
    listed = "\n".join(f"{number}. {text}" for text, number in notes.items())
    return table(["layer", "A4W4", *CHECKS], lines, left=2 + len(CHECKS)) + f"\n\n{listed}"


def _outcome(row: Row, check: str) -> str:
    outcome = row["checks"].get(check)
    if outcome is None:
        return f"no: {row['absent']}" if row["absent"] else "not run"
    return (outcome["note"] or "yes") if outcome["works"] else f"no: {outcome['note']}"


def _cell(values: dict[str, str], notes: dict[str, int]) -> str:
    """One word where all backends agree; otherwise that of most, and then the others' by name."""
    short = {b: _short(values.get(b, "not run"), notes) for b in NAMES}
    most, count = Counter(short.values()).most_common(1)[0]
    if count == len(short):
        return most
    if count == 1:
        most = None
    others = [f"{NAMES[backend]}: {text}" for backend, text in short.items() if text != most]
    return "; ".join([most, *others] if most else others)


def _short(text: str, notes: dict[str, int]) -> str:
    word, colon, reason = text.partition(": ")
    if not colon:
        return text
    reason = re.sub(r"\x1b\[\d+m|\s+", " ", reason).replace("|", "/").strip()[:240]
    return f"{word} [{notes.setdefault(reason, len(notes) + 1)}]"


def main() -> None:
    """Prints the tables, or writes them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--write", type=Path, metavar="README")
    options = parser.parse_args()
    sections = [section(options.folder, device) for device in ("cpu", "gpu")]
    text = "\n\n".join(found for found in sections if found is not None)
    made = {"accuracy": accuracy(options.folder), "speed": text, "support": support(options.folder)}
    for name, found in made.items():
        if found is None:
            continue
        if options.write is None:
            print(found)
            continue
        begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
        readme = options.write.read_text()
        marked = re.compile(f"{begin}.*{end}", re.DOTALL)
        if not marked.search(readme):
            parser.error(f"{options.write} has no {begin} ... {end}.")
        whole = f"{begin}\n{found}\n{end}"
        options.write.write_text(marked.sub(lambda _, whole=whole: whole, readme))


if __name__ == "__main__":
    main()
