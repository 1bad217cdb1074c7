"""Pictures: one look for all of them, each file replaced atomically."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def picture(path: Path, rows: int, columns: int, title: str, widths: tuple[float, ...] | None = None) -> Iterator[Any]:
    """Panels `[row][column]` to draw on; the file is written when the block ends.

    Args:
      path: of the PNG.
      rows, columns: of panels.
      title: above all of them.
      widths: of the columns, relative to each other.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    size = (4.8 * columns, 3.6 * rows)
    figure, panels = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False, width_ratios=widths)
    try:
        yield panels
        for axes in panels.flat:
            axes.spines[["top", "right"]].set_visible(False)
        figure.suptitle(title)
        temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
        figure.savefig(temporary, dpi=120)
        os.replace(temporary, path)
    finally:
        plt.close(figure)


def style(k: int) -> dict[str, str]:
    """Colour and dashes of the k-th of many lines: ten colours, then the same dashed."""
    return {"color": f"C{k % 10}", "linestyle": "-" if k % 20 < 10 else "--"}


def logarithmic(axis: Any) -> None:
    """A logarithmic axis (`axes.yaxis`) whose ticks are plain numbers: for what spans a decade or two, as losses do."""
    from matplotlib.ticker import LogLocator, NullLocator

    axis.axes.set(**{f"{axis.axis_name}scale": "log"})
    axis.set(major_locator=LogLocator(subs=(1, 1.5, 2, 3, 5, 7)), minor_locator=NullLocator())
    axis.set_major_formatter("{x:g}")
