"""The gradient of each block's own loss as guess or predictor."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from forwardgrad import taps
from forwardgrad.errors import InputError
from forwardgrad.guesses.base import Guess, View
from forwardgrad.named import Named
from forwardgrad.network import leaf_paths, with_leaves


def gradient_of_local_losses(view: View, params: Any) -> dict[str, Named]:
    """Exact gradient of every local loss, cut between blocks, with respect to the sites, with the readouts of `params`.

    Raises:
      InputError: a site in a block without readout.
    """
    weights = {}
    for block in view.params:
        if (
            block
            and block not in view.readouts
            and any(name.startswith((f"{block}/", f"{block}#")) for name in view.sites)
        ):
            raise InputError(
                f"the gradient of local losses needs readouts, and {block!r} has none: use a network with local readouts."
            )
    for name, site in view.sites.items():
        if site.kind == "weight":
            block, leaf = name.split("#", 1)
            weights[name] = f"{block}/layers/{leaf}" if leaf else f"{block}/layers"
    leaves = leaf_paths(params)

    def loss(eps: Mapping[str, jax.Array]) -> jax.Array:
        at_taps = {name: Named(e, view.sites[name].axes) for name, e in eps.items() if name not in weights}
        moved = with_leaves(params, {path: leaves[path] + eps[name] for name, path in weights.items()})
        return view.forward(moved, taps.displace(at_taps), greedy=True)[0]

    zeros = {name: jnp.zeros(site.shape, site.dtype) for name, site in view.sites.items()}
    return {name: Named(g, view.sites[name].axes) for name, g in jax.grad(loss)(zeros).items()}


def local_gradient() -> Guess:
    """u = gradient of the block's own auxiliary loss (Fournier et al. 2023, "local" guess).

    Needs readouts on all blocks of the sites. With the projection rule, g = <∇, u> u / |u|²: biased, with less error than a random guess as far as
    local and global gradients agree. As a predictor of a random guess it leaves the estimate unbiased. Cost: one greedy
    backward pass, one block deep.

    Raises:
      InputError: (when used) a site in a block without readout.
    """
    return Guess(
        lambda key, state, view: gradient_of_local_losses(view, view.params), name="local gradient", isotropic=False
    )
