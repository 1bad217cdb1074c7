"""Flags of figures that are measured as a whole, in place of cells.

A module that is named as `measured_by` may define `Options`, a dataclass with one of these as its base. `run(out, say=...)` is then given every field
of it that is not one of `Options` here, and returns what `conclude` says of what it has written, and the names of its `files`. `conclude` is given
what the JSON file holds, and returns at least `passes` and a sentence, `said`.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from forwardgrad.data.files import make_folder
from forwardgrad.errors import InputError


@dataclasses.dataclass(frozen=True)
class Options:
    """Where results go."""

    results: Path = Path("results")
    """directory of the JSON file and the picture"""
    quiet: bool = False
    """show no progress"""


@dataclasses.dataclass(frozen=True)
class OnData(Options):
    """Of a figure that reads a data set."""

    data_dir: Path | None = None
    """folder of the data sets; by default $FORWARDGRAD_DATA, then the user's cache"""
    offline: bool = False
    """never download"""


def own(options: Options) -> dict[str, Any]:
    """What `run` is given by name."""
    common = {f.name for f in dataclasses.fields(Options)}
    return {f.name: getattr(options, f.name) for f in dataclasses.fields(options) if f.name not in common}


def refuse_unwritable(out: Path) -> None:
    """Make the folder of the results, before anything is measured.

    Raises:
      InputError: it cannot be written.
    """
    make_folder(out, "choose other --results")


def refuse_less(**values: tuple[int, int]) -> None:
    """Refuse flags below what they must be: `{flag: (value, least)}`.

    Raises:
      InputError: with the first of them.
    """
    for flag, (value, least) in values.items():
        if value < least:
            raise InputError(f"--{flag} must be at least {least}, not {value}.")
