"""The demo's table, in the terminal and as Markdown."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.table import Table

from keras_rq.demo.results import Results, Row

COLUMNS = (
    "setting",
    "method",
    "accuracy %",
    "bits per element",
    "file bytes",
    "of float",
    "largest difference",
    "classes differ",
    "latency",
)
_NARROW = 112


def show(results: Results, console: Console) -> None:
    """Prints the table and what it was measured with."""
    table = Table(title="Handwritten digits", title_justify="left", box=box.SIMPLE_HEAD)
    for index, column in enumerate(COLUMNS):
        # Two words share a column's width, one above the other.
        header = column.replace(" ", "\n") if index > 2 else column
        table.add_column(header, justify="right" if index > 1 else "left", no_wrap=True)
    for previous, row in zip((None, *results.rows), results.rows, strict=False):
        if previous and previous.setting != row.setting:
            table.add_section()
        table.add_row(*cells(row, results))
    if not console.is_terminal:
        console = Console(width=max(_NARROW, console.width))
    console.print(table)
    for line in notes(results):
        console.print(line, highlight=False)


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
        f"{row.file.classes_differ}/{results.test_images}",
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
        f"Quantized, both trainings: {results.recipe}. {spread}",
        f"Accuracy: on {results.test_images} images that no model was trained on. "
        "Bits per element: of the kernels, with scales and offsets.",
        "File: made from the best seed of ridge. Largest difference: of its logits from the Keras "
        "model's over all test images; it shows where a rounding tie fell the other way. "
        "Latency: one image on one thread, median, over that of the float file.",
    ]
