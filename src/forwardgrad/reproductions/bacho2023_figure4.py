"""Bacho & Chu 2023, Figure 4: variance of FDFA's estimate against α, the rate of the moving average that its feedback is (Proposition 2).

    forwardgrad reproduce bacho2023:figure4

784 inputs, 1000 ReLU units, 10 outputs; the estimate is that of the hidden layer's weights on one batch of 64 images of MNIST; weights and batch stay
as they are. The feedback starts where Proposition 2 has it, at the Jacobian of the outputs, J = V, and is updated t times, B <- (1 - α) B + α S, with
S the mean of d ⊗ u over the batch, before the estimate is made with it, as in Algorithm 1. (Training here, as the released code, estimates with the B
before its update: given that B such an estimate does not vary at all.)

- *given the previous B*: t = 1. Variance α² T, T that of an estimate with S in place of B. **This is the paper's figure**: slope 2.
- *at rest*: t = ⌈3 / α⌉, every B before having been as random. Variance T α (1 - (1 - α)^2t) / (2 - α), in the limit T α / (2 - α), of first order
  in α: what the moving average varies by when nothing is given. The paper has none of it.

T is known: entries of S, for which each example draws its own u, have the covariances Cov(S_oi, S_pj) = ([J Jᵀ]_op 1[i = j] + J_oj J_pi) / N, and
the estimate is linear in S. Since the mean of S is J, that of every estimate is the exact gradient: a measured variance is the mean square of the
distance to it, summed over weights, and its standard error that of a mean of independent samples.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import forwardgrad as fg
from forwardgrad.guesses.feedback import Learned
from forwardgrad.presets.bacho_mnist_fc import preset
from forwardgrad.reproductions import measured
from forwardgrad.reproductions.against_theory import ERRORS, SHARE, agrees, exponent
from forwardgrad.training.metrics import write_json
from forwardgrad.training.pictures import picture

KINDS = ("given the previous B", "at rest")
SMALL = 0.1
LAYER = ("layer0", "layers", "linear", "kernel")


@dataclasses.dataclass(frozen=True)
class Options(measured.OnData):
    """Sizes."""

    units: int = 1000
    """hidden units"""
    examples: int = 64
    """images of the batch"""
    samples: int = 32
    """estimates per point"""


@dataclasses.dataclass(frozen=True)
class Problem:
    """Network, parameters and batch, all fixed, and how directions are drawn."""

    network: fg.Network
    params: Any
    model_state: Any
    batch: dict[str, jax.Array]
    guess: fg.Guess = dataclasses.field(default_factory=fg.gaussian)

    def estimator(self, alpha: Any) -> fg.Estimator:
        return fg.recipes.fdfa(self.network, guess=self.guess, rule="average", alpha=alpha, mask=False)

    def gradient(self) -> jax.Array:
        """Exact, of the hidden layer's weights [inputs, units]."""
        method = fg.recipes.bp(self.network)
        found = jax.jit(method.estimate)(jax.random.key(0), (), self.params, self.model_state, self.batch)
        return kernel(found[0].grads)

    def sample(self, key: jax.Array, alpha: jax.Array, updates: jax.Array, exact: jax.Array) -> jax.Array:
        """Squared distance to the exact gradient of the estimate after a number of updates of the feedback."""
        method, rest = self.estimator(alpha), (self.params, self.model_state, self.batch)
        start = self.at_the_jacobian(method.initial_state(key, *rest))
        update = lambda i, state: method.estimate(jax.random.fold_in(key, i), state, *rest)[1]
        state = jax.lax.fori_loop(0, updates, update, start)
        return jnp.sum((kernel(method.estimate(key, state, *rest)[0].grads) - exact) ** 2)

    def at_the_jacobian(self, state: Any) -> Any:
        """The estimator's state with the output weights as feedback: where outputs are linear they are the Jacobian (Eq. 13)."""
        own = fg.Named(self.params["layer0"]["readout"]["kernel"], ("unit", "class"))
        learned: Learned = state[0]["global"]["predictor"]
        matrices = {site: fg.Named(own.to(b.axes), b.axes) for site, b in learned.matrices.items()}  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType]
        return ({"global": {**state[0]["global"], "predictor": learned._replace(matrices=matrices)}},)

    def total(self) -> float:
        """T, in double precision: Σ_i Σ_op C_iop Cov(S_oi, S_pi), with C_i the Gram matrix of Σ_b x_b 1[y_bi > 0] e_bo."""
        w, v = self.params["layer0"]["layers"]["linear"], self.params["layer0"]["readout"]
        x = np.asarray(self.batch["inputs"], np.float64).reshape(len(self.batch["labels"]), -1)
        on = x @ np.asarray(w["kernel"], np.float64) + np.asarray(w["bias"], np.float64)  # [batch, unit]
        j = np.asarray(v["kernel"], np.float64).T  # [class, unit]
        outputs = np.maximum(on, 0) @ j.T + np.asarray(v["bias"], np.float64)
        e = np.exp(outputs - outputs.max(1, keepdims=True))
        e = (e / e.sum(1, keepdims=True) - np.eye(len(j))[np.asarray(self.batch["labels"])]) / len(x)
        pairs = (x @ x.T)[:, :, None] * (on[:, None] > 0) * (on[None] > 0)  # [batch, batch, unit]
        gram = np.einsum("abi,ao,bp->iop", pairs, e, e, optimize=True)
        return float(np.einsum("iop,iop->", gram, j @ j.T + np.einsum("oi,pi->iop", j, j)) / len(x))


def kernel(grads: Any) -> jax.Array:
    """The hidden layer's weights among the parameters' gradients."""
    for name in LAYER:
        grads = grads[name]
    return grads


def problem(units: int, images: np.ndarray, labels: np.ndarray, normalise: Callable[[Any], jax.Array]) -> Problem:
    """The two-layer network, as it starts, on stored images."""
    model = dataclasses.replace(preset.model, hidden=(units,), batch_norm=False)
    network = model.network(images.shape[1:], int(labels.max()) + 1)
    params, model_state = jax.jit(network.init)(jax.random.key(0))
    return Problem(network, params, model_state, {"inputs": normalise(images), "labels": jnp.asarray(labels)})


def rows(known: Problem, alphas: dict[str, Sequence[float]], samples: int) -> list[dict[str, Any]]:
    """A row per kind and α."""
    exact, total = known.gradient(), known.total()
    norm = float((exact**2).sum())

    @jax.jit
    def each(keys: jax.Array, alpha: jax.Array, updates: jax.Array) -> jax.Array:
        return jax.lax.map(lambda key: known.sample(key, alpha, updates, exact), keys)

    out = []
    for kind, values in alphas.items():
        for number, alpha in enumerate(values):
            updates = 1 if kind == KINDS[0] else math.ceil(3 / alpha)
            keys = jax.random.split(jax.random.fold_in(jax.random.key(KINDS.index(kind)), number), samples)
            found = np.asarray(each(keys, jnp.float32(alpha), updates), np.float64)
            out.append(
                {
                    "kind": kind,
                    "alpha": alpha,
                    "updates": updates,
                    "samples": samples,
                    "squared_gradient": norm,
                    "measured": float(found.mean()),
                    "standard_error": float(found.std(ddof=1) / math.sqrt(samples)),
                    "theory": total * alpha / (2 - alpha) * (1 - (1 - alpha) ** (2 * updates)),
                }
            )
    return out


def slope(found: list[dict[str, Any]], kind: str) -> float:
    """Of log variance against log α, by linear regression; at rest where α is small, since the power law holds in the limit."""
    mine = [row for row in found if row["kind"] == kind and (kind == KINDS[0] or row["alpha"] <= SMALL)]
    return exponent(mine, "alpha")


ALPHAS = {KINDS[0]: (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0), KINDS[1]: (1e-2, 3e-2, 1e-1, 3e-1, 1.0)}


def run(
    out: Path,
    *,
    say: Callable[[str], None] = print,
    data_dir: Path | None = None,
    offline: bool = False,
    units: int = 1000,
    examples: int = 64,
    samples: int = 32,
    alphas: dict[str, Sequence[float]] = ALPHAS,  # pyright: ignore[reportArgumentType]
) -> dict[str, Any]:
    """Measure, write `figure4.json` and `figure4.png`.

    Args:
      out: folder of the files.
      say: is told of progress.
      alphas: by kind.
      data_dir, offline, units, examples, samples: see `Options`.

    Returns:
      What `conclude` says of it, and `files`.
    """
    from forwardgrad.training.loop import load_arrays

    measured.refuse_less(units=(units, 1), examples=(examples, 1), samples=(samples, 2))
    arrays = load_arrays(preset, data_dir, offline)
    measured.refuse_unwritable(out)
    known = problem(units, arrays.train_images[:examples], arrays.train_labels[:examples], arrays.normalise)
    found = rows(known, alphas, samples)
    for row in found:
        say(
            f"{row['kind']}, α = {row['alpha']:g}: {row['measured']:.3g} ± {row['standard_error']:.1g}, "
            f"theory {row['theory']:.3g}"
        )
    write_json(out / "figure4.json", found)
    concluded = conclude(found)
    draw(out / "figure4.png", found, concluded["slopes"])
    return {**concluded, "files": ["figure4.json", "figure4.png"]}


def conclude(found: list[dict[str, Any]]) -> dict[str, Any]:
    """What the points say.

    Returns:
      `passes` where the slope given the previous B is 2 ± 0.05 and all but one in twenty points are within three standard errors of the theory;
      `slopes`, `said`.
    """
    slopes = {kind: slope(found, kind) for kind in dict.fromkeys(row["kind"] for row in found)}
    within = sum(map(agrees, found))
    said = ", ".join(f"{value:.3f} {kind}" for kind, value in slopes.items())
    return {
        "passes": abs(slopes[KINDS[0]] - 2) <= 0.05 and within >= SHARE * len(found),
        "said": f"slope of log variance against log α: {said}; {within} of {len(found)} points are within {ERRORS} standard errors of the theory",
        "slopes": slopes,
    }


def draw(path: Path, found: list[dict[str, Any]], slopes: dict[str, float]) -> None:
    """Variance relative to |∇|² against α: marks measured, lines theory."""
    with picture(path, 1, 1, "Variance of FDFA: marks measured, lines theory") as panels:
        axes = panels[0][0]
        for i, (kind, its) in enumerate(slopes.items()):
            mine = [row for row in found if row["kind"] == kind]
            x = [row["alpha"] for row in mine]
            relative = lambda key, mine=mine: [row[key] / row["squared_gradient"] for row in mine]
            axes.plot(x, relative("theory"), color=f"C{i}", linewidth=1)
            style = {"fmt": "os"[i], "markersize": 4.5, "markerfacecolor": "none", "linestyle": "none"}
            bars = [ERRORS * e for e in relative("standard_error")]
            label = f"{kind}: slope {its:.2f}" + (", the paper's figure" if kind == KINDS[0] else f" for α ≤ {SMALL}")
            axes.errorbar(x, relative("measured"), bars, color=f"C{i}", elinewidth=0.8, label=label, **style)
        axes.set(xscale="log", yscale="log", xlabel="α", ylabel="variance / |∇|²")
        axes.legend(fontsize=8, frameon=False)
