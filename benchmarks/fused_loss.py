"""Time and memory of the replicated loss alone, fused and by its definition, against the number of groups.

    python benchmarks/fused_loss.py --out DIR [--batch 128] [--patches 64] [--channels 512] [--groups 1 4 16 64]

One row per form and number of groups: seconds of the value with its gradient and of the value with a directional derivative (median, interleaved),
temporary MiB of both. What would need more than half of the free memory is compiled, not run.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import jax
import jax.numpy as jnp

from forwardgrad.diagnostics import cost
from forwardgrad.losses.cross_entropy import naive_replicated_cross_entropy, replicated_cross_entropy
from forwardgrad.training.metrics import write_json

FORMS = {"fused": replicated_cross_entropy, "naive": naive_replicated_cross_entropy}


def functions(form, batch, patches, channels, groups):
    """The gradient and the directional derivative of the mean loss by features, kernel and bias; with their arguments."""
    keys = jax.random.split(jax.random.key(0), 4)
    x = jax.random.normal(keys[0], (batch, patches, groups, channels // groups))
    kernel, bias = jax.random.normal(keys[1], (channels, 10)) / channels**0.5, jnp.zeros(10)
    labels = jnp.arange(batch) % 10
    loss = lambda x, kernel, bias: FORMS[form](x, kernel, bias, labels).sum() / batch
    cells = lambda x, kernel, bias: FORMS[form](x, kernel, bias, labels)
    direction = (jax.random.normal(keys[2], x.shape), jax.random.normal(keys[3], kernel.shape), jnp.ones(10))
    gradient = lambda *args: jax.value_and_grad(loss, (0, 1, 2))(*args)
    derivative = lambda *args: jax.jvp(cells, args, direction)
    return {"gradient": gradient, "derivative": derivative}, (x, kernel, bias)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--patches", type=int, default=64)
    parser.add_argument("--channels", type=int, default=512)
    parser.add_argument("--groups", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--repeats", type=int, default=15)
    arguments = parser.parse_args()
    compiled, temp = {}, {}
    for form in FORMS:
        for groups in arguments.groups:
            made, args = functions(form, arguments.batch, arguments.patches, arguments.channels, groups)
            for name, function in made.items():
                one = jax.jit(function).lower(*args).compile()
                size = one.memory_analysis().temp_size_in_bytes / cost.MIB
                temp[form, groups, name] = size
                if size < 0.5 * cost.available_mib():
                    compiled[form, groups, name] = lambda one=one, args=args: jax.block_until_ready(one(*args))
    taken = cost.seconds(compiled, arguments.repeats)
    rows = []
    for form in FORMS:
        for groups in arguments.groups:
            row = {"form": form, "groups": groups, "batch": arguments.batch, "device": cost.device()}
            for name in ("gradient", "derivative"):
                row[f"{name}_seconds"] = taken.get((form, groups, name))
                row[f"{name}_temp_mib"] = temp[form, groups, name]
            rows.append(row)
            show = lambda x: "not run" if x is None else f"{1e3 * x:8.2f} ms"
            print(
                f"{form:6s} {groups:3d} groups: gradient {show(row['gradient_seconds'])}, {row['gradient_temp_mib']:8.1f} MiB; "
                f"derivative {show(row['derivative_seconds'])}, {row['derivative_temp_mib']:8.1f} MiB"
            )
    arguments.out.mkdir(parents=True, exist_ok=True)
    write_json(arguments.out / "fused_loss.json", rows)


if __name__ == "__main__":
    main()
