"""The engine: an estimator answers target, guess, insertion, partition and rule; `whole.py` carries the answer out on one batch."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from forwardgrad import probes, rules
from forwardgrad.errors import InputError
from forwardgrad.guesses.base import Guess
from forwardgrad.insertions import Insertion
from forwardgrad.named import Named
from forwardgrad.network import Network, complete
from forwardgrad.parts import Estimate as Estimate
from forwardgrad.parts import Info as Info
from forwardgrad.parts import Part as Part
from forwardgrad.targets import Target
from forwardgrad.whole import Step


@dataclasses.dataclass(frozen=True)
class Estimator:
    """A gradient estimator for one network. Data: edit it with `dataclasses.replace`, or with `forwardgrad.wrappers`.

    Attributes:
      network, target: what is differentiated.
      parts: disjoint sets of sites, each with its own tangent. None at all: the exact gradient of the target (backpropagation).
      allow_bias: run although a check says that the expected estimate is not the gradient.
      name: for messages.
      microbatch: examples that are worked on at a time; `None` is the whole batch. Any divisor of the batch size gives the same result;
        estimators of which that is not true are refused.
    """

    network: Network
    target: Target
    parts: tuple[Part, ...] = ()
    allow_bias: bool = False
    name: str = "estimator"
    microbatch: int | None = None

    def __post_init__(self) -> None:
        for part in self.parts:
            if not part.probe.exact and (self.target.cuts(self.network) or not set(part.partition) <= {"batch"}):
                raise InputError(
                    f"a {part.probe.name} crosses the cuts between blocks, patches and groups: use the jvp probe, or a global loss with at most "
                    "the batch as partition."
                )

    def init(self, key: jax.Array, params: Any, model_state: Any, batch: Mapping[str, Any]) -> tuple[Any, ...]:
        """The estimator's state. Checks the estimator on the first four examples of `batch`, where values are at hand.

        Raises:
          InputError: a combination whose estimate would be silently biased, or that this network cannot serve.
        """
        self.check(params, model_state, batch)
        return jax.jit(self.initial_state)(key, params, model_state, batch)

    def check(self, params: Any, model_state: Any, batch: Mapping[str, Any]) -> None:
        """Refuse what `init` refuses. Needs values: not to be called under `jit`."""
        from forwardgrad import checks

        if self.microbatch is not None:
            checks.refuse_microbatches(self, params, model_state, batch)
        if not self.allow_bias:
            checks.refuse_bias(self, params, model_state, batch)

    def initial_state(self, key: jax.Array, params: Any, model_state: Any, batch: Mapping[str, Any]) -> tuple[Any, ...]:
        """The state that `init` returns, without its checks."""
        step = Step(self.network, self.target, params, model_state, complete(batch))
        out = []
        for number, part in enumerate(self.parts):
            state = {}
            for scope, view in step.views(part).items():
                own = jax.random.fold_in(jax.random.fold_in(key, number), scope.blocks[0])
                state[scope.name] = {
                    role: guess.init(jax.random.fold_in(own, i), view)
                    for i, (role, guess) in enumerate((("guess", part.guess), ("predictor", part.predictor)))
                    if guess is not None
                }
            out.append(state)
        return tuple(out)

    def estimate(
        self, key: jax.Array, state: tuple[Any, ...], params: Any, model_state: Any, batch: Mapping[str, Any]
    ) -> tuple[Estimate, tuple[Any, ...], Any]:
        """Estimate the gradient on one batch.

        Args:
          key: of this step; the same key gives the same result.
          state: from `init` or the step before.
          params, model_state: as `network.init` returns them.
          batch: `inputs`, `labels`, and optionally `weight` (1/N; 0 for padding) and `index` (global example numbers).

        Returns:
          `(Estimate, state, model_state)`.
        """
        batch = complete(batch)
        if self.microbatch is None:
            estimate, statistics, model_state = self._measure(key, state, params, model_state, batch)
        else:
            estimate, statistics = self._measure_in_pieces(key, state, params, model_state, batch, self.microbatch)
        return estimate, self._learn(state, statistics), model_state

    def _measure(
        self, key: jax.Array, state: tuple[Any, ...], params: Any, model_state: Any, batch: Mapping[str, Any]
    ) -> tuple[Estimate, tuple[Any, ...], Any]:
        """The estimate on some examples, and the statistics that guesses learn from. Both sum over disjoint sets of examples."""
        step = Step(self.network, self.target, params, model_state, batch)
        credits: dict[str, Named] = {}
        statistics = []
        for number, (part, part_state) in enumerate(zip(self.parts, state, strict=True)):
            got, observed = step.run_part(part, jax.random.fold_in(key, number), part_state)
            twice = sorted(set(got) & set(credits))
            if twice:
                raise InputError(f"two parts estimate {', '.join(twice)}: give each site to one part (only=...).")
            credits.update(got)
            statistics.append(observed)
        estimate, model_state = step.pull(credits)
        return estimate, tuple(statistics), model_state

    def _measure_in_pieces(
        self, key: jax.Array, state: tuple[Any, ...], params: Any, model_state: Any, batch: Mapping[str, Any], size: int
    ) -> tuple[Estimate, tuple[Any, ...]]:
        """The same by a scan over microbatches: noise is keyed by the global example index, losses carry the weight of the whole batch."""
        n = len(batch["weight"])
        if size < 1 or n % size:
            raise InputError(f"microbatches of {size} do not divide a batch of {n}: choose a divisor.")

        def measure(piece: Mapping[str, Any]) -> tuple[Any, Named]:
            estimate, statistics, _ = self._measure(key, state, params, model_state, piece)
            sums = (estimate.loss, estimate.grads, estimate.info.losses, statistics)
            return sums, estimate.info.outputs

        pieces = jax.tree.map(lambda x: x.reshape(n // size, size, *x.shape[1:]), dict(batch))
        zeros = jax.tree.map(
            lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(measure, jax.tree.map(lambda x: x[0], pieces))[0]
        )

        def add(sums: Any, piece: Mapping[str, Any]) -> tuple[Any, Named]:
            more, outputs = measure(piece)
            return jax.tree.map(jnp.add, sums, more), outputs

        (loss, grads, losses, statistics), outputs = jax.lax.scan(add, zeros, pieces)
        outputs = Named(outputs.value.reshape(n, *outputs.value.shape[2:]), outputs.axes)  # "batch" is first
        return Estimate(loss, grads, Info(losses, outputs)), statistics

    def _learn(self, state: tuple[Any, ...], statistics: tuple[Any, ...]) -> tuple[Any, ...]:
        """Each guess's update, once per step."""
        out = []
        for part, part_state, observed in zip(self.parts, state, statistics, strict=True):
            new = {scope: dict(roles) for scope, roles in part_state.items()}
            for scope, roles in observed.items():
                for role, seen in roles.items():
                    guess = part.guess if role == "guess" else part.predictor
                    assert guess is not None
                    new[scope][role] = guess.update(part_state[scope][role], seen)
            out.append(new)
        return tuple(out)


def estimator(
    network: Network,
    *,
    target: Target,
    guess: Guess | None,
    insertion: Insertion,
    partition: tuple[str, ...] = (),
    rule: rules.Rule = rules.unbiased,
    predictor: Guess | None = None,
    draws: int = 1,
    probe: probes.Probe = probes.jvp,
    allow_bias: bool = False,
    name: str = "estimator",
) -> Estimator:
    """An estimator of one part: one answer to each of the five questions. See the arguments' own docstrings.

    Example:
      >>> import jax, jax.numpy as jnp, forwardgrad as fg
      >>> from forwardgrad.models.mlp import MLP
      >>> network = MLP(hidden=(16, 16)).network((4, 1, 1), classes=3)
      >>> method = fg.estimator(network, target=fg.local(), guess=fg.rademacher(), insertion=fg.activations(), partition=("batch",))
      >>> params, model_state = network.init(jax.random.key(0))
      >>> batch = {"inputs": jnp.ones((8, 4, 1, 1)), "labels": jnp.zeros(8, int)}
      >>> state = method.init(jax.random.key(1), params, model_state, batch)
      >>> estimate, state, model_state = jax.jit(method.estimate)(jax.random.key(2), state, params, model_state, batch)
      >>> jax.tree.structure(estimate.grads) == jax.tree.structure(params)
      True
    """
    part = Part(guess, insertion, tuple(partition), rule, predictor, draws, probe)
    return Estimator(network, target, (part,), allow_bias, name)
