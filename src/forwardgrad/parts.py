"""A part of an estimator, and what an estimate is."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from forwardgrad import probes, rules
from forwardgrad.errors import InputError
from forwardgrad.guesses.base import Guess
from forwardgrad.insertions import Insertion
from forwardgrad.named import Named


@dataclasses.dataclass(frozen=True)
class Part:
    """One tangent: its own guess, sites, partition, rule, predictor, draws and probe.

    `guess=None` displaces nothing in the push: the predictor alone is the credit of the insertion's sites.
    """

    guess: Guess | None
    insertion: Insertion
    partition: tuple[str, ...] = ()
    rule: rules.Rule = rules.unbiased
    predictor: Guess | None = None
    draws: int = 1
    probe: probes.Probe = probes.jvp

    def __post_init__(self) -> None:
        if self.draws < 1:
            raise InputError(f"an estimate needs at least one draw, not {self.draws}.")
        if self.guess is not None and not self.guess.isotropic and self.rule.name in ("unbiased", "unnormalised"):
            raise InputError(
                f"the {self.rule.name} rule needs random directions, and {self.guess.name} is a guided guess: use the projection or the sign "
                "rule, or make it the predictor of a random guess."
            )


class Info(NamedTuple):
    """What a reader may want: the loss of each block that has one in the target, and the last of their outputs (before the update)."""

    losses: dict[str, jax.Array]
    outputs: Named


class Carry(NamedTuple):
    """All that a training step reads and changes: dicts by block, and the estimator's state."""

    params: Any
    model_state: Any
    opt_state: Any
    state: tuple[Any, ...]


Update = Callable[[str, Any, Any, Any], tuple[Any, Any]]
"""`(block, gradients, opt_state, params) -> (params, opt_state)`, all of one block. Blocks of equal code share one call, with the first's name."""


def learn(parts: tuple[Part, ...], state: tuple[Any, ...], statistics: tuple[Any, ...]) -> tuple[Any, ...]:
    """Each guess's update from what it observed, once per step."""
    out = []
    for part, part_state, observed in zip(parts, state, statistics, strict=True):
        new = {scope: dict(roles) for scope, roles in part_state.items()}
        for scope, roles in observed.items():
            for role, seen in roles.items():
                guess = part.guess if role == "guess" else part.predictor
                assert guess is not None
                new[scope][role] = guess.update(part_state[scope][role], seen)
        out.append(new)
    return tuple(out)


class Estimate(NamedTuple):
    """`loss`: the target's, a mean over the batch. `grads`: like the parameters; unbiased means equal to `jax.grad(loss)` in expectation."""

    loss: jax.Array
    grads: Any
    info: Info
