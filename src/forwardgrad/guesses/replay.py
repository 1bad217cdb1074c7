"""Feedback alignment: the backward pass through fixed random weights, as a prediction of the gradient."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.interpreters.partial_eval import dce_jaxpr

from forwardgrad import taps
from forwardgrad.errors import InputError
from forwardgrad.guesses.base import Guess, View
from forwardgrad.named import Named, contract
from forwardgrad.network import leaf_paths, with_leaves


def feedback_alignment(*, at_feedback_readouts: bool = False) -> Guess:
    """p = gradient of the scope's losses at the taps, sent back through fixed random weights B (Lillicrap et al. 2016).

    δ_t = e_t B_t below the readout of loss t, δ_l = J_l(δ_{l+1} B_{l+1}) below a linear layer: e_t is the error at the readout's true outputs,
    J_l the exact Jacobian of normalisation, nonlinearity and residual at the true activations. One replay of the network with B gives it
    all, where a tap, passive or not, stands at each linear layer's output; weights that no tap follows are differentiated at wrong values.
    With B = W it is the gradient. As a predictor of a random guess it leaves the estimate unbiased, as any predictor. Cost: one backward pass
    (what the replay would compute forwards is not asked for). State: B, as large as the parameters.

    B is what the blocks' own `init` draws with another key: every leaf of two or more axes that depends on the key. Leaves that start the same
    for every key, such as the gains of a normalisation and most biases, are those of the network, as are all vectors. The kernel of a readout
    that starts at zero, which would feed nothing back, is drawn from N(0, 1/features) instead.

    Args:
      at_feedback_readouts: take the error e_t at the outputs that the readout has with B, softmax(h B + b) - y, not at the true ones, as the
        code released with Ren et al. 2023 does.

    Raises:
      InputError: (when used) sites that are weights; a block without `init`.
    """

    def init(key: jax.Array, view: View) -> dict[str, jax.Array]:
        own, other = jax.random.split(key)
        drawn = view.draw(own)
        for name, params in view.params.items():
            if _shapes(drawn[name]) != _shapes(params):
                raise InputError(
                    f"feedback alignment draws its weights by the blocks' own init, and that of block {name!r} gives other parameters than the "
                    "network has: give the block and its readout an init."
                )
        used = {n: p if n in view.errors else {**p, "readout": ()} for n, p in drawn.items()}
        like, random, out = leaf_paths(view.params), _random(view.draw, own), {}
        for i, (path, leaf) in enumerate(leaf_paths(used).items()):
            if jnp.ndim(leaf) > 1 and (path in random or path.split("/")[1] == "readout"):
                spare = jax.random.normal(jax.random.fold_in(other, i), leaf.shape, leaf.dtype) / leaf.shape[-2] ** 0.5
                out[path] = jnp.where(jnp.any(leaf != 0), leaf, spare).astype(like[path].dtype)
        return out

    def propose(key: jax.Array, state: Mapping[str, jax.Array], view: View) -> dict[str, Named]:
        for name, site in view.sites.items():
            if site.kind != "tap":
                raise InputError(
                    f"feedback alignment feeds back to activations, and {name!r} is a weight: use fg.activations()."
                )
        params, replayed = with_leaves(view.params, state), taps.replay(view.taps)

        def fed_back(eps: Mapping[str, jax.Array]) -> jax.Array:
            def visit(name: str, axes: tuple[str, ...], z: jax.Array) -> tuple[None, jax.Array]:
                if name not in view.taps:  # of a block outside the scope, which runs as it is
                    return None, z
                h = replayed(name, axes, z)[1]
                return None, h + eps[name] if name in eps else h

            if at_feedback_readouts:
                return view.forward(params, visit)[0]
            outputs = view.read(params, visit)
            return sum((contract((), e, outputs[name]).value for name, e in view.errors.items()), jnp.zeros(()))

        zeros = {name: jnp.zeros(site.shape, site.dtype) for name, site in view.sites.items()}
        return {name: Named(g, view.sites[name].axes) for name, g in jax.grad(fed_back)(zeros).items()}

    return Guess(propose, init, name="feedback alignment", isotropic=False)


def _random(draw: Callable[[jax.Array], Any], key: jax.Array) -> set[str]:
    """Paths of the leaves that depend on the key."""
    paths: list[str] = []

    def leaves(key: jax.Array) -> list[Any]:
        found = leaf_paths(draw(key))
        paths.extend(found)
        return list(found.values())

    jaxpr = jax.make_jaxpr(leaves)(key).jaxpr
    needs = lambda i: any(dce_jaxpr(jaxpr, [j == i for j in range(len(paths))])[1])
    return {path for i, path in enumerate(paths) if needs(i)}


def _shapes(tree: Any) -> Any:
    return jax.tree.structure(tree), [jnp.shape(leaf) for leaf in jax.tree.leaves(tree)]
