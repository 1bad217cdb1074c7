"""A fully connected network with local readouts."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from forwardgrad.adapters import flax_nnx
from forwardgrad.errors import InputError
from forwardgrad.models import heads
from forwardgrad.network import Network
from forwardgrad.taps import tap

ACTIVATIONS = {"relu": jax.nn.relu, "tanh": jnp.tanh}


class Layer(nnx.Module):
    """Linear, a passive tap, BatchNorm if wanted, a tap, the nonlinearity."""

    def __init__(self, config: MLP, inputs: int, units: int, rngs: nnx.Rngs):
        self.linear = nnx.Linear(inputs, units, kernel_init=jax.nn.initializers.he_normal(), rngs=rngs)
        self.norm = nnx.BatchNorm(units, rngs=rngs) if config.batch_norm else None
        self.activation, self.after = config.activation, config.taps == "after"

    def __call__(self, h: jax.Array) -> jax.Array:
        z = tap(self.linear(h.reshape(h.shape[0], -1)), "input/linear", "batch unit", passive=True)
        if self.norm is not None:
            z = self.norm(z)
        nonlinearity = ACTIVATIONS[self.activation]
        if self.after:
            return tap(nonlinearity(z), "output", "batch unit")
        return nonlinearity(tap(z, "input", "batch unit"))


@dataclasses.dataclass(frozen=True)
class MLP:
    """Fully connected layers, each with a linear readout of its own; the last layer's readout is the classifier."""

    hidden: tuple[int, ...] = (256, 256)
    """units of each hidden layer"""
    activation: Literal["relu", "tanh"] = "relu"
    """nonlinearity of the hidden layers"""
    batch_norm: bool = False
    """BatchNorm before each nonlinearity"""
    taps: Literal["before", "after"] = "before"
    """whether activations are displaced before or after the nonlinearity"""

    def network(self, shape: tuple[int, ...], classes: int) -> Network:
        """The network for inputs [batch, *shape].

        Raises:
          InputError: no hidden layer, or one without units.
        """
        if not self.hidden or min(self.hidden) < 1:
            raise InputError(
                f"an MLP needs hidden layers of at least one unit, not {self.hidden}: for example --hidden 256 256."
            )
        if self.activation not in ACTIVATIONS:
            raise InputError(f"activation {self.activation!r} does not exist: use one of {', '.join(ACTIVATIONS)}.")
        sizes = (math.prod(shape), *self.hidden)
        blocks = []
        for i, (inputs, units) in enumerate(itertools.pairwise(sizes)):
            weights = {"linear/kernel": ("in", "unit"), "linear/bias": ("unit",)}
            if self.batch_norm:
                weights |= {"norm/scale": ("unit",), "norm/bias": ("unit",)}
            blocks.append(
                flax_nnx.block(
                    f"layer{i}",
                    lambda rngs, inputs=inputs, units=units: Layer(self, inputs, units, rngs),
                    readout=heads.linear(units, classes, jax.nn.initializers.lecun_normal()),
                    weights=weights,
                    code=("layer", self, units, classes) if i and inputs == units else None,
                )
            )
        return Network(tuple(blocks))
