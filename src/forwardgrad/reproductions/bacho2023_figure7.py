"""Bacho & Chu 2023, Figure 7: angle between the mean estimate and the gradient, layer by layer, over epochs of MNIST, by dfa, dkp and fdfa.

    forwardgrad reproduce bacho2023:figure7 --epochs 10

The preset `bacho-mnist-fc`, the paper's network of five layers, trained and measured as `forwardgrad diagnose bacho-mnist-fc --methods dfa,dkp,fdfa
--guess gaussian` does it: before the first step and after every epoch, on one batch. None of the three estimates varies once its feedback is given,
so that eight estimates, the fewest that are taken, have the exact mean. The paper trains for 100 epochs, the default.

After 5 epochs (or the last, if there are fewer) the angle of `fdfa`, on average over hidden layers, must be at least 15 degrees below that of `dfa`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from forwardgrad.diagnostics.alignment_picture import draw_angles
from forwardgrad.presets.bacho_mnist_fc import preset
from forwardgrad.reproductions import measured
from forwardgrad.training.metrics import write_json

PRESET = "bacho-mnist-fc"
METHODS = ("dfa", "dkp", "fdfa")
DRAWS = 8
BELOW, AFTER = 15.0, 5  # degrees; epochs


@dataclasses.dataclass(frozen=True)
class Options(measured.OnData):
    """Length and place of the runs."""

    epochs: int = preset.epochs
    """passes over the training images; the learning rate does not depend on how many there will be"""
    hidden: tuple[int, ...] = preset.model.hidden
    """units of each hidden layer"""
    train_images: int = 0
    """use only the first N training images; 0: all"""
    runs: Path = Path("runs/reproduce")
    """directory of the run directories; runs that are finished there are kept, interrupted ones go on"""


def run(
    out: Path,
    *,
    say: Callable[[str], None] = print,
    data_dir: Path | None = None,
    offline: bool = False,
    epochs: int = preset.epochs,
    hidden: tuple[int, ...] = preset.model.hidden,
    train_images: int = 0,
    runs: Path = Path("runs/reproduce"),
) -> dict[str, Any]:
    """Train and measure, or find it done; write `figure7.json` and `figure7.png`.

    Args:
      out: folder of the files.
      say: is told of progress.
      data_dir, offline, epochs, hidden, train_images, runs: see `Options`.

    Returns:
      What `conclude` says of it, and `files`.
    """
    from forwardgrad.diagnostics.observer import How
    from forwardgrad.diagnostics.over_training import diagnose
    from forwardgrad.training.loop import load_arrays

    model = dataclasses.replace(preset.model, hidden=hidden)
    one = dataclasses.replace(preset, model=model, epochs=epochs, train_images=train_images, guess="gaussian")
    one.check()
    how = How(tuple(range(epochs + 1)), DRAWS, one.batch_size)
    arrays = load_arrays(one, data_dir, offline)
    measured.refuse_unwritable(out)
    words = ["figure7", f"{epochs}-epochs"]
    words += [f"hidden-{'x'.join(map(str, hidden))}"] if hidden != preset.model.hidden else []
    words += [f"train-images-{train_images}"] if train_images else []
    place = runs / "bacho2023" / "-".join(words)
    found = diagnose(one, METHODS, arrays, how, place, preset=PRESET, quiet=True, say=say)
    write_json(out / "figure7.json", found)
    draw_angles(
        out / "figure7.png", found["rows"], f"Angle between mean estimate and gradient, {epochs} epochs of MNIST"
    )
    return {**conclude(found), "files": ["figure7.json", "figure7.png"]}


def conclude(found: dict[str, Any]) -> dict[str, Any]:
    """What the angles say.

    Returns:
      `passes` where that of `fdfa` is at least 15 degrees below that of `dfa`; `degrees` of every method on average over hidden layers, `said`.
    """
    from forwardgrad.diagnostics.over_training import mean_degrees

    at = min(AFTER, max((row["epoch"] for row in found["totals"]), default=0))
    degrees = {method: mean_degrees(found["totals"], method, at) for method in METHODS}
    dfa, fdfa = (degrees[method] for method in ("dfa", "fdfa"))
    listed = ", ".join(f"{method} {'-' if value is None else f'{value:.1f}'}" for method, value in degrees.items())
    return {
        "passes": dfa is not None and fdfa is not None and fdfa <= dfa - BELOW,
        "said": f"degrees on average over hidden layers after {at} epochs: {listed}",
        "degrees": degrees,
    }
