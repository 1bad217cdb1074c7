"""Every published method in a few lines: each is a point of the grid, and its recipe is in the file of its paper.

A recipe takes a network and returns an `Estimator`: `recipes.lg_fg_a(network)`. On the command line `lg_fg_a` is called `lg-fg-a`. Every recipe of a
module of this folder is found. In every recipe the last readout and the local heads get their exact gradient, one layer deep. D is the number of
displaced units that share a scalar, K the number of draws, N the batch size, "pass" one forward pass. Estimates are on the scale of the mean loss
over the batch.
"""

from __future__ import annotations

import importlib
import pkgutil

from forwardgrad.errors import unknown
from forwardgrad.recipes.base import Recipe as Recipe

FIRST = ("baselines", "ren2023", "classical", "bacho2023", "frontier")
"""Modules whose recipes are listed first, in this order; then the others by name."""


def _found() -> dict[str, Recipe]:
    """`{name in its module: recipe}`, in the order of `FIRST` and of the modules."""
    modules = [info.name for info in pkgutil.iter_modules(__path__)]
    out = {}
    for name in sorted(modules, key=lambda name: (FIRST.index(name) if name in FIRST else len(FIRST), name)):
        for attribute, value in vars(importlib.import_module(f"{__name__}.{name}")).items():
            if isinstance(value, Recipe) and value.build.__module__ == f"{__name__}.{name}":
                out[attribute] = value
    return out


def __getattr__(name: str) -> Recipe:
    """`recipes.lg_fg_a`, whichever file it is in."""
    found = {} if name.startswith("__") else _found()
    if name not in found:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return found[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *_found()})


def names() -> list[str]:
    """Command-line names of all recipes."""
    return [recipe.name for recipe in _found().values()]


def find(name: str) -> Recipe:
    """The recipe with a command-line name.

    Raises:
      InputError: there is none; the nearest names are given.
    """
    for recipe in _found().values():
        if recipe.name == name:
            return recipe
    raise unknown("method", name, names())
