"""Guesses. Every public function of a module of this folder that is annotated to return a `Guess` is found by its own name."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import typing
from collections.abc import Callable


def found() -> dict[str, Callable[..., typing.Any]]:
    """`{name: function}` of all guesses of the package, sorted by name.

    Example:
      >>> from forwardgrad import guesses
      >>> guesses.found()["rademacher"]().name
      'rademacher'
    """
    from forwardgrad.guesses.base import Guess

    out = {}
    for info in pkgutil.iter_modules(__path__):
        module = importlib.import_module(f"{__name__}.{info.name}")
        for name, value in inspect.getmembers(module, inspect.isfunction):
            own = value.__module__ == module.__name__ and not name.startswith("_")
            if own and typing.get_type_hints(value).get("return") is Guess:
                out[name] = value
    return dict(sorted(out.items()))
