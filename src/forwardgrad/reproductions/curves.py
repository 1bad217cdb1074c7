"""Errors over epochs: what a record keeps of a run's `metrics.jsonl`, and pictures of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from forwardgrad.training.metrics import read
from forwardgrad.training.pictures import logarithmic, picture, style

POINTS = 200  # of a record's curve, at most
# key of a record's curve: key of a line of metrics.jsonl
KEYS = {"train_loss": "epoch_loss", "train_error": "epoch_error", "test_error": "test_error"}
LABELS = {
    "train_loss": "training loss (nats)",
    "train_error": "error on the training batches (%)",
    "test_error": "test error (%)",
    "test_accuracy": "test accuracy (%)",
}


def of(run: Path) -> dict[str, list[float]] | None:
    """`{"epoch", "train_loss", "train_error", "test_error": [...]}` of a run's directory, at most `POINTS` epochs; `None` before the first ends.

    Loss and error of training are means over the epoch's batches as they were trained on, of the classifier; the test error is that after the
    epoch. Of a longer run epochs at even distances are kept, the first and the last among them.
    """
    ends = [line for line in read(run / "metrics.jsonl") if all(key in line for key in KEYS.values())]
    if not ends:
        return None
    last = len(ends) - 1
    kept = range(len(ends)) if last < POINTS else sorted({round(last * i / (POINTS - 1)) for i in range(POINTS)})
    epochs: dict[str, list[float]] = {"epoch": [round(ends[i]["epoch"]) for i in kept]}
    return epochs | {name: [round(ends[i][key], 5) for i in kept] for name, key in KEYS.items()}


def draw(path: Path, title: str, quantities: tuple[str, ...], records: list[dict[str, Any]]) -> bool:
    """A panel for each column of the table (down) and each quantity (across); a line per record, a colour per method.

    Args:
      path: of the PNG.
      title: above all panels.
      quantities: keys of curves, or `test_accuracy`.
      records: those without a curve are left out.

    Returns:
      Whether there was anything to draw.
    """
    known = [one for one in records if one.get("curve")]
    if not known:
        return False
    columns = list(dict.fromkeys(one["cell"]["column"] for one in known))
    rows = list(dict.fromkeys(one["cell"]["row"] for one in known))
    with picture(path, len(columns), len(quantities), title) as panels:
        for i, column in enumerate(columns):
            mine = [one for one in known if one["cell"]["column"] == column]
            for axes, quantity in zip(panels[i], quantities, strict=True):
                _lines(axes, mine, rows, quantity)
                axes.set(xlabel="epoch", ylabel=LABELS[quantity])
                axes.xaxis.get_major_locator().set_params(integer=True)
                axes.set_title(column if len(columns) > 1 else "", fontsize="medium")
        panels[0][-1].legend(frameon=False, fontsize="small", loc="upper left", bbox_to_anchor=(1.01, 1))
    return True


def _lines(axes: Any, records: list[dict[str, Any]], rows: list[str], quantity: str) -> None:
    for k, row in enumerate(rows):
        # an empty line puts every method into the key, whichever panel it stands in
        axes.plot([], [], label=row, **style(k))
        for one in (one for one in records if one["cell"]["row"] == row):
            curve = one["curve"]
            y = [100 - e for e in curve["test_error"]] if quantity == "test_accuracy" else curve[quantity]
            marker = "o" if len(y) < 3 else None
            axes.plot(curve["epoch"], y, linewidth=1, marker=marker, markersize=3, alpha=0.85, **style(k))
    if quantity == "train_loss":
        logarithmic(axes.yaxis)
