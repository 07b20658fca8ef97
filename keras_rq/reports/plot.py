"""A report as a picture."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from keras_rq.reports.report import Report


def plot(report: Report, path: str) -> None:
    """Draws stored bytes against float32, and the error of the kernels, layer by layer.

    Args:
        report: what to draw.
        path: image file; the suffix says the format.

    Raises:
        ImportError: without matplotlib.
        ValueError: if no layer has a kernel.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("Plots need matplotlib: pip install 'keras-rq[plots]'.") from error
    rows = [row for row in report.rows if row.kernel_elements]
    if not rows:
        raise ValueError(f"Model {report.name!r} has no layer with a kernel to draw.")
    figure = Figure(figsize=(9, 1.6 + 0.32 * len(rows)), layout="constrained")
    size, error = figure.subplots(1, 2, sharey=True)
    names = [row.path for row in rows]
    places = range(len(rows))
    size.barh(places, [row.parameters * 4 / 1024 for row in rows], color="#d5d9e0", label="float32")
    size.barh(places, [row.nbytes / 1024 for row in rows], color="#2f6db3", label="stored")
    size.set_yticks(places, names)
    size.invert_yaxis()
    size.set_xlabel("size (KiB)")
    size.legend(frameon=False)
    error.barh(places, [row.sqnr_db or 0.0 for row in rows], color="#c9703a")
    error.set_xlabel("signal to quantization noise of the kernels (dB)")
    for axes in (size, error):
        axes.spines[["top", "right"]].set_visible(False)
    bits = report.total.bits_per_element
    figure.suptitle(f"{report.name}: {bits:.2f} bits per kernel element", fontsize=11)
    figure.savefig(path, dpi=150)
