"""A report as text."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from keras_rq.reports.report import Report, Row

_HEAD = ("layer", "class", "A", "W", "zeros", "bits/elem", "bytes", "energy", "SQNR dB")


def render(report: Report) -> str:
    """The table that `print(report)` shows; reasons for float layers stand below it."""
    rows = [_cells(row) for row in (*report.rows, report.total)]
    widths = [max(len(cell) for cell in column) for column in zip(_HEAD, *rows, strict=True)]
    rule = "  ".join("-" * width for width in widths)
    lines = [report.name, _line(_HEAD, widths), rule, *(_line(r, widths) for r in rows[:-1])]
    lines += [rule, _line(rows[-1], widths)]
    return "\n".join([*lines, *report.lines_below()])


def _cells(row: Row) -> tuple[str, ...]:
    return (
        row.path,
        row.layer,
        _bits(row.activation_bits),
        _bits(row.weight_bits),
        f"{row.sparsity:.0%}" if row.sparsity else "",
        "" if row.bits_per_element is None else f"{row.bits_per_element:.2f}",
        f"{row.nbytes:,}",
        "?" if row.energy is None else _short(row.energy),
        "" if row.sqnr_db is None else f"{row.sqnr_db:.1f}",
    )


def _bits(bits: int | float | str | None) -> str:
    return "" if bits is None else ("float" if bits == 32 else str(bits))


def _short(number: float) -> str:
    for unit in ("", "k", "M", "G", "T"):
        if number < 1000:
            return f"{number:.3g}{unit}"
        number /= 1000
    return f"{number:.3g}P"


def _line(cells: tuple[str, ...], widths: list[int]) -> str:
    text = [
        cell.ljust(width) if i < 2 else cell.rjust(width)
        for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
    ]
    return "  ".join(text).rstrip()
