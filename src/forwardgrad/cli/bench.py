"""seconds per step, memory and operations of methods: bench.json, bench.png."""

from __future__ import annotations

import dataclasses
import os
from importlib import metadata
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from forwardgrad.cli.options import method_names, parse
from forwardgrad.data.files import make_folder
from forwardgrad.errors import InputError

REFERENCES = ("bp", "bp-checkpointed")
# of an experiment, what a step on random images does not depend on
UNUSED = (
    "epochs",
    "lr",
    "schedule",
    "decay",
    "warmup_epochs",
    "pixels",
    "flip",
    "crop",
    "seed",
    "train_images",
    "validation",
    "allow_bias",
)


@dataclasses.dataclass(frozen=True)
class Options:
    """What is measured, and where the results go."""

    methods: str = "bp,bp-checkpointed,lg-bp,lg-fg-a"
    """names of methods, with commas between them; bp is always measured, for the ratios"""
    over_blocks: tuple[int, ...] = ()
    """also measure these numbers of blocks, everything else as in the preset"""
    over_groups: tuple[int, ...] = ()
    """also measure these numbers of groups"""
    over_batch: tuple[int, ...] = ()
    """also measure these batch sizes"""
    microbatches: tuple[int, ...] = ()
    """sizes to try for each method, in place of --microbatch; 0 is the whole batch; by default 4, 8, 16 and 0 on a CPU; the whole batch
    elsewhere, and where the result would be another.
    The fastest one that fits in memory counts"""
    repeats: int = 5
    """timed steps of each method, interleaved; the median counts"""
    peak: bool = True
    """also measure the real peak of memory, each in a process of its own"""
    out: Path | None = None
    """directory of the results"""


def run(argv: list[str]) -> int:
    """`forwardgrad bench [PRESET] --methods a,b --out DIR`."""
    about = "Measure what a training step costs, on random images of the data set's shape."
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # or no second process could measure its peak
    preset, experiment, options = parse("bench", argv, Options(), about, unused=UNUSED)
    methods = method_names(options.methods)
    if options.out is None:
        raise InputError("bench needs a directory for its results: add --out DIR.")
    if options.repeats < 1:
        raise InputError(f"--repeats must be at least 1, not {options.repeats}.")
    from forwardgrad import data
    from forwardgrad.diagnostics import cost
    from forwardgrad.training.metrics import write_json

    arrays = data.find(experiment.dataset)
    task = cost.Task(experiment, tuple(arrays.shape), arrays.classes)
    console = Console(stderr=True)
    rows: list[dict[str, Any]] = []
    product = cost.product().run
    sizes = _sizes(task, options)
    for one in (one for size in sizes for one in _by_method(size, methods).values()):
        cost.refuse(one, options.microbatches)
    make_folder(options.out, "choose another --out")
    for size in sizes:
        title = ", ".join(f"{name} {value}" for name, value in _size(size).items() if value is not None)
        console.print(f"[bold]{title}[/bold]")
        rows += _measure(size, methods, options, product, console)
        write_json(options.out / "bench.json", rows)
    _draw(options.out, rows, f"{preset}, {experiment.dataset} shape")
    _print(rows)
    print(f"{options.out / 'bench.json'}, {options.out / 'bench.png'}")
    return 0


def _size(task: Any) -> dict[str, int | None]:
    model = task.experiment.model
    return {
        "blocks": getattr(model, "blocks", len(task.network.blocks)),
        "groups": getattr(model, "groups", None),
        "batch": task.experiment.batch_size,
    }


def _sizes(task: Any, options: Options) -> list[Any]:
    """The preset's size first, then one with each value of each sweep."""
    out = [task]
    for name, values in (("blocks", options.over_blocks), ("groups", options.over_groups)):
        if values and not hasattr(task.experiment.model, name):
            raise InputError(f"this model has no {name} to vary: leave --over-{name} out, or choose another --model.")
        for value in values:
            model = dataclasses.replace(task.experiment.model, **{name: value})
            out.append(task._replace(experiment=dataclasses.replace(task.experiment, model=model)))
    out += [task._replace(experiment=dataclasses.replace(task.experiment, batch_size=n)) for n in options.over_batch]
    for one in out:
        # impossible sizes are refused before they are looked at
        dataclasses.replace(one.experiment, microbatch=0).check()
        one.network  # noqa: B018
    return [one for i, one in enumerate(out) if _size(one) not in [_size(other) for other in out[:i]]]


def _by_method(task: Any, methods: list[str]) -> dict[str, Any]:
    """The task by each method, and by `bp`."""
    wanted = [*methods, *(["bp"] if "bp" not in methods else [])]
    return {m: task._replace(experiment=dataclasses.replace(task.experiment, method=m)) for m in wanted}


def _measure(task: Any, methods: list[str], options: Options, product: Any, console: Console) -> list[dict[str, Any]]:
    """Rows of all methods at one size; each method at its own fastest microbatch, then all of them interleaved."""
    from forwardgrad.diagnostics import cost

    tasks = _by_method(task, methods)
    sizes = {method: list(options.microbatches) or cost.microbatches(one) for method, one in tasks.items()}
    best, tried = {}, {}
    for method, one in tasks.items():
        with console.status(f"{method}: microbatches of {', '.join(str(s) if s else 'all' for s in sizes[method])}"):
            best[method], tried[method] = cost.fastest(one, sizes[method], 2)
    forwards = {
        s: cost.forward(cost.with_microbatch(task, s)) for s in sorted({s for one in sizes.values() for s in one})
    }
    with console.status(f"timing {', '.join(tasks)}"):
        runs: dict[Any, Any] = {m: t.compiled.run for m, t in best.items() if cost.fits(t.compiled)}
        runs |= {("forward", s): f.run for s, f in forwards.items()}
        taken = cost.seconds(runs | {"product": product}, options.repeats)
    forward = min(taken["forward", s] for s in forwards)
    rows = []
    for method in methods:
        one = cost.with_microbatch(tasks[method], best[method].microbatch)
        mine = taken.get(method)  # None: what would not fit in memory is not run, and its size is XLA's estimate
        ratio = lambda other, mine=mine: None if mine is None or other is None else mine / other
        with console.status(f"{method}: memory and operations"):
            rows.append(
                {
                    "method": method,
                    **_size(task),
                    "guess": task.experiment.guess,
                    "draws": task.experiment.draws,
                    "precision": task.experiment.precision,
                    "seconds_per_step": mine,
                    "fits": mine is not None,
                    "forward_seconds": forward,
                    "product_gflop_per_second": 2 * 8192 * 512 * 512 / 1e9 / taken["product"],
                    "ratio_to_forward": ratio(forward),
                    **{f"ratio_to_{r.replace('-', '_')}": ratio(taken.get(r)) for r in REFERENCES},
                    "temp_mib": best[method].compiled.temp_mib,
                    "held_mib": best[method].compiled.held_mib,
                    "peak_mib": cost.peak_mib(one) if options.peak and mine is not None else None,
                    "gflop": cost.gflop_by_xla(one),
                    "gflop_by_hand": cost.gflop_by_hand(one),
                    "compile_seconds": best[method].compiled.compile_seconds,
                    "microbatch": best[method].microbatch,
                    "executor": "streamed" if cost.is_streamed(one) else "whole",
                    "tried": [
                        {"microbatch": t.microbatch, "seconds_per_step": t.seconds, "temp_mib": t.compiled.temp_mib}
                        for t in tried[method]
                    ],
                    "device": cost.device(),
                    "version": metadata.version("forwardgrad"),
                }
            )
    return rows


def _print(rows: list[dict[str, Any]]) -> None:
    table = Table(title="one step: median seconds, each method at its own fastest microbatch")
    columns = (
        "method",
        "blocks",
        "groups",
        "batch",
        "s",
        "/ forward",
        "/ bp",
        "temp MiB",
        "peak MiB",
        "GFLOP",
        "compile s",
        "microbatch",
        "executor",
    )
    for name in columns:
        table.add_column(name, justify="left" if name in ("method", "executor") else "right")
    show = lambda x, digits: "-" if x is None else f"{x:.{digits}f}"
    for row in rows:
        table.add_row(
            row["method"],
            *(str(row[name] if row[name] is not None else "-") for name in ("blocks", "groups", "batch")),
            show(row["seconds_per_step"], 3),
            show(row["ratio_to_forward"], 2),
            show(row["ratio_to_bp"], 2),
            show(row["temp_mib"], 1),
            show(row["peak_mib"], 0),
            show(row["gflop"] or row["gflop_by_hand"], 1),
            show(row["compile_seconds"], 1),
            str(row["microbatch"] or "all"),
            row["executor"],
        )
    Console(width=140).print(table)


def _draw(out: Path, rows: list[dict[str, Any]], title: str) -> None:
    """`bench.png`: time and temporary memory of each method, over what was varied (one row of panels for each)."""
    from forwardgrad.training.pictures import picture

    methods = list(dict.fromkeys(row["method"] for row in rows))
    first = {name: rows[0][name] for name in ("blocks", "groups", "batch")}
    others = lambda name: [n for n in first if n != name]
    varied = [n for n in first if len({r[n] for r in rows if all(r[o] == first[o] for o in others(n))}) > 1]
    with picture(out / "bench.png", max(len(varied), 1), 2, title) as panels:
        measures = (("seconds_per_step", "seconds per step"), ("temp_mib", "temporary memory (MiB)"))
        for row_of_panels, name in zip(panels, varied or [""], strict=True):
            for axes, (key, label) in zip(row_of_panels, measures, strict=True):
                if not name:
                    values = [next(r[key] for r in rows if r["method"] == m) or 0.0 for m in methods]
                    axes.barh(methods, values, color=[f"C{i % 10}" for i in range(len(methods))], alpha=0.6)
                    for i, value in enumerate(values):
                        axes.annotate(f"{value:.3g}", (value, i), textcoords="offset points", xytext=(4, -3))
                    axes.invert_yaxis()
                    axes.margins(x=0.15)
                    axes.set(xlabel=label)
                    continue
                for i, method in enumerate(methods):
                    mine = [r for r in rows if r["method"] == method and all(r[o] == first[o] for o in others(name))]
                    mine.sort(key=lambda r: r[name])
                    axes.plot(
                        [r[name] for r in mine if r[key] is not None],
                        [r[key] for r in mine if r[key] is not None],
                        "o-",
                        color=f"C{i % 10}",
                        label=method,
                        markersize=4,
                    )
                axes.set(xlabel=name, ylabel=label, xscale="log", yscale="log")
                ticks = sorted({r[name] for r in rows})
                axes.set_xticks(ticks, [str(t) for t in ticks])
                axes.minorticks_off()
        if varied:
            panels[0][0].legend(frameon=False, fontsize="small")
