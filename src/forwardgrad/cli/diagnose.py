"""how far a method's estimates are from the gradient, per layer, over training: diagnose.json, diagnose.png."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from forwardgrad.cli.options import Places, method_names, parse
from forwardgrad.errors import InputError
from forwardgrad.presets import Experiment

ABOUT = (
    "Train one experiment by several methods, and measure each method's estimate as it trains: per layer the angle to the true gradient, bias, "
    "variance, and the cosine of one estimate and of the mean of many. The true gradient is that of the method's own target, and of the final "
    "loss where that is another. Repeating the command goes on where it stopped and keeps what is finished."
)


@dataclasses.dataclass(frozen=True)
class Options(Places):
    """What is measured, and where the results go."""

    methods: str = "fg-a,fg-w,dfa,fdfa"
    """names of methods, with commas between them"""
    at: tuple[int, ...] = ()
    """epochs after which estimates are measured, 0 being before the first step; by default 0 and every epoch"""
    draws_for_moments: int = 64
    """estimates with fresh keys from which mean and variance are taken, a multiple of 4, at least 8"""
    examples: int = 0
    """training images of the fixed batch; 0: as many as a training step has"""
    out: Path | None = None
    """directory of the results; runs that are finished there are kept, interrupted ones go on"""
    quiet: bool = False
    """show no progress"""


def run(argv: list[str]) -> int:
    """`forwardgrad diagnose [PRESET] --methods a,b,c --out DIR`."""
    preset, experiment, options = parse("diagnose", argv, Options(), ABOUT)
    methods = method_names(options.methods)
    if options.out is None:
        raise InputError("diagnose needs a directory for its results: add --out DIR.")
    from forwardgrad.diagnostics.alignment_picture import draw
    from forwardgrad.diagnostics.observer import How
    from forwardgrad.diagnostics.over_training import FILE, diagnose
    from forwardgrad.training.loop import load_arrays

    how = How(*_how(experiment, options))
    arrays = load_arrays(experiment, options.data_dir, options.offline)
    if how.examples > len(arrays.train_images):
        raise InputError(
            f"no batch of {how.examples} can be taken from {len(arrays.train_images)} training images: set --examples to at most that."
        )
    say = lambda line: None if options.quiet else Console(stderr=True).print(line, highlight=False)
    found = diagnose(experiment, methods, arrays, how, options.out, preset=preset, quiet=options.quiet, say=say)
    title = f"{' on '.join(dict.fromkeys((preset, experiment.dataset)))}, {how.draws} estimates on {how.examples} images, seed {experiment.seed}"
    drawn = draw(options.out / "diagnose.png", found["rows"], title)
    _print_layers(found["rows"])
    _print_totals(found["totals"], found["runs"])
    print(", ".join(str(options.out / name) for name in (FILE, "diagnose.png")[: 1 + drawn]))
    return 0


def _how(experiment: Experiment[Any], options: Options) -> tuple[tuple[int, ...], int, int]:
    """Epochs, draws and examples of the measurement that the flags ask for."""
    epochs, draws = options.at or tuple(range(experiment.epochs + 1)), options.draws_for_moments
    wrong = [epoch for epoch in epochs if not 0 <= epoch <= experiment.epochs]
    if wrong:
        raise InputError(f"--at {wrong[0]} is no epoch of this run: give numbers from 0 to {experiment.epochs}.")
    if draws < 8 or draws % 4:
        raise InputError(f"--draws-for-moments must be a multiple of 4, at least 8, not {draws}.")
    if options.examples < 0:
        raise InputError(f"--examples must be at least 0, not {options.examples}.")
    return epochs, draws, options.examples or experiment.batch_size


def _shown(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}" if abs(value) < 1e4 else f"{value:.1e}"


def _print_layers(rows: list[dict[str, Any]]) -> None:
    """Degrees after the last measured epoch: a line per layer, a column per method and reference."""
    last = max((row["epoch"] for row in rows), default=0)
    columns = list(dict.fromkeys((r["method"], r["reference"]) for r in rows))
    found = {(r["layer"], r["method"], r["reference"]): r["degrees"] for r in rows if r["epoch"] == last}
    table = Table(title=f"degrees between mean estimate and true gradient, after epoch {last}")
    table.add_column("layer")
    for method, reference in columns:
        table.add_column(f"{method}\n({reference})", justify="right")
    for layer in dict.fromkeys(r["layer"] for r in rows):
        table.add_row(layer, *(_shown(found.get((layer, *column)), 1) for column in columns))
    Console(width=max(Console().width, 120)).print(table)


def _print_totals(totals: list[dict[str, Any]], runs: list[dict[str, Any]]) -> None:
    """All layers as one vector, a line per method and reference."""
    table = Table(title="degrees: mean over layers; the rest: all layers as one vector, after the last epoch")
    for column in ("method", "true gradient of", "degrees, first to last", "cosine of one", "bias", "variance"):
        table.add_column(column, justify="left" if column in ("method", "true gradient of") else "right")
    diverged = {r["method"] for r in runs if r["diverged"]}
    for method, reference in dict.fromkeys((r["method"], r["reference"]) for r in totals):
        mine = [r for r in totals if (r["method"], r["reference"]) == (method, reference)]
        angles, last = [r["mean_degrees"] for r in mine], mine[-1]
        bias = _shown(last["bias"], 3) + ("" if last["bias_se"] is None else f" ± {_shown(last['bias_se'], 3)}")
        table.add_row(
            method + (" (diverged)" if method in diverged else ""),
            f"{reference} loss",
            f"{_shown(angles[0], 1)} to {_shown(angles[-1], 1)}",
            _shown(last["cosine"], 3),
            bias,
            _shown(last["variance"], 2),
        )
    Console(width=max(Console().width, 120)).print(table)
