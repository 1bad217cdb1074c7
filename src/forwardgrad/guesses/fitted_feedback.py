"""Feedback from the error straight to every unit, fitted to the tangents by least squares, cell by cell.

What distinguishes it from `feedback.learned_feedback`: each cell of the loss teaches it by its own tangent, in which no other cell's units are noise;
cells along shared axes (patches) teach one matrix; it goes through what a unit knows of its own, its ReLU, or also the
normalisation after it; and it descends the residual, whose noise vanishes as the fit gets better.
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
from forwardgrad.normalise import normalise

Through = Callable[[jax.Array], jax.Array]

STARTS = 2  # vectors in a power iteration: products with two are products of matrices, and take less time than with one


def relu_and_normalise(z: jax.Array) -> jax.Array:
    """What follows a tap of LocalMixer in its own layer: the ReLU, and the normalisation over the last axis that the next layer begins with."""
    return normalise(jax.nn.relu(z))


def normalise_relu_and_normalise(z: jax.Array) -> jax.Array:
    """What follows the linear output below such a tap: the normalisation that the layer ends with comes first."""
    return relu_and_normalise(normalise(z))


class Fitted(NamedTuple):
    """What is learned. Attributes: `feedback`, B by site; where weights are predicted also t, `top`, by site, and Λ, `largest`."""

    feedback: dict[str, Named]
    top: dict[str, Named]
    largest: jax.Array


class Sample(NamedTuple):
    """What a step teaches; sums over microbatches. Attributes: `gradient`, by site; D and M: `units`, `cells`; `turned`: A t."""

    gradient: dict[str, Named]
    units: jax.Array
    cells: jax.Array
    turned: dict[str, Named]


def fitted_feedback(
    rate: float = 0.4, *, through: Through = jax.nn.relu, shared: tuple[str, ...] = ("patch",)
) -> Guess:
    """p = J_yᵀ (e B), B fitted by least squares to the tangents of each cell's share of the outputs.

    With y = `through`(z) what a site's activation z is to the next layer, and v = J_y u its tangent along the direction u, a cell's share of the
    outputs (`Readout.shares`) moves by

        d[n, c] = Σ_sites ∂s[n, c]/∂y v    and is fitted by    Σ_sites v B,

    n the example, c the cell. B descends the mean over examples, cells along `shared` and draws of ½ D |d - Σ v B|² / |v|², from zero:

        B <- B + α · mean (d - Σ v B) ⊗ v D[n, c] / |v[n, c]|²,    α = rate / (Λ + D/M),

    |v|² summed over the units that the cell sees, D[n, c] how many of them are displaced and on, D its mean, M the cells that teach one B. Where
    the shares depend on y linearly and alike in all cells, B becomes their Jacobian and the prediction exact; else it becomes the best
    linear fit. A step multiplies the error of B by 1 - α λ, λ the eigenvalues of A, the mean of v vᵀ D / |v|², and by chance adds to it as if λ were
    D/M larger. For independent signs, and y a ReLU of z, A's expectation is diagonal: the share of cells in which a unit is on, at most Λ = 1. A
    normalisation in `through` takes one of the D dimensions away, two where all units are on: λ is then about D / (D - 2) at most, which says
    nothing for two units.

    **Weights displaced per example** are predicted at the taps where they arrive (`Guess.at_arrivals`): v is the tangent there, and the
    prediction goes back to the weights through their one layer. What arrives from few weights is correlated between the units that share them: λ
    may be as large as D, and Λ is the largest that is found. Two vectors t that each step turns to A t / |A t| find it (power iteration), and
    Λ <- max(|A t|, 0.9 Λ) comes down to it from the number of all units.

    Cost: per draw and site two products like the head's, one as large again for e B, and for weights one with t twice and the way back through
    their layer; a site that lacks an axis which another site of the part or the outputs have, as token mixing lacks the channels' groups, has them
    for each of its slices. State: [such axes, class, units] per layer, units without those of other examples and of shared axes; for weights
    two vectors t more. As a predictor of a random guess it leaves the estimate unbiased.

    Args:
      rate: between 0 and 1.
      through: of [..., units] whose last axis it may mix: the nonlinearity above the tap and what else the unit knows of (`relu_and_normalise` for
        LocalMixer). One that is not the network's predicts less well. Where it all but erases a tangent, as a normalisation over two units
        does, B grows very large, and its prediction is worse than none.
      shared: axes of the loss along which cells teach, and use, one B where the site has them too.

    Raises:
      InputError: a rate that is not between 0 and 1; (when used) a part without directions, sites that are weights whose displacements, per example,
        do not arrive at taps, or that have an axis of the outputs along which the partition does not keep losses apart.
    """
    if not 0 < rate <= 1:
        raise InputError(f"the rate of fitted feedback must be between 0 and 1, not {rate}: set --predictor-rate.")
    mask = relu_mask if through in (jax.nn.relu, relu_and_normalise) else None

    def cell_axes(view: View) -> tuple[str, ...]:
        """Axes of the shares that tell cells apart. What no site has and no output, as all share one error there, is added up."""
        outputs, sites = view.outputs.axes, view.sites.values()
        has = lambda a: (a in outputs and a in view.partition) or any(a in site.axes for site in sites)
        return tuple(a for a in view.shares.axes if a == "batch" or (has(a) and a not in class_axes(view)))

    def class_axes(view: View) -> tuple[str, ...]:
        """Those of an output."""
        return tuple(a for a in view.outputs.axes if a != "batch" and a not in view.partition)

    def axes(site: Site, view: View) -> tuple[str, ...]:
        apart = cell_axes(view)
        lacking = tuple(a for a in apart if a not in ("batch", *site.axes))
        together = [a for a in shared if a in apart]
        return (*lacking, *class_axes(view), *(a for a in site.axes if a != "batch" and a not in together))

    def init(key: jax.Array, view: View) -> Fitted:
        out, top = {}, {}
        for name, site in view.sites.items():
            if site.kind == "weight":
                raise InputError(
                    f"fitted feedback predicts activations, and {name!r} is a weight, not displaced per example or with a way past all taps: give it "
                    "to a part of taps, or displace the weights per example where taps follow them (lg-fg-a-plus: --token-by activities)."
                )
            sizes = {**view.shares.sizes, **dict(zip(site.axes, site.shape, strict=True))}
            own = axes(site, view)
            twice = [a for a in own if own.count(a) > 1]
            if twice:
                raise InputError(
                    f"{twice[0]!r} is an axis of the outputs and of {name!r}, along which losses are not kept apart: add it to the partition, or "
                    "take another predictor than fitted feedback."
                )
            out[name] = Named(jnp.zeros([sizes[a] for a in own], view.outputs.value.dtype), own)
            units = tuple(a for a in own if a not in class_axes(view))
            if any(other.kind == "arrival" for other in view.sites.values()):
                shape = (*(sizes[a] for a in units), STARTS)
                top[name] = Named(jax.random.normal(site.key(key), shape, view.outputs.value.dtype), (*units, "~start"))
        most = sum(t.value.size / STARTS for t in top.values()) if top else 1
        return Fitted(out, top, jnp.asarray(float(most), view.outputs.value.dtype))

    def propose(key: jax.Array, state: Fitted, view: View) -> dict[str, Named]:
        out = {}
        for name, site in view.sites.items():
            b, z = state.feedback[name], view.taps[name]
            lacking = tuple(a for a in b.axes if a in cell_axes(view) and a not in site.axes)
            full = (*lacking, *site.axes)
            sent = contract(full, view.error, b)
            shape = (*(b.sizes[a] for a in lacking), *site.shape)
            back = jax.vjp(through, z.value)[1]
            for _ in lacking:
                back = jax.vmap(back)
            (value,) = back(jnp.broadcast_to(sent.to(full), shape).astype(z.value.dtype))
            out[name] = Named(value, full)
        return out

    def observe(state: Fitted, view: View, u: Mapping[str, Named], du: Mapping[str, Named]) -> Sample:
        if not du:
            raise InputError(
                "fitted feedback is fitted to directions, and its part has none: give the part a random guess."
            )
        rest = du["shares"].sum_to(("draw", *cell_axes(view), *class_axes(view)))
        weight = Named(view.batch["weight"] / view.draws, ("batch",))
        apart = tuple(a for a in rest.axes if a == "draw" or a in cell_axes(view))
        like = lambda named, axes: jnp.broadcast_to(named.to(axes), [rest.sizes[a] for a in axes])
        moved, length, units = {}, *[jnp.zeros([rest.sizes[a] for a in apart], rest.value.dtype)] * 2
        for name, site in view.sites.items():
            z = view.taps[name].value
            along = jnp.broadcast_to(u[name].to(("draw", *site.axes)), (view.draws, *site.shape))
            forward = jax.vmap(lambda t, z=z: jax.jvp(through, (z,), (t,))[1])
            v = moved[name] = Named(forward(along), ("draw", *site.axes))
            on = along != 0 if mask is None else (along != 0) & (mask(z) != 0)
            length += like(contract(apart, v, v), apart)
            units += like(Named(on.astype(rest.value.dtype), v.axes).sum_to(apart), apart)
            rest = Named(rest.value - like(contract(rest.axes, v, state.feedback[name]), rest.axes), rest.axes)
        scale = Named(jnp.where(length > 0, units / jnp.where(length > 0, length, 1), 0), apart)

        def taught(told: Named, b: Named, name: str) -> Named:
            """The mean over cells of v D / |v|² times what each is told, along the axes of B."""
            together = math.prod(n for a, n in rest.sizes.items() if a in shared and a not in b.axes)
            mean = contract(told.axes, contract(told.axes, told, scale), Named(weight.value / together, ("batch",)))
            return Named(contract(b.axes, mean, moved[name]).value.astype(b.value.dtype), b.axes)

        gradient = {name: taught(rest, b, name) for name, b in state.feedback.items()}
        seen = lambda name, t: contract((*apart, "~start"), moved[name], t).to((*apart, "~start"))
        share = Named(sum((seen(name, t) for name, t in state.top.items()), jnp.zeros(())), (*apart, "~start"))
        turned = {name: taught(share, t, name) for name, t in state.top.items()}
        lacked = [a for a in rest.axes if a in shared and all(a not in b.axes for b in state.feedback.values())]
        count = view.draws * math.prod(rest.sizes[a] for a in lacked)
        each = Named(units, apart).sum_to(("batch",)).value * (units.shape[apart.index("batch")] / units.size)
        cells = count * jnp.ones_like(weight.value).sum()
        return Sample(gradient, (each * view.batch["weight"]).sum(), cells, turned)

    def update(state: Fitted, seen: Sample) -> Fitted:
        top, largest = state.top, state.largest
        if top:
            length = lambda t: jnp.sqrt(sum(jnp.square(x.value).reshape(-1, STARTS).sum(0) for x in t.values()))
            found = length(seen.turned)
            largest = jnp.maximum((found / length(top)).max(), 0.9 * largest)
            kept = lambda new, old: Named(
                jnp.where(found > 0, new.value / jnp.where(found > 0, found, 1), old.value), old.axes
            )
            top = {name: kept(seen.turned[name], t) for name, t in top.items()}
        alpha = rate / (largest + seen.units / seen.cells)
        step = lambda b, gradient: Named(b.value + (alpha * gradient.value).astype(b.value.dtype), b.axes)
        return Fitted({name: step(b, seen.gradient[name]) for name, b in state.feedback.items()}, top, largest)

    return Guess(propose, init, observe, update, name="fitted feedback", mask=mask, isotropic=False, at_arrivals=True)
