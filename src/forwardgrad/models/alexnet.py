"""AlexNet (Krizhevsky et al. 2012) as Bacho & Chu (2023) train it: BatchNorm instead of dropout, activations displaced after pooling.

| block | layer, 224 pixels | maps of 224 | of 64 or 32 |
|---|---|---|---|
| conv0 | 11 x 11, stride 4, padding 2, 64 channels; pooled | 55, pooled 27 | 32, 15 |
| conv1 | 5 x 5, padding 2, 192; pooled | 27, 13 | 15, 7 |
| conv2 | 3 x 3, padding 1, 384 | 13 | 7 |
| conv3 | 3 x 3, padding 1, 256 | 13 | 7 |
| conv4 | 3 x 3, padding 1, 256; pooled | 13, 6 | 7, 3 |
| dense0, dense1 | 4096 units each | | |

Pooling takes the largest of 3 x 3, stride 2. Smaller images have another first convolution, and nothing else: 5 x 5 with padding 2, stride 2 from 48
pixels on (as adaptations to Tiny ImageNet commonly have it), stride 1 below. Both leave maps of 32 x 32, so that one network, with one number of
parameters, serves 64 and 32 pixels; 11 x 11 with stride 4 would leave a single place of CIFAR's images before the last pooling, which then has
nothing to look at.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
from flax import nnx

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
from forwardgrad.network import Block, Network

POOL = Window(3, 2)
POOLS = (POOL, POOL, None, None, POOL)
SMALLEST = 15  # pixels a side of which something is left


@dataclasses.dataclass(frozen=True)
class AlexNet:
    """Five convolutions and two fully connected layers, for images of 224, 64 or 32 pixels; see the module for its layers."""

    channels: tuple[int, int, int, int, int] = (64, 192, 384, 256, 256)
    """channels of the convolutions"""
    units: tuple[int, int] = (4096, 4096)
    """units of the fully connected layers"""
    resize: int = 0
    """first scale images to this many pixels a side (bilinear), 224 as published; 0: as they are"""
    batch_norm: Literal["all", "convolutions", "none"] = "convolutions"
    """BatchNorm before the nonlinearity of all layers (the code released with Bacho & Chu 2023), of convolutions (their paper), or of none"""
    init: initial.Name = "he"
    """initial weights: normal with biases at zero (he), U(±√(6/fan-in)) with biases at zero, or U(±1/√fan-in), biases and all (torch)"""
    local_heads: bool = True
    """readouts of the layers below the last, for methods with local losses; the others leave them as they are. With 100 classes and 224 pixels
    they are 20 million weights"""
    output: heads.Output = "readout"
    """the output layer: a readout, exact with every method, or a layer that is displaced as the others are"""

    def network(self, shape: tuple[int, ...], classes: int) -> Network:
        """The network for images [batch, *shape], shape (height, width, colours).

        Raises:
          InputError: sizes below one, or images that the layers leave nothing of.
        """
        if len(shape) != 3:
            raise InputError(
                f"AlexNet takes images (height, width, colours), not arrays of shape {shape}: use --model mlp."
            )
        if min(*self.channels, *self.units) < 1 or self.resize < 0:
            raise InputError(
                f"AlexNet needs channels and units of at least 1 and a size that is not negative, not {self.channels}, {self.units} and "
                f"{self.resize}: for example --channels 64 192 384 256 256 --units 4096 4096 --resize 0."
            )
        height, width, inputs = (self.resize, self.resize, shape[2]) if self.resize else shape
        if min(height, width) < SMALLEST:
            raise InputError(
                f"images of {height} x {width} pixels are too small for AlexNet, which leaves nothing of them: scale them up with --resize 32."
            )
        small = Window(3, 1, 1)
        windows = (_first(min(height, width)), Window(5, 1, 2), small, small, small)
        blocks, maps_normed, units_normed = [], self.batch_norm != "none", self.batch_norm == "all"
        for i, (channels, window, pool) in enumerate(zip(self.channels, windows, POOLS, strict=True)):
            height, width = window.sides(height, width)
            height, width = pool.sides(height, width) if pool else (height, width)
            make = lambda rngs, i=inputs, c=channels, window=window, pool=pool: Layer(
                Convolution(i, c, window, self._initial, rngs),
                c,
                MAPS,
                rngs,
                batch_norm=maps_normed,
                tapped="pooled",
                pool=pool,
            )
            blocks.append(self._block(f"conv{i}", make, CONVOLUTION, maps_normed, (height * width * channels, classes)))
            inputs = channels
        if self.resize:
            blocks[0] = _scaled(blocks[0], self.resize)
        inputs = height * width * inputs
        for i, units in enumerate(self.units):
            make = lambda rngs, i=inputs, u=units: Layer(
                Dense(i, u, self._initial, rngs), u, UNITS, rngs, batch_norm=units_normed
            )
            last = i == len(self.units) - 1
            blocks.append(self._block(f"dense{i}", make, DENSE, units_normed, (units, classes), last))
            inputs = units
        return with_output(blocks, self.output, inputs, classes, self._initial, self.local_heads)

    @property
    def _initial(self) -> initial.Initial:
        return initial.find(self.init)

    def _block(
        self,
        name: str,
        make: Callable[[nnx.Rngs], nnx.Module],
        axes: tuple[str, ...],
        normed: bool,
        sizes: tuple[int, int],
        last: bool = False,
    ) -> Block:
        readout = (
            heads.linear(*sizes, self._initial.readout, self._initial.bias) if self.local_heads and not last else None
        )
        return flax_nnx.block(name, make, readout=readout, weights=weight_axes(axes, normed))


def _first(side: int) -> Window:
    """The first convolution's."""
    if side >= 128:
        return Window(11, 4, 2)
    return Window(5, 2, 2) if side >= 48 else Window(5, 1, 2)


def _scaled(block: Block, side: int) -> Block:
    """The block on images scaled to `side` x `side`."""

    def apply(params: Any, state: Any, h: jax.Array, train: bool) -> tuple[Any, Any]:
        return block.apply(params, state, jax.image.resize(h, (len(h), side, side, h.shape[3]), "bilinear"), train)

    return block._replace(apply=apply)
