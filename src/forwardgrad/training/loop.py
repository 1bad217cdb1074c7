"""The training loop: dispatches of many steps, checkpoints, metrics, progress, signals."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shlex
import signal
import time
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from types import FrameType
from typing import Any

import jax
import numpy as np

from forwardgrad import data
from forwardgrad.errors import Diverged, InputError, Interrupted
from forwardgrad.presets.experiment import NEEDS, OPTIONS, Experiment
from forwardgrad.training import auto
from forwardgrad.training.checkpoint import Checkpoints
from forwardgrad.training.learner import Learner, StepLog, TrainState
from forwardgrad.training.metrics import Metrics, draw_curves, write_json
from forwardgrad.training.optimisers import schedule
from forwardgrad.training.progress import Progress

HOW = frozenset({"microbatch", "executor"})  # fields of an experiment that change time and memory, not the result


def load_arrays(experiment: Experiment, data_dir: Path | None, offline: bool) -> data.Arrays:
    """The experiment's data: its pixels' scale, the validation images held out, then its first training images taken."""
    arrays = data.find(experiment.dataset).load(data.data_directory(data_dir), offline=offline)
    arrays = arrays.symmetric() if experiment.pixels == "symmetric" else arrays
    arrays = arrays.validation(experiment.validation) if experiment.validation else arrays
    return arrays.first(experiment.train_images) if experiment.train_images else arrays


def train(
    experiment: Experiment,
    directory: Path,
    *,
    preset: str = "",
    resume: bool = False,
    data_dir: Path | None = None,
    offline: bool = False,
    checkpoint_every: int = 0,
    keep: int = 2,
    quiet: bool = False,
    learner: Learner | None = None,
    observe: Callable[[TrainState], None] | None = None,
) -> dict[str, Any]:
    """Train, writing a run directory as it goes.

    Args:
      experiment: what to train.
      directory: of the run; made where it does not exist.
      preset: the name it started from, for the records.
      resume: go on from the latest checkpoint of this directory, bit for bit on a CPU; from the beginning where there is none.
      data_dir, offline: where data lie, and whether they may be downloaded.
      checkpoint_every: steps between checkpoints; 0 is once an epoch, and at least a minute apart.
      keep: how many checkpoints stay.
      quiet: show no progress.
      learner: of this experiment; saves compilation where the caller has one.
      observe: is shown the state before the first step and after each epoch, and again where a run goes on from there.

    Returns:
      What `result.json` holds.

    Raises:
      InputError: anything wrong with the input; the directory holds another run.
      Diverged: the loss is not a number.
      Interrupted: after a signal, with a checkpoint written.
    """
    experiment.check()
    refuse_other_run(directory, experiment, resume)
    if learner is None:
        arrays = load_arrays(experiment, data_dir, offline)
        if resume and experiment.microbatch == "auto" and (directory / "config.json").exists():
            # the size that the run began with: another one rounds differently
            started = read_config(directory)["experiment"]["microbatch"]
            experiment = dataclasses.replace(experiment, microbatch=started)
        experiment = auto.chosen(experiment, arrays)
        learner = Learner(experiment, arrays)
    state = learner.init()
    claim(directory, experiment, preset, learner.arrays)
    checkpoints = Checkpoints(directory, keep)
    if resume and checkpoints.latest is not None:
        state = checkpoints.restore(state)
    metrics = Metrics(directory, int(state.step))
    try:
        with Progress(learner, quiet) as progress, _Signals() as signals:
            state = _loop(learner, state, checkpoints, metrics, progress, signals, checkpoint_every, observe)
    finally:
        metrics.close()
        checkpoints.close()
        draw_curves(directory, f"{experiment.dataset}, {experiment.method}, seed {experiment.seed}")
    result = summary(learner, state, preset, metrics.seconds)
    write_json(directory / "result.json", result)
    return result


def _loop(
    learner: Learner,
    state: TrainState,
    checkpoints: Checkpoints,
    metrics: Metrics,
    progress: Progress,
    signals: _Signals,
    checkpoint_every: int,
    observe: Callable[[TrainState], None] | None,
) -> TrainState:
    rate = schedule(learner.experiment, learner.steps_per_epoch)
    held_out = "validation_error" if learner.experiment.validation else "test_error"
    step, seconds_per_step, compiled, saved = int(state.step), 0.0, False, time.monotonic()
    progress.update(step, {})
    while True:
        if observe is not None and step % learner.steps_per_epoch == 0:
            observe(state)
            if signals.arrived:
                checkpoints.save(state)
                raise _interrupted(signals.arrived, step, learner, checkpoints)
        if step == learner.total_steps:
            return state
        began = time.monotonic()
        count = _next_count(learner, step, seconds_per_step, checkpoint_every)
        state, log = learner.run(state, count)
        taken = time.monotonic() - began
        _refuse_divergence(log, step, learner)
        step += count
        seconds_per_step, compiled = (
            (taken / count if compiled else 0.0),
            True,
        )  # the first dispatch compiles and says nothing about the next
        metrics.seconds += time.monotonic() - began
        line = {
            "step": step,
            "epoch": step / learner.steps_per_epoch,
            "seconds": round(metrics.seconds, 3),
            "loss": float(log.loss.mean()),
            "error": 100 * float(log.error.mean()),
            "lr": float(np.asarray(rate(step - 1))),
        }
        if step % learner.steps_per_epoch == 0:
            began = time.monotonic()
            loss, wrong, steps = np.asarray(state.sums)
            line |= {
                "epoch_loss": float(loss / steps),
                "epoch_error": 100 * float(wrong / steps),
                held_out: learner.error(state, "test"),
            }
            metrics.seconds += time.monotonic() - began
        metrics.write(line)
        progress.update(step, line)
        epoch_done = step % learner.steps_per_epoch == 0
        due = step % checkpoint_every == 0 if checkpoint_every else epoch_done and time.monotonic() - saved > 60
        if due or signals.arrived or step == learner.total_steps:
            checkpoints.save(state)
            saved = time.monotonic()
        if signals.arrived:
            raise _interrupted(signals.arrived, step, learner, checkpoints)


def _interrupted(signum: int, step: int, learner: Learner, checkpoints: Checkpoints) -> Interrupted:
    return Interrupted(
        signum,
        f"stopped at step {step} of {learner.total_steps}; a checkpoint is written: go on with the same flags and --run-dir "
        f"{shlex.quote(str(checkpoints.directory.parent))} --resume (train), or repeat the command (compare, reproduce, diagnose).",
    )


def _next_count(learner: Learner, step: int, seconds_per_step: float, checkpoint_every: int) -> int:
    """Steps of the next dispatch: about a second, and no further than the next epoch or checkpoint."""
    about = 1 if seconds_per_step == 0.0 else max(1, int(1.0 / max(seconds_per_step, 1e-3)))
    ends = [learner.steps_per_epoch - step % learner.steps_per_epoch]
    if checkpoint_every:
        ends.append(checkpoint_every - step % checkpoint_every)
    return min(about, learner.longest_dispatch, *ends)


def _refuse_divergence(log: StepLog, step: int, learner: Learner) -> None:
    bad = ~np.isfinite(log.target) | ~np.isfinite(log.loss)
    if bad.any():
        at = step + int(np.argmax(bad)) + 1
        raise Diverged(
            f"{learner.experiment.method} diverged at step {at} of {learner.total_steps} (epoch {at / learner.steps_per_epoch:.1f}): the loss is "
            f"not finite; try a smaller learning rate than --lr {learner.experiment.lr}."
        )


def summary(learner: Learner, state: TrainState, preset: str, seconds: float) -> dict[str, Any]:
    """What `result.json` holds; errors in percent. With held-out images the test set stays unseen."""
    experiment = learner.experiment
    held_out = learner.error(state, "test")
    return {
        "method": experiment.method,
        "preset": preset,
        "dataset": experiment.dataset,
        "seed": experiment.seed,
        "epochs": experiment.epochs,
        "steps": int(state.step),
        "test_error": None if experiment.validation else held_out,
        "validation_error": held_out if experiment.validation else None,
        "train_error": learner.error(state, "train"),
        "wall_seconds": round(seconds, 2),
        "bias": learner.bias,
        "parameters": int(sum(np.size(x) for x in jax.tree.leaves(state.params))),
        "version": metadata.version("forwardgrad"),
    }


def refuse_other_run(directory: Path, experiment: Experiment, resume: bool) -> None:
    """Refuse a directory that holds anything but this very run, to be resumed.

    Raises:
      InputError: it holds a run and `resume` is False; it holds a run of another configuration; it holds something else.
    """
    if (directory / "config.json").exists():
        if not resume:
            raise InputError(
                f"{directory} already holds a run: continue it with --resume, or choose another --run-dir."
            )
        different = differences(directory, experiment)
        if different:
            listed = ", ".join(f"{k} ({there} there, {here} here)" for k, (there, here) in sorted(different.items()))
            raise InputError(
                f"{directory} holds a run of another configuration: {listed}; use the same flags, or another directory."
            )
    elif directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise InputError(f"{directory} is not empty and holds no run: choose another directory.")


def differences(directory: Path, experiment: Experiment) -> dict[str, tuple[Any, Any]]:
    """`{field: (value there, value here)}` of a directory's run and an experiment, as far as they change the result.

    A field that did not exist yet when the run began has its default there.

    Raises:
      InputError: the directory holds no run, or its `config.json` is damaged.
    """
    there, here = read_config(directory)["experiment"], json.loads(json.dumps(experiment.to_json()))
    with contextlib.suppress(
        InputError, TypeError, KeyError
    ):  # of a model or a field that is no more: compared as it is written
        there = json.loads(json.dumps(Experiment.from_json(there).to_json()))
    idle = {name for name in (*OPTIONS, *NEEDS) if experiment.idle(name)}
    return {k: (there.get(k), here.get(k)) for k in {*there, *here} - HOW - idle if there.get(k) != here.get(k)}


def finished(directory: Path, experiment: Experiment) -> dict[str, Any] | None:
    """What `result.json` holds, where the directory holds a finished run of this experiment."""
    try:
        return None if differences(directory, experiment) else json.loads((directory / "result.json").read_text())
    except (InputError, OSError, ValueError):
        return None


def refuse_unfit(experiments: Mapping[Path, Experiment], arrays: data.Arrays) -> None:
    """Refuse what cannot train, before the first of several has trained for hours.

    Args:
      experiments: by their directories; what is finished there is not looked at.

    Raises:
      InputError: a model that does not fit the images, a method that does not fit the model, an estimate that would be biased; a
        directory that holds something else.
    """
    for directory, experiment in experiments.items():
        if finished(directory, experiment) is None:
            refuse_other_run(directory, experiment, resume=True)
            Learner(experiment, arrays).init()


def claim(directory: Path, experiment: Experiment, preset: str, arrays: data.Arrays) -> None:
    """Make the directory this run's own by writing `config.json`, where there is none yet.

    The file holds the experiment, and what it takes to predict without the data: shape, classes and normalisation of the images.

    Raises:
      InputError: the directory cannot be written.
    """
    images = {
        "shape": list(arrays.train_images.shape[1:]),
        "classes": arrays.classes,
        "mean": list(arrays.mean),
        "std": list(arrays.std),
        "scale": arrays.scale,
    }
    config = {
        "preset": preset,
        "experiment": experiment.to_json(),
        "images": images,
        "version": metadata.version("forwardgrad"),
    }
    if (directory / "config.json").exists():
        return
    try:
        directory.mkdir(parents=True, exist_ok=True)
        write_json(directory / "config.json", config)
    except OSError as error:
        raise InputError(f"{directory} cannot be written ({error.strerror}): choose another directory.") from error


def read_config(directory: Path) -> dict[str, Any]:
    """A run's `config.json`.

    Raises:
      InputError: there is none, or it cannot be read.
    """
    path = Path(directory) / "config.json"
    try:
        config = json.loads(path.read_text())
        return {name: config[name] for name in ("preset", "experiment", "images", "version")}
    except OSError as error:
        raise InputError(
            f"{directory} holds no run (no config.json): give the directory that `forwardgrad train` wrote."
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is damaged: restore it, or train again in another directory.") from error


class _Signals:
    """Remembers SIGINT and SIGTERM while it is entered; a second one kills as usual."""

    def __init__(self) -> None:
        self.arrived = 0
        self._before: dict[int, Any] = {}

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        self.arrived = signum
        signal.signal(signum, self._before[signum])

    def __enter__(self) -> _Signals:
        for signum in (signal.SIGINT, signal.SIGTERM):
            try:
                self._before[signum] = signal.signal(signum, self._handle)
            except ValueError:  # not in the main thread: the caller handles signals
                break
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)
