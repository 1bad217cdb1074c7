"""Wrappers: `Estimator -> Estimator`, editing every part."""

from __future__ import annotations

import dataclasses

from forwardgrad.engine import Estimator
from forwardgrad.guesses.base import Guess
from forwardgrad.guesses.given import masked
from forwardgrad.guesses.random import orthogonal
from forwardgrad.parts import Part


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
    """`draws` orthogonal directions per step; exact with as many as a cell has displaced units (see `orthogonal`)."""
    return with_draws(with_guess(estimator, orthogonal()), draws)


def with_predictor(estimator: Estimator, predictor: Guess) -> Estimator:
    """A control variate: ĝ = p + <g - p, u> u. Unbiased whatever the prediction p is, with the variance of g - p instead of g."""
    return _edited(estimator, predictor=predictor)
