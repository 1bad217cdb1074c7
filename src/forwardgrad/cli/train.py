"""train one experiment: a preset and flags."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from forwardgrad.cli.options import Places, count, parse
from forwardgrad.errors import InputError


@dataclasses.dataclass(frozen=True)
class Options(Places):
    """Where the run goes."""

    run_dir: Path | None = None
    """directory of the run; by default a new one in runs/"""
    resume: bool = False
    """go on from the latest checkpoint of --run-dir; from the beginning where it has none"""
    checkpoint_every: int = 0
    """steps between checkpoints; 0: at the end of an epoch, at most once a minute"""
    keep: int = 2
    """how many checkpoints stay"""
    quiet: bool = False
    """show no progress"""


def run(argv: list[str]) -> int:
    """`forwardgrad train [PRESET] [flags]`."""
    preset, experiment, options = parse(
        "train",
        argv,
        Options(),
        "Train one experiment. PRESET (default: digits) is a name from `forwardgrad list presets`.",
    )
    if options.resume and options.run_dir is None:
        raise InputError("--resume needs the run's directory: add --run-dir DIR.")
    for name, least in (("checkpoint_every", 0), ("keep", 1)):
        if getattr(options, name) < least:
            raise InputError(f"--{name.replace('_', '-')} must be at least {least}, not {getattr(options, name)}.")
    from forwardgrad.training.loop import train

    directory = options.run_dir or _new(Path("runs"), f"{preset}-{experiment.method}-seed{experiment.seed}")
    result = train(
        experiment,
        directory,
        preset=preset,
        resume=options.resume,
        data_dir=options.data_dir,
        offline=options.offline,
        checkpoint_every=options.checkpoint_every,
        keep=options.keep,
        quiet=options.quiet,
    )
    held_out = "validation" if experiment.validation else "test"
    print(
        f"{held_out} error {result[f'{held_out}_error']:.2f} %, train error {result['train_error']:.2f} % "
        f"({experiment.dataset}, {experiment.method}, {count(result['epochs'], 'epoch')}, {result['wall_seconds']:.0f} s)"
    )
    if result["bias"]:
        site, size = max(result["bias"].items(), key=lambda item: item[1])
        print(
            f"relative bias of the estimate before training: at most {100 * size:.1f} % of the gradient, at {site} (all sites: result.json)"
        )
    print(f"curves: {directory / 'curves.png'}; everything else: {directory}")
    return 0


def _new(parent: Path, name: str) -> Path:
    """A directory that does not exist yet."""
    candidates = (parent / (name if i == 1 else f"{name}-{i}") for i in range(1, 10**6))
    return next(path for path in candidates if not path.exists())
