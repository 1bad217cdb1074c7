"""run a published cell, and compare its error with the paper's."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from forwardgrad import recipes, reproductions
from forwardgrad.cli.options import Places, flags, refuse_idle, tyro_cli
from forwardgrad.errors import Diverged, InputError
from forwardgrad.presets import Experiment
from forwardgrad.presets.experiment import NEEDS, OPTIONS
from forwardgrad.reproductions import curves, measured, records
from forwardgrad.reproductions.cells import Cell, expected

MADE = "made.json"  # in a run's directory: what it was made on and by
ABOUT = (
    "Run PAPER:TABLE[:COLUMN[:METHOD]], one cell or every cell that begins so, and compare the test error with the paper's: in range within the "
    "larger of 0.3 points and three standard deviations on the test images and over the paper's runs, else better or worse. The exit code is 1 "
    "where a run is worse or diverges. The range is that of the paper's whole length: a shortened run (fewer --epochs, or --train-images) is "
    "marked so, and never fails. Repeating the command goes on where it stopped and keeps what is finished."
)


@dataclasses.dataclass(frozen=True)
class Options(Places):
    """Where runs and records go."""

    runs: Path = Path("runs/reproduce")
    """directory of the run directories"""
    results: Path = Path("results")
    """directory of the records, one JSON file per run"""
    quiet: bool = False
    """show no progress"""


def run(argv: list[str]) -> int:
    """`forwardgrad reproduce PAPER:TABLE[:COLUMN[:METHOD]] [flags]`."""
    argv = list(argv)
    tables = [f"{paper}:{table}" for paper, found in reproductions.papers().items() for table in found]
    measurement = reproductions.measurement(argv[0]) if argv else None
    if measurement is not None:
        return _measure(measurement, *argv)
    if argv and not argv[0].startswith("-"):
        cells = reproductions.find(argv.pop(0))
    elif {"-h", "--help"} & set(argv):
        cells = reproductions.find("ren2023:table3")
    else:
        raise InputError(f"forwardgrad reproduce needs a table, a column or a cell: {', '.join(tables)}.")
    about = (
        f"{ABOUT} Tables: {', '.join(tables)}. Defaults are those of {cells[0].name}; name another cell to see its own."
    )
    usage = "PAPER:TABLE[:COLUMN[:METHOD]]"
    jobs: list[tuple[Cell, Experiment[Any]]] = []
    options = Options()
    for cell in cells:
        experiment, options = flags("reproduce", argv, cell.experiment, Options(), about, usage)
        _check(cell, experiment)
        jobs.append((cell, experiment))
    refuse_idle(argv, [experiment for _, experiment in jobs])
    records.commit()  # asked before anything trains, and remembered
    jobs = [(cell, _without_idle(cell, experiment)) for cell, experiment in jobs]
    done = []
    for number, (cell, experiment) in enumerate(jobs):
        if not options.quiet:
            Console(stderr=True).print(f"[bold]{cell.name}[/bold] ({number + 1} of {len(jobs)})", highlight=False)
        done.append(_one(cell, experiment, options))
    _print(jobs, done)
    _draw(cells, done[-1][1], options.results)
    failed = [one for _, one in done if one["verdict"] in ("worse", "diverged") and not one["shortened"]]
    return 1 if failed else 0


def _without_idle(cell: Cell, experiment: Experiment[Any]) -> Experiment[Any]:
    """Flags that have no effect on this cell, though on others, have its own values: it is the same run without them."""
    idle = {name: getattr(cell.experiment, name) for name in {*OPTIONS, *NEEDS} if experiment.idle(name)}
    return dataclasses.replace(experiment, **idle)


def _measure(module: Any, name: str, *argv: str) -> int:
    """A figure without cells: its numbers are measured as a whole, and checked."""
    about = f"{module.__doc__.strip().splitlines()[0]} The exit code is 1 where the measurement does not bear it out."
    kind = getattr(module, "Options", measured.Options)
    options = tyro_cli("reproduce", list(argv), kind, f"forwardgrad reproduce {name}", about, kind())
    out = options.results / name.partition(":")[0]
    say = (lambda line: None) if options.quiet else (lambda line: Console(stderr=True).print(line, highlight=False))
    begin = time.monotonic()
    summary = module.run(out, say=say, **measured.own(options))
    print(f"{summary['said']} ({time.monotonic() - begin:.0f} s)")
    print(", ".join(str(out / file) for file in summary["files"]))
    return 0 if summary["passes"] else 1


def _check(cell: Cell, experiment: Experiment[Any]) -> None:
    """Refuse before the first run what no run could be compared with, or could not train."""
    recipes.find(experiment.method)
    for name, value, its in (
        ("method", experiment.method, cell.experiment.method),
        ("dataset", experiment.dataset, cell.experiment.dataset),
        ("model", type(experiment.model), type(cell.experiment.model)),
        ("validation", experiment.validation, 0),
    ):
        if value != its:
            raise InputError(f"{cell.name} says which {name} is meant: leave --{name} out, or use `forwardgrad train`.")
    experiment.check()


def _one(cell: Cell, experiment: Experiment[Any], options: Options) -> tuple[Path, dict[str, Any]]:
    """Run a cell, or find its experiment finished, and write its record."""
    from forwardgrad.training.metrics import write_json

    stem = records.stem(cell, experiment)
    directory = options.runs / cell.paper / cell.table / stem
    path = options.results / cell.paper / cell.table / f"{stem}.json"
    measured.refuse_unwritable(path.parent)
    try:
        result, made, run = _known(experiment, directory, options.runs) or _run(cell, experiment, directory, options)
    except Diverged as error:
        result, made, run = records.diverged(cell, experiment, str(error)), records.made(), directory
    one = records.record(cell, experiment, result, made, curves.of(run))
    write_json(path, one)
    return path, one


def _run(cell: Cell, experiment: Experiment[Any], directory: Path, options: Options) -> tuple[Any, Any, Path]:
    """Train to the end: result, origin and directory. What it was made by is kept beside the run."""
    from forwardgrad.training.loop import train
    from forwardgrad.training.metrics import write_json

    result = train(
        experiment,
        directory,
        preset=cell.preset,
        resume=True,
        data_dir=options.data_dir,
        offline=options.offline,
        quiet=options.quiet,
    )
    made = records.made()
    write_json(directory / MADE, made)
    return result, made, directory


def _known(experiment: Experiment[Any], own: Path, runs: Path) -> tuple[Any, Any, Path] | None:
    """Result, origin and directory of a finished run of this experiment: the cell's own, or that of another cell (tables share some)."""
    from forwardgrad.training.loop import finished

    others = sorted(path.parent for path in runs.rglob("result.json"))
    for directory in (own, *others):
        result = finished(directory, experiment)
        if result is not None:
            made = directory / MADE
            return result, json.loads(made.read_text()) if made.exists() else records.made(), directory
    return None


def _draw(cells: tuple[Cell, ...], one: dict[str, Any], results: Path) -> None:
    """The figure that the cells are of, from all records like this one."""
    from forwardgrad.reproductions import figures

    paper, table = cells[0].paper, cells[0].table
    found = reproductions.papers()[paper][table]
    order = {cell.name: i for i, cell in enumerate(found.cells)}
    if found.draw is None and not found.curves:
        return
    there = records.alike(records.read(results / paper / table), one)
    path = results / paper / f"{table}.png"
    if figures.draw(path, found, sorted(there, key=lambda r: order.get(records.name_of(r), len(order)))):
        print(f"figure: {path}")


def _print(jobs: list[tuple[Cell, Experiment[Any]]], done: list[tuple[Path, dict[str, Any]]]) -> None:
    table = Table(title="errors in percent, test / train")
    for column in ("cell", "paper", "here", "range", "verdict", "record"):
        table.add_column(column, justify="right" if column in ("paper", "here", "range") else "left", overflow="fold")
    for (cell, _), (path, one) in zip(jobs, done, strict=True):
        between = "{:.2f} to {:.2f}".format(*expected(cell.printed)) if cell.printed else "-"
        theirs, mine = (records.both(one[f"{whose}test_error"], one[f"{whose}train_error"]) for whose in ("paper_", ""))
        table.add_row(cell.name, theirs, mine, between, records.said(one), str(path))
    Console(width=max(Console().width, 170)).print(table)
    for _, one in done:
        if records.bias_of(one):
            print(f"{records.name_of(one)} is {records.bias_of(one)}")
