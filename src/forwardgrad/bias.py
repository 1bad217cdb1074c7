"""The measured bias of an estimator that runs although a check refuses it (`allow_bias`): how far the expected estimate is from the gradient.

What the engine measures is linear in the directions, and its credit is a product with the same directions. With E[u uᵀ] = I (on the units that
a mask leaves) the expected credit is therefore the engine's own push, transposed, one slice of the partition at a time: no draw, no tolerance.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from forwardgrad.checks import generic, gradients
from forwardgrad.engine import Estimator
from forwardgrad.named import Named, contract
from forwardgrad.parts import Part
from forwardgrad.probes import jvp
from forwardgrad.whole import Step


def bias(
    estimator: Estimator, params: Any, model_state: Any, batch: Mapping[str, Any], *, shrink: bool = True
) -> dict[str, float]:
    """Relative bias of the estimate at each site, |E[ĝ] - ∇| / |∇|, exactly: for runs that accept it (`allow_bias`).

    At parameters a little off the given ones, as all checks. The expected credit of a slice is the gradient of the cells that share its
    indices with respect to its displacement, as the engine displaces: one displacement for all where it is shared, and each example run
    alone, from tap to tap, where weights are displaced per example. This is compared with the gradient of all cells of the batch with
    respect to the place where the credit lands: the site, or the tap that `credit_at` names. Cost: one reverse pass per slice of the
    partition, on four examples. Parts whose rule is not the unbiased one are left out.

    Args:
      estimator, params, model_state, batch: as for `Estimator.init`.
      shrink: look at the first four examples only.

    Returns:
      `{where the credit lands: relative bias}`; zero where names hold and credit lands where it was measured.
    """
    with jax.ensure_compile_time_eval():
        params, model_state, batch = generic(params, model_state, batch, shrink)
    out: dict[str, float] = {}
    for part in estimator.parts:
        if part.guess is None or part.rule.name != "unbiased":
            continue
        measure = jax.jit(
            lambda params, model_state, batch, part=part: _biases(estimator, part, params, model_state, batch)
        )
        out.update({site: float(x) for site, x in measure(params, model_state, batch).items()})
    return out


def _biases(
    estimator: Estimator, part: Part, params: Any, model_state: Any, batch: Mapping[str, Any]
) -> dict[str, jax.Array]:
    step = Step(estimator.network, estimator.target, params, model_state, batch)
    landings, sites = step.landings(part), step.sites(part)
    landed = gradients(step, {landings[name]: site for name, site in sites.items()})
    true = {name: landed[landings[name]] for name in sites}
    expected = _expected(step, part)
    norm = lambda x: jnp.linalg.norm(x.ravel())
    largest = jnp.stack([norm(x) for x in true.values()]).max()
    out = {}
    for name, x in true.items():
        # a gradient that vanishes (of a bias below BatchNorm) is made of rounding errors, and so is what is off there
        rounding = 100 * jnp.finfo(x.dtype).eps * largest
        off = norm(expected[name] - x)
        out[landings[name]] = jnp.where(off <= rounding, 0.0, off / jnp.maximum(norm(x), rounding))
    return out


def _expected(step: Step, part: Part) -> dict[str, jax.Array]:
    """Expected credit of every site: slice by slice of the partition, the transpose of its scalar, kept where the slice's own displacements are."""
    sites, passes = step.sites(part), _passes(step, part)
    lengths = {a: n for term in step.terms.values() for a, n in term.cells.sizes.items() if a in part.partition}
    apart = {name: tuple(a for a in lengths if a in (*site.axes, *site.noise_axes)) for name, site in sites.items()}
    out = {}
    for slices in dict.fromkeys(apart.values()):
        shape = tuple(lengths[a] for a in slices)
        mine = {name: site for name, site in sites.items() if apart[name] == slices}

        def add(
            total: dict[str, jax.Array], i: jax.Array, slices=slices, shape=shape, mine=mine
        ) -> tuple[dict[str, jax.Array], None]:
            kept = Named((jnp.arange(math.prod(shape)) == i).reshape(shape).astype(jnp.float32), slices)
            found = _transpose(step, part, passes, kept)
            own = {name: contract(site.axes, found[name], kept).to(site.axes) for name, site in mine.items()}
            return {name: total[name] + own[name].astype(site.dtype) for name, site in mine.items()}, None

        start = {name: jnp.zeros(site.shape, site.dtype) for name, site in mine.items()}
        total, _ = jax.lax.scan(add, start, jnp.arange(math.prod(shape)))
        out |= {
            name: contract(sites[name].axes, Named(x, sites[name].axes), passes[name]).value
            for name, x in total.items()
        }
    return out


def _passes(step: Step, part: Part) -> dict[str, Named]:
    """1 where a unit is displaced, 0 where the guess's mask leaves it out."""
    sites, mask = step.sites(part), part.guess.mask if part.guess is not None else None
    if mask is None:
        return {name: Named(jnp.ones((), site.dtype), ()) for name, site in sites.items()}
    return {name: Named(mask(step.taps[name].value), site.axes) for name, site in sites.items()}


def _transpose(step: Step, part: Part, passes: Mapping[str, Named], kept: Named) -> dict[str, Named]:
    """Gradient of the measured scalar of the cells that `kept` leaves with respect to every displacement, on its noise axes."""
    sites, part = step.sites(part), dataclasses.replace(part, probe=jvp, draws=1)

    def scalar(u: dict[str, Named]) -> jax.Array:
        displaced = {}
        for name, value in u.items():
            direction = Named(value.value[None], ("draw", *value.axes))
            displaced[name] = contract(
                tuple(dict.fromkeys((*direction.axes, *sites[name].axes))), direction, passes[name]
            )
        pushed = step.push(part, displaced).terms
        cells = [step.cells(scope, pushed) for scope in step.scopes]
        return jnp.sum(jnp.stack([contract((), c, _fitting(kept, c.axes)).value for c in cells]))

    # linear in the displacements, so that its gradient is the same anywhere
    return jax.grad(scalar)(
        {name: Named(jnp.zeros(site.noise_shape, site.dtype), site.noise_axes) for name, site in sites.items()}
    )


def _fitting(mask: Named, axes: tuple[str, ...]) -> Named:
    """A mask as far as cells have its axes: cells that lack one feed all of its slices."""
    lost = tuple(i for i, a in enumerate(mask.axes) if a not in axes)
    return Named(mask.value.max(lost), tuple(a for a in mask.axes if a in axes))
