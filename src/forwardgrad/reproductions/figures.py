"""Pictures of a paper's figures, from records alone."""

from __future__ import annotations

import re
import statistics
from pathlib import Path
from typing import Any

from forwardgrad.reproductions import curves
from forwardgrad.reproductions.cells import Table
from forwardgrad.training.pictures import picture

SPLITS = ("test", "train")


def draw(path: Path, table: Table, records: list[dict[str, Any]]) -> bool:
    """The table's figure from records that differ in cell and seed alone; what they have in common is in the title.

    Returns:
      Whether there was anything to draw: records may have no curves.
    """
    one = records[0]
    images = f", first {one['changed']['train_images']} images" if "train_images" in one["changed"] else ""
    length = (
        f"{one['epochs']} of " if one["epochs"] < one["paper_epochs"] else ""
    ) + f"{one['paper_epochs']} epochs{images}"
    seeds = len({r["seed"] for r in records})
    title = f"{table.title}\n{one['dataset']}, {length}, {seeds} seed{'s' * (seeds > 1)}"
    if table.curves:
        return curves.draw(path, title, table.curves, records)
    with picture(path, 1, 1, title) as panels:
        assert table.draw is not None
        table.draw(panels[0][0], records)
        panels[0][0].title.set_fontsize("small")
    return True


def mean(records: list[dict[str, Any]], column: str | None, row: str, split: str) -> float | None:
    """Over seeds, in percent; `None` without a run that ended."""
    mine = [r for r in records if r["cell"]["row"] == row and column in (None, r["cell"]["column"])]
    values = [r[f"{split}_error"] for r in mine if r[f"{split}_error"] is not None]
    return statistics.fmean(values) if values else None


def bars(axes: Any, records: list[dict[str, Any]]) -> None:
    """Accuracy on test and training images, one pair of bars per row."""
    rows = list(dict.fromkeys(r["cell"]["row"] for r in records))
    for i, split in enumerate(SPLITS):
        errors = [mean(records, None, row, split) for row in rows]
        heights = [0.0 if error is None else 100 - error for error in errors]
        drawn = axes.bar([k + 0.4 * i for k in range(len(rows))], heights, 0.4, label=split)
        said = ["diverged" if error is None else f"{100 - error:.1f}" for error in errors]
        axes.bar_label(drawn, said, fontsize="x-small")
    axes.set_xticks([k + 0.2 for k in range(len(rows))], [row.replace("+", "\n+ ") for row in rows], fontsize="small")
    axes.set(ylabel="accuracy (%)")
    axes.legend(frameon=False)


def lines(axes: Any, records: list[dict[str, Any]]) -> None:
    """Error over the number in the columns' names, one line per method and split."""
    number = lambda column: int(re.sub(r"\D", "", column))
    columns = sorted({r["cell"]["column"] for r in records}, key=number)
    for i, row in enumerate(dict.fromkeys(r["cell"]["row"] for r in records)):
        for split, style in zip(SPLITS, ("o-", "o--"), strict=True):
            points = [(number(c), e) for c in columns if (e := mean(records, c, row, split)) is not None]
            axes.plot(
                *zip(*points, strict=True), style, color=f"C{i}", markersize=4, label=f"{row}, {split}"
            ) if points else None
    axes.set_xscale("log", base=2)
    axes.set_xticks([number(c) for c in columns], [str(number(c)) for c in columns])
    axes.set(xlabel=re.sub(r"-?\d+", "", columns[0]), ylabel="error (%)")
    axes.legend(frameon=False, fontsize="small")
