"""Wrappers: `Estimator -> Estimator`, editing every part, or what comes out."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Mapping
from typing import Any

import jax

from forwardgrad.engine import Estimator
from forwardgrad.errors import InputError
from forwardgrad.guesses.base import Guess
from forwardgrad.guesses.given import masked
from forwardgrad.guesses.random import antithetic, orthogonal
from forwardgrad.parts import Carry, Info, Part, Update
from forwardgrad.streaming import Packed


def _edited(estimator: Estimator, **changes) -> Estimator:
    return dataclasses.replace(estimator, parts=tuple(dataclasses.replace(part, **changes) for part in estimator.parts))


def _like(part: Part, guess: Guess) -> Guess:
    """The guess, with the mask of the part's present one."""
    mask = part.guess.mask if part.guess is not None else None
    return guess if mask is None else masked(guess, mask)


def with_draws(estimator: Estimator, draws: int) -> Estimator:
    """The mean of several draws per step, on one primal: the variance of one, divided by `draws`.

    Raises:
      InputError: `draws` is below 1.
    """
    return _edited(estimator, draws=draws)


def with_guess(estimator: Estimator, guess: Guess) -> Estimator:
    """The same estimator along other directions; a mask stays."""
    parts = tuple(dataclasses.replace(part, guess=_like(part, guess)) for part in estimator.parts)
    return dataclasses.replace(estimator, parts=parts)


def with_orthogonal_draws(estimator: Estimator, draws: int) -> Estimator:
    """`draws` orthogonal directions per step; exact with as many as a slice of what all taps share has units (see `orthogonal`)."""
    return with_draws(with_guess(estimator, orthogonal()), draws)


def with_antithetic_draws(estimator: Estimator, draws: int) -> Estimator:
    """`draws` directions per step in pairs u, -u: for parts that measure by finite differences, whose O(ε) error it removes (see `antithetic`)."""
    pairs = lambda part: dataclasses.replace(part, guess=part.guess and antithetic(part.guess))
    return with_draws(dataclasses.replace(estimator, parts=tuple(map(pairs, estimator.parts))), draws)


def with_predictor(estimator: Estimator, predictor: Guess) -> Estimator:
    """A control variate: ĝ = p + <g - p, u> u. Unbiased whatever the prediction p is, with the variance of g - p instead of g."""
    return _edited(estimator, predictor=predictor)


@dataclasses.dataclass(frozen=True)
class Noisy(Estimator):
    """What `with_noise` makes. Attributes: `sigma`, standard deviation of the noise."""

    sigma: float = 0.0

    def step(
        self, key: jax.Array, packed: Carry | Packed, batch: Mapping[str, Any], update: Update
    ) -> tuple[Carry | Packed, jax.Array, Info]:
        """As that of every estimator, with noise between estimate and update."""

        def noisy(block: str, grads: Any, opt_state: Any, params: Any) -> tuple[Any, Any]:
            own = jax.random.fold_in(jax.random.fold_in(key, zlib.crc32(b"noise")), zlib.crc32(block.encode()))
            leaves, tree = jax.tree.flatten(grads["layers"])
            keys = jax.random.split(own, len(leaves))
            leaves = [
                g + self.sigma * jax.random.normal(k, g.shape, g.dtype) for g, k in zip(leaves, keys, strict=True)
            ]
            return update(block, {**grads, "layers": jax.tree.unflatten(tree, leaves)}, opt_state, params)

        return super().step(key, packed, batch, noisy)


def with_noise(estimator: Estimator, sigma: float) -> Estimator:
    """ĝ + σ n, n ~ N(0, I) drawn for every step and every parameter of the layers: an estimate made worse, without bias, by a known amount.

    Of an exact gradient in D parameters the total variance is σ² D, isotropic; that of a forward gradient grows with the gradient itself. Readouts
    are left as they are, since methods that perturb have them exact. Runs by the whole executor: streaming would have equal blocks share their noise.
    Cost: a Gaussian per parameter.

    Raises:
      InputError: `sigma` is negative.
    """
    if sigma < 0:
        raise InputError(f"noise needs a standard deviation of at least 0, not {sigma}.")
    fields = {f.name: getattr(estimator, f.name) for f in dataclasses.fields(Estimator)}
    return Noisy(**{**fields, "executor": "whole"}, sigma=sigma)
