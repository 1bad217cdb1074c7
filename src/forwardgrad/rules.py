"""Rules: from a measured scalar and a direction to an estimate.

With `d = <gradient, u>`, one per cell of the partition, and a direction `u`, the credit of a site is `coefficient(d, |u|^2, w) u`, where `w`
is the weight of the cell's example in the loss (1/N; 1 where the partition has no batch axis). `d` already contains `w`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Rule(NamedTuple):
    """`coefficient(d, squared_norm, weight) -> array` like `d`; `None`: the direction serves learning only, the predictor alone is the credit."""

    name: str
    coefficient: Callable[[jax.Array, jax.Array, jax.Array], jax.Array] | None


unbiased = Rule("unbiased", lambda d, squared, weight: d)
"""`d u`: unbiased where E[u uᵀ] = I (Baydin et al. 2022; Ren et al. 2023, Eqs. 2 and 3)."""

projection = Rule("projection", lambda d, squared, weight: d / jnp.where(squared > 0, squared, 1))
"""`d u / |u|²`: the orthogonal projection of the gradient on the guess (Fournier et al. 2023). Biased for random guesses (shrunk by about
1/dimension). In each cell never longer than the gradient; a site that feeds several cells gets their sum. Zero where the guess is zero."""

sign = Rule("sign", lambda d, squared, weight: jnp.sign(d) * weight)
"""`sign(d) w u`: the direction of descent along the guess at the guess's own length; the scale of the gradient is lost."""

unnormalised = Rule("unnormalised", lambda d, squared, weight: d / jnp.where(weight > 0, weight, 1))
"""`d u / w`: N times the unbiased estimate, as the released code of Ren et al. scales global activity perturbation."""

prediction_only = Rule("prediction only", None)
"""No direction in the credit: feedback alignment, direct feedback, local learning. A guess, where there is one, is probed only to learn."""
