"""Ren et al. 2023, Figure 5: memory and time of the replicated loss alone, fused and by its definition, against the number of groups.

    forwardgrad reproduce ren2023:figure5

128 examples, 64 patches and 512 channels (M/8/16 on CIFAR-10), 1 to 64 groups. For each form and number of groups

- *gradient*: of the mean loss by features, classifier and bias, by reverse mode;
- *derivative*: of every loss cell along one direction in all three, by forward mode;

each without the loss's value: its cells, which grow with the groups, would have to be written and added up. Memory is XLA's temporary bytes, known
without running: arguments and results are not among them. Time is the fastest of interleaved runs, since what else a machine does can only add to
it. What would take more than half of the free memory is compiled for its number, and not run.

The fused form's four costs must be the same with 1 and with 64 groups, to 15 %.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from forwardgrad.diagnostics import cost
from forwardgrad.losses.cross_entropy import naive_replicated_cross_entropy, replicated_cross_entropy
from forwardgrad.reproductions import measured
from forwardgrad.training.metrics import write_json
from forwardgrad.training.pictures import picture

FORMS = {"fused": replicated_cross_entropy, "naive": naive_replicated_cross_entropy}
MODES = ("gradient", "derivative")
TOLERANCE = 0.15


def functions(form: str, batch: int, patches: int, channels: int, groups: int) -> dict[str, tuple[Callable, tuple]]:
    """Gradient and derivative, each with its arguments."""
    keys = jax.random.split(jax.random.key(0), 4)
    x = jax.random.normal(keys[0], (batch, patches, groups, channels // groups))
    kernel, bias = jax.random.normal(keys[1], (channels, 10)) / channels**0.5, jnp.zeros(10)
    labels = jnp.arange(batch) % 10
    cells = lambda *args: FORMS[form](*args, labels)
    direction = (jax.random.normal(keys[2], x.shape), jax.random.normal(keys[3], kernel.shape), jnp.ones(10))
    primals = (x, kernel, bias)
    return {
        "gradient": (jax.grad(lambda *args: cells(*args).sum() / batch, (0, 1, 2)), primals),
        "derivative": (lambda primals, direction: jax.jvp(cells, primals, direction)[1], (primals, direction)),
    }


def compiled(form: str, sizes: Sequence[int], groups: Sequence[int]) -> dict[tuple[int, str], Any]:
    """By number of groups and mode: what runs it, and its temporary MiB."""
    out = {}
    for g in groups:
        batch, patches, channels = sizes
        for mode, (function, arguments) in functions(form, batch, patches, channels, g).items():
            one = jax.jit(function).lower(*arguments).compile()
            go = lambda one=one, arguments=arguments: jax.block_until_ready(one(*arguments))
            out[g, mode] = go, cost.memory(one)[0]
    return out


def measure(form: str, sizes: Sequence[int], groups: Sequence[int], repeats: int) -> list[dict[str, Any]]:
    """A row per number of groups; `None` seconds where it was not run."""
    batch, patches, channels = sizes
    all_of_them, limit = compiled(form, sizes, groups), 0.5 * cost.available_mib()
    temporary = {key: mib for key, (_, mib) in all_of_them.items()}
    runs = {key: go for key, (go, mib) in all_of_them.items() if mib < limit}
    taken = cost.seconds(runs, repeats, min)
    return [
        {"form": form, "groups": g, "batch": batch, "patches": patches, "channels": channels}
        | {f"{mode}_seconds": taken.get((g, mode)) for mode in MODES}
        | {f"{mode}_temp_mib": temporary[g, mode] for mode in MODES}
        | {"device": cost.device()}
        for g in groups
    ]


def ratios(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Cost of the fused form with the most groups over that with the fewest."""
    fused = sorted((row for row in rows if row["form"] == "fused"), key=lambda row: row["groups"])
    keys = [f"{mode}_{what}" for mode in MODES for what in ("seconds", "temp_mib")]
    return {key: fused[-1][key] / fused[0][key] for key in keys}


def run(
    out: Path,
    *,
    groups: Sequence[int] = (1, 2, 4, 8, 16, 32, 64),
    sizes: Sequence[int] = (128, 64, 512),
    repeats: int = 201,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Measure, write `figure5.json` and `figure5.png`.

    Args:
      out: folder of the files.
      groups: their numbers.
      sizes: examples, patches, channels.
      repeats: timed runs of the fused form; the naive one, up to a thousand times slower, has a fiftieth of them, and two at least.
      say: is told of progress.

    Returns:
      What `conclude` says of it, and `files`.
    """
    measured.refuse_unwritable(out)
    rows = []
    for form, times in (("fused", repeats), ("naive", max(2, repeats // 50))):
        rows += measure(form, sizes, groups, times)
        for row in rows[-len(groups) :]:
            say(_line(row))
    write_json(out / "figure5.json", rows)
    draw(out / "figure5.png", rows)
    return {**conclude(rows), "files": ["figure5.json", "figure5.png"]}


def conclude(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What the costs say.

    Returns:
      `passes` where the fused form's do not depend on groups, up to the tolerance; their `ratios` (most groups over fewest), `said`, a sentence.
    """
    found, groups = ratios(rows), [row["groups"] for row in rows]
    said = ", ".join(f"{key.replace('_', ' ')} x {ratio:.2f}" for key, ratio in found.items())
    return {
        "passes": all(abs(ratio - 1) <= TOLERANCE for ratio in found.values()),
        "said": f"the fused loss with {max(groups)} groups over {min(groups)}: {said}",
        "ratios": found,
    }


def _line(row: dict[str, Any]) -> str:
    show = lambda x: " not run" if x is None else f"{1e3 * x:8.2f} ms"
    costs = (f"{mode} {show(row[f'{mode}_seconds'])}, {row[f'{mode}_temp_mib']:8.2f} MiB" for mode in MODES)
    return f"{row['form']} {row['groups']:3d} groups: " + "; ".join(costs)


def draw(path: Path, rows: list[dict[str, Any]]) -> None:
    """Memory and time against groups."""
    with picture(path, 1, 2, "The replicated loss alone") as panels:
        for axes, what, label in zip(
            panels[0], ("temp_mib", "seconds"), ("temporary memory, MiB", "time, ms"), strict=True
        ):
            for i, form in enumerate(FORMS):
                for mode, line in zip(MODES, ("o-", "s--"), strict=True):
                    here = [row for row in rows if row["form"] == form and row[f"{mode}_{what}"] is not None]
                    y = [row[f"{mode}_{what}"] * (1e3 if what == "seconds" else 1) for row in here]
                    style = {"color": f"C{i}", "markerfacecolor": "none", "markersize": 5}
                    axes.plot([row["groups"] for row in here], y, line, label=f"{form}, {mode}", **style)
            axes.set(xlabel="groups", ylabel=label, yscale="log")
            axes.set_xscale("log", base=2)
            axes.set_xticks(sorted({row["groups"] for row in rows}))
            axes.xaxis.set_major_formatter("{x:.0f}")
        panels[0][0].legend(fontsize=8, frameon=False)
