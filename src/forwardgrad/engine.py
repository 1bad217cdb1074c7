"""The engine: an estimator answers target, guess, insertion, partition and rule; `whole.py` or `streaming.py` carries the answer out."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp

from forwardgrad import probes, rules, streaming
from forwardgrad.errors import InputError
from forwardgrad.guesses.base import Guess
from forwardgrad.insertions import Insertion
from forwardgrad.network import Network, complete
from forwardgrad.parts import Carry, Update, learn
from forwardgrad.parts import Estimate as Estimate
from forwardgrad.parts import Info as Info
from forwardgrad.parts import Part as Part
from forwardgrad.pieces import in_pieces
from forwardgrad.targets import Target
from forwardgrad.whole import Step, measure


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
      executor: "whole" runs the network as one function, "streamed" one block at a time, so that memory does not grow with depth, with the same
        result. "auto" streams where it costs nothing: greedy targets, weights, and activations under a global loss beyond 8 blocks, where it
        costs one more forward pass.
    """

    network: Network
    target: Target
    parts: tuple[Part, ...] = ()
    allow_bias: bool = False
    name: str = "estimator"
    microbatch: int | None = None
    executor: Literal["auto", "whole", "streamed"] = "auto"

    def __post_init__(self) -> None:
        if self.executor not in ("auto", "whole", "streamed"):
            raise InputError(f"executor {self.executor!r} does not exist: use auto, whole or streamed.")
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

        self.streams(params, model_state, batch)
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
                    role: guess.init(jax.random.fold_in(own, i), seen)
                    for i, (role, guess, seen) in enumerate(
                        (("guess", part.guess, view), ("predictor", part.predictor, step.predicted(part, view)))
                    )
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
        # the gradients are what an update would be given
        gradients = lambda block, grads, opt_state, params: (params, grads)
        carry = Carry(params, model_state, jax.tree.map(jnp.zeros_like, params), state)
        packed, loss, info = self.step(key, self.pack(carry, batch), batch, gradients)
        carry = self.unpack(packed, state)
        return Estimate(loss, carry.opt_state, info), carry.state, carry.model_state

    def streams(self, params: Any, model_state: Any, batch: Mapping[str, Any]) -> bool:
        """Whether the streamed executor is used. Only shapes are looked at.

        Raises:
          InputError: it is asked for and cannot be used.
        """
        if self.executor == "whole":
            return False
        why = streaming.why_not(self, params, model_state, batch)
        if self.executor == "streamed" and why:
            raise InputError(
                f"{self.name} cannot be streamed, because {why}: use the whole executor (--executor whole)."
            )
        activations = any(part.insertion.taps is not None for part in self.parts)
        costs = activations and not streaming.is_greedy(self) and len(self.network.blocks) <= 8
        return not why and (self.executor == "streamed" or not costs)

    def pack(self, carry: Carry, batch: Mapping[str, Any]) -> Carry | streaming.Packed:
        """The form in which `step` wants what it changes; `batch` for its shapes. Pack once, then take many steps."""
        packs = self.streams(carry.params, carry.model_state, batch)
        packs = packs or (self.executor == "auto" and streaming.is_looped(self))
        return streaming.pack(self, carry, batch) if packs else carry

    def unpack(self, packed: Carry | streaming.Packed, state: tuple[Any, ...]) -> Carry:
        """The inverse of `pack`; `state` is the estimator's state before."""
        return streaming.unpack(self, packed, state) if isinstance(packed, streaming.Packed) else packed

    def step(
        self, key: jax.Array, packed: Carry | streaming.Packed, batch: Mapping[str, Any], update: Update
    ) -> tuple[Carry | streaming.Packed, jax.Array, Info]:
        """Estimate the gradient on one batch and update every block with it.

        Args:
          key: of this step.
          packed: from `pack` or the step before.
          batch: as for `estimate`.
          update: `(block, gradients, opt_state, params) -> (params, opt_state)`, for one block at a time.

        Returns:
          What the next step takes, the target's loss, and `Info`.
        """
        batch = complete(batch)
        if isinstance(packed, streaming.Packed):
            return streaming.step(self, key, packed, batch, self.microbatch, update)
        params, model_state, opt_state, state = packed

        def some(batch: Mapping[str, Any]) -> tuple[Any, Any]:
            m = measure(self, key, state, params, model_state, batch)
            return (m.estimate.loss, m.estimate.grads, m.estimate.info.losses, m.statistics, m.model_state), (
                m.estimate.info.outputs
            )

        (loss, grads, losses, statistics, model_state), outputs = in_pieces(some, batch, self.microbatch)
        updated = {name: update(name, grads[name], opt_state[name], params[name]) for name in params}
        params, opt_state = ({name: both[i] for name, both in updated.items()} for i in (0, 1))
        return Carry(params, model_state, opt_state, learn(self.parts, state, statistics)), loss, Info(losses, outputs)


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
