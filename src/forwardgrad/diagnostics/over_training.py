"""Trains an experiment by several methods, each of which is measured as it trains (`observer.py`): what `forwardgrad diagnose` runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from forwardgrad.diagnostics.alignment import ALL
from forwardgrad.diagnostics.observer import How, Observer, refuse_gaps, stored
from forwardgrad.errors import Diverged
from forwardgrad.presets import Experiment
from forwardgrad.training import auto
from forwardgrad.training.learner import Learner
from forwardgrad.training.loop import finished, refuse_unfit, train
from forwardgrad.training.metrics import read, write_json

FILE = "diagnose.json"


def diagnose(
    experiment: Experiment[Any],
    methods: Sequence[str],
    arrays: Any,
    how: How,
    out: Path,
    *,
    preset: str,
    quiet: bool,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Train and measure by each method, or find it done, and write `diagnose.json`.

    Args:
      experiment: all but the method.
      methods: in order; each has a run directory in `out`.
      arrays: the experiment's data.
      how: to measure.
      out: directory of the results; what is finished there is kept, what was interrupted goes on.
      preset: for the record.
      quiet: show no progress of the training.
      say: is told which method it is, and of each measurement.

    Returns:
      What the file holds: `rows` of layers, `totals` of all layers, `runs`, and what they are of.

    Raises:
      InputError: before anything trains, a method that the network cannot serve; a directory that holds something else.
    """
    experiments = [dataclasses.replace(experiment, method=method) for method in methods]
    refuse_unfit({out / f"{one.method}-seed{one.seed}": one for one in experiments}, arrays)
    common = {name: value for name, value in experiment.to_json().items() if name != "method"}
    made: dict[str, Any] = {"preset": preset, "experiment": common, "methods": methods, **how.to_json()}
    runs, totals, rows = [], [], []
    for number, one in enumerate(experiments):
        say(f"[bold]{one.method}[/bold] ({number + 1} of {len(methods)})")
        directory = out / f"{one.method}-seed{one.seed}"
        result, own = _one(one, arrays, how, directory, preset, quiet, say)
        runs.append(result)
        mine, whole = _split(own, directory)
        rows += mine
        totals += whole
        made = {**made, "runs": runs, "totals": totals, "rows": rows}
        write_json(out / FILE, made)  # after each method, so that something is there to look at
    return made


def mean_degrees(totals: Iterable[dict[str, Any]], method: str, epoch: int) -> float | None:
    """Angle to the gradient of the method's own target, on average over layers; `None` where there is no gradient, or training ended before."""
    rows = [r for r in totals if (r["method"], r["epoch"], r["own_target"]) == (method, epoch, True)]
    return rows[0]["mean_degrees"] if rows else None


def _one(
    one: Experiment[Any],
    arrays: Any,
    how: How,
    directory: Path,
    preset: str,
    quiet: bool,
    say: Callable[[str], None],
) -> tuple[Any, list[Any]]:
    """Train and measure a method, or find it done: what `result.json` holds, and rows."""
    one = auto.chosen(one, arrays)
    result, known = finished(directory, one), stored(directory, how)
    diverged = None
    if result is None:
        learner = Learner(one, arrays)
        observer = Observer(learner, directory, how, say)
        try:
            result = train(one, directory, preset=preset, resume=True, quiet=quiet, learner=learner, observe=observer)
        except Diverged as error:
            none = dict.fromkeys(("test_error", "validation_error", "train_error", "wall_seconds"))
            result, diverged = {"method": one.method, "seed": one.seed, **none}, str(error)
        known = observer.known
    if diverged is None:
        refuse_gaps(directory, known, how.epochs)
    return {**result, "diverged": diverged}, [row for e in sorted(known) if e in how.epochs for row in known[e]]


def _split(own: list[dict[str, Any]], directory: Path) -> tuple[list[Any], list[Any]]:
    """Rows of layers, and rows of all layers together with the means over layers and the errors after that epoch."""
    ends = {round(line["epoch"]): line for line in read(directory / "metrics.jsonl") if "epoch_error" in line}
    rows = [row for row in own if row["layer"] != ALL]
    totals = []
    for whole in (row for row in own if row["layer"] == ALL):
        same = [r for r in rows if (r["epoch"], r["reference"]) == (whole["epoch"], whole["reference"])]
        angles = [r["degrees"] for r in same if r["degrees"] is not None]
        after = ends.get(whole["epoch"], {})
        more = {
            "mean_degrees": sum(angles) / len(angles) if angles else None,
            "train_loss": after.get("epoch_loss"),
            "train_error": after.get("epoch_error"),
            "held_out_error": after.get("test_error", after.get("validation_error")),
        }
        totals.append({**whole, **more})
    return rows, totals
