"""Bacho & Chu 2023, Figure 6: training loss after one epoch of MNIST against the variance of the gradient estimates it was trained by.

    forwardgrad reproduce bacho2023:figure6

The preset's experiment on a network of two layers, 1000 hidden units, without BatchNorm (`fg-w` and `fg-a` are unbiased without), for one epoch: by
backpropagation with Gaussian noise of several standard deviations on the gradient of the hidden layer (`wrappers.with_noise`), and by `fg-w`, `fg-a`
and `fdfa`, all with an exact output layer. The loss is that over the training images after the epoch. `fg-w` has a second point with its output layer
displaced too, as in the tables' cells: that layer's variance, which is not on the axis, puts it above the line.

Variances are those over the noise of the estimates, of the hidden layer's weights as one vector, given a batch of 64 images, at four times of
the epoch and put together as ratios of sums over them:

    variance_share   Σ V / Σ E|ĝ|²      the paper's normalisation; at most 1 but for chance
    variance         Σ V / Σ |g|²       relative to the true gradient: tells large ones apart

(as `diagnostics/alignment.py` defines them). What learns is updated along the draw's own directions before it estimates, as in Algorithm 1, so that
`fdfa` has the variance that one update of its feedback brings; given the feedback it has none.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from forwardgrad import wrappers
from forwardgrad.data import batches
from forwardgrad.diagnostics import alignment
from forwardgrad.engine import Estimator
from forwardgrad.errors import InputError
from forwardgrad.losses.cross_entropy import cross_entropy
from forwardgrad.presets.bacho_mnist_fc import preset
from forwardgrad.presets.experiment import Experiment
from forwardgrad.reproductions import measured
from forwardgrad.training.metrics import write_json
from forwardgrad.training.pictures import logarithmic, picture

SIGMAS = (0.0, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0)
METHODS = (("fg-w", "readout"), ("fg-a", "readout"), ("fdfa", "readout"), ("fg-w", "layer"))  # and their output layers
NOISY, WHOLE = "bp with noise", "fg-w, output layer too"
COLOURS = {NOISY: "black", "fg-w": "C2", WHOLE: "C2", "fg-a": "C3", "fdfa": "C0"}
TIMES = 4  # at which variances are measured, at even distances, the last at the end
RANKS = 0.9  # least correlation of the ranks
OFF = 1.5  # factor on the loss of noisy backpropagation of the same variance


@dataclasses.dataclass(frozen=True)
class Options(measured.OnData):
    """Sizes."""

    units: int = 1000
    """hidden units"""
    train_images: int = 0
    """use only the first N training images; 0: all"""
    draws: int = 16
    """estimates of which a variance is taken, a multiple of 4, at least 8"""


def experiment(method: str, units: int, train_images: int, output: str = "readout") -> Experiment[Any]:
    """One epoch of the preset on the network of two layers; its output layer exact, or estimated as a `layer`."""
    model = dataclasses.replace(preset.model, hidden=(units,), batch_norm=False, output=output)
    return dataclasses.replace(
        preset, model=model, method=method, guess="gaussian", epochs=1, train_images=train_images
    )


def variances(
    method: Estimator, exact: Estimator, state: Any, params: Any, model_state: Any, batch: Any, keys: jax.Array
) -> dict[str, jax.Array]:
    """V, E|ĝ|² and |g|² of the hidden layer; see the module's docstring."""

    def estimate(key: jax.Array) -> dict[str, jax.Array]:
        learned = method.estimate(key, state, params, model_state, batch)[1]
        return alignment.weights(method.network, method.estimate(key, learned, params, model_state, batch)[0].grads)

    grads = exact.estimate(keys[0], (), params, model_state, batch)[0].grads
    true = {"global": alignment.weights(exact.network, grads)}
    found = alignment.found(alignment.moments(estimate, keys, true), true, len(keys))["global"]
    hidden = sorted(true["global"]).index("layer0/linear")  # `fg-w` has a layer more
    return {"V": found.V[hidden], "estimates": found.estimates[hidden], "gradient": found.gradient[hidden]}


def point(one: Experiment[Any], arrays: Any, sigma: float, draws: int) -> dict[str, Any]:
    """Train for the epoch, measuring as it goes: loss, variances."""
    from forwardgrad.recipes import bp
    from forwardgrad.training.learner import Learner

    learner = Learner(one, arrays, lambda method: wrappers.with_noise(method, sigma) if sigma else method)
    exact = bp(learner.network)
    measure = jax.jit(lambda *rest: variances(learner.method, exact, *rest))
    few = slice(0, one.batch_size)
    batch = {
        "inputs": arrays.normalise(arrays.train_images[few]),
        "labels": jnp.asarray(arrays.train_labels[few]),
    }
    state, found = learner.init(), []
    stops = [round(learner.total_steps * (i + 1) / TIMES) for i in range(TIMES)]
    for i, stop in enumerate(stops):
        while int(state.step) < stop:
            state, _ = learner.run(state, min(learner.longest_dispatch, stop - int(state.step)))
        keys = jax.random.split(jax.random.fold_in(jax.random.key(one.seed), i), draws)
        found.append(jax.device_get(measure(state.method_state, state.params, state.model_state, batch, keys)))
    v, estimates, gradient = (float(sum(f[name] for f in found)) for name in ("V", "estimates", "gradient"))
    return {
        "method": one.method,
        "output": one.model.output,
        "sigma": sigma,
        "train_loss": loss(learner, state),
        "variance": v / gradient,
        "variance_share": v / estimates,
        "draws": draws,
        "steps": stops[-1],
        "measured_after": stops,
    }


def loss(learner: Any, state: Any) -> float:
    """Cross-entropy of the training images, in evaluation mode, in nats."""
    images, labels = learner.arrays.train_images, learner.arrays.train_labels
    indices, weight = batches.evaluation_batches(len(images), learner.experiment.batch_size)

    @jax.jit
    def total(params: Any, model_state: Any, images: jax.Array, labels: jax.Array) -> jax.Array:
        def some(rows: tuple[jax.Array, jax.Array]) -> jax.Array:
            outputs = learner.network.predict(params, model_state, learner.arrays.normalise(images[rows[0]]))
            return (cross_entropy(outputs, {"labels": labels[rows[0]]}).value * rows[1]).sum()

        return jax.lax.map(some, (indices, weight)).sum()

    return float(total(state.params, state.model_state, jnp.asarray(images), jnp.asarray(labels))) / len(images)


def ranks(found: list[dict[str, Any]]) -> float:
    """Correlation of the ranks of variance and loss, over all points (Spearman)."""
    rank = lambda key: np.argsort(np.argsort([row[key] for row in found]))
    return float(np.corrcoef(rank("variance"), rank("train_loss"))[0, 1])


def off_the_line(found: list[dict[str, Any]]) -> dict[str, float]:
    """Loss over that of noisy backpropagation of the same variance, by name: along log variance, beyond its points that of the nearest."""
    noisy = sorted((row["variance"], row["train_loss"]) for row in found if row["sigma"] > 0)
    x, y = np.log([v for v, _ in noisy]), [one for _, one in noisy]
    forward = [row for row in found if row["method"] != "bp" and row["variance"] > 0]
    return {_name(row): float(row["train_loss"] / np.interp(np.log(row["variance"]), x, y)) for row in forward}


def _name(row: dict[str, Any]) -> str:
    return NOISY if row["sigma"] else WHOLE if row.get("output") == "layer" else row["method"]


def run(
    out: Path,
    *,
    say: Callable[[str], None] = print,
    data_dir: Path | None = None,
    offline: bool = False,
    units: int = 1000,
    train_images: int = 0,
    draws: int = 16,
    sigmas: Sequence[float] = SIGMAS,
) -> dict[str, Any]:
    """Train and measure, write `figure6.json` and `figure6.png`.

    Args:
      out: folder of the files.
      say: is told of progress.
      sigmas: standard deviations of the noise on backpropagation, 0 among them for none.
      data_dir, offline, units, train_images, draws: see `Options`.

    Returns:
      What `conclude` says of it, and `files`.
    """
    from forwardgrad.training.loop import load_arrays

    measured.refuse_less(units=(units, 1))
    if draws < 8 or draws % 4:
        raise InputError(f"--draws must be a multiple of 4, at least 8, not {draws}.")
    begin, arrays = time.monotonic(), load_arrays(experiment("bp", units, train_images), data_dir, offline)
    measured.refuse_unwritable(out)
    found = []
    noisy = [("bp", sigma, "readout") for sigma in sigmas]
    for method, sigma, output in noisy + [(method, 0.0, output) for method, output in METHODS]:
        found.append(row := point(experiment(method, units, train_images, output), arrays, sigma, draws))
        name = f"{_name(row)}, σ = {sigma:g}" if sigma else _name(row)
        say(f"{name}: loss {row['train_loss']:.4f}, variance {row['variance']:.3g} ({time.monotonic() - begin:.0f} s)")
    write_json(out / "figure6.json", found)
    draw(out / "figure6.png", found)
    return {**conclude(found), "files": ["figure6.json", "figure6.png"]}


def conclude(found: list[dict[str, Any]]) -> dict[str, Any]:
    """What the points say.

    Returns:
      `passes` where variance and loss of all points have a rank correlation of at least 0.9, and no method's loss is more than 1.5 times
      that of noisy backpropagation at the same variance, or less than that by as much, the output layer exact; `ranks`, `off_the_line`, these
      quotients, `said`.
    """
    correlation, ratios = ranks(found), off_the_line(found)
    listed = ", ".join(f"{method} x {ratio:.2f}" for method, ratio in ratios.items())
    said = f"variance and loss have a rank correlation of {correlation:.2f}; loss over that of noisy backpropagation of the same variance: {listed}"
    return {
        "passes": correlation >= RANKS
        and all(1 / OFF <= ratio <= OFF for name, ratio in ratios.items() if name != WHOLE),
        "said": said,
        "ranks": correlation,
        "off_the_line": ratios,
    }


def draw(path: Path, found: list[dict[str, Any]]) -> None:
    """Loss against the paper's normalised variance, and against the relative one on a logarithmic axis, where backpropagation itself is a line."""
    with picture(path, 1, 2, "Loss after one epoch of MNIST against variance") as panels:
        for axes, key in zip(panels[0], ("variance_share", "variance"), strict=True):
            (exact,) = [row["train_loss"] for row in found if row["method"] == "bp" and row["sigma"] == 0]
            axes.axhline(exact, color="grey", linewidth=1, linestyle="--", label="bp")
            for name, colour in COLOURS.items():
                mine = [row for row in found if _name(row) == name]
                mine.sort(key=lambda row, key=key: row[key])
                style = {NOISY: "o-", WHOLE: "s"}.get(name, "D")
                at = [[row[k] for row in mine] for k in (key, "train_loss")]
                axes.plot(*at, style, color=colour, markersize=4.5, linewidth=1, label=name)
            axes.set(ylabel="training loss (nats)")
            logarithmic(axes.yaxis)
        panels[0][0].set(xlabel="variance / E|ĝ|²")
        panels[0][1].set(xlabel="variance / |∇|²", xscale="log")
        panels[0][0].legend(fontsize=8, frameon=False)
