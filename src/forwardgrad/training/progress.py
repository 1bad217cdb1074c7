"""What a person sees while a run goes on: a bar on a terminal, a line per epoch elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from forwardgrad.training.learner import Learner


class Progress:
    """Step, loss, error, steps per second, time left.

    Args:
      learner: for the number of steps.
      quiet: show nothing.
    """

    def __init__(self, learner: Learner, quiet: bool):
        self._learner, self._quiet = learner, quiet
        self._console = Console(stderr=True)
        self._bar: Bar | None = None
        self._task = None
        self._seen: tuple[float, int] | None = None
        self._last = float("-inf")
        self._held_out = ""

    def __enter__(self) -> Progress:
        if not self._quiet and self._console.is_terminal:
            columns = (
                TextColumn("{task.fields[epoch]}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[numbers]}"),
                TimeRemainingColumn(),
            )
            self._bar = Bar(*columns, console=self._console)
            self._bar.start()
            self._task = self._bar.add_task("", total=self._learner.total_steps, epoch="compiling", numbers="")
        return self

    def update(self, step: int, line: Mapping[str, float]) -> None:
        """Show the state after `step` steps and its metrics line."""
        now = time.monotonic()
        held_out = next(
            (
                f", {k.split('_')[0]} error {v:.2f} %"
                for k, v in line.items()
                if k in ("test_error", "validation_error")
            ),
            "",
        )
        self._held_out = held_out or self._held_out
        if not line:
            self._seen = self._seen or (now, step)
            if self._bar is not None and self._task is not None:
                self._bar.update(self._task, completed=step)
            return
        if self._quiet or (self._bar is None and not held_out and now - self._last <= 30):
            return
        # over all steps since the last time: an epoch's last dispatch is short, and has the evaluation with it
        rate = (step - self._seen[1]) / max(now - self._seen[0], 1e-9) if self._seen else 0.0
        self._seen, self._last = (now, step), now
        epoch = f"epoch {line['epoch']:.1f}/{self._learner.experiment.epochs}"
        numbers = f"loss {line['loss']:.3f}, error {line['error']:.1f} %{self._held_out}, {rate:.1f} steps/s"
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=step, epoch=epoch, numbers=numbers)
        else:
            print(f"{epoch}: step {step}, {numbers}", file=sys.stderr, flush=True)

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()
