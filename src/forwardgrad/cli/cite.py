"""print the BibTeX entries of the papers behind a method."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import tyro

from forwardgrad import recipes
from forwardgrad.cite import bibtex
from forwardgrad.cli.options import tyro_cli
from forwardgrad.errors import InputError


@dataclasses.dataclass(frozen=True)
class Options:
    """Print the BibTeX entries of the papers behind a method."""

    method: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="METHOD", help_behavior_hint="")]] = ""
    """a name from `forwardgrad list methods`"""


def run(argv: list[str]) -> int:
    """`forwardgrad cite METHOD`.

    Raises:
      InputError: no method, or an unknown one.
    """
    method = tyro_cli("cite", argv, Options).method
    if not method:
        raise InputError(f"forwardgrad cite needs a method: one of {', '.join(recipes.names())}.")
    print(bibtex(method))
    return 0
