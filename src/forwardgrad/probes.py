"""Probes: how the derivative along a direction is measured. Both have `jax.jvp`'s signature."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from forwardgrad.errors import InputError


class Probe(NamedTuple):
    """`push(f, primals, tangents) -> (value, tangent)`; `exact`: it sees through `stop_gradient` as derivatives do."""

    name: str
    push: Callable[[Callable, tuple[Any, ...], tuple[Any, ...]], tuple[Any, Any]]
    exact: bool


jvp = Probe("jvp", jax.jvp, True)
"""Forward-mode differentiation: exact, one forward pass augmented with tangents."""


def finite_difference(epsilon: float = 1e-3) -> Probe:
    """`(f(x + εu) - f(x)) / ε`: classical weight and node perturbation. Rounding error O(1e-7 / ε) in float32.

    Each measurement errs by O(ε), the estimate along symmetric directions is biased by O(ε²): curvature is even in u, and averages out.
    One more forward pass per draw. `fg.antithetic` pairs of draws make it the central difference, which errs by O(ε²). A difference of values
    crosses `stop_gradient`, so that it serves global losses only.
    """
    if not epsilon > 0:
        raise InputError(
            f"the step of a finite difference must be positive, not {epsilon}: 1e-3 suits float32, 1e-6 float64."
        )

    def push(f: Callable, primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[Any, Any]:
        here = f(*primals)
        there = f(*jax.tree.map(lambda x, u: x + epsilon * u.astype(jnp.result_type(x)), primals, tangents))
        return here, jax.tree.map(lambda a, b: (b - a) / epsilon, here, there)

    return Probe("finite difference", push, False)
