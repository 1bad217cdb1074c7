"""Kill a CIFAR-10 run with SIGKILL, resume it, and compare it with an uninterrupted one, bit for bit.

    python benchmarks/resume_after_kill.py --out DIR [--preset cifar10-m-8-16] [--kill-after 200] [--checkpoint-every 100]

Needs the CIFAR-10 files (`FORWARDGRAD_DATA`, or a network). Prints one line per finding; exit code 1 where a bit differs. Steps that are done
are not done again: the script itself may be interrupted and started again with the same arguments.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from forwardgrad.training.checkpoint import Checkpoints
from forwardgrad.training.metrics import read, write_json


def command(arguments: argparse.Namespace, directory: Path, *more: str) -> list[str]:
    program = [sys.executable, "-c", "from forwardgrad.cli.main import main; main()", "train", arguments.preset]
    flags = [
        "--method",
        "lg-fg-a",
        "--epochs",
        "1",
        "--checkpoint-every",
        str(arguments.checkpoint_every),
        "--run-dir",
        str(directory),
    ]
    return [*program, *flags, *more]


def steps_done(directory: Path) -> int:
    lines = read(directory / "metrics.jsonl")
    return int(lines[-1]["step"]) if lines else 0


def latest(directory: Path) -> int | None:
    checkpoints = Checkpoints(directory)
    step = checkpoints.latest
    checkpoints.close()
    return step


def run_and_kill(arguments: argparse.Namespace, directory: Path) -> tuple[int, int]:
    """Returns the step at which the process was killed, and the step of the checkpoint that it left."""
    process = subprocess.Popen(command(arguments, directory))
    while steps_done(directory) <= arguments.kill_after:
        time.sleep(0.05)
        if process.poll() is not None:
            sys.exit("the run ended before it could be killed: choose a smaller --kill-after")
    os.kill(process.pid, signal.SIGKILL)
    if process.wait() != -signal.SIGKILL:
        sys.exit("the run was not killed by SIGKILL")
    found = latest(directory)
    if found is None:
        sys.exit("the killed run left no checkpoint: choose a smaller --checkpoint-every")
    return steps_done(directory), found


def arrays(directory: Path) -> dict[str, np.ndarray]:
    checkpoints = Checkpoints(directory)
    stored = checkpoints.read()
    checkpoints.close()
    return {name: np.asarray(value) for name, value in stored.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--preset", default="cifar10-m-8-16")
    parser.add_argument("--kill-after", type=int, default=200)
    parser.add_argument("--checkpoint-every", type=int, default=100)
    arguments = parser.parse_args()
    broken, whole = arguments.out / "killed", arguments.out / "whole"
    if not (broken / "config.json").exists():
        killed, checkpoint = run_and_kill(arguments, broken)
        write_json(arguments.out / "kill.json", {"killed_after_step": killed, "checkpoint": checkpoint})
    kill = json.loads((arguments.out / "kill.json").read_text())
    print(f"killed after step {kill['killed_after_step']}, resumed from the checkpoint at step {kill['checkpoint']}")
    for directory in (broken, whole):
        if not (directory / "result.json").exists():
            subprocess.run(command(arguments, directory, "--resume"), check=True)
    one, other = arrays(broken), arrays(whole)
    different = sorted(name for name in {*one, *other} if not np.array_equal(one.get(name), other.get(name)))
    steps = json.loads((whole / "result.json").read_text())["steps"]
    print(
        f"{len(one)} arrays after {steps} steps, {len(different)} of them different{': ' + ', '.join(different) if different else ''}"
    )
    sys.exit(1 if different else 0)


if __name__ == "__main__":
    main()
