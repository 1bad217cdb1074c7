"""What a paper's tables are made of: cells, each an experiment with the error that the paper prints for it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from forwardgrad import presets
from forwardgrad.errors import InputError
from forwardgrad.presets import Experiment


class Printed(NamedTuple):
    """Errors in percent, as a paper prints them.

    Attributes:
      test, train: the errors; papers that print no train error have `None`.
      source: where they are printed.
      images: on how many test images.
      spread: what is printed after ±, of the test error; 0 where nothing is.
    """

    test: float
    train: float | None
    source: str
    images: int = 10_000
    spread: float = 0.0


@dataclasses.dataclass(frozen=True)
class Cell:
    """One number of a table or figure.

    Attributes:
      paper, table, column, row: its name is these four with colons between them.
      preset: the experiment it starts from.
      settings: fields of the experiment, or of its model, with the values that the paper used in this cell.
      printed: what the paper prints; `None` where it is only drawn, or not shown.
    """

    paper: str
    table: str
    column: str
    row: str
    preset: str
    settings: Mapping[str, Any]
    printed: Printed | None = None

    @property
    def name(self) -> str:
        return f"{self.paper}:{self.table}:{self.column}:{self.row}"

    @property
    def experiment(self) -> Experiment[Any]:
        """The preset with the cell's settings.

        Raises:
          InputError: a setting that neither the experiment nor its model has.
        """
        whole = presets.find(self.preset)
        of_run, of_model = ({f.name for f in dataclasses.fields(x)} for x in (whole, whole.model))
        lost = [name for name in self.settings if name not in of_run | of_model]
        if lost:
            raise InputError(
                f"{self.name} needs the setting {lost[0]!r}, which this version does not have: use a newer one."
            )
        model = {name: value for name, value in self.settings.items() if name not in of_run}
        run = {name: value for name, value in self.settings.items() if name in of_run}
        return dataclasses.replace(whole, model=dataclasses.replace(whole.model, **model), **run)


class Table(NamedTuple):
    """A table or figure of a paper.

    Attributes:
      title: what it shows.
      cells: in the paper's order, column by column.
      draw: of a figure: `(axes, records)`.
      curves: of a figure over epochs, in place of `draw`: what it shows, as `curves.draw` takes it.
      measured_by: of a figure that is no set of runs with an error each, in place of cells: the module whose `run(out, say=...)` measures and draws
        it, and returns a summary with `passes`, `said`, a sentence, and `files`; its flags are in `measured.py`.
    """

    title: str
    cells: tuple[Cell, ...] = ()
    draw: Callable[[Any, list[dict[str, Any]]], None] | None = None
    measured_by: str = ""
    curves: tuple[str, ...] = ()


class Range(NamedTuple):
    """Test errors, in percent, that count as the paper's."""

    low: float
    high: float


def expected(printed: Printed) -> Range:
    """The printed test error ± the larger of 0.3 points and three standard deviations: binomial on the test images, and the printed spread.

    A convention, not a test: both runs are scored on the same images, so that what their errors differ by is less than two test sets would, and
    0.3 points are left to seeds where errors are small. A printed spread is taken as a standard deviation over runs.
    """
    share = printed.test / 100
    binomial = 100 * math.sqrt(share * (1 - share) / printed.images)
    width = max(0.3, 3 * math.hypot(binomial, printed.spread))
    return Range(printed.test - width, printed.test + width)


def verdict(test_error: float | None, printed: Printed | None) -> str | None:
    """`better` (below the range), `in range`, `worse`; `diverged` without an error; `None` where the paper prints no number."""
    if test_error is None:
        return "diverged"
    if printed is None:
        return None
    low, high = expected(printed)
    return "better" if test_error < low else "worse" if test_error > high else "in range"
