"""Descent on what a guess learns: two optimisers, in optax's form.

The core needs JAX alone; any of optax's serves as well: `Optimiser(*optax.adamw(1e-4))`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Optimiser(NamedTuple):
    """Attributes: `init(x) -> state`; `update(gradients, state, x) -> (steps, state)`, where x moves to x + steps."""

    init: Callable[[Any], Any]
    update: Callable[..., tuple[Any, Any]]


def sgd(lr: float) -> Optimiser:
    """x <- x - lr g. On g = x - sample it is the moving average (1 - lr) x + lr sample."""
    return Optimiser(lambda x: (), lambda grads, state, x=None: (jax.tree.map(lambda g: -lr * g, grads), state))


class Moments(NamedTuple):
    """State of Adam: steps taken, and the moving averages of g and g²."""

    count: jax.Array
    first: Any
    second: Any


def adam(lr: float, *, b1: float = 0.9, b2: float = 0.999, epsilon: float = 1e-8) -> Optimiser:
    """x <- x - lr m̂ / (√v̂ + ε), m̂ and v̂ the unbiased moving averages of g and g² (Kingma & Ba 2015). State: twice the size of x."""

    def init(x: Any) -> Moments:
        zeros = lambda: jax.tree.map(jnp.zeros_like, x)
        return Moments(jnp.zeros((), jnp.int32), zeros(), zeros())

    def update(grads: Any, state: Moments, x: Any = None) -> tuple[Any, Moments]:
        count = state.count + 1
        first = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, state.first, grads)
        second = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * g * g, state.second, grads)

        def step(m: jax.Array, v: jax.Array) -> jax.Array:
            share = lambda b: (1 - b ** count.astype(m.dtype)).astype(m.dtype)  # of an average that started at zero
            return -lr * (m / share(b1)) / (jnp.sqrt(v / share(b2)) + epsilon)

        return jax.tree.map(step, first, second), Moments(count, first, second)

    return Optimiser(init, update)
