"""Published tables, cell by cell: each module of this folder with `tables` is a paper, named after its file.

A cell's name is PAPER:TABLE:COLUMN:METHOD. A shorter name means every cell that begins with it.
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

from forwardgrad.errors import InputError, unknown
from forwardgrad.reproductions.cells import Cell, Table


def papers() -> dict[str, dict[str, Table]]:
    """`{paper: {table: Table}}` of every paper."""
    modules = {info.name: importlib.import_module(f"{__name__}.{info.name}") for info in pkgutil.iter_modules(__path__)}
    return {name: module.tables for name, module in modules.items() if hasattr(module, "tables")}


def measurement(name: str) -> Any:
    """The module that measures `PAPER:TABLE`, where that is measured as a whole; else `None`."""
    paper, _, table = name.partition(":")
    found = papers().get(paper, {}).get(table)
    return importlib.import_module(f"{__name__}.{found.measured_by}") if found and found.measured_by else None


def find(name: str) -> tuple[Cell, ...]:
    """The cells of `PAPER:TABLE[:COLUMN[:METHOD]]`, in the paper's order.

    Raises:
      InputError: an unknown paper, table, column or method, with the nearest names; too few or too many parts.
    """
    known = papers()
    parts = name.split(":")
    if not 2 <= len(parts) <= 4:
        meant = {parts[0]: known[parts[0]]} if parts[0] in known else known
        listed = ", ".join(f"{paper}:{table}" for paper, tables in meant.items() for table in tables)
        raise InputError(f"{name!r} is no PAPER:TABLE[:COLUMN[:METHOD]]: begin with one of {listed}.")
    paper, table, *rest = parts
    if paper not in known:
        raise unknown("paper", paper, known)
    if table not in known[paper]:
        raise unknown(f"table of {paper}", table, known[paper])
    cells = known[paper][table].cells
    if rest and not cells:
        raise InputError(f"{paper}:{table} is measured as a whole: leave {':'.join(rest)!r} out.")
    for kind, part in zip(("column", "row"), rest, strict=False):
        there = {getattr(cell, kind) for cell in cells}
        if part not in there:
            raise unknown(f"{'method' if kind == 'row' else kind} of {paper}:{table}", part, there)
        cells = tuple(cell for cell in cells if getattr(cell, kind) == part)
    return cells
