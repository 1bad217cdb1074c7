"""Feedback guesses: the output error sent straight to every layer, through fixed or learned matrices."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from forwardgrad.errors import InputError
from forwardgrad.guesses.base import Guess, Site, View
from forwardgrad.guesses.given import relu_mask
from forwardgrad.named import Named, contract


def _axes(site: Site, view: View, per_cell: tuple[str, ...]) -> tuple[str, ...]:
    """Axes of a site's matrix B: output axes that are summed, then the site's own; `per_cell` axes of the outputs get a matrix each."""
    outputs, own = view.outputs.axes, site.axes
    shared = tuple(a for a in own if a in outputs and a != "batch")
    cells = tuple(a for a in outputs if a in per_cell and a not in own and a != "batch")
    summed = tuple(a for a in outputs if a not in (*own, *cells, "batch"))
    return (*shared, *cells, *summed, *(a for a in own if a not in outputs))


def _sizes(site: Site, view: View) -> dict[str, int]:
    return {**view.outputs.sizes, **dict(zip(site.axes, site.shape, strict=True))}


def _shape(site: Site, view: View, per_cell: tuple[str, ...]) -> tuple[int, ...]:
    sizes = _sizes(site, view)
    return tuple(sizes[a] for a in _axes(site, view, per_cell))


def _propose(state: Mapping[str, Named], view: View, mask: bool, per_cell: tuple[str, ...]) -> dict[str, Named]:
    out = {}
    for name, site in view.sites.items():
        axes = (*(a for a in view.error.axes if a in per_cell and a not in site.axes), *site.axes)
        prediction = contract(axes, view.error, state[name])
        if mask:
            z = view.taps[name]
            prediction = contract(axes, prediction, Named(relu_mask(z.value), z.axes))
        out[name] = prediction
    return out


def direct_feedback(*, mask: bool = False, per_cell: tuple[str, ...] = ()) -> Guess:
    """p_l = e B_l with fixed random B_l ~ U(±√(6/n_l)) (Nøkland 2016).

    e is the exact error at the scope's outputs, [batch, class]; B_l has the axes class x the site's own, one entry per unit (convolutional units
    share none). n_l is the number of units per example. As a predictor of a random guess it leaves the estimate unbiased, as any predictor.

    Args:
      mask: multiply by the derivative of the ReLU above the tap, 1[z > 0]: the tap stands before the ReLU, the published rule feeds back
        to the layer's *output*, and this is the exact pullback from there.
      per_cell: axes of the outputs (loss axes such as "group") that get a matrix of their own where the site lacks them.
    """

    def init(key: jax.Array, view: View) -> dict[str, Named]:
        out = {}
        for name, site in view.sites.items():
            units = 1
            for a, n in zip(site.axes, site.shape, strict=True):
                units *= 1 if a == "batch" else n
            bound = (6 / units) ** 0.5
            shape = _shape(site, view, per_cell)
            out[name] = Named(
                jax.random.uniform(site.key(key), shape, site.dtype, -bound, bound), _axes(site, view, per_cell)
            )
        return out

    return Guess(
        lambda key, state, view: _propose(state, view, mask, per_cell),
        init,
        name="direct feedback",
        mask=relu_mask if mask else None,
        isotropic=False,
    )


def learned_feedback(alpha: float = 1e-3, *, mask: bool = False, per_cell: tuple[str, ...] = ()) -> Guess:
    """p_l = e B_l with B_l learned by forward gradients, from zero (Bacho & Chu 2023, Eqs. 7 to 10).

    B_l <- (1 - α) B_l + α Σ_b w_b d_b (x) u_b with d the tangent of the outputs along the part's directions u, w the example weights. For
    E[u uᵀ] = I the expected update's fixed point is the mean Jacobian of the outputs with respect to the site. No [batch, class, units]
    tensor is formed: the update is one matrix product.

    Args:
      alpha: rate of the moving average, in (0, 1].
      mask, per_cell: as in `direct_feedback`. At a tap before a ReLU, B is learned for the Jacobian there, which is zero for units that are
        off: the mean over examples is smaller by how often the unit is on. The published rule has its taps after the ReLU and no mask.
    """

    def init(key: jax.Array, view: View) -> dict[str, Named]:
        return {
            name: Named(jnp.zeros(_shape(site, view, per_cell), site.dtype), _axes(site, view, per_cell))
            for name, site in view.sites.items()
        }

    def observe(state: Any, view: View, u: Mapping[str, Named], du: Mapping[str, Named]) -> dict[str, Named]:
        if not du:
            raise InputError(
                "learned feedback learns from directions, and its part has none: give the part a random guess, or use direct_feedback."
            )
        weight = Named(view.batch["weight"], ("batch",))
        d = contract(du["outputs"].axes, du["outputs"], weight)
        return {
            name: Named((contract(b.axes, d, u[name]).value / view.draws).astype(b.value.dtype), b.axes)
            for name, b in state.items()
        }

    def update(state: Any, statistics: Any) -> Any:
        return jax.tree.map(lambda b, sample: (1 - alpha) * b + alpha * sample, state, statistics)

    return Guess(
        lambda key, state, view: _propose(state, view, mask, per_cell),
        init,
        observe,
        update,
        name="learned feedback",
        mask=relu_mask if mask else None,
        isotropic=False,
    )
