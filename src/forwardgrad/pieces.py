"""Exact microbatches: what sums over examples is summed, what belongs to examples is put side by side."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from forwardgrad.errors import InputError


def in_pieces(
    measure: Callable[[Mapping[str, Any]], tuple[Any, Any]], batch: Mapping[str, Any], size: int | None
) -> tuple[Any, Any]:
    """`measure(batch)`, a few examples at a time.

    Args:
      measure: from examples to `(sums, rows)`: a pytree that sums over disjoint sets of examples, and one whose leaves have the examples first.
      batch: arrays with the examples first.
      size: examples at a time, a divisor of their number; `None` is all of them.

    Raises:
      InputError: `size` does not divide the batch.
    """
    if size is None:
        return measure(batch)
    n = len(batch["weight"])
    if size == n:
        return measure(batch)
    if size < 1 or n % size:
        raise InputError(f"microbatches of {size} do not divide a batch of {n}: choose a divisor.")
    pieces = jax.tree.map(lambda x: x.reshape(n // size, size, *x.shape[1:]), dict(batch))
    shapes = jax.eval_shape(measure, jax.tree.map(lambda x: x[0], pieces))[0]
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

    def add(sums: Any, piece: Mapping[str, Any]) -> tuple[Any, Any]:
        more, rows = measure(piece)
        return jax.tree.map(jnp.add, sums, more), rows

    sums, rows = jax.lax.scan(add, zeros, pieces)
    return sums, jax.tree.map(lambda x: x.reshape(n, *x.shape[2:]), rows)
