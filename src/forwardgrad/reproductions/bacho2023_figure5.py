"""Bacho & Chu 2023, Figure 5: variance of FG-W and FG-A against the numbers of neurons and of inputs, beside Propositions 5 and 6.

    forwardgrad reproduce bacho2023:figure5

n0 inputs, n1 ReLU units, 10 outputs, one image of MNIST at a time; the estimate is that of the hidden layer's weights, which (FG-A: whose outputs)
alone are displaced. With δ = ∂L/∂y, for the weight from input j to unit i,

    Proposition 5   FG-W   Var = (∂L/∂w_ij)² + |∂L/∂W|²
    Proposition 6   FG-A   Var = (δ_i² + |δ|²)(∂y_i/∂w_ij)²

both exact. What is shown is the average over the weights and over 10 images, each on a network of its own, since few neurons are no good sample of
what is drawn. More inputs are the image's pixels several times, as in the paper.

The paper's slopes, 1 and 1 for FG-W and 1 and 0 for FG-A, need derivatives by single weights whose size does not depend on n1 and n0 (they are
"bounded" there). Output weights are therefore drawn with one standard deviation whatever n1 is, small enough that outputs stay small: with the usual
1/√n1 their squares, and with them both variances, would fall as fast as the numbers of terms grow. Hidden weights are U(±1/√n0).

The mean of every estimate is the exact gradient: a measured variance is the mean square of the distance to it, and its standard error that of a
mean of independent samples.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import forwardgrad as fg
from forwardgrad.presets.bacho_mnist_fc import preset
from forwardgrad.reproductions import measured
from forwardgrad.reproductions.against_theory import ERRORS, SHARE, agrees, exponent
from forwardgrad.reproductions.bacho2023_figure4 import kernel
from forwardgrad.training.metrics import write_json
from forwardgrad.training.pictures import picture

OUTPUT = 0.01  # standard deviation of the output weights
LABELS = {"fg-w": "FG-W", "fg-a": "FG-A"}
AXES = {"neurons": "neurons n1 (n0 = {})", "inputs": "inputs n0 (n1 = {})"}
SWEEPS = {"neurons": (16, 64, 256, 1024), "inputs": (1, 2, 4, 8)}
FIXED = {"neurons": 1, "inputs": 64}  # copies of the pixels; units
SLOPES = {("neurons", "fg-w"): 1, ("neurons", "fg-a"): 1, ("inputs", "fg-w"): 1, ("inputs", "fg-a"): 0}  # the paper's
FLATTER = 0.2  # a slope may be off by, since a few networks with their images are a sample


@dataclasses.dataclass(frozen=True)
class Options(measured.OnData):
    """Sizes."""

    images: int = 10
    """images of the average"""
    samples: int = 100
    """estimates per image"""


class Problem(NamedTuple):
    """A network with parameters for each image [images, ...], and images [images, 1, ...] with labels [images, 1]: batches of one."""

    network: fg.Network
    params: Any
    model_state: Any
    batches: dict[str, jax.Array]


class Truth(NamedTuple):
    """For each image: ∂L/∂W [images, n0, n1], and the average over weights of Propositions 5 and 6 [images]."""

    gradient: jax.Array
    variance: dict[str, jax.Array]


def problem(units: int, copies: int, images: jax.Array, labels: Any) -> Problem:
    """As the paper's, on images [images, height, width, 1] whose pixels come several times."""
    model = dataclasses.replace(preset.model, hidden=(units,), batch_norm=False)
    x = jnp.repeat(images, copies, axis=-1)[:, None]
    network = model.network(x.shape[2:], 10)
    params, model_state = jax.jit(jax.vmap(network.init))(jax.random.split(jax.random.key(0), len(x)))
    drawn = OUTPUT * jax.random.normal(jax.random.key(1), (len(x), units, 10))
    params = {"layer0": {**params["layer0"], "readout": {"kernel": drawn, "bias": jnp.zeros((len(x), 10))}}}
    return Problem(network, params, model_state, {"inputs": x, "labels": jnp.asarray(labels)[:, None]})


def truth(known: Problem) -> Truth:
    """From the formulas, without an estimator."""

    def one(params: Any, x: jax.Array, label: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        (layers, readout) = (params["layer0"][name] for name in ("layers", "readout"))
        w, b = layers["linear"]["kernel"], layers["linear"]["bias"]
        x = x.ravel()
        z = x @ w + b
        delta = jax.grad(lambda y: -jax.nn.log_softmax(y @ readout["kernel"] + readout["bias"])[label])(jax.nn.relu(z))
        local = x[:, None] * (z > 0)  # ∂y_i/∂w_ij
        gradient = local * delta
        total = (gradient**2).sum()
        fg_a = ((delta**2 + (delta**2).sum()) * local**2).mean()
        return gradient, total * (1 + 1 / w.size), fg_a

    gradient, fg_w, fg_a = jax.jit(jax.vmap(one))(
        known.params, *(known.batches[name][:, 0] for name in ("inputs", "labels"))
    )
    return Truth(gradient, {"fg-w": fg_w, "fg-a": fg_a})


def estimator(name: str, network: fg.Network, guess: fg.Guess) -> fg.Estimator:
    """Displaces the hidden layer's weights, biases left out, or its outputs."""
    insertion, partition = (fg.weights("*kernel"), ()) if name == "fg-w" else (fg.activations(), ("batch",))
    return fg.estimator(
        network, target=fg.global_loss(), guess=guess, insertion=insertion, partition=partition, name=name
    )


def measure(name: str, known: Problem, gradient: jax.Array, samples: int, key: jax.Array) -> tuple[float, float]:
    """The variance, averaged over weights and images, and its standard error, of which the difference of the images is no part."""
    method = estimator(name, known.network, fg.gaussian())

    @jax.jit
    def each(keys: jax.Array, *known: Any) -> jax.Array:
        def image(one: Any) -> jax.Array:
            key, params, model_state, batch, exact = one
            state = method.initial_state(key, params, model_state, batch)
            estimate = lambda k: method.estimate(k, state, params, model_state, batch)[0].grads
            return jax.lax.map(lambda k: ((kernel(estimate(k)) - exact) ** 2).mean(), jax.random.split(key, samples))

        return jax.lax.map(image, (keys, *known))

    keys = jax.random.split(key, len(gradient))
    found = np.asarray(each(keys, known.params, known.model_state, known.batches, gradient), np.float64)
    error = math.sqrt(found.var(1, ddof=1).sum() / samples) / len(found)
    return float(found.mean()), error


def rows(
    images: jax.Array, labels: Any, sweeps: dict[str, Sequence[int]], samples: int, say: Callable[[str], None]
) -> Iterator[dict[str, Any]]:
    """A row per sweep, value and method."""
    for number, (sweep, values) in enumerate(sweeps.items()):
        for value in values:
            units, copies = (value, FIXED[sweep]) if sweep == "neurons" else (FIXED[sweep], value)
            begin, known = time.monotonic(), problem(units, copies, images, labels)
            exact = truth(known)
            for i, name in enumerate(LABELS):
                key = jax.random.fold_in(jax.random.key(i + len(LABELS) * number), 10_000 * copies + units)
                found, error = measure(name, known, exact.gradient, samples, key)
                yield {
                    "sweep": sweep,
                    "neurons": units,
                    "inputs": math.prod(images.shape[1:]) * copies,
                    "method": name,
                    "images": len(images),
                    "samples": samples,
                    "measured": found,
                    "standard_error": error,
                    "theory": float(exact.variance[name].mean()),
                }
            say(f"{units} neurons, {math.prod(images.shape[1:]) * copies} inputs: {time.monotonic() - begin:.1f} s")


def slope(found: list[dict[str, Any]], sweep: str, method: str) -> float:
    """Of log variance against the log of the number that is swept, by linear regression."""
    mine = [row for row in found if (row["sweep"], row["method"]) == (sweep, method)]
    return exponent(mine, sweep)


def run(
    out: Path,
    *,
    say: Callable[[str], None] = print,
    data_dir: Path | None = None,
    offline: bool = False,
    images: int = 10,
    samples: int = 100,
    sweeps: dict[str, Sequence[int]] = SWEEPS,  # pyright: ignore[reportArgumentType]
) -> dict[str, Any]:
    """Measure, write `figure5.json` and `figure5.png`.

    Args:
      out: folder of the files.
      say: is told of progress.
      sweeps: `{"neurons": numbers, "inputs": copies of the pixels}`.
      data_dir, offline, images, samples: see `Options`.

    Returns:
      What `conclude` says of it, and `files`.
    """
    from forwardgrad.training.loop import load_arrays

    measured.refuse_less(images=(images, 1), samples=(samples, 2))
    arrays = load_arrays(preset, data_dir, offline)
    measured.refuse_unwritable(out)
    found = list(
        rows(arrays.normalise(arrays.train_images[:images]), arrays.train_labels[:images], sweeps, samples, say)
    )
    write_json(out / "figure5.json", found)
    concluded = conclude(found)
    draw(out / "figure5.png", found, concluded["slopes"])
    return {**concluded, "files": ["figure5.json", "figure5.png"]}


def conclude(found: list[dict[str, Any]]) -> dict[str, Any]:
    """What the points say.

    Returns:
      `passes` where 95 % of the points are within three standard errors of the propositions and slopes within 0.2 of the paper's, 1, 1, 1
      and 0; `slopes`, `said`.
    """
    sweeps = dict.fromkeys(row["sweep"] for row in found)
    slopes = {sweep: {name: slope(found, sweep, name) for name in LABELS} for sweep in sweeps}
    within = sum(map(agrees, found))
    fitted = "; ".join(
        f"in {sweep} " + ", ".join(f"{LABELS[name]} {value:.2f}" for name, value in its.items())
        for sweep, its in slopes.items()
    )
    return {
        "passes": within >= SHARE * len(found)
        and all(abs(its[name] - SLOPES[sweep, name]) <= FLATTER for sweep, its in slopes.items() for name in its),
        "said": f"{within} of {len(found)} variances are within {ERRORS} standard errors of Propositions 5 and 6; slopes {fitted}",
        "slopes": slopes,
    }


def draw(path: Path, found: list[dict[str, Any]], slopes: dict[str, dict[str, float]]) -> None:
    """A panel per sweep: marks measured, lines the propositions."""
    with picture(path, 1, len(slopes), "Variance of one weight's estimate: marks measured, lines theory") as panels:
        for axes, (sweep, its) in zip(panels[0], slopes.items(), strict=True):
            for i, (name, fitted) in enumerate(its.items()):
                mine = [row for row in found if (row["sweep"], row["method"]) == (sweep, name)]
                x = [row[sweep] for row in mine]
                axes.plot(x, [row["theory"] for row in mine], color=f"C{i}", linewidth=1)
                style = {"fmt": "^s"[i], "markersize": 4.5, "markerfacecolor": "none", "linestyle": "none"}
                bars = [ERRORS * row["standard_error"] for row in mine]
                label = f"{LABELS[name]}: slope {fitted:.2f}"
                axes.errorbar(
                    x, [r["measured"] for r in mine], bars, color=f"C{i}", elinewidth=0.8, label=label, **style
                )
            other = next(row["inputs" if sweep == "neurons" else "neurons"] for row in found if row["sweep"] == sweep)
            axes.set(xscale="log", yscale="log", xlabel=AXES[sweep].format(other))
            axes.set_xticks(ticks := sorted({row[sweep] for row in found if row["sweep"] == sweep}), map(str, ticks))
            axes.minorticks_off()
            axes.legend(fontsize=8, frameon=False)
        panels[0][0].set_ylabel("variance, average over weights")
