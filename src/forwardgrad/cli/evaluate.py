"""test and train error of a finished or interrupted run."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import tyro

from forwardgrad.cli.options import Places, tyro_cli


@dataclasses.dataclass(frozen=True)
class Options(Places):
    """Test and train error of a run at its latest checkpoint, every image once. The held-out images of --validation are reported apart."""

    run_dir: tyro.conf.Positional[Path] = dataclasses.field(kw_only=True)
    """the run's directory"""
    json: bool = False
    """print a JSON object"""


def run(argv: list[str]) -> int:
    """`forwardgrad evaluate RUN_DIR`."""
    options = tyro_cli("evaluate", argv, Options)
    from forwardgrad.training.learner import Learner
    from forwardgrad.training.loop import load_arrays
    from forwardgrad.training.runs import load_run

    found = load_run(options.run_dir)
    whole = dataclasses.replace(found.experiment, validation=0)
    learner = Learner(whole, load_arrays(whole, options.data_dir, options.offline))
    errors = {"step": found.step, "steps": learner.total_steps, "test_error": learner.error(found, "test")}
    if found.experiment.validation:
        held_out = Learner(found.experiment, load_arrays(found.experiment, options.data_dir, options.offline))
        errors |= {
            "steps": held_out.total_steps,
            "train_error": held_out.error(found, "train"),
            "validation_error": held_out.error(found, "test"),
        }
    else:
        errors["train_error"] = learner.error(found, "train")
    if options.json:
        print(json.dumps(errors))
    else:
        print(
            ", ".join(
                f"{name.replace('_', ' ')} {value:.2f} %" for name, value in errors.items() if name.endswith("error")
            )
        )
        print(f"at step {found.step} of {errors['steps']} ({found.experiment.dataset}, {found.experiment.method})")
    return 0
