"""The layer that networks of fully connected layers and convolutions are made of, and its pooling."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from forwardgrad.adapters import flax_nnx
from forwardgrad.losses.products import product
from forwardgrad.models import heads
from forwardgrad.models.convolutions import convolve
from forwardgrad.models.initial import Initial
from forwardgrad.network import Block, Network
from forwardgrad.taps import tap

ACTIVATIONS = {"relu": jax.nn.relu, "tanh": jnp.tanh}
MOMENTUM = 0.9  # of BatchNorm's running statistics, PyTorch's 0.1: new = 0.9 old + 0.1 batch


class Window(NamedTuple):
    """What a convolution or a pooling looks at: `size` x `size` pixels at a time, `stride` apart, `padding` zeros around the image."""

    size: int
    stride: int = 1
    padding: int = 0

    def sides(self, *sides: int) -> tuple[int, ...]:
        """Sides of what it makes of an image of the given sides."""
        return tuple((side + 2 * self.padding - self.size) // self.stride + 1 for side in sides)


class Layer(nnx.Module):
    """Linear map, passive tap "input/linear", BatchNorm if wanted, nonlinearity, maximum pooling if wanted; and one tap.

    Args:
      linear: a `Dense` or a `Convolution`.
      units: features or channels that it gives.
      axes: names of its output's axes.
      tapped: where the tap stands. Before the nonlinearity its name is "input"; after it, or after the pooling, "output".
      pool: without padding.

    BatchNorm's variance is the biased one, 1/N Σ(x - mean)², in the running statistics too: PyTorch keeps N/(N - 1) times it there, with N the
    batch (and the places of a convolution), 1.6 % more at 64 examples.
    """

    def __init__(
        self,
        linear: Dense | Convolution,
        units: int,
        axes: str,
        rngs: nnx.Rngs,
        *,
        batch_norm: bool,
        activation: str = "relu",
        tapped: Literal["before", "after", "pooled"] = "after",
        pool: Window | None = None,
    ):
        self.linear = linear
        self.norm = nnx.BatchNorm(units, momentum=MOMENTUM, rngs=rngs) if batch_norm else None
        self.axes, self.activation, self.tapped, self.pool = axes, activation, tapped, pool

    def __call__(self, h: jax.Array) -> jax.Array:
        z = tap(self.linear(h), "input/linear", self.axes, passive=True)
        z = z if self.norm is None else self.norm(z)
        if self.tapped == "before":
            z = tap(z, "input", self.axes)
        h = ACTIVATIONS[self.activation](z)
        if self.tapped == "after":
            h = tap(h, "output", self.axes)
        if self.pool is not None:
            h = max_pool(h, self.pool)
        return tap(h, "output", self.axes) if self.tapped == "pooled" else h


class Output(nnx.Module):
    """The output layer as one that methods may displace: linear map and tap "output"."""

    def __init__(self, inputs: int, classes: int, initial: Initial, rngs: nnx.Rngs):
        self.linear = Dense(inputs, classes, initial._replace(kernel=initial.readout), rngs)

    def __call__(self, h: jax.Array) -> jax.Array:
        return tap(self.linear(h), "output", "batch class")


def with_output(
    blocks: Sequence[Block], end: heads.Output, features: int, classes: int, initial: Initial, local_heads: bool
) -> Network:
    """Blocks of layers and the end of the network on [batch, features]: a readout on the last of them, or a block "output" of its own.

    Args:
      blocks: the last has no readout yet.
      local_heads: where the output is a layer, whether the last of the others has a readout too.
    """
    head = heads.linear(features, classes, initial.readout, initial.bias)
    last = blocks[-1]
    if end == "readout":
        return Network((*blocks[:-1], last._replace(readout=head)))
    output = flax_nnx.block(
        "output",
        lambda rngs: Output(features, classes, initial, rngs),
        readout=heads.comparison(),
        weights={"linear/kernel": ("in", "class"), "linear/bias": ("class",)},
    )
    return Network((*blocks[:-1], last._replace(readout=head) if local_heads else last, output))


def _product(x: jax.Array, kernel: jax.Array, *_, **__) -> jax.Array:
    return product(x, kernel)


class Dense(nnx.Linear):
    """Fully connected, on [batch, ...]: all axes but the first are features."""

    def __init__(self, inputs: int, units: int, initial: Initial, rngs: nnx.Rngs):
        super().__init__(
            inputs,
            units,
            kernel_init=initial.kernel,
            bias_init=initial.bias(inputs),
            dot_general=_product,  # pyright: ignore[reportArgumentType]
            rngs=rngs,
        )

    def __call__(self, inputs: jax.Array) -> jax.Array:
        return super().__call__(inputs.reshape(inputs.shape[0], -1))


class Convolution(nnx.Module):
    """Convolution of [batch, height, width, inputs]."""

    def __init__(self, inputs: int, channels: int, window: Window, initial: Initial, rngs: nnx.Rngs):
        shape, fan_in = (window.size, window.size, inputs, channels), window.size**2 * inputs
        self.kernel = nnx.Param(initial.kernel(rngs.params(), shape, jnp.float32))
        self.bias = nnx.Param(initial.bias(fan_in)(rngs.params(), (channels,), jnp.float32))
        self.window = window

    def __call__(self, x: jax.Array) -> jax.Array:
        return convolve(x, self.kernel[...], self.window.stride, self.window.padding) + self.bias[...]


def max_pool(h: jax.Array, window: Window) -> jax.Array:
    """Largest of each window of [batch, height, width, channel], without padding; what no whole window covers is left out.

    Units of a window that are equal share its derivative, unevenly (`jnp.maximum` halves it at each tie); PyTorch gives all of it to one of them.
    After a ReLU they are units that are off: no weight's gradient depends on which, but where the tap stands between ReLU and pooling, what those
    units are displaced by enters a tangent with another weight.
    """
    height, width = (window.stride * (n - 1) + 1 for n in window.sides(*h.shape[1:3]))
    shifts = [
        h[:, i : i + height : window.stride, j : j + width : window.stride]
        for i in range(window.size)
        for j in range(window.size)
    ]
    return functools.reduce(jnp.maximum, shifts)


def weight_axes(kernel: Sequence[str], batch_norm: bool) -> dict[str, tuple[str, ...]]:
    """Axes of a layer's parameters: the kernel's are given, the last of them is the others'."""
    unit = (kernel[-1],)
    axes = {"linear/kernel": tuple(kernel), "linear/bias": unit}
    return axes | {"norm/scale": unit, "norm/bias": unit} if batch_norm else axes


DENSE = ("in", "unit")
CONVOLUTION = ("row", "column", "in", "channel")
UNITS = "batch unit"
MAPS = "batch height width channel"
