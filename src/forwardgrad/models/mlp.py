"""A fully connected network with local readouts."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Literal

from forwardgrad.adapters import flax_nnx
from forwardgrad.errors import InputError
from forwardgrad.models import heads, initial
from forwardgrad.models.layers import ACTIVATIONS, DENSE, UNITS, Dense, Layer, weight_axes, with_output
from forwardgrad.network import Network


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
    init: initial.Name = "he"
    """initial weights: normal with biases at zero (he), U(±√(6/fan-in)) with biases at zero, or U(±1/√fan-in), biases and all (torch)"""
    local_heads: bool = True
    """readouts of the layers below the last, for methods with local losses; the others leave them as they are"""
    output: heads.Output = "readout"
    """the output layer: a readout, exact with every method, or a layer that is displaced as the others are"""

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
        starts = initial.find(self.init)
        sizes = (math.prod(shape), *self.hidden)
        blocks = []
        for i, (inputs, units) in enumerate(itertools.pairwise(sizes)):
            layer = lambda rngs, inputs=inputs, units=units: Layer(
                Dense(inputs, units, starts, rngs),
                units,
                UNITS,
                rngs,
                batch_norm=self.batch_norm,
                activation=self.activation,
                tapped=self.taps,
            )
            last = i == len(self.hidden) - 1
            readout = self.local_heads and not last
            again = i and inputs == units and (self.local_heads or self.output == "layer" or not last)
            blocks.append(
                flax_nnx.block(
                    f"layer{i}",
                    layer,
                    readout=heads.linear(units, classes, starts.readout, starts.bias) if readout else None,
                    weights=weight_axes(DENSE, self.batch_norm),
                    code=("layer", self, units, classes) if again else None,
                )
            )
        return with_output(blocks, self.output, sizes[-1], classes, starts, self.local_heads)
