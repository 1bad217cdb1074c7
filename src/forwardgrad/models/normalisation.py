"""The normalisations of LocalMixer's ablations."""

from __future__ import annotations

import math

import jax
from flax import nnx

from forwardgrad.normalise import normalise


class Norm(nnx.Module):
    """One of the normalisations that the ablations of Ren et al. 2023 compare, without learned gain or bias.

    | kind | over | keeps apart |
    |---|---|---|
    | local | the last axis: a patch's channels, or a group's in grouped layers | examples, patches, groups |
    | ln | all axes but the batch | examples |
    | bn | the batch, for each unit; in evaluation running statistics, which move by 0.01 a step | patches, groups |
    | none | nothing | everything |
    """

    def __init__(self, kind: str, shape: tuple[int, ...], rngs: nnx.Rngs):
        self.kind = kind
        units = math.prod(shape)
        self.batch_norm = nnx.BatchNorm(units, use_bias=False, use_scale=False, rngs=rngs) if kind == "bn" else None

    def __call__(self, x: jax.Array) -> jax.Array:
        """`x` is [batch, ...]; the shape is kept."""
        if self.batch_norm is not None:
            return self.batch_norm(x.reshape(x.shape[0], -1)).reshape(x.shape)
        if self.kind == "local":
            return normalise(x, (-1,))
        if self.kind == "ln":
            return normalise(x, tuple(range(1, x.ndim)))
        return x
