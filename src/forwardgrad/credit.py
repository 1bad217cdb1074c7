"""Credit assignment as one contraction over named axes.

The loss has axes, a site has axes. The partition is the set of loss axes that are not summed away. With `d` the tangent of the loss cells
along `u`, and `p` a prediction of the gradient,

    scalar[cell]  = sum over the axes outside the partition of  d[cell] - <p, u>[cell]
    credit[site]  = mean over draws of  sum over the cells' axes that the site lacks of  rule(scalar)[cell] u[site]  +  p[site]

Token mixing, whose units feed every group, and channel mixing, whose units feed one, are two cases of this line.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import jax.numpy as jnp

from forwardgrad.named import Named, contract, spread
from forwardgrad.rules import Rule


def scalars(
    d: Named, u: Mapping[str, Named], p: Mapping[str, Named], partition: tuple[str, ...]
) -> tuple[Named, Named]:
    """The measured scalar of each cell, the prediction's share taken out, and the squared norm of the direction in that cell.

    Args:
      d: tangents of the loss cells, axes `("draw", *loss axes)`.
      u: directions by site, with a draw axis.
      p: predictions by site, with the site's axes and any loss axes. Cell axes that a prediction lacks get equal shares of `<p, u>`, which
        changes no expectation.
      partition: loss axes that stay apart.

    Returns:
      Two arrays with axes `("draw", *(loss axes in the partition))`.
    """
    scalar = d.sum_to(("draw", *partition))
    sizes = scalar.sizes
    value, squared = scalar.value, jnp.zeros_like(scalar.value)
    for site, direction in u.items():
        squared = squared + spread(contract(scalar.axes, direction, direction), sizes).value
        if site in p:
            owned = tuple(a for a in scalar.axes if a in p[site].axes or a == "draw")
            product = spread(contract(scalar.axes, p[site], direction), sizes, owned).value
            # along an axis of the direction alone, such as examples whose losses are not kept apart, the prediction is shared out evenly
            shares = math.prod(n for a, n in direction.sizes.items() if a not in (*p[site].axes, *scalar.axes))
            value = value - product / shares
    return Named(value, scalar.axes), Named(squared, scalar.axes)


def coefficients(rule: Rule, scalar: Named, squared: Named, weight: Named) -> Named:
    """The rule applied to each cell; `weight` is the examples' weight in the loss, 1 where cells are not per example."""
    if rule.coefficient is None:
        return Named(jnp.zeros_like(scalar.value), scalar.axes)
    w = weight.to(scalar.axes) if "batch" in scalar.axes else jnp.ones_like(scalar.value)
    return Named(rule.coefficient(scalar.value, squared.value, w.astype(scalar.value.dtype)), scalar.axes)


def credit(
    axes: tuple[str, ...], coefficient: Named | None, direction: Named | None, prediction: Named | None
) -> Named:
    """What a site with these axes is credited with: the estimated gradient of the loss with respect to it."""
    total: Named | None = None
    if coefficient is not None and direction is not None:
        draws = coefficient.sizes["draw"]
        total = contract(axes, Named(coefficient.value / draws, coefficient.axes), direction)
    if prediction is not None:
        predicted = prediction.sum_to(axes)
        value = predicted.to(axes) if total is None else total.to(axes) + predicted.to(axes)
        total = Named(value, axes)
    if total is None:
        raise ValueError("a displaced site needs a direction or a prediction")
    return total
