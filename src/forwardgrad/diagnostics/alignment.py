"""How far estimates of a gradient are from it: angle, bias and variance of every layer, from K estimates with fresh keys on one batch.

Of one layer's weights, as one vector: ĝ_k the K estimates, m their mean, g the true gradient of a reference. Parameters, model state and what
guesses have learned are the same for all; the noise alone differs. So means and variances are those over the noise, given the batch.

    cosine           1/K Σ_k <ĝ_k, g> / (|ĝ_k| |g|)         of one estimate
    cosine_of_mean   <m, g> / (|m| |g|)
    degrees          arccos(cosine_of_mean)                  Bacho & Chu (2023), Figure 7: the angle of the averaged estimate
    variance         V / |g|²     V = Σ_k |ĝ_k - m|² / (K - 1),       unbiased for tr Σ = E|ĝ - Eĝ|²
    bias_squared     B / |g|²     B = |m - g|² - V / K,               unbiased for |Eĝ - g|², which |m - g|² is not; may be negative
    bias             sqrt(max(B, 0)) / |g|
    variance_share   V / (1/K Σ_k |ĝ_k|²)                    Figure 6: the variance normalised by the squared norm of the estimates

B is the mean of <ĝ_i - g, ĝ_j - g> over all pairs of draws, whose variance is, with b = Eĝ - g and Σ the covariance of ĝ,

    Var B = 4 bᵀΣb / K + 2 tr(Σ²) / (K (K - 1)).

Both terms have unbiased estimates from draws that are made four at a time: tr(Σ²) = E <ĝ_i - ĝ_j, ĝ_k - ĝ_l>² / 4 for four different draws, and the
sample variance of <ĝ, m' - g> over four draws, with m' the mean of the n draws before them, has the expectation bᵀΣb + tr(Σ²) / n. So a group is
added to sums and forgotten: five vectors of the weights' size at a time, whatever K is. `bias_squared_se` is sqrt(Var B) / |g|², the estimate of
bᵀΣb being no less than zero, and `bias_se` is how much larger the bias would be if B were larger by sqrt(Var B):
sqrt(max(B, 0) + sqrt(Var B)) / |g| - bias.

A mean of few noisy estimates still points elsewhere than their expectation: its cosine is at most about 1 / sqrt(1 + variance / K). An estimate that
is zero has cosine 0. Where g vanishes (or is as small as rounding) nothing can be compared with it: `None`.

`forwardgrad.bias` computes the bias of activity perturbation at its taps exactly, without draws, where its rule is linear; what is here is
measured on weight gradients, and holds for any estimator.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from forwardgrad.network import Network, leaf_paths
from forwardgrad.training.optimisers import is_weight

GROUP = 4  # draws at a time: what the standard error of the bias takes
PAIRINGS = (((0, 1), (2, 3)), ((0, 2), (1, 3)), ((0, 3), (1, 2)))
ALL = "all layers"

Vectors = Mapping[str, jax.Array]


def weights(network: Network, grads: Any) -> dict[str, jax.Array]:
    """`{layer: vector}`: the weights of every layer (no biases, no gains, no readouts, whose gradient is always exact), as `block/path`."""
    out = {}
    for block in network.blocks:
        for path, leaf in leaf_paths(grads[block.name]["layers"]).items():
            if is_weight(path):
                name = "/".join(word for word in (block.name, path) if word)
                out[name.removesuffix("/kernel")] = jnp.ravel(leaf)
    return out


class Moments(NamedTuple):
    """Sums over draws. Arrays have an entry per layer, in the order of their names, and a last one for all layers as one vector.

    Attributes:
      mean: of the estimates, by layer.
      scatter: Σ |ĝ - m|².
      squares: Σ |ĝ|².
      trace: Σ over groups of tr(Σ²).
      cosines: Σ of the cosine with each reference's gradient.
      along: Σ over groups of the n draws before times the sample variance along their mean's distance, by reference.
    """

    mean: dict[str, jax.Array]
    scatter: jax.Array
    squares: jax.Array
    trace: jax.Array
    cosines: dict[str, jax.Array]
    along: dict[str, jax.Array]


def moments(estimate: Callable[[Any], Vectors], keys: Any, references: Mapping[str, Vectors]) -> Moments:
    """Sums over the estimates of all keys, four at a time.

    Args:
      estimate: `key -> {layer: vector}`.
      keys: an array with a leading axis, whose length is a multiple of four, at least eight.
      references: `{name: {layer: true gradient}}`.
    """
    groups = keys.reshape(-1, GROUP, *keys.shape[1:])
    layers = jax.eval_shape(estimate, keys[0])
    zeros = jnp.zeros(len(layers) + 1, jnp.result_type(*layers.values()))
    mean, each = ({name: jnp.zeros(x.shape, x.dtype) for name, x in layers.items()}, dict.fromkeys(references, zeros))
    start = Moments(mean, zeros, zeros, zeros, each, each)

    def add(sums: Moments, group: tuple[jax.Array, Any]) -> tuple[Moments, None]:
        number, keys = group
        return _added(sums, GROUP * number, jax.lax.map(estimate, keys), references), None

    return jax.lax.scan(add, start, (jnp.arange(len(groups)), groups))[0]


def _added(sums: Moments, before: jax.Array, found: Vectors, references: Mapping[str, Vectors]) -> Moments:
    """The sums with a group of estimates [GROUP, size] more; `before` draws are in them already (Chan et al. 1979)."""
    # from the first: the mean of equal vectors is then equal to them, bit for bit
    means = {name: x[0] + (x - x[0]).mean(0) for name, x in found.items()}
    moved = {name: mean - sums.mean[name] for name, mean in means.items()}
    share = GROUP / (before + GROUP)
    inner = _per_layer(lambda x, mean: _products(x - mean), found, means)
    between = _per_layer(_square, moved) * before * share
    squares = _per_layer(lambda x: jnp.sum(x**2, 1), found)
    cosines, along = {}, {}
    for name, true in references.items():
        dots = _per_layer(lambda x, g: x @ g, found, true)
        norms = jnp.sqrt(squares * _per_layer(_square, true)[:, None])
        cosines[name] = sums.cosines[name] + _ratio(dots, norms).sum(1)
        shadow = _per_layer(lambda x, mean, before, g: (x - mean) @ (before - g), found, means, sums.mean, true)
        along[name] = sums.along[name] + before * shadow.var(1, ddof=1)
    return Moments(
        {name: mean + share * moved[name] for name, mean in sums.mean.items()},
        sums.scatter + jnp.trace(inner, axis1=1, axis2=2) + between,
        sums.squares + squares.sum(1),
        sums.trace + _trace_of_square(inner),
        cosines,
        along,
    )


def _per_layer(f: Callable[..., jax.Array], *vectors: Vectors) -> jax.Array:
    """`f` of each layer's vectors, by name, and the sum over the layers: what it is for all of them as one vector."""
    values = jnp.stack([f(*(v[name] for v in vectors)) for name in sorted(vectors[0])])
    return jnp.concatenate([values, values.sum(0, keepdims=True)])


def _square(x: jax.Array) -> jax.Array:
    return jnp.sum(x**2)


def _products(x: jax.Array) -> jax.Array:
    """[GROUP, size] to the products of all pairs [GROUP, GROUP]."""
    return jnp.matmul(x, x.T, precision="highest")


def _ratio(x: jax.Array, y: jax.Array) -> jax.Array:
    """0 where there is nothing to divide by."""
    return jnp.where(y > 0, x / jnp.where(y > 0, y, 1), 0)


def _trace_of_square(products: jax.Array) -> jax.Array:
    """Unbiased for tr(Σ²), from the products [..., GROUP, GROUP] of four estimates less any constant."""
    p = lambda i, j: products[..., i, j]
    ways = [(p(i, k) - p(i, m) - p(j, k) + p(j, m)) ** 2 / 4 for (i, j), (k, m) in PAIRINGS]
    return jnp.stack(ways).mean(0)


def variance_of_bias(sums: Moments, reference: str, draws: int) -> tuple[jax.Array, jax.Array]:
    """The two terms of Var B, unbiased, of which the first may be negative."""
    groups = draws / GROUP
    trace = sums.trace / groups
    along = sums.along[reference] / (2 * groups * (groups - 1)) - trace / (2 * groups)
    return 4 * along / draws, 2 * trace / (draws * (draws - 1))


class Found(NamedTuple):
    """What the module's docstring defines, against one reference, but the roots: arrays with an entry per layer and one for all.

    Not divided by |g|²: `V`, `B` and its standard error `B_se`; `cosine`, `inner` is <m, g>; squared norms of the gradient, of the mean
    estimate, and on average of the estimates.
    """

    V: jax.Array
    B: jax.Array
    B_se: jax.Array
    cosine: jax.Array
    inner: jax.Array
    gradient: jax.Array
    mean: jax.Array
    estimates: jax.Array


def found(sums: Moments, references: Mapping[str, Vectors], draws: int) -> dict[str, Found]:
    """From the sums over `draws` estimates, for each reference."""
    out = {}
    variance = sums.scatter / (draws - 1)
    for name, true in references.items():
        bias = _per_layer(lambda m, g: _square(m - g), sums.mean, true) - variance / draws
        along, trace = variance_of_bias(sums, name, draws)
        out[name] = Found(
            variance,
            bias,
            jnp.sqrt(jnp.maximum(along, 0) + trace),
            sums.cosines[name] / draws,
            _per_layer(lambda m, g: m @ g, sums.mean, true),
            _per_layer(_square, true),
            _per_layer(_square, sums.mean),
            sums.squares / draws,
        )
    return out


def rows(layers: list[str], one: Found, draws: int) -> list[dict[str, Any]]:
    """One row per layer, and one for all of them (`ALL`), in plain numbers; see the module's docstring for the keys.

    Args:
      layers: all of them, in the order wanted.
      one: against one reference.
      draws: for the record.
    """
    values = {name: np.asarray(x, np.float64) for name, x in one._asdict().items()}
    rounding = 100 * float(jnp.finfo(one.gradient.dtype).eps) * math.sqrt(float(values["gradient"][:-1].max()))
    places = [*map(sorted(layers).index, layers), len(layers)]
    each = [_row({name: float(x[i]) for name, x in values.items()}, rounding) for i in places]
    return [{"layer": name, **row, "draws": draws} for name, row in zip([*layers, ALL], each, strict=True)]


def _row(x: Mapping[str, float], rounding: float) -> dict[str, float | None]:
    norm, mean = math.sqrt(x["gradient"]), math.sqrt(x["mean"])
    names = ("degrees", "cosine", "cosine_of_mean", "bias", "bias_se", "bias_squared", "bias_squared_se", "variance")
    own: dict[str, float | None] = dict.fromkeys(names)
    if norm > rounding:
        cosine = max(-1.0, min(1.0, x["inner"] / (mean * norm))) if mean > 0 else 0.0
        bias = math.sqrt(max(x["B"], 0.0)) / norm
        own = {
            "degrees": math.degrees(math.acos(cosine)),
            "cosine": x["cosine"],
            "cosine_of_mean": cosine,
            "bias": bias,
            "bias_se": math.sqrt(max(x["B"], 0.0) + x["B_se"]) / norm - bias,
            "bias_squared": x["B"] / x["gradient"],
            "bias_squared_se": x["B_se"] / x["gradient"],
            "variance": x["V"] / x["gradient"],
        }
    return {
        **own,
        "variance_share": x["V"] / x["estimates"] if x["estimates"] > 0 else None,
        "gradient_norm": norm,
        "estimate_norm": mean,
    }
