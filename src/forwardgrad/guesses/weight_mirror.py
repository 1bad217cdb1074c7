"""A way back through weights that were learned from tangents: a weight mirror in forward mode."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from forwardgrad import descent
from forwardgrad.errors import InputError
from forwardgrad.guesses.base import Guess, View
from forwardgrad.guesses.replay import feedback_alignment
from forwardgrad.named import Named
from forwardgrad.network import with_leaves


class Mirror(NamedTuple):
    """Attributes: `weights`, `{path: F}` of the layers' kernels; `memory`, the optimiser's state."""

    weights: dict[str, jax.Array]
    memory: Any


def weight_mirror(optimiser: descent.Optimiser | None = None) -> Guess:
    """p = gradient of the scope's losses, sent back layer by layer through weights F that the tangents have taught.

    While directions are pushed through the network, a linear layer turns the tangent v at its input into W v at its output, and both are there to
    be seen. F descends, from zero, the mean over examples, and the sum over units and places, of ½|W v - F v|²: no weight is read, and the minimum
    is W itself, on all inputs that are ever displaced. (Akrout et al. 2019 show a layer noise and correlate what goes in with what comes out; here
    the noise is the tangent, the layer goes on working, and the residual vanishes.) The prediction is that of `guesses.replay.feedback_alignment`
    with F in place of fixed random weights: a replay, with a tap, passive or not, at each linear layer's output, and the true readouts. With
    F = W it is the gradient. It goes back through all layers of the scope, one after another: for methods that may not, see
    `fitted_feedback`.

    Layers that no displacement comes before, such as a block's first, have nothing to learn from, and need no F. As a predictor of a random guess
    it leaves the estimate unbiased. Cost: two backward passes one layer deep per draw to learn, one backward pass to predict. State: F, as large as
    the kernels, and what the optimiser keeps.

    Args:
      optimiser: what moves F; by default Adam at 1e-3.

    Raises:
      InputError: (when used) a part without directions, or that displaces weights per example; sites that are weights; a block without `init`.
    """
    replayed, optimiser = feedback_alignment(), optimiser or descent.adam(1e-3)

    def init(key: jax.Array, view: View) -> Mirror:
        drawn = replayed.init(key, view)
        kernels = {path: jnp.zeros_like(leaf) for path, leaf in drawn.items() if path.split("/")[1] == "layers"}
        return Mirror(kernels, optimiser.init(kernels))

    def propose(key: jax.Array, state: Mirror, view: View) -> Mapping[str, Named]:
        return replayed.propose(key, state.weights, view)

    def observe(state: Mirror, view: View, u: Mapping[str, Named], du: Mapping[str, Any]) -> dict[str, jax.Array]:
        if not du or not du["taps"]:
            raise InputError(
                "a weight mirror learns from tangents of activations, and its part has none: give the part a random guess and activations."
            )

        def residuals(
            weights: Mapping[str, jax.Array], tangents: Mapping[str, jax.Array], own: Mapping[str, jax.Array]
        ) -> jax.Array:
            """Of one draw: tangents at every tap, and what of them is the tap's own displacement."""

            def layers(along: jax.Array) -> dict[str, jax.Array]:
                def visit(name: str, axes: tuple[str, ...], z: jax.Array) -> tuple[Named | None, jax.Array]:
                    if name not in tangents:  # of a block outside the scope
                        return None, z
                    stored = view.taps[name].value + along * tangents[name]
                    return Named(z, axes), stored.astype(z.dtype)

                records = view.forward(with_leaves(view.params, weights), visit)[1]
                return {name: record.value for name, record in records.items()}

            _, given = jax.jvp(layers, (jnp.zeros(()),), (jnp.ones(()),))
            total = jnp.zeros(())
            for name, guessed in given.items():
                missed = tangents[name] - own.get(name, 0) - guessed
                total += (_per_example(jnp.square(missed), view.taps[name].axes) * view.batch["weight"]).sum()
            return total / 2

        def mean(weights: Mapping[str, jax.Array]) -> jax.Array:
            tangents = {name: t.to(("draw", *view.taps[name].axes)) for name, t in du["taps"].items()}
            own = {
                name: jnp.broadcast_to(u[name].to(("draw", *view.taps[name].axes)), tangents[name].shape) for name in u
            }
            return jax.vmap(lambda t, o: residuals(weights, t, o))(tangents, own).mean()

        return jax.grad(mean)(state.weights)

    def update(state: Mirror, gradient: dict[str, jax.Array]) -> Mirror:
        steps, memory = optimiser.update(gradient, state.memory, state.weights)
        return Mirror(jax.tree.map(jnp.add, state.weights, steps), memory)

    return Guess(propose, init, observe, update, name="weight mirror", isotropic=False)


def _per_example(value: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    return Named(value, axes).sum_to(("batch",)).value
