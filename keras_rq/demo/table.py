"""The demo's table, in the terminal and as Markdown."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from keras_rq.demo.results import Results, Row

COLUMNS = (
    "setting",
    "method",
    "accuracy %",
    "bits/element",
    "file bytes",
    "vs float",
    "max diff",
    "classes differ",
    "latency vs float",
)


def show(results: Results, console: Console) -> None:
    """Prints the table and what it was measured with."""
    table = Table(title="Handwritten digits: what was measured", title_justify="left")
    for column in COLUMNS:
        table.add_column(column, justify="left" if column in COLUMNS[:2] else "right")
    for previous, row in zip((None, *results.rows), results.rows, strict=False):
        if previous and previous.setting != row.setting:
            table.add_section()
        table.add_row(*cells(row, results))
    console.print(table)
    for line in notes(results):
        console.print(line, style="dim", highlight=False)


def markdown(results: Results) -> str:
    """The same table for a README."""
    lines = [COLUMNS, ["---"] * 2 + ["---:"] * (len(COLUMNS) - 2)]
    lines += [cells(row, results) for row in results.rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def cells(row: Row, results: Results) -> list[str]:
    """One row as text."""
    reference = results.rows[0].file
    accuracy = f"{100 * row.mean:.2f}"
    if row.spread is not None:
        accuracy += f" ± {100 * row.spread:.2f}"
    text = [row.setting, row.method, accuracy, f"{row.bits_per_element:.2f}"]
    if row.file is None or reference is None:
        return text + ["-"] * 5
    return [
        *text,
        f"{row.file.size:,}",
        f"{row.file.size / reference.size:.2f}x",
        f"{row.file.largest_difference:.1e}",
        f"{row.file.classes_differ} of {results.test_images}",
        f"{row.file.latency_ratio:.2f}x",
    ]


def notes(results: Results) -> list[str]:
    """What a reader needs to know to judge the table."""
    seeds = max(len(row.accuracies) for row in results.rows)
    spread = (
        f"± is the sample standard deviation over {seeds} seeds, which decide the order of images."
        if seeds > 1
        else "One seed: no spread."
    )
    return [
        f"Float: {results.float_recipe}.",
        f"Quantized, both methods: {results.recipe}. {spread}",
        f"Accuracy on {results.test_images} images that were not trained on. The file is made "
        "from the best seed; max diff compares its logits with the Keras model's over all of "
        "them; latency is the median of one image on one thread, files taking turns.",
    ]
