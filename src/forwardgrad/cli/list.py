"""show methods, presets, models, datasets or guesses."""

from __future__ import annotations

import dataclasses
import inspect
import json
from collections.abc import Callable
from typing import Annotated, Any

import tyro

from forwardgrad import data, guesses, models, presets, recipes
from forwardgrad.cli.options import tyro_cli
from forwardgrad.errors import InputError, unknown
from forwardgrad.presets.experiment import GUESSES

Row = dict[str, Any]


def methods() -> list[Row]:
    """Every method, with the keys of the papers behind it."""
    found = [recipes.find(name) for name in recipes.names()]
    return [{"name": recipe.name, "about": recipe.about, "cite": list(recipe.cite)} for recipe in found]


def experiments() -> list[Row]:
    """Every preset, with its data set and model."""
    found = {name: presets.find(name) for name in presets.names()}
    return [
        {"name": name, "about": presets.about(name), "dataset": preset.dataset, "model": models.name_of(preset.model)}
        for name, preset in found.items()
    ]


def networks() -> list[Row]:
    """Every model of the package."""
    return [{"name": name, "about": _first_line(models.find(name))} for name in models.names()]


def datasets() -> list[Row]:
    """Every data set of the package, with the shape of an image and the number of classes."""
    found = [data.find(name) for name in data.names()]
    return [{"name": d.name, "about": d.about, "shape": list(d.shape), "classes": d.classes} for d in found]


def directions() -> list[Row]:
    """Every guess: first those that `--guess` takes, then those of the library."""
    rows = [
        {"name": name, "about": _first_line(make), "flag": name in GUESSES} for name, make in guesses.found().items()
    ]
    return sorted(rows, key=lambda row: (not row["flag"], row["name"]))


KINDS: dict[str, Callable[[], list[Row]]] = {
    "methods": methods,
    "presets": experiments,
    "models": networks,
    "datasets": datasets,
    "guesses": directions,
}


@dataclasses.dataclass(frozen=True)
class Options:
    """Show what there is, by name."""

    kind: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="KIND", help_behavior_hint="")]] = ""
    """methods, presets, models, datasets or guesses"""
    json: bool = False
    """print a JSON list of objects with the keys name, about and more"""


def run(argv: list[str]) -> int:
    """`forwardgrad list KIND [--json]`.

    Raises:
      InputError: no kind, or an unknown one.
    """
    options = tyro_cli("list", argv, Options)
    if not options.kind:
        raise InputError(f"forwardgrad list needs to know what to list: one of {', '.join(KINDS)}.")
    if options.kind not in KINDS:
        raise unknown("list", options.kind, KINDS)
    rows = KINDS[options.kind]()
    if options.json:
        print(json.dumps(rows, indent=2, ensure_ascii=False))
    else:
        _print_table(options.kind, rows)
    return 0


def _print_table(kind: str, rows: list[Row]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    table.add_column(kind, no_wrap=True)
    table.add_column("about")
    for row in rows:
        library = "" if row.get("flag", True) else "(library) "
        table.add_row(Text(row["name"], style="bold"), Text(library + row["about"]))
    Console().print(table)


def _first_line(value: object) -> str:
    return (inspect.getdoc(value) or "").partition("\n")[0]
