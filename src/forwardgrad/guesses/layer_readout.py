"""A fixed random readout on every layer."""

from __future__ import annotations

import math
from collections.abc import Mapping

import jax

from forwardgrad.errors import InputError
from forwardgrad.guesses.base import Guess, Site, View
from forwardgrad.guesses.given import relu_mask
from forwardgrad.named import Named, contract
from forwardgrad.network import weighed


def layer_readout(*, relu: bool = True, averaged: Mapping[str, str] | None = None) -> Guess:
    """p_l = gradient of the layer's own loss L(mean(h_l) B_l), h_l = relu(z_l), with a fixed random readout B_l.

    L is the loss of the scope's last readout. What Ren et al. 2023's released code computes under the name of direct feedback alignment: the
    output error is not used. B_l ~ N(0, s²), s = min(2/√n_l, 0.1), with n_l the features that are left after the mean. Cost: next to nothing.

    Args:
      relu: False for taps after the nonlinearity, whose own value is h_l.
      averaged: `{tap: axis}` of the mean, by the tap's name within its block; "patch" where nothing is said, and no mean where the tap lacks
        the axis.

    Raises:
      InputError: (when used) the network's outputs share an axis with a tap.
    """
    means = averaged or {}

    def features(site: Site) -> dict[str, int]:
        lost = ("batch", means.get(site.name, "patch"))
        return {a: n for a, n in zip(site.axes, site.shape, strict=True) if a not in lost}

    def init(key: jax.Array, view: View) -> dict[str, Named]:
        classes, out = {a: n for a, n in view.outputs.sizes.items() if a != "batch"}, {}
        for name, site in view.sites.items():
            if set(classes) & set(site.axes):
                raise InputError(
                    f"a layer's readout gives outputs with axes {' '.join(view.outputs.axes)}, which {name!r} shares: use a network whose last "
                    "readout has the axes batch and class."
                )
            sizes = features(site)
            deviation = min(2 / math.prod(sizes.values()) ** 0.5, 0.1)
            shape = (*sizes.values(), *classes.values())
            normal = jax.random.normal(site.key(key), shape, view.outputs.value.dtype)
            out[name] = Named(deviation * normal, (*sizes, *classes))
        return out

    def propose(key: jax.Array, state: Mapping[str, Named], view: View) -> dict[str, Named]:
        readout, out = list(view.readouts.values())[-1], {}
        for name, site in view.sites.items():

            def loss(z: jax.Array, name=name, site=site) -> jax.Array:
                kept = tuple(a for a in site.axes if a == "batch" or a in features(site))
                h = Named(jax.nn.relu(z) if relu else z, site.axes).sum_to(kept)
                share = math.prod(site.shape) / math.prod(h.value.shape)
                outputs = contract(view.outputs.axes, Named(h.value / share, h.axes), state[name])
                return weighed(readout.loss(outputs, view.batch), view.batch).value.sum()

            out[name] = Named(jax.grad(loss)(view.taps[name].value), site.axes)
        return out

    return Guess(propose, init, name="layer readout", mask=relu_mask if relu else None, isotropic=False)
