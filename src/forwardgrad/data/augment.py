"""Random changes of images that leave their class as it is: pure functions of a key, to be used inside `jit`."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from forwardgrad.errors import InputError


def flip(key: jax.Array, images: jax.Array) -> jax.Array:
    """Mirror each image left to right with probability 1/2.

    Args:
      key: a JAX random key.
      images: `[N, H, W, C]`, of any type.

    Returns:
      Images of the same shape and type.
    """
    mirrored = jax.random.bernoulli(key, 0.5, (images.shape[0], 1, 1, 1))
    return jnp.where(mirrored, images[:, :, ::-1, :], images)


def pad_and_crop(key: jax.Array, images: jax.Array, pad: int) -> jax.Array:
    """Crop each image at random, to its own size, from itself with a border of zeros around it.

    Args:
      key: a JAX random key.
      images: `[N, H, W, C]`, of any type.
      pad: width of the border in pixels; 0 changes nothing.

    Returns:
      Images of the same shape and type: each shifted by -pad to pad pixels along both axes, all shifts equally likely.

    Raises:
      InputError: for a negative border.
    """
    if pad < 0:
        raise InputError(f"a border of {pad} pixels cannot be added: choose 0 or more.")
    corners = jax.random.randint(key, (images.shape[0], 2), 0, 2 * pad + 1)
    padded = jnp.pad(images, ((0, 0), (pad, pad), (pad, pad), (0, 0)))

    def crop(image: jax.Array, corner: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice(image, (corner[0], corner[1], 0), images.shape[1:])

    return jax.vmap(crop)(padded, corners)
