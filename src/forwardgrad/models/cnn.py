"""A small convolutional network: two convolutions, one fully connected layer, the classifier (Bacho & Chu 2023, Table 2)."""

from __future__ import annotations

import dataclasses

from forwardgrad.adapters import flax_nnx
from forwardgrad.errors import InputError
from forwardgrad.models import heads, initial
from forwardgrad.models.layers import (
    CONVOLUTION,
    DENSE,
    MAPS,
    UNITS,
    Convolution,
    Dense,
    Layer,
    Window,
    weight_axes,
    with_output,
)
from forwardgrad.network import Network


@dataclasses.dataclass(frozen=True)
class CNN:
    """Convolutions without padding, the last one pooled, one fully connected layer; activations are displaced after each ReLU.

    By default the layers of the code released with Bacho & Chu (2023), 15C5-40C5-P2-128, whose `init` is `torch`. Their paper writes
    15C5-P2-40C5-P2-128: `pool_all`.
    """

    channels: tuple[int, ...] = (15, 40)
    """channels of each convolution"""
    kernel: int = 5
    """side of the convolutions' kernels"""
    units: int = 128
    """units of the fully connected layer"""
    pool_all: bool = False
    """pool after every convolution (2 x 2, after the displaced activation), not the last one alone"""
    batch_norm: bool = True
    """BatchNorm before each nonlinearity"""
    init: initial.Name = "he"
    """initial weights: normal with biases at zero (he), U(±√(6/fan-in)) with biases at zero, or U(±1/√fan-in), biases and all (torch)"""
    local_heads: bool = True
    """readouts of the layers below the last, for methods with local losses; the others leave them as they are"""
    output: heads.Output = "readout"
    """the output layer: a readout, exact with every method, or a layer that is displaced as the others are"""

    def network(self, shape: tuple[int, ...], classes: int) -> Network:
        """The network for images [batch, *shape], shape (height, width, colours).

        Raises:
          InputError: sizes below one, or images that the convolutions leave nothing of.
        """
        if len(shape) != 3:
            raise InputError(
                f"a CNN takes images (height, width, colours), not arrays of shape {shape}: use --model mlp."
            )
        if not self.channels or min(*self.channels, self.kernel, self.units) < 1:
            raise InputError(
                f"a CNN needs channels, kernel and units of at least 1, not {self.channels}, {self.kernel} and {self.units}: for example "
                "--channels 15 40 --kernel 5 --units 128."
            )
        starts = initial.find(self.init)
        height, width, inputs = shape
        blocks = []
        for i, channels in enumerate(self.channels):
            pool = Window(2, 2) if self.pool_all or i == len(self.channels) - 1 else None
            layer = lambda rngs, inputs=inputs, channels=channels, pool=pool: Layer(
                Convolution(inputs, channels, Window(self.kernel), starts, rngs),
                channels,
                MAPS,
                rngs,
                batch_norm=self.batch_norm,
                pool=pool,
            )
            height, width = Window(self.kernel).sides(height, width)
            height, width = pool.sides(height, width) if pool else (height, width)
            if min(height, width) < 1:
                raise InputError(
                    f"images of {shape[0]} x {shape[1]} pixels leave nothing of convolution {i + 1} of {len(self.channels)}, each {self.kernel} x "
                    f"{self.kernel}: set a smaller --kernel{', or give --channels fewer numbers' if i else ''}."
                )
            inputs = channels
            features = height * width * channels
            blocks.append(
                flax_nnx.block(
                    f"conv{i}",
                    layer,
                    readout=heads.linear(features, classes, starts.readout, starts.bias) if self.local_heads else None,
                    weights=weight_axes(CONVOLUTION, self.batch_norm),
                )
            )
        features = height * width * inputs
        dense = flax_nnx.block(
            "dense",
            lambda rngs: Layer(
                Dense(features, self.units, starts, rngs), self.units, UNITS, rngs, batch_norm=self.batch_norm
            ),
            weights=weight_axes(DENSE, self.batch_norm),
        )
        return with_output((*blocks, dense), self.output, self.units, classes, starts, self.local_heads)
