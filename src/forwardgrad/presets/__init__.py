"""Experiments by name: each module of this folder with a `preset` is one, named after its file (`mnist_m_1_16` is `mnist-m-1-16`)."""

from __future__ import annotations

import importlib
import pkgutil

from forwardgrad.errors import unknown
from forwardgrad.presets.experiment import Experiment as Experiment


def _found() -> dict[str, str]:
    modules = (info.name for info in pkgutil.iter_modules(__path__))
    return {name.replace("_", "-"): f"{__name__}.{name}" for name in modules if name != "experiment"}


def names() -> list[str]:
    """The names of all presets, sorted."""
    return sorted(_found())


def find(name: str) -> Experiment:
    """A preset.

    Raises:
      InputError: there is none of that name; the nearest names are given.
    """
    known = _found()
    if name not in known:
        raise unknown("preset", name, known)
    return importlib.import_module(known[name]).preset


def about(name: str) -> str:
    """First line of the preset's docstring: what it reproduces."""
    return (importlib.import_module(_found()[name]).__doc__ or "").strip().splitlines()[0]
