"""Normalisation without parameters, with its derivative in closed form."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

EPSILON = 1e-5


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def normalise(x: jax.Array, axes: tuple[int, ...] = (-1,)) -> jax.Array:
    """(x - mean) / sqrt(variance + 1e-5) over `axes`.

    The Jacobian J = r (1 - 1 1ᵀ/n - y yᵀ/n), r = 1/sqrt(variance + 1e-5), is symmetric, so that one formula is the rule of both modes:
    J v = r (v - mean(v) - y mean(y v)).

    Args:
      x: any shape.
      axes: axes normalised over, as a tuple.

    Returns:
      The same shape.
    """
    return _normalised(x, axes)[0]


def _normalised(x: jax.Array, axes: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    mean = x.mean(axes, keepdims=True)
    variance = jnp.maximum(jnp.square(x).mean(axes, keepdims=True) - jnp.square(mean), 0)
    scale = jax.lax.rsqrt(variance + EPSILON)
    return (x - mean) * scale, scale


@normalise.defjvp
def _normalise_jvp(axes: tuple[int, ...], primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    (x,), (v,) = primals, tangents
    y, scale = _normalised(x, axes)
    return y, scale * (v - v.mean(axes, keepdims=True) - y * (y * v).mean(axes, keepdims=True))


class Norm(nnx.Module):
    """One of the normalisations that the ablations of Ren et al. 2023 compare, without learned gain or bias.

    | kind | over | keeps apart |
    |---|---|---|
    | local | the last axis: a patch's channels, or a group's in grouped layers | examples, patches, groups |
    | ln | all axes but the batch | examples |
    | bn | the batch, for each unit; running statistics in evaluation | patches, groups |
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
