"""Directions that the caller gives, and the ReLU mask on any guess."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from forwardgrad.errors import InputError
from forwardgrad.guesses.base import Guess, View
from forwardgrad.named import Named
from forwardgrad.network import leaf_paths


def given(arrays: Any) -> Guess:
    """The caller's own directions, one per site: for enumeration, for tests, for directions from elsewhere.

    Args:
      arrays: a pytree whose paths are names of sites, e.g. `{"hidden": u}` for a tap called "hidden" (in a network of blocks also
        "block0/hidden"), or a pytree like the parameters for weights. A leaf is a `Named`, or a plain array with the displacement's shape
        (axes that `vmap` added first, then the tap's own in their order), with one more leading axis for several draws.

    Raises:
      InputError: (when used) a site has no direction, a direction of these blocks no site, or a shape is wrong. Full names of other blocks pass:
        under local losses each block takes its own.

    Example:
      >>> import jax, jax.numpy as jnp, forwardgrad as fg
      >>> loss = lambda w: (w ** 2).sum()
      >>> vg = fg.value_and_grad(loss, guess=fg.given(jnp.array([1.0, 0.0])), insertion="weights")
      >>> [float(g) for g in vg(jnp.array([3.0, 4.0]), key=jax.random.key(0))[1]]
      [6.0, 0.0]
    """
    table = {path: leaf for path, leaf in leaf_paths(arrays).items() if leaf is not None}

    def propose(key: jax.Array, state: tuple[()], view: View) -> dict[str, Named]:
        out, used = {}, set()
        for name, site in view.sites.items():
            found = [n for n in (name, site.name) if n in table]
            if not found:
                raise InputError(
                    f"no direction is given for site {name!r}: give one under that name; given are {sorted(table)}."
                )
            used.add(found[0])
            value = table[found[0]]
            if not isinstance(value, Named):
                shape = jnp.shape(value)
                if shape == site.noise_shape:
                    value = Named(jnp.asarray(value), site.noise_axes)
                elif shape == (view.draws, *site.noise_shape):
                    value = Named(jnp.asarray(value), ("draw", *site.noise_axes))
                else:
                    raise InputError(
                        f"the direction for site {name!r} has shape {shape}: give {site.noise_shape}, the axes {' '.join(site.noise_axes)}."
                    )
            out[name] = value
        # under local losses each block asks for its own: what is left over may be another block's, under its full name
        blocks = {name.removesuffix(site.name).rstrip("/#") for name, site in view.sites.items()} | set(view.readouts)
        here = "" if "" in blocks else tuple(block + mark for block in blocks for mark in "/#")
        lost = [name for name in set(table) - used if name.startswith(here) or not {"/", "#"} & set(name)]
        if lost:
            raise InputError(
                f"directions are given for {sorted(lost)}, which are not displaced: sites are {sorted(view.sites)}."
            )
        return out

    return Guess(propose, name="given")


def relu_mask(z: jax.Array) -> jax.Array:
    """1 where a ReLU of `z` passes, else 0."""
    return (z > 0).astype(z.dtype)


def masked(guess: Guess, mask: Callable[[jax.Array], jax.Array] = relu_mask) -> Guess:
    """Do not displace units that are off (Ren et al. 2023, section 3.6).

    Unbiased, with less variance, wherever a unit with `mask(z) = 0` has a zero gradient: at a tap that only a ReLU reads, the mask of its
    own activation. `checks.mask_is_exact` verifies it at every tap.

    Args:
      guess: any guess whose sites are taps.
      mask: `z -> 0 or 1`, of the tap's activation.
    """

    def propose(key: jax.Array, state: Any, view: View) -> dict[str, Named]:
        out = {}
        for name, u in guess.propose(key, state, view).items():
            if view.sites[name].kind != "tap":
                raise InputError(
                    f"a mask needs activations, and {name!r} is a weight: leave the mask out (mask=False)."
                )
            z = view.taps[name]
            axes = (*(a for a in u.axes if a not in z.axes), *z.axes)
            out[name] = Named(u.to(axes) * mask(z.value), axes)
        return out

    return guess._replace(propose=propose, name=f"masked {guess.name}", mask=mask)
