"""Random directions: zero mean, unit covariance, keyed by site, draw and global example index."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from forwardgrad.guesses.base import Guess, Site, View
from forwardgrad.named import Named

Draw = Callable[[jax.Array, tuple[int, ...], jax.typing.DTypeLike], jax.Array]


def signs(key: jax.Array, shape: tuple[int, ...], dtype: jax.typing.DTypeLike) -> jax.Array:
    """Independent ±1 from packed bits: 32 signs for one random word."""
    size = math.prod(shape)
    words = jax.random.bits(key, (-(-size // 32),), jnp.uint32)
    bits = (words[:, None] >> jnp.arange(32, dtype=jnp.uint32)) & 1
    return (2 * bits.reshape(-1)[:size].astype(dtype) - 1).reshape(shape)


def normals(key: jax.Array, shape: tuple[int, ...], dtype: jax.typing.DTypeLike) -> jax.Array:
    """Independent Gaussians from 16 bits each: the quantiles of N(0, 1) at (k + 1/2) / 2^16, scaled to unit variance exactly.

    Mean 0 and variance 1 without error, fourth moment 2.9993, at most 4.33 standard deviations. Most of the time of `jax.random.normal` goes into
    its 32 random bits per number, and most of the rest into the quantile, which is looked up here.
    """
    size = math.prod(shape)
    words = jax.random.bits(key, (-(-size // 2),), jnp.uint32)
    table = jnp.asarray(_quantiles(), dtype)
    # in a loop, so that its result is kept: XLA would draw again wherever the numbers are read
    look_up = lambda numbers: table.at[numbers].get(mode="promise_in_bounds")
    halves = jax.lax.map(look_up, jnp.stack([words >> 16, words & 0xFFFF]))
    return halves.reshape(-1)[:size].reshape(shape)


@functools.cache
def _quantiles() -> np.ndarray:
    """Quantiles of N(0, 1) at (k + 1/2) / 2^16, k = 0 ... 2^16 - 1, times what makes their variance 1; float64."""
    with jax.ensure_compile_time_eval(), jax.enable_x64(True):
        x = np.asarray(jax.scipy.special.ndtri((jnp.arange(2**16, dtype=jnp.float64) + 0.5) / 2**16))
    return x / np.sqrt(np.mean(x**2))


def independent(draw: Draw, name: str) -> Guess:
    """A guess whose entries are independent, from `draw(key, shape, dtype)`."""

    def one(key: jax.Array, site: Site, view: View) -> Named:
        sizes = dict(zip(site.noise_axes, site.noise_shape, strict=True))
        apart = "batch" in site.noise_axes and view.batch["index"] is not None
        rest = {a: n for a, n in sizes.items() if not (apart and a == "batch")}

        def draw_one(number: jax.Array) -> jax.Array:
            own = jax.random.fold_in(site.key(key), number)
            if not apart:
                return draw(own, tuple(rest.values()), site.dtype)
            keys = jax.vmap(lambda i: jax.random.fold_in(own, i))(view.batch["index"])
            return jax.vmap(lambda k: draw(k, tuple(rest.values()), site.dtype))(keys)

        value = jax.vmap(draw_one)(jnp.arange(view.draws))
        return Named(value, ("draw", *(("batch",) if apart else ()), *rest))

    return Guess(
        lambda key, state, view: {name: one(key, site, view) for name, site in view.sites.items()},
        name=name,
        sitewise=True,
    )


def gaussian() -> Guess:
    """Directions u ~ N(0, I): E[u uᵀ] = I, E[u⁴] = 3. What Baydin et al. and all three papers draw.

    With d = <∇, u> the estimate d u has expectation ∇ and, in D dimensions, total variance (D + 1)|∇|².
    """
    return independent(normals, "gaussian")


def rademacher() -> Guess:
    """Directions of independent signs: E[u uᵀ] = I, u² = 1. Total variance of d u in D dimensions: (D - 1)|∇|².

    The least variance that independent entries can have, and far cheaper to draw than Gaussians; the default.
    """
    return independent(signs, "rademacher")


def orthogonal() -> Guess:
    """Sets of orthogonal directions, uniform on the sphere of radius √D in each cell: E[u uᵀ] = I.

    A cell is a slice of the axes that all sites of the part share with the partition; its D units are the noise of all sites in that
    slice, jointly. The draws of a step are orthogonal in each cell; with D draws the mean of d u is the gradient exactly, with K < D draws
    the total variance is (D / K - 1)|∇|². More draws than D start a new set. Cost: a QR factorisation of [D, draws] per cell.
    """

    def propose(key: jax.Array, state: tuple[()], view: View) -> dict[str, Named]:
        sites = list(view.sites.values())
        if not sites:
            return {}
        common = tuple(a for a in view.partition if all(a in site.noise_axes for site in sites))
        sizes = [dict(zip(site.noise_axes, site.noise_shape, strict=True)) for site in sites]
        rests = [[a for a in site.noise_axes if a not in common] for site in sites]
        lengths = [math.prod(s[a] for a in rest) for s, rest in zip(sizes, rests, strict=True)]
        shape, dim = tuple(sizes[0][a] for a in common), sum(lengths)
        dtype = jnp.result_type(*(site.dtype for site in sites))
        base = sites[0].key(key)

        def one_set(number: int, count: int) -> jax.Array:
            own = jax.random.fold_in(base, number)
            if "batch" in common and view.batch["index"] is not None:  # keyed by the global index, as all noise is
                rest = tuple(n for a, n in zip(common, shape, strict=True) if a != "batch")
                draw = lambda i: jax.random.normal(jax.random.fold_in(own, i), (*rest, dim, count), dtype)
                normal = jnp.moveaxis(jax.vmap(draw)(view.batch["index"]), 0, common.index("batch"))
            else:
                normal = jax.random.normal(own, (*shape, dim, count), dtype)
            q, r = jnp.linalg.qr(normal)
            # the signs make q uniform (Haar), and not just orthogonal
            return q * jnp.sign(jnp.diagonal(r, axis1=-2, axis2=-1))[..., None, :] * math.sqrt(dim)

        counts = [min(dim, view.draws - first) for first in range(0, view.draws, dim)]
        u = jnp.concatenate([one_set(i, count) for i, count in enumerate(counts)], -1)
        u = jnp.moveaxis(u, -1, 0)  # [draw, *common, dim]
        pieces = jnp.split(u, list(_ends(lengths))[:-1], -1)
        out = {}
        for name, piece, rest, size in zip(view.sites, pieces, rests, sizes, strict=True):
            out[name] = Named(piece.reshape(view.draws, *shape, *(size[a] for a in rest)), ("draw", *common, *rest))
        return out

    return Guess(propose, name="orthogonal")


def _ends(lengths: list[int]):
    total = 0
    for n in lengths:
        total += n
        yield total
