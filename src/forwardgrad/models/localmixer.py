"""LocalMixer (Ren et al. 2023, section 5, Table 2 and appendix 13): an MLP-Mixer whose units stay apart by patch and by group.

Block 0 is channel mixing, linear then grouped linear; every later block begins with token mixing and ends with a residual sum. Each layer is

    normalise? - linear - [passive tap] - normalise? - [tap] - ReLU

with the residual added before the last tap: a tap is the last thing before its unit's ReLU, and its activation says whether the unit is on.
The linear layer below the tap "channel" ends in the passive tap "channel/linear", and so on.
Shapes: N examples, P patches, G groups, D channels per group, C = G D.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from forwardgrad.adapters import flax_nnx
from forwardgrad.errors import InputError
from forwardgrad.losses.products import product
from forwardgrad.models import heads
from forwardgrad.models.normalisation import Norm
from forwardgrad.network import Network
from forwardgrad.taps import tap

Initializer = Callable[..., jax.Array]


@dataclasses.dataclass(frozen=True)
class LocalMixer:
    """LocalMixer of any size. Table 2's: S/1/1, M/1/16 (MNIST), M/8/16, L/8/64 (CIFAR-10), L/32/64 (ImageNet)."""

    blocks: int = 4
    """number of blocks, each with a local loss"""
    patches: int = 8
    """patches per side of the image"""
    channels: int = 512
    """channels C of every hidden layer"""
    groups: int = 16
    """groups G of channels, each with a loss of its own"""
    norm: Literal["local", "ln", "bn", "none"] = "local"
    """normalisation: over a patch's channels (group by group in grouped layers), over all of an example, over the batch, or none"""
    norm_place: Literal["both", "before", "after", "begin"] = "both"
    """where: before and after every linear layer, before, after, or at the beginning of each block only"""
    init: Literal["kaiming", "lecun", "constant"] = "kaiming"
    """standard deviation of the weights: 2/sqrt(fan-in), 1/sqrt(fan-in), or 0.1"""
    init_cap: float | None = None
    """upper bound of that standard deviation; the released code of Ren et al. caps it at 0.1"""
    zero_classifier: bool = False
    """start the final classifier at zero, as the released code does"""
    bias_twice: bool = False
    """add the bias of the token and channel layers twice, as the released code does: its gradient is then twice the paper's"""

    weights_by_group: bool = False
    """lg-fg-w only: credit every channel weight with its own group's loss, as the released code does, although normalisation after the layer
    mixes groups: biased, needs --allow-bias"""

    def network(self, shape: tuple[int, ...], classes: int) -> Network:
        """The network for images [batch, *shape], shape (height, width, colours): `blocks` blocks and the detached final classifier.

        Raises:
          InputError: channels that are not divisible by groups, patches that do not divide the image, or sizes below one.
        """
        self._check(shape)
        height, width, colours = shape
        features = (height // self.patches) * (width // self.patches) * colours
        initializer = self._initializer()
        blocks = []
        for i in range(self.blocks):
            make = (lambda rngs: FirstBlock(self, features, rngs)) if i == 0 else (lambda rngs: MixerBlock(self, rngs))
            blocks.append(
                flax_nnx.block(
                    f"block{i}",
                    make,
                    readout=heads.replicated(self.channels, classes, initializer),
                    weights=weight_axes(self, i == 0),
                    code=("mixer", self, classes) if i else None,
                )
            )
        final = (lambda key, shape: jnp.zeros(shape)) if self.zero_classifier else initializer
        classifier = flax_nnx.block(
            "classifier", lambda rngs: Pool(), readout=heads.linear(self.channels, classes, final), detached=True
        )
        return Network((*blocks, classifier))

    def _check(self, shape: tuple[int, ...]) -> None:
        for name in ("blocks", "patches", "channels", "groups"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, not {getattr(self, name)}: set --{name}.")
        if self.channels % self.groups:
            raise InputError(
                f"{self.channels} channels are not divisible by {self.groups} groups: set --groups to a divisor, or --channels to a multiple."
            )
        if len(shape) != 3:
            raise InputError(
                f"LocalMixer takes images (height, width, colours), not arrays of shape {shape}: use --model mlp."
            )
        if shape[0] % self.patches or shape[1] % self.patches:
            raise InputError(
                f"{self.patches} patches per side do not divide an image of {shape[0]} x {shape[1]} pixels: set --patches to a common divisor."
            )

    def _initializer(self) -> Initializer:
        """N(0, s²), s from the fan-in, which is the second to last dimension of a matrix of inputs by outputs."""
        cap = math.inf if self.init_cap is None else self.init_cap

        def init(
            key: jax.Array, shape: tuple[int, ...], dtype=jnp.float32, fan_in: int | None = None, **_
        ) -> jax.Array:
            inputs = shape[-2] if fan_in is None else fan_in
            deviation = {"kaiming": 2 / inputs**0.5, "lecun": 1 / inputs**0.5, "constant": 0.1}[self.init]
            return min(deviation, cap) * jax.random.normal(key, shape, dtype)

        return init


def weight_axes(config: LocalMixer, first: bool) -> dict[str, tuple[str, ...]]:
    """Axes of a block's weights, for weight perturbation.

    A displaced weight's effect runs through the normalisation *after* its layer, unlike a displaced activation's. The group axis is therefore
    named only where everything that follows in the block keeps groups apart: after the linear layer over all channels a local normalisation
    mixes them, as does any layer normalisation over the whole example. Token mixing feeds all groups.
    """
    after = config.norm_place in ("both", "after")
    later = after or config.norm_place == "before"  # a normalisation between the two channel layers
    mixed = {"local": (after, False), "ln": (later, after), "bn": (False, False), "none": (False, False)}[config.norm]
    channel = "group" if config.weights_by_group or not mixed[0] else "all groups"
    grouped = "group" if config.weights_by_group or not mixed[1] else "all groups"
    axes = {
        "channel/kernel": ("in", channel, "channel"),
        "channel/bias": (channel, "channel"),
        "grouped/kernel": (grouped, "in", "channel"),
        "grouped/bias": (grouped, "channel"),
    }
    return axes if first else axes | {"token/kernel": ("in", "patch"), "token/bias": ("patch", "one")}


# `jnp.einsum` puts the weights first, and XLA then lays activations out with units apart from each other, at twice the cost on a CPU.


def _mix_channels(x: jax.Array, kernel: jax.Array, dimensions: Any, **_) -> jax.Array:
    """npf,fgd->npgd, as a product of matrices: with three axes the kernel's gradient would come out transposed."""
    out = product(x.reshape(-1, x.shape[-1]), kernel.reshape(kernel.shape[0], -1))
    return out.reshape(*x.shape[:2], *kernel.shape[1:])


def _mix_groups(spec: str, x: jax.Array, kernel: jax.Array, **_) -> jax.Array:
    """npgc,gcd->npgd."""
    return jnp.moveaxis(jax.lax.dot_general(x, kernel, (((3,), (1,)), ((2,), (0,)))), 0, 2)


def _mix_tokens(spec: str, x: jax.Array, kernel: jax.Array, **_) -> jax.Array:
    """npc,pq->nqc."""
    return jnp.moveaxis(jax.lax.dot_general(x, kernel, (((1,), (0,)), ((), ()))), 2, 1)


class Channels(nnx.Module):
    """Channel mixing: a linear layer over all channels, then one within each group."""

    def __init__(self, config: LocalMixer, features: int, first: bool, rngs: nnx.Rngs):
        g, d = config.groups, config.channels // config.groups
        init = config._initializer()
        place, patches = config.norm_place, config.patches**2
        norm = lambda here, *shape: Norm(config.norm if here else "none", shape, rngs)
        self.before = norm(place in ("both", "before") or (first and place == "begin"), patches, features)
        self.channel = nnx.LinearGeneral(
            features,
            (g, d),
            kernel_init=lambda *a: init(*a, fan_in=features),
            bias_init=nnx.initializers.zeros,
            dot_general=_mix_channels,
            rngs=rngs,
        )
        self.after = norm(place in ("both", "after"), patches, config.channels)
        self.before_grouped = norm(place in ("both", "before"), patches, g, d)
        self.grouped = nnx.Einsum(
            "npgc,gcd->npgd", (g, d, d), (g, d), kernel_init=init, einsum_op=_mix_groups, rngs=rngs
        )
        self.after_grouped = norm(place in ("both", "after"), patches, g, d)
        self.groups, self.again = g, config.bias_twice

    def _again(self, layer: nnx.LinearGeneral | nnx.Einsum, z: jax.Array) -> jax.Array:
        """The layer's output, its bias once more where the released code is followed."""
        assert layer.bias is not None
        return z + layer.bias[...] if self.again else z

    def __call__(self, x: jax.Array, residual: jax.Array | None) -> jax.Array:
        """[N, P, F] to [N, P, G, D]; `residual` is added before the last nonlinearity."""
        n, p, _ = x.shape
        z = self._again(self.channel, self.channel(self.before(x)))
        z = tap(z, "channel/linear", "batch patch group channel", passive=True)
        z = self.after(z.reshape(n, p, -1)).reshape(n, p, self.groups, -1)  # normalised over all C channels
        h = jax.nn.relu(tap(z, "channel", "batch patch group channel"))
        z = tap(self.grouped(self.before_grouped(h)), "grouped/linear", "batch patch group channel", passive=True)
        z = self.after_grouped(z)
        z = z if residual is None else z + residual
        return jax.nn.relu(tap(z, "grouped", "batch patch group channel"))


class FirstBlock(Channels):
    """Patches of an image to [N, P, G, D], without a residual."""

    def __init__(self, config: LocalMixer, features: int, rngs: nnx.Rngs):
        super().__init__(config, features, True, rngs)
        self.side = config.patches

    def __call__(self, x: jax.Array) -> jax.Array:
        return super().__call__(patchify(x, self.side), None)


class MixerBlock(Channels):
    """Token mixing, channel mixing, residual."""

    def __init__(self, config: LocalMixer, rngs: nnx.Rngs):
        super().__init__(config, config.channels, False, rngs)
        p, place = config.patches**2, config.norm_place
        self.begin = Norm("none" if place == "after" else config.norm, (p, config.channels), rngs)
        self.token = nnx.Einsum(
            "npc,pq->nqc", (p, p), (p, 1), kernel_init=config._initializer(), einsum_op=_mix_tokens, rngs=rngs
        )
        self.after_token = Norm(config.norm if place in ("both", "after") else "none", (p, config.channels), rngs)

    def __call__(self, h: jax.Array) -> jax.Array:
        n, p, _, _ = h.shape
        z = self._again(self.token, self.token(self.begin(h.reshape(n, p, -1))))
        # every channel of a token feeds all groups, so that this axis is no group axis
        z = tap(z, "token/linear", "batch patch feature", passive=True)
        x = jax.nn.relu(tap(self.after_token(z), "token", "batch patch feature"))
        return super().__call__(x, h)


class Pool(nnx.Module):
    """What the final classifier sees: the mean over patches, normalised."""

    def __call__(self, h: jax.Array) -> jax.Array:
        return Norm("local", (), nnx.Rngs(0))(h.reshape(*h.shape[:2], -1).mean(1))


def patchify(images: jax.Array, side: int) -> jax.Array:
    """[N, H, W, colours] to [N, side², features]: patch p = row * side + column, features ordered (height, width, colour)."""
    n, height, width, colours = images.shape
    h, w = height // side, width // side
    x = images.reshape(n, side, h, side, w, colours).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(n, side * side, h * w * colours)
