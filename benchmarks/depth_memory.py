"""Temporary memory and compilation time of a step over depth: compiled, not run, so that depth costs no time.

    python benchmarks/depth_memory.py --out DIR [--preset cifar10-m-8-16] [--methods bp,bp-checkpointed,lg-fg-a] [--blocks 4 16 64] [--microbatch 8]

Parameters and momentum are updated in place and are not among the temporary buffers (`held_mib` has them). Gradients are: of all blocks where the
network runs as a whole, of one block at a time where it is streamed.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from forwardgrad import data, presets
from forwardgrad.diagnostics import cost
from forwardgrad.training.metrics import write_json


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--preset", default="cifar10-m-8-16")
    parser.add_argument("--methods", default="bp,bp-checkpointed,lg-bp,lg-fg-a,lg-fg-w,fg-a,fg-w")
    parser.add_argument("--blocks", type=int, nargs="+", default=[4, 16, 64])
    parser.add_argument("--microbatch", type=int, default=8)
    arguments = parser.parse_args()
    preset = presets.find(arguments.preset)
    about = data.find(preset.dataset)
    rows = []
    for method in arguments.methods.split(","):
        for blocks in arguments.blocks:
            model = dataclasses.replace(preset.model, blocks=blocks)
            one = dataclasses.replace(preset, model=model, method=method, microbatch=arguments.microbatch)
            task = cost.Task(one, tuple(about.shape), about.classes)
            compiled = cost.step(task, run=False)
            row = {
                "method": method,
                "blocks": blocks,
                "microbatch": arguments.microbatch,
                "executor": "streamed" if cost.is_streamed(task) else "whole",
                "temp_mib": compiled.temp_mib,
                "held_mib": compiled.held_mib,
                "compile_seconds": compiled.compile_seconds,
            }
            rows.append(row)
            print(
                f"{method:16s} {blocks:3d} blocks: {row['temp_mib']:8.1f} MiB temporary, {row['held_mib']:6.1f} MiB held, "
                f"{row['compile_seconds']:5.1f} s to compile ({row['executor']})",
                flush=True,
            )
            arguments.out.mkdir(parents=True, exist_ok=True)
            write_json(arguments.out / "depth_memory.json", rows)


if __name__ == "__main__":
    main()
