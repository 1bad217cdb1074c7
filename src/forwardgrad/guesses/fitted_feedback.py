"""Feedback from the error straight to every unit, fitted to the tangents by least squares, cell by cell.

What distinguishes it from `feedback.learned_feedback`: each cell of the loss teaches it by its own tangent, in which no other cell's units are noise;
cells along shared axes (patches) teach one matrix; it goes through what a unit knows of its own, its ReLU and the normalisation after it; and it
descends the residual, whose noise vanishes as the fit gets better.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from forwardgrad.errors import InputError
from forwardgrad.guesses.base import Guess, Site, View
from forwardgrad.guesses.given import relu_mask
from forwardgrad.named import Named, contract

Through = Callable[[jax.Array], jax.Array]


def relu_and_normalise(z: jax.Array) -> jax.Array:
    """What follows a tap of LocalMixer in its own layer: the ReLU, and the normalisation over the last axis that the next layer begins with."""
    h = jax.nn.relu(z)
    mean = h.mean(-1, keepdims=True)
    return (h - mean) * jax.lax.rsqrt(jnp.square(h - mean).mean(-1, keepdims=True) + 1e-5)


class Sample(NamedTuple):
    """What a step teaches; sums over microbatches. Attributes: `gradient`, by site; D and M: `units`, `cells`."""

    gradient: dict[str, Named]
    units: jax.Array
    cells: jax.Array


def fitted_feedback(
    rate: float = 0.2, *, through: Through = relu_and_normalise, shared: tuple[str, ...] = ("patch",)
) -> Guess:
    """p = J_yᵀ (e B), B fitted by least squares to the tangents of each cell's share of the outputs.

    With y = `through`(z) what a site's activation z is to the next layer, and v = J_y u its tangent along the direction u, a cell's share of the
    outputs (`Readout.shares`) moves by

        d[n, c] = Σ_sites ∂s[n, c]/∂y v    and is fitted by    Σ_sites v B,

    n the example, c the cell. B descends the mean over examples, cells along `shared` and draws of ½ D |d - Σ v B|² / |v|², |v|² summed over the D
    units that the cell sees (normalised least mean squares), from zero:

        B <- B + α · mean (d - Σ v B) ⊗ v D / |v|²,    α = rate / (1 + D/M),

    M the cells that teach one B. Where the shares depend on y linearly and alike in all cells, B becomes their Jacobian and the prediction exact;
    else it becomes the best linear fit. The normalisation keeps cells whose `through` is steep from deciding alone: what a step multiplies the
    error of B by has eigenvalues 1 - α λ, λ those of the mean of v vᵀ D / |v|², whose trace is D; for independent directions λ is at most about
    (1 + √(D/M))² <= 2 (1 + D/M), so that it does not grow for rates up to 1.

    Cost: per draw and site two products like the head's, one as large again for e B. State: [cells that the site lacks, class, units] per
    layer, units without those of other examples and of shared axes. As a predictor of a random guess it leaves the estimate unbiased.

    Args:
      rate: between 0 and 1.
      through: of [..., units] whose last axis it may mix, e.g. `jax.nn.relu`; the default suits LocalMixer, and any other merely predicts less
        well.
      shared: axes of the loss along which cells teach, and use, one B where the site has them too.

    Raises:
      InputError: a rate that is not between 0 and 1; (when used) a part without directions, or sites that are weights.
    """
    if not 0 < rate <= 1:
        raise InputError(f"the rate of fitted feedback must be between 0 and 1, not {rate}: set --predictor-rate.")

    def axes(site: Site, view: View) -> tuple[str, ...]:
        classes = tuple(a for a in view.outputs.axes if a != "batch")
        cells = tuple(a for a in view.shares.axes if a not in (*view.outputs.axes, *site.axes))
        return (*cells, *classes, *(a for a in site.axes if a != "batch" and a not in shared))

    def init(key: jax.Array, view: View) -> dict[str, Named]:
        out = {}
        for name, site in view.sites.items():
            if site.kind != "tap":
                raise InputError(
                    f"fitted feedback predicts activations, and {name!r} is a weight: give it to a part of taps."
                )
            sizes = {**view.shares.sizes, **dict(zip(site.axes, site.shape, strict=True))}
            own = axes(site, view)
            out[name] = Named(jnp.zeros([sizes[a] for a in own], view.outputs.value.dtype), own)
        return out

    def propose(key: jax.Array, state: Mapping[str, Named], view: View) -> dict[str, Named]:
        out = {}
        for name, site in view.sites.items():
            b, z = state[name], view.taps[name]
            cells = tuple(a for a in b.axes if a in view.shares.axes and a not in (*view.outputs.axes, *site.axes))
            full = (*cells, *site.axes)
            sent = contract(full, view.error, b)
            shape = (*(b.sizes[a] for a in cells), *site.shape)
            back = jax.vjp(through, z.value)[1]
            for _ in cells:
                back = jax.vmap(back)
            (value,) = back(jnp.broadcast_to(sent.to(full), shape).astype(z.value.dtype))
            out[name] = Named(value, full)
        return out

    def observe(state: Mapping[str, Named], view: View, u: Mapping[str, Named], du: Mapping[str, Named]) -> Sample:
        if not du:
            raise InputError(
                "fitted feedback is fitted to directions, and its part has none: give the part a random guess."
            )
        rest = du["shares"]
        weight = Named(view.batch["weight"] / view.draws, ("batch",))
        apart = tuple(a for a in rest.axes if a == "draw" or a not in view.outputs.axes or a == "batch")
        like = lambda named, axes: jnp.broadcast_to(named.to(axes), [rest.sizes[a] for a in axes])
        moved, length = {}, jnp.zeros([rest.sizes[a] for a in apart], rest.value.dtype)
        for name, site in view.sites.items():
            forward = jax.vmap(lambda t, z=view.taps[name].value: jax.jvp(through, (z,), (t,))[1])
            v = moved[name] = Named(forward(u[name].to(("draw", *site.axes))), ("draw", *site.axes))
            length += like(contract(apart, v, v), apart)
            rest = Named(rest.value - like(contract(rest.axes, v, state[name]), rest.axes), rest.axes)
        units = sum(math.prod(n for a, n in b.sizes.items() if a not in rest.axes) for b in state.values())
        rest = contract(
            rest.axes, rest, Named(jnp.where(length > 0, units / jnp.where(length > 0, length, 1), 0), apart)
        )
        gradient = {}
        for name, b in state.items():
            together = math.prod(n for a, n in rest.sizes.items() if a in shared and a not in b.axes)
            mean = contract(rest.axes, rest, Named(weight.value / together, ("batch",)))
            gradient[name] = Named(contract(b.axes, mean, moved[name]).value.astype(b.value.dtype), b.axes)
        count = view.draws * math.prod(n for a, n in rest.sizes.items() if a in shared)
        return Sample(gradient, units * view.batch["weight"].sum(), count * jnp.ones_like(weight.value).sum())

    def update(state: Mapping[str, Named], seen: Sample) -> dict[str, Named]:
        alpha = rate / (1 + seen.units / seen.cells)
        step = lambda b, gradient: Named(b.value + (alpha * gradient.value).astype(b.value.dtype), b.axes)
        return {name: step(b, seen.gradient[name]) for name, b in state.items()}

    mask = relu_mask if through in (jax.nn.relu, relu_and_normalise) else None
    return Guess(propose, init, observe, update, name="fitted feedback", mask=mask, isotropic=False)
