"""the same task by several methods: a table, compare.json, compare.png."""

from __future__ import annotations

import dataclasses
import statistics
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from forwardgrad.cli.options import Places, count, method_names, parse
from forwardgrad.errors import Diverged, InputError


@dataclasses.dataclass(frozen=True)
class Options(Places):
    """What is compared, and where the results go."""

    methods: str = "bp,lg-bp,lg-fg-a,fg-a,fg-w"
    """names of methods, with commas between them"""
    seeds: int = 3
    """runs per method, with seeds counted from --seed"""
    out: Path | None = None
    """directory of the results; runs that are finished there are kept, interrupted ones go on"""
    quiet: bool = False
    """show no progress"""


def run(argv: list[str]) -> int:
    """`forwardgrad compare [PRESET] --methods a,b,c --seeds K --out DIR`."""
    preset, experiment, options = parse(
        "compare", argv, Options(), "Train one experiment by several methods, with several seeds."
    )
    methods = method_names(options.methods)
    if options.seeds < 1:
        raise InputError(f"--seeds must be at least 1, not {options.seeds}.")
    if options.out is None:
        raise InputError("compare needs a directory for its results: add --out DIR.")
    from forwardgrad.training import auto
    from forwardgrad.training.learner import Learner
    from forwardgrad.training.loop import finished, load_arrays, refuse_unfit, train
    from forwardgrad.training.metrics import write_json

    runs: list[dict[str, Any]] = []
    arrays = load_arrays(experiment, options.data_dir, options.offline)
    firsts = {options.out / f"{m}-seed{experiment.seed}": dataclasses.replace(experiment, method=m) for m in methods}
    refuse_unfit(firsts, arrays)
    for method in methods:
        learner: Learner | None = None  # one compilation serves all seeds of a method
        for seed in range(experiment.seed, experiment.seed + options.seeds):
            one = auto.chosen(dataclasses.replace(experiment, method=method, seed=seed), arrays)
            directory = options.out / f"{method}-seed{seed}"
            if not options.quiet:
                number = f"({len(runs) + 1} of {options.seeds * len(methods)})"
                Console(stderr=True).print(f"[bold]{method}[/bold], seed {seed} {number}")
            result = finished(directory, one)
            try:
                if result is None:
                    learner = learner.with_seed(seed) if learner else Learner(one, arrays)
                    result = train(one, directory, preset=preset, resume=True, quiet=options.quiet, learner=learner)
                runs.append({**result, "diverged": None})
            except Diverged as error:
                none = dict.fromkeys(("test_error", "validation_error", "train_error", "wall_seconds"))
                runs.append({"method": method, "seed": seed, **none, "diverged": str(error)})
    held_out = "validation_error" if experiment.validation else "test_error"
    table = [_row(method, [r for r in runs if r["method"] == method], held_out) for method in methods]
    common = {name: value for name, value in experiment.to_json().items() if name != "method"}
    write_json(
        options.out / "compare.json",
        {"preset": preset, "experiment": common, "held_out": held_out, "table": table, "runs": runs},
    )
    length = f"{count(experiment.epochs, 'epoch')}, {count(options.seeds, 'seed')}"
    _draw(options.out, methods, runs, held_out, f"{experiment.dataset}, {length}")
    _print(table, held_out)
    print(f"{options.out / 'compare.json'}, {options.out / 'compare.png'}")
    return 0


def _row(method: str, runs: list[dict[str, Any]], held_out: str) -> dict[str, Any]:
    """Mean and sample standard deviation over seeds, in percent; of the runs that did not diverge."""
    row: dict[str, Any] = {
        "method": method,
        "runs": len(runs),
        "diverged": sum(r["diverged"] is not None for r in runs),
    }
    for name in (held_out, "train_error", "wall_seconds"):
        values = [r[name] for r in runs if r.get(name) is not None]
        row[f"{name}_mean"] = statistics.fmean(values) if values else None
        row[f"{name}_sd"] = statistics.stdev(values) if len(values) > 1 else None
    return row


def _print(rows: list[dict[str, Any]], held_out: str) -> None:
    table = Table(title="error in percent, mean ± standard deviation over seeds")
    for column in ("method", held_out.replace("_", " "), "train error", "seconds"):
        table.add_column(column, justify="left" if column == "method" else "right")
    for row in rows:
        cells = []
        for name, digits in ((held_out, 2), ("train_error", 2), ("wall_seconds", 0)):
            mean, sd = row[f"{name}_mean"], row[f"{name}_sd"]
            cells.append(
                "-" if mean is None else f"{mean:.{digits}f}" + (f" ± {sd:.{digits}f}" if sd is not None else "")
            )
        diverged = f" ({row['diverged']} diverged)" if row["diverged"] else ""
        table.add_row(row["method"] + diverged, *cells)
    Console().print(table)


def _draw(out: Path, methods: list[str], runs: list[dict[str, Any]], held_out: str, title: str) -> None:
    """`compare.png`: each method's held-out error over epochs, one thin line per seed, and the final errors."""
    from forwardgrad.training.metrics import read
    from forwardgrad.training.pictures import logarithmic, picture, style

    with picture(out / "compare.png", 1, 2, title, widths=(3, 2)) as panels:
        left, right = panels[0]
        for i, method in enumerate(methods):
            mine = [r for r in runs if r["method"] == method]
            for j, r in enumerate(mine):
                ends = [line for line in read(out / f"{method}-seed{r['seed']}" / "metrics.jsonl") if held_out in line]
                left.plot(
                    [e["epoch"] for e in ends],
                    [e[held_out] for e in ends],
                    linewidth=1,
                    marker="o" if len(ends) < 3 else None,
                    markersize=4,
                    alpha=0.8,
                    label=method if j == 0 else None,
                    **style(i),
                )
            final = [r[held_out] for r in mine if r[held_out] is not None]
            if final:
                right.barh(i, statistics.fmean(final), color=style(i)["color"], alpha=0.5)
                if len(final) > 1:
                    right.plot(final, [i] * len(final), "|", color="black", markersize=10)
                right.annotate(
                    f"{statistics.fmean(final):.2f}", (max(final), i), textcoords="offset points", xytext=(6, -3)
                )
        left.set(xlabel="epoch", ylabel=f"{held_out.replace('_', ' ')} (%)")
        left.set_xlim(0)
        logarithmic(left.yaxis)
        left.legend(frameon=False, fontsize="small", ncols=2)
        right.set(xlabel=f"final {held_out.replace('_', ' ')} (%)", yticks=range(len(methods)), yticklabels=methods)
        right.invert_yaxis()
        right.margins(x=0.15)
