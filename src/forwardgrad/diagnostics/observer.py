"""Measures the alignment of a method's estimates (`alignment.py`) while it trains, and keeps what it measured beside the run."""

from __future__ import annotations

import dataclasses
import functools
import json
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from forwardgrad import targets
from forwardgrad.data import batches
from forwardgrad.diagnostics import alignment
from forwardgrad.engine import Estimator
from forwardgrad.errors import InputError
from forwardgrad.training.learner import Learner, TrainState
from forwardgrad.training.metrics import write_json

FILE = "alignment.json"


@dataclasses.dataclass(frozen=True)
class How:
    """How alignment is measured.

    Attributes:
      epochs: after which; 0 is before the first step.
      draws: estimates with fresh keys; a multiple of four, at least eight.
      examples: of the fixed batch, which are not augmented.
    """

    epochs: Collection[int]
    draws: int
    examples: int

    def to_json(self) -> dict[str, int]:
        """What decides a measurement's numbers, besides the run."""
        return {"draws": self.draws, "examples": self.examples}


class Observer:
    """To be given to `train` as `observe`.

    Args:
      learner: that trains.
      directory: of the run. What was measured lies in its file `alignment.json`, and is not measured again.
      how: to measure.
      say: is told of each measurement.

    Raises:
      InputError: the directory holds measurements of another kind; (when called) the run is past an epoch that was not measured.
    """

    def __init__(self, learner: Learner, directory: Path, how: How, say: Callable[[str], None]):
        self.learner, self.path, self.how, self.say = learner, directory / FILE, how, say
        self.known = stored(directory, how)
        n, seed = len(learner.arrays.train_images), learner.experiment.seed
        self._chosen = batches.epoch_order(seed, 0, n)[: how.examples]  # in the order of the first epoch
        self._measure = jax.jit(functools.partial(measure, learner.method, references(learner)))

    def __call__(self, state: TrainState) -> None:
        epoch = int(state.step) // self.learner.steps_per_epoch
        refuse_gaps(self.path.parent, self.known, [e for e in self.how.epochs if e < epoch])
        if epoch not in self.how.epochs or epoch in self.known:
            return
        began, learner = time.monotonic(), self.learner
        images, labels = (x[self._chosen] for x in (learner.arrays.train_images, learner.arrays.train_labels))
        batch = {"inputs": learner.arrays.normalise(jnp.asarray(images)), "labels": jnp.asarray(labels)}
        key = jax.random.fold_in(jax.random.key(learner.experiment.seed), state.step)
        keys = jax.random.split(key, self.how.draws)
        measured = self._measure(state.method_state, state.params, state.model_state, batch, keys)
        own, layers = learner.method.target.name, list(alignment.weights(learner.network, state.params))
        self.known[epoch] = [
            {"method": learner.experiment.method, "epoch": epoch, "step": int(state.step), "reference": name}
            | {"own_target": name == own, **row, "examples": self.how.examples}
            for name in sorted(measured, key=lambda name: name != own)
            for row in alignment.rows(layers, measured[name], self.how.draws)
        ]
        rows = [row for e in sorted(self.known) for row in self.known[e]]
        write_json(self.path, {**self.how.to_json(), "rows": rows})
        self.say(f"epoch {epoch}: {self.how.draws} estimates in {time.monotonic() - began:.0f} s, {_said(rows, epoch)}")


def _said(rows: list[dict[str, Any]], epoch: int) -> str:
    angles = [r["degrees"] for r in rows if r["epoch"] == epoch and r["own_target"] and r["layer"] != alignment.ALL]
    known = [angle for angle in angles if angle is not None]
    return f"angle {sum(known) / len(known):.1f} degrees on average over layers" if known else "no gradient"


def references(learner: Learner) -> dict[str, Estimator]:
    """`{target: exact gradient}`: of the method's own target, and of the final loss where that is another; in single precision."""
    method = dataclasses.replace(learner.experiment, precision="float32").estimator(learner.network)
    exact = dataclasses.replace(method, parts=(), executor="auto")
    both = (exact, dataclasses.replace(exact, target=targets.global_loss()))
    return {one.target.name: one for one in both}


def measure(
    method: Estimator,
    references: dict[str, Estimator],
    state: Any,
    params: Any,
    model_state: Any,
    batch: Any,
    keys: jax.Array,
) -> dict[str, alignment.Found]:
    """Against each reference what `alignment` defines.

    Args:
      method, references: on the same network.
      state, params, model_state, batch: as in `Estimator.estimate`.
      keys: one per draw, a multiple of four, at least eight.
    """
    grads = lambda one, key, state: one.estimate(key, state, params, model_state, batch)[0].grads
    true = {name: alignment.weights(one.network, grads(one, keys[0], ())) for name, one in references.items()}
    sums = alignment.moments(lambda key: alignment.weights(method.network, grads(method, key, state)), keys, true)
    return alignment.found(sums, true, len(keys))


def stored(directory: Path, how: How) -> dict[int, list[dict[str, Any]]]:
    """`{epoch: rows}` of what was measured in a run's directory.

    Raises:
      InputError: it was measured otherwise.
    """
    path = directory / FILE
    if not path.exists():
        return {}
    try:
        there = json.loads(path.read_text())
        rows = there.pop("rows")
        out = {row["epoch"]: [r for r in rows if r["epoch"] == row["epoch"]] for row in rows}
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is damaged: remove the directory {directory}, or choose another --out.") from error
    if there != how.to_json():
        listed = ", ".join(
            f"{k} ({there.get(k)} there, {v} here)" for k, v in how.to_json().items() if there.get(k) != v
        )
        raise InputError(f"{directory} was measured otherwise: {listed}; use the same flags, or another --out.")
    return out


def refuse_gaps(directory: Path, known: dict[int, Any], epochs: Collection[int]) -> None:
    """Refuse a run that is past epochs at which it was not measured.

    Raises:
      InputError: with the first of them.
    """
    lost = sorted(set(epochs) - set(known))
    if lost:
        raise InputError(
            f"{directory} holds a run that was not measured after epoch {lost[0]} and is past it: leave that epoch out of --at, or choose another "
            "--out."
        )
