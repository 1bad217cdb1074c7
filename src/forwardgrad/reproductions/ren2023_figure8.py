"""Ren et al. 2023, Figure 8: measured variance of weight and activity perturbation against Lemma 1 and Table 1.

    forwardgrad reproduce ren2023:figure8

The network of appendix 10: 4 inputs, 4 tanh units, 1 output, squared error, Gaussian noise; the gradient estimated is that of the first layer,
which alone is displaced. Batch sizes from 1 to 4096, then N = 4 with 1 to 256 inputs (fan-in p) or units (fan-out q). 5000 estimates a point.

What is sampled is the batches and the noise, nothing else: batches are drawn with replacement from a population of 1024 examples, all of whose
gradients are known by backpropagation. So V and S are no estimates (the paper took them from 5000 batches), and the theory has no sampling error.
A measured variance is the mean square of the distance to the population's gradient, averaged over the weights: a bias would add to it. It is a
mean of independent samples, and its standard error is theirs.

Each of Lemma 1's terms has a measurement of its own, from parts of a batch under the noise of the whole batch (the other examples' losses are
multiplied by zero):

    Z1  square of the batch's gradient less the population's
    Z2  N times the square of what noise does to the first example's share
    Z3  4 (N - 1) / N times the product of what noise does to the two halves of the batch, one with the other

The estimates are `forwardgrad.value_and_grad`'s. Shared activity perturbation is not in the paper's figure, and is here.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import forwardgrad as fg
from forwardgrad.reproductions import measured
from forwardgrad.reproductions.against_theory import ERRORS, SHARE, agrees
from forwardgrad.reproductions.ren2023_figure8_pictures import draw, draw_terms
from forwardgrad.reproductions.ren2023_table1 import ESTIMATES, Estimate, backpropagation, terms
from forwardgrad.training.metrics import write_json

POPULATION = 1024
NAMES = (*ESTIMATES, "backpropagation")
SWEEPS = {
    "batch size": (1, 4, 16, 64, 256, 1024, 4096),
    "fan-in": (1, 4, 16, 64, 256),
    "fan-out": (1, 4, 16, 64, 256),
}
AT_ONCE = 2**20  # displaced numbers
QUICKLY = {"xla_backend_optimization_level": 1}  # most of the time is compilation


class Problem(NamedTuple):
    """First layer [p, q], readout [q], inputs [examples, p], targets [examples]."""

    w: jax.Array
    readout: jax.Array
    x: jax.Array
    y: jax.Array

    def loss(self, w: jax.Array, x: jax.Array, y: jax.Array, mask: jax.Array) -> jax.Array:
        """Squared error of each example, times its mask."""
        z = fg.tap(x @ w, "z", "batch unit")
        return mask * (jnp.tanh(z) @ self.readout - y) ** 2

    def gradients(self) -> jax.Array:
        """Of each example, by backpropagation [examples, p, q]."""
        one = lambda x, y: jax.grad(lambda w: self.loss(w, x[None], y[None], jnp.ones(1))[0])(self.w)
        return jax.vmap(one)(self.x, self.y)


def problem(p: int, q: int, examples: int = POPULATION, seed: int = 0) -> Problem:
    """Gaussian inputs and first layer; the units are added up, and so are the inputs for the target."""
    keys = jax.random.split(jax.random.key(seed), 2)
    x = jax.random.normal(keys[0], (examples, p))
    return Problem(jax.random.normal(keys[1], (p, q)) / p**0.5, jnp.ones(q), x, x.sum(1) / p**0.5)


def constants(known: Problem) -> tuple[np.ndarray, float, float]:
    """The population's gradient, V and S."""
    each = np.asarray(jax.jit(known.gradients)(), np.float64)
    return each.mean(0), float(each.var(0).mean()), float((each.mean(0) ** 2).mean())


def parts(n: int) -> np.ndarray:
    """Masks [3, n]: the whole batch, its first half, its first example."""
    number = np.arange(n)
    return np.stack([number >= 0, number < n // 2, number < 1]).astype(float)


def shares(known: Problem, estimate: Estimate | None, guess: Any, key: jax.Array, x: jax.Array, y: jax.Array) -> Any:
    """Estimates and gradients of the parts of one batch, under the noise of the whole: two arrays [3, p, q]."""
    masks = jnp.asarray(parts(len(x)), x.dtype)
    exact = jax.vmap(lambda m: jax.grad(lambda w: known.loss(w, x, y, m).mean())(known.w))(masks)
    if estimate is None:
        return exact, exact
    vg = fg.value_and_grad(
        known.loss, guess=guess, insertion=estimate.insertion, partition=estimate.partition, allow_bias=True
    )
    return jax.vmap(lambda m: vg(known.w, x, y, m, key=key)[1])(masks), exact


def squares(found: jax.Array, exact: jax.Array, mean: jax.Array, n: int) -> jax.Array:
    """Unbiased samples of the variance and of Z1, Z2, Z3 [4] from one batch; `mean` is the population's gradient."""
    whole, half, first = found - exact
    total, z1 = (found[0] - mean) ** 2, (exact[0] - mean) ** 2
    z2, z3 = n * first**2, 4 * (n - 1) / n * half * (whole - half)
    return jnp.stack([term.mean() for term in (total, z1, z2, z3)])


def measure(known: Problem, estimate: Estimate | None, n: int, samples: int, mean: Any, key: jax.Array) -> np.ndarray:
    """Means and standard errors of the variance and of Z1, Z2, Z3: [2, 4]."""
    assert n == 1 or n % 2 == 0, "a batch has two halves"
    p, q = known.w.shape
    guess, size = fg.gaussian(), 3 * n * (p * q if estimate and estimate.entries(p, q) == p * q else max(p, q))
    at_once = max(d for d in range(1, samples + 1) if samples % d == 0 and d <= max(1, AT_ONCE // size))

    def sample(key: jax.Array, known: Problem, mean: jax.Array) -> jax.Array:
        chosen, noise = jax.random.split(key)
        index = jax.random.randint(chosen, (n,), 0, len(known.x))
        found, exact = shares(known, estimate, guess, noise, known.x[index], known.y[index])
        return squares(found, exact, mean, n)

    @functools.partial(jax.jit, compiler_options=QUICKLY)
    def all_of_them(keys: jax.Array, known: Problem, mean: jax.Array) -> jax.Array:
        return jax.lax.map(lambda key: sample(key, known, mean), keys, batch_size=at_once)

    found = np.asarray(all_of_them(jax.random.split(key, samples), known, jnp.asarray(mean, jnp.float32)), np.float64)
    return np.stack([found.mean(0), found.std(0, ddof=1) / math.sqrt(samples)])


def rows(sweeps: dict[str, Sequence[int]], samples: int, say: Callable[[str], None]) -> Iterator[dict[str, Any]]:
    """One row per sweep, value and estimator."""
    for sweep, values in sweeps.items():
        for value in values:
            n, p, q = {"batch size": (value, 4, 4), "fan-in": (4, value, 4), "fan-out": (4, 4, value)}[sweep]
            begin, known = time.monotonic(), problem(p, q)
            mean, v, s = constants(known)
            for i, name in enumerate(NAMES):
                estimate = ESTIMATES.get(name)
                theory = terms(estimate, n, p, q, v, s) if estimate else backpropagation(n, v)
                key = jax.random.fold_in(jax.random.key(list(sweeps).index(sweep)), len(NAMES) * value + i)
                found, error = measure(known, estimate, n, samples, mean, key).tolist()
                yield {
                    "sweep": sweep,
                    "value": value,
                    "estimator": name,
                    "batch_size": n,
                    "fan_in": p,
                    "fan_out": q,
                    "samples": samples,
                    "gradient_variance": v,
                    "squared_gradient": s,
                    "measured": found[0],
                    "standard_error": error[0],
                    "theory": theory.total,
                    "terms": {
                        term: {"measured": m, "standard_error": e, "theory": t}
                        for term, m, e, t in zip(("Z1", "Z2", "Z3"), found[1:], error[1:], theory, strict=True)
                    },
                }
            say(f"{sweep} {value}: {time.monotonic() - begin:.1f} s")


def run(
    out: Path,
    *,
    samples: int = 5000,
    sweeps: dict[str, Sequence[int]] = SWEEPS,  # pyright: ignore[reportArgumentType]
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Measure, write `figure8.json`, `figure8.png` and `figure8_terms.png`.

    Args:
      out: folder of the files.
      samples: estimates per point.
      sweeps: `{"batch size" | "fan-in" | "fan-out": values}`; batch sizes are 1 or even.
      say: is told of progress.

    Returns:
      What `conclude` says of it, and `files`.
    """
    measured.refuse_unwritable(out)
    found = list(rows(sweeps, samples, say))
    write_json(out / "figure8.json", found)
    draw(out / "figure8.png", found)
    draw_terms(out / "figure8_terms.png", found)
    return {**conclude(found), "files": ["figure8.json", "figure8.png", "figure8_terms.png"]}


def conclude(found: list[dict[str, Any]]) -> dict[str, Any]:
    """What the points say.

    Returns:
      `passes`, `points` and `points_within` three standard errors, the same for the three terms, `said`, a sentence.
    """
    # a term that vanishes for every sample, as two of backpropagation's, confirms nothing
    each = [term for row in found for term in row["terms"].values() if term["standard_error"] > 0]
    within, terms_within = sum(map(agrees, found)), sum(map(agrees, each))
    said = f"{within} of {len(found)} variances and {terms_within} of {len(each)} terms are within {ERRORS} standard errors of the theory"
    return {
        "passes": within >= SHARE * len(found),
        "said": said,
        "points": len(found),
        "points_within": within,
        "terms": len(each),
        "terms_within": terms_within,
    }
