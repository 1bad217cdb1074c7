"""A record: one run of one cell as a JSON file, from which RESULTS.md and the figures are made."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
import shlex
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import forwardgrad
from forwardgrad.diagnostics import cost
from forwardgrad.presets import Experiment
from forwardgrad.reproductions.cells import Cell, verdict

# what the record's name says anyway, and what changes no result
NAMED = ("epochs", "seed", "variant", "microbatch", "executor", "allow_bias")


def changed(cell: Cell, experiment: Experiment[Any]) -> dict[str, Any]:
    """`{field: value}` of the experiment and its model, where they differ from the cell's."""
    out = {}
    for mine, its in ((experiment, cell.experiment), (experiment.model, cell.experiment.model)):
        for field in dataclasses.fields(its):
            if field.name != "model" and getattr(mine, field.name) != getattr(its, field.name):
                out[field.name] = getattr(mine, field.name)
    return out


def variant(experiment: Experiment[Any]) -> str:
    """Which reading of the paper the run follows."""
    return experiment.variant


def is_shortened(cell: Cell, experiment: Experiment[Any]) -> bool:
    """Whether the run sees less than the paper's: fewer epochs, or fewer images."""
    return experiment.epochs < cell.experiment.epochs or experiment.train_images > 0


def stem(cell: Cell, experiment: Experiment[Any]) -> str:
    """The record's name, from everything that decides its numbers: `mnist-m-1-16-lg-fg-a-1000-epochs-seed0`."""
    words = [cell.column, cell.row, variant(experiment)] if variant(experiment) != "paper" else [cell.column, cell.row]
    words += [f"{experiment.epochs}-epochs", f"seed{experiment.seed}"]
    others = {name: value for name, value in changed(cell, experiment).items() if name not in NAMED}
    words += [f"{name.replace('_', '-')}-{_word(value)}" for name, value in sorted(others.items())]
    return "-".join(words)


def _word(value: Any) -> str:
    return re.sub(r"[^\w.+-]+", "-", "x".join(map(str, value)) if isinstance(value, tuple) else str(value))


def command(cell: Cell, experiment: Experiment[Any]) -> str:
    """The command that repeats the run, without the places of this machine."""
    words = ["forwardgrad", "reproduce", cell.name]
    for name, value in changed(cell, experiment).items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words += [f"--{flag}" if value else f"--no-{flag}"]
        else:
            words += [f"--{flag}", *map(str, value if isinstance(value, tuple) else (value,))]
    return shlex.join(words)


def diverged(cell: Cell, experiment: Experiment[Any], message: str) -> dict[str, Any]:
    """In place of `result.json`, for a run that ended before it could write one."""
    none = dict.fromkeys(
        ("steps", "test_error", "validation_error", "train_error", "wall_seconds", "bias", "parameters")
    )
    known = {"method": experiment.method, "preset": cell.preset, "dataset": experiment.dataset, "seed": experiment.seed}
    version = metadata.version("forwardgrad")
    return {**known, "epochs": experiment.epochs, **none, "version": version, "diverged": message}


def record(
    cell: Cell,
    experiment: Experiment[Any],
    result: dict[str, Any],
    made: dict[str, Any],
    curve: dict[str, list[float]] | None = None,
) -> dict[str, Any]:
    """What the file holds: the keys of `result.json`, and what is compared with what, by which command and on what (`made`).

    Args:
      curve: errors over epochs (`curves.of`); the key is left out where there is none.
    """
    printed = cell.printed
    return {
        **result,
        "command": command(cell, experiment),
        "variant": variant(experiment),
        **made,
        "cell": {"paper": cell.paper, "table": cell.table, "column": cell.column, "row": cell.row},
        "changed": changed(cell, experiment),
        "paper_test_error": printed.test if printed else None,
        "paper_train_error": printed.train if printed else None,
        "paper_epochs": cell.experiment.epochs,
        "source": printed.source if printed else None,
        "shortened": is_shortened(cell, experiment),
        "verdict": verdict(result["test_error"], printed),
        **({"curve": curve} if curve else {}),
    }


def made() -> dict[str, Any]:
    """What runs are made on and by: hardware, and the commit of the source."""
    return {"hardware": cost.device(), "commit": commit()}


@functools.cache
def commit() -> str | None:
    """Of the checkout that the package runs from, with "-dirty" where its source is another; `None` where it does not run from one.

    Asked once, when a process begins: the source may be another one when training ends.
    """
    here = Path(forwardgrad.__file__)
    try:
        for words in (("ls-files", "--error-unmatch", here.name), ("rev-parse", "--short", "HEAD")):
            done = subprocess.run(["git", *words], cwd=here.parent, capture_output=True, text=True, check=True)
        words = ["git", "status", "--porcelain", "--", "."]
        changes = subprocess.run(words, cwd=here.parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip() + "-dirty" * bool(changes.stdout.strip())


def said(one: dict[str, Any]) -> str:
    """A record's verdict in words; of a shortened run with the distance from the paper's error."""
    words = one["verdict"] or "no number printed"
    if not one["shortened"]:
        return words
    if one["test_error"] is None or one["paper_test_error"] is None:
        return f"shortened ({words})"
    return f"shortened: {one['test_error'] - one['paper_test_error']:+.2f} ({words})"


def both(test: float | None, train: float | None) -> str:
    """Two errors; a dash for one that is not known."""
    return " / ".join("-" if error is None else f"{error:.2f}" for error in (test, train))


def name_of(one: dict[str, Any]) -> str:
    """Of the record's cell."""
    return ":".join(one["cell"][part] for part in ("paper", "table", "column", "row"))


def bias_of(one: dict[str, Any]) -> str:
    """The largest measured bias in words; empty where the estimate has none."""
    site, size = max((one["bias"] or {}).items(), key=lambda item: item[1], default=("", 0.0))
    if size == 0.0:
        return ""
    return f"biased before training by at most {100 * size:.1f} % of the gradient, at {site}"


def alike(records: list[dict[str, Any]], one: dict[str, Any]) -> list[dict[str, Any]]:
    """The records of one's table that differ from it in cell and seed alone."""
    free = ("seed", "microbatch", "executor")
    what = lambda r: (
        r["cell"]["paper"],
        r["cell"]["table"],
        r["epochs"],
        r["variant"],
        sorted((k, str(v)) for k, v in r["changed"].items() if k not in free),
    )
    return [r for r in records if what(r) == what(one)]


def read(directory: Path) -> list[dict[str, Any]]:
    """Every record below a directory, in the order of their paths; other JSON files are none."""
    found = [json.loads(path.read_text()) for path in sorted(directory.rglob("*.json"))]
    return [one for one in found if isinstance(one, dict) and "cell" in one]
