"""Random directions: zero mean, unit covariance, keyed by site, draw and global example index."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.random import threefry_2x32

from forwardgrad.errors import InputError
from forwardgrad.guesses.base import Guess, Site, View
from forwardgrad.named import Named

Numbers = Callable[[jax.Array, jax.typing.DTypeLike], jax.Array]
"""`(words, dtype) -> numbers`: random words uint32 [N, n] to independent entries [N, m n]."""


def signs(words: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """±1 from each bit: 32 of a word."""
    bits = (words[..., None] >> jnp.arange(32, dtype=jnp.uint32)) & 1
    return (2 * bits.astype(dtype) - 1).reshape(len(words), -1)


def normals(words: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """Gaussians from 16 bits each, 2 of a word: the quantiles of N(0, 1) at (k + 1/2) / 2^16, scaled to unit variance exactly.

    Mean 0 exactly, variance 1 up to the rounding of `dtype` (6e-10 in float32), fourth moment 2.9992, at most 4.33 standard deviations. Most of
    the time of `jax.random.normal` goes into its 32 random bits per number, and most of the rest into the quantile, which is looked up here.
    """
    table = jnp.asarray(_quantiles(), dtype)
    # in a loop, so that its result is kept: XLA would look up again wherever the numbers are read
    look_up = lambda numbers: table.at[numbers].get(mode="promise_in_bounds")
    halves = jax.lax.map(look_up, jnp.stack([words >> 16, words & 0xFFFF]))
    return jnp.moveaxis(halves, 0, 1).reshape(len(words), -1)


@functools.cache
def _quantiles() -> np.ndarray:
    """Quantiles of N(0, 1) at (k + 1/2) / 2^16, k = 0 ... 2^16 - 1, times what makes their variance 1; float64."""
    with jax.ensure_compile_time_eval(), jax.enable_x64(True):
        x = np.asarray(jax.scipy.special.ndtri((jnp.arange(2**16, dtype=jnp.float64) + 0.5) / 2**16))
    return x / np.sqrt(np.mean(x**2))


def random_words(key: jax.Array, index: jax.Array, count: int) -> jax.Array:
    """Independent words of each example: a function of the key and its own index alone.

    Threefry, as `jax.random.bits`, with (index, place) as the counter: both words of its result are used, and no example needs a key of its own,
    which is a fourth of the work.

    Args:
      key: of any implementation.
      index: integers [N].
      count: words per example.

    Returns:
      uint32 [N, count].
    """
    pairs = -(-count // 2)
    examples = jnp.repeat(index.astype(jnp.uint32), pairs)
    places = jnp.tile(jnp.arange(pairs, dtype=jnp.uint32), len(index))
    words = threefry_2x32(jax.random.bits(key, (2,), jnp.uint32), jnp.concatenate([examples, places]))
    return jnp.moveaxis(words.reshape(2, len(index), pairs), 0, 1).reshape(len(index), -1)[:, :count]


def independent(numbers: Numbers, per_word: int, name: str) -> Guess:
    """A guess whose entries are independent, with zero mean and unit variance.

    Args:
      numbers: makes them of random words.
      per_word: how many of one word.
      name: for messages.
    """

    def one(key: jax.Array, site: Site, view: View) -> Named:
        sizes = dict(zip(site.noise_axes, site.noise_shape, strict=True))
        apart = "batch" in site.noise_axes and view.batch["index"] is not None
        index: Any = view.batch["index"] if apart else jnp.zeros(1, jnp.uint32)
        rest = {a: n for a, n in sizes.items() if not (apart and a == "batch")}
        size = math.prod(rest.values())

        def draw(number: jax.Array) -> jax.Array:
            words = random_words(jax.random.fold_in(site.key(key), number), index, -(-size // per_word))
            value = numbers(words, site.dtype)[:, :size].reshape(len(index), *rest.values())
            return value if apart else value[0]

        value = jax.vmap(draw)(jnp.arange(view.draws))
        return Named(value, ("draw", *(("batch",) if apart else ()), *rest))

    return Guess(
        lambda key, state, view: {name: one(key, site, view) for name, site in view.sites.items()},
        name=name,
        sitewise=True,
    )


def gaussian() -> Guess:
    """Directions u ~ N(0, I): E[u uᵀ] = I, E[u⁴] = 3 (2.9992 as drawn, see `normals`). What Baydin et al. and all three papers draw.

    With d = <∇, u> the estimate d u has expectation ∇ and, in D dimensions, total variance (D + 1)|∇|².
    """
    return independent(normals, 2, "gaussian")


def rademacher() -> Guess:
    """Directions of independent signs: E[u uᵀ] = I, u² = 1. Total variance of d u in D dimensions: (D - 1)|∇|².

    The least variance that independent entries can have, and far cheaper to draw than Gaussians; the default.
    """
    return independent(signs, 32, "rademacher")


def orthogonal() -> Guess:
    """Sets of orthogonal directions, uniform on the sphere of radius √D in each cell: E[u uᵀ] = I.

    A cell is a slice of the axes that all sites of the part share with the partition; its D units are the noise of all sites in that
    slice, jointly. The draws of a step are orthogonal in each cell; with D draws the mean of d u is the gradient exactly, with K < D draws
    the total variance is (D / K - 1)|∇|². D counts units that a mask then leaves out, which have a gradient of zero: with m of D on, one draw has
    the variance (D (m + 2) / (D + 2) - 1)|∇|². More draws than D start a new set. Cost: a QR factorisation of [D, draws] per cell.
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
        # there is no QR factorisation in half precision
        dtype = jnp.promote_types(jnp.result_type(*(site.dtype for site in sites)), jnp.float32)
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
        for (name, site), piece, rest, size in zip(view.sites.items(), pieces, rests, sizes, strict=True):
            value = piece.reshape(view.draws, *shape, *(size[a] for a in rest)).astype(site.dtype)
            out[name] = Named(value, ("draw", *common, *rest))
        return out

    return Guess(propose, name="orthogonal")


def antithetic(guess: Guess) -> Guess:
    """Directions in pairs u, -u, of any guess: for a measured derivative, where the loss is curved.

    The mean of a pair is d u with d = (f(x + εu) - f(x - εu)) / 2ε: of `probes.finite_difference` the error that is odd in ε, of which
    curvature's ½ ε uᵀ H u is the first, is taken out, and O(ε²) is left, for the price of two draws. An exact derivative is odd in u, so that with
    `probes.jvp` both halves give the same estimate and a pair is worth one draw: never use it there.

    Raises:
      InputError: (when used) an odd number of draws.
    """

    def propose(key: jax.Array, state: Any, view: View) -> dict[str, Named]:
        if view.draws % 2:
            raise InputError(f"antithetic directions come in pairs: ask for an even number of draws, not {view.draws}.")
        half = view.draws // 2
        out = {}
        for name, u in guess.propose(key, state, view._replace(draws=half)).items():
            axes = ("draw", *(a for a in u.axes if a != "draw"))
            value = jnp.broadcast_to(u.to(axes), (half, *u.to(axes).shape[1:]))
            out[name] = Named(jnp.concatenate([value, -value]), axes)
        return out

    return guess._replace(propose=propose, name=f"antithetic {guess.name}")


def _ends(lengths: list[int]):
    total = 0
    for n in lengths:
        total += n
        yield total
