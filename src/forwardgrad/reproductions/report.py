"""RESULTS.md from the records in `results/` alone: `python -m forwardgrad.reproductions.report [RESULTS] [FILE]`."""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any

from forwardgrad import reproductions
from forwardgrad.reproductions import records
from forwardgrad.training.metrics import write_text

HEAD = """# Results

Published numbers, run again: one row per run, made from the files in `{results}` by `python -m forwardgrad.reproductions.report`. Errors in percent,
test / train. A test error is *in range* where it is no farther from the paper's than 0.3 points or three standard deviations, whichever is more:
binomial on the test images, and the paper's own ± over runs where it prints one; *better* is below that and *worse* above. The train error does not
decide.
"""
SHORT = """
Where the epochs are "N of M", or only the first images are used, a shortened run stands in for one of the paper's length: its verdict compares it
with a number that took all of them, and says by how much it is off.
"""
MEASURED = """
### {title}

Measured by `forwardgrad reproduce {name}`, {verdict}: {said}.
"""
MEANS = """
Means over seeds, ± the standard deviation of one:

"""
MEAN_COLUMNS = ("column", "method", "paper", "here", "epochs", "seeds")
COLUMNS = ("column", "method", "paper", "here", "verdict", "epochs", "seed", "variant", "time", "hardware", "command")
OF_PAPER = ("paper", "verdict", "variant")  # columns without use where the paper prints nothing


def report(results: Path) -> str:
    """The text of RESULTS.md.

    Args:
      results: directory of the records.
    """
    found = records.read(results)
    parts = [HEAD.format(results=f"{results.name}/")]
    papers = reproductions.papers()
    drawn = {(paper, table) for paper in papers for table in papers[paper] if _picture(results, paper, table).exists()}
    for paper in sorted({one["cell"]["paper"] for one in found} | {paper for paper, _ in drawn}):
        parts.append(f"\n## {paper}\n")
        known = papers.get(paper, {})
        there = {one["cell"]["table"] for one in found if one["cell"]["paper"] == paper}
        there |= {table for its, table in drawn if its == paper}
        for table in sorted(there, key=lambda name: (_place(name, list(known)), name)):
            title, cells = (known[table].title, known[table].cells) if table in known else (table, ())
            order = [cell.name for cell in cells]
            mine = [one for one in found if (one["cell"]["paper"], one["cell"]["table"]) == (paper, table)]
            mine.sort(
                key=lambda one: (_place(records.name_of(one), order), one["shortened"], -one["epochs"], one["command"])
            )
            parts.append(_section(title, mine) if mine else _measured(title, paper, table, results))
            if (paper, table) in drawn:
                parts.append(f"\n![{title}]({results.name}/{paper}/{table}.png)\n")
    if not found:
        parts.append("\nThere is no record yet.\n")
    return "".join(parts)


def _measured(title: str, paper: str, table: str, results: Path) -> str:
    """What the module that measures a figure concludes from the numbers that are stored."""
    module, stored = reproductions.measurement(f"{paper}:{table}"), results / paper / f"{table}.json"
    if module is None or not stored.exists():  # a picture alone
        return f"\n### {title}\n"
    concluded = module.conclude(json.loads(stored.read_text()))
    verdict = "which bears it out" if concluded["passes"] else "which does **not** bear it out"
    return MEASURED.format(title=title, name=f"{paper}:{table}", verdict=verdict, said=concluded["said"])


def _picture(results: Path, paper: str, table: str) -> Path:
    return results / paper / f"{table}.png"


def _place(name: str, order: list[str]) -> int:
    """In the paper's order; last where the paper is not known to have it."""
    return order.index(name) if name in order else len(order)


def _section(title: str, found: list[dict[str, Any]]) -> str:
    printed = any(one["paper_test_error"] is not None for one in found)
    rows, means = _table(COLUMNS, [_row(one) for one in found], printed), _table(MEAN_COLUMNS, _means(found), printed)
    notes = [f"`{one['command']}` is {records.bias_of(one)}." for one in found if records.bias_of(one)]
    short = SHORT if printed and any(one["shortened"] for one in found) else ""
    more = "".join(f"\n{note}\n" for note in dict.fromkeys(notes))
    return f"\n### {title}\n{short}\n{rows}" + (MEANS + means if means else "") + more


def _table(columns: tuple[str, ...], rows: list[tuple[str, ...]], printed: bool) -> str:
    """In Markdown; empty without rows."""
    kept = [
        i
        for i, name in enumerate(columns)
        if printed or name not in OF_PAPER or (name == "variant" and {row[i] for row in rows} != {"paper"})
    ]
    lines = [columns, ("---",) * len(columns), *rows] if rows else []
    return "".join(f"| {' | '.join(row[i] for i in kept)} |\n" for row in lines)


def _means(found: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    """A row for each cell that several seeds ran, all else equal; those that diverged are left out, and not counted."""
    rows, done = [], []
    for one in found:
        same = [r for r in records.alike(found, one) if r["cell"] == one["cell"] and r["test_error"] is not None]
        if len(same) < 2 or same in done:
            continue
        done.append(same)
        over = lambda key, same=same: [r[key] for r in same if r[key] is not None]
        rows.append(
            (
                one["cell"]["column"],
                one["cell"]["row"],
                records.both(one["paper_test_error"], one["paper_train_error"]),
                " / ".join(map(_mean, (over("test_error"), over("train_error")))),
                _epochs(one),
                ", ".join(str(seed) for seed in sorted(r["seed"] for r in same)),
            )
        )
    return rows


def _mean(errors: list[float]) -> str:
    return f"{statistics.fmean(errors):.2f} ± {statistics.stdev(errors):.2f}" if len(errors) > 1 else "-"


def _epochs(one: dict[str, Any]) -> str:
    epochs = f"{one['epochs']} of {one['paper_epochs']}" if one["epochs"] != one["paper_epochs"] else str(one["epochs"])
    images = one["changed"].get("train_images")
    return epochs + (f", first {images} images" if images else "")


def _row(one: dict[str, Any]) -> tuple[str, ...]:
    return (
        one["cell"]["column"],
        one["cell"]["row"],
        records.both(one["paper_test_error"], one["paper_train_error"]),
        "diverged" if one["verdict"] == "diverged" else records.both(one["test_error"], one["train_error"]),
        records.said(one),
        _epochs(one),
        str(one["seed"]),
        one["variant"],
        "-" if one["wall_seconds"] is None else _time(one["wall_seconds"]),
        one["hardware"],
        f"`{one['command']}`",
    )


def _time(seconds: float) -> str:
    return (
        f"{seconds:.0f} s"
        if seconds < 100
        else f"{seconds / 60:.0f} min"
        if seconds < 6000
        else f"{seconds / 3600:.1f} h"
    )


def main(argv: list[str]) -> int:
    """Write RESULTS.md, or the second argument, from `results`, or the first: the exit code, 2 where there is nothing to write it from."""
    results, path = (*map(Path, argv[:2]), *(Path("results"), Path("RESULTS.md"))[len(argv) :])
    if len(argv) > 2 or not any(results.rglob("*.json")):
        print(f"{results} holds no records: give the directory of results, and the file to write.", file=sys.stderr)
        return 2
    write_text(path, report(results))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
