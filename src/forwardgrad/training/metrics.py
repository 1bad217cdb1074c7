"""What a run writes down: JSON lines, TensorBoard events, curves. Every whole file is replaced atomically."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from forwardgrad.training.pictures import logarithmic, picture


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file so that a reader sees the old file or the new one, never a part. Lists of numbers stand on one line."""
    text = json.dumps(value, indent=2, allow_nan=True)
    # a line break inside brackets stands in no string
    text = re.sub(r"\[\n\s+([-+.\w,\s]+?)\n\s+\]", lambda found: "[" + " ".join(found[1].split()) + "]", text)
    write_text(path, text + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a file so that a reader sees the old one or the new one, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text)
    os.replace(temporary, path)


class Metrics:
    """`metrics.jsonl` and TensorBoard events of a run.

    A line holds `step`, `epoch` (a fraction), `seconds` (of the run so far), the mean `loss` and `error` (percent) of the classifier on the training
    batches since the line before, `lr`; at the end of an epoch also `epoch_loss`, `epoch_error` and `test_error` or `validation_error` (percent).

    Args:
      directory: of the run.
      step: lines after this step are dropped: they belong to what was lost since the checkpoint.
    """

    def __init__(self, directory: Path, step: int):
        from tensorboardX import SummaryWriter

        self.path = directory / "metrics.jsonl"
        kept = [line for line in read(self.path) if line["step"] <= step]
        write_text(self.path, "".join(json.dumps(line) + "\n" for line in kept))
        self.seconds = kept[-1]["seconds"] if kept else 0.0
        self._lines = self.path.open("a", buffering=1)
        self._events = SummaryWriter(str(directory / "tensorboard"), purge_step=step + 1)

    def write(self, line: Mapping[str, float]) -> None:
        """Append one line."""
        self._lines.write(json.dumps(dict(line)) + "\n")
        for name, value in line.items():
            if name not in ("step", "epoch", "seconds"):
                self._events.add_scalar(name, value, int(line["step"]))

    def close(self) -> None:
        self._lines.close()
        self._events.close()


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of a `metrics.jsonl`; a last line that a killed process left unfinished is dropped."""
    out = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            out.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return out


def draw_curves(directory: Path, title: str) -> None:
    """`curves.png`: the training loss, and training and test error, over epochs."""
    lines = read(directory / "metrics.jsonl")
    if not lines:
        return
    with picture(directory / "curves.png", 1, 2, title) as panels:
        left, right = panels[0]
        _draw_lines(left, right, lines)


def _draw_lines(left: Any, right: Any, lines: list[dict[str, Any]]) -> None:
    epochs = [line["epoch"] for line in lines]
    left.plot(epochs, [line["loss"] for line in lines], color="tab:blue", linewidth=1)
    left.set(xlabel="epoch", ylabel="training loss (nats)", xlim=(0, epochs[-1]))
    logarithmic(left.yaxis)
    ends = [line for line in lines if "epoch_error" in line]
    if not ends:
        shown = [line["error"] for line in lines]
        right.plot(epochs, shown, label="training batches")
    else:
        held_out = "validation_error" if "validation_error" in ends[-1] else "test_error"
        marker = "o" if len(ends) < 3 else None
        x = [line["epoch"] for line in ends]
        shown = []
        for key, label in (
            ("epoch_error", "training batches, mean over the epoch"),
            (held_out, held_out.split("_")[0]),
        ):
            shown += (y := [line[key] for line in ends])
            right.plot(x, y, marker=marker, label=label, clip_on=False)
        last = {"xy": (x[-1], ends[-1][held_out]), "xytext": (6, 0), "textcoords": "offset points"}
        right.annotate(f"{ends[-1][held_out]:.2f}", **last, va="center", color="C1", annotation_clip=False)
    right.set(xlabel="epoch", ylabel="error (%)", xlim=(0, epochs[-1]), ylim=(0, 1.05 * max(*shown, 1.0)))
    right.legend(frameon=False)
