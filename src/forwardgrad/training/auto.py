"""`--microbatch auto`: the fastest microbatch, measured once for this machine and remembered."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import jax

from forwardgrad.data import Arrays
from forwardgrad.data.files import cache_directory
from forwardgrad.diagnostics import cost
from forwardgrad.errors import InputError
from forwardgrad.presets.experiment import Experiment
from forwardgrad.training.metrics import write_json

# what changes no step's cost
FREE = (
    "seed",
    "epochs",
    "lr",
    "schedule",
    "decay",
    "warmup_epochs",
    "pixels",
    "validation",
    "train_images",
    "microbatch",
    "allow_bias",
    "dataset",
)


def memory() -> Path:
    """The file that remembers, in the user's cache."""
    return cache_directory() / "microbatch.json"


def chosen(experiment: Experiment[Any], arrays: Arrays) -> Experiment[Any]:
    """The experiment with a number in place of `microbatch="auto"`; any other is returned as it is.

    Sizes that the method or the network refuses (BatchNorm, scalars for the whole batch) leave the whole batch.
    """
    if experiment.microbatch != "auto":
        return experiment
    task = cost.Task(experiment, tuple(arrays.train_images.shape[1:]), arrays.classes)
    key = _key(task)
    known = _read()
    if key not in known:
        known[key] = _measured(task)
        _remember(known)
    return dataclasses.replace(experiment, microbatch=known[key])


def _measured(task: cost.Task) -> int:
    sizes = cost.microbatches(task)
    if len(sizes) == 1:
        return sizes[0]
    best, _ = cost.fastest(task, sizes, repeats=3)
    if not cost.fits(best.compiled):
        raise InputError(
            f"a step of {task.experiment.method} needs {best.compiled.total_mib:.0f} MiB and {cost.available_mib():.0f} are free: use a smaller "
            "--batch-size, or --microbatch 1."
        )
    return best.microbatch


def _key(task: cost.Task) -> str:
    """Everything that a step's time depends on."""
    values = {k: v for k, v in task.experiment.to_json().items() if k not in FREE}
    what = {
        "experiment": values,
        "shape": task.shape,
        "classes": task.classes,
        "device": cost.device(),
        "jax": jax.__version__,
    }
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]


def _read() -> dict[str, int]:
    try:
        return dict(json.loads(memory().read_text()))
    except (OSError, ValueError, TypeError):  # not there, or damaged: measured again
        return {}


def _remember(known: dict[str, int]) -> None:
    try:
        memory().parent.mkdir(parents=True, exist_ok=True)
        write_json(memory(), known)
    except OSError:  # a cache that cannot be written costs the next run a minute, no more
        return
