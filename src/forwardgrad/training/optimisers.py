"""Learning-rate schedules and optimisers, from optax."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import optax

from forwardgrad.network import Network
from forwardgrad.parts import Update
from forwardgrad.presets.experiment import Experiment


def schedule(experiment: Experiment, steps_per_epoch: int) -> optax.Schedule:
    """Learning rate of each step. T = epochs x steps per epoch, warm-up included.

    linear: lr (1 - t/T); cosine: lr (1 + cos(π t/T)) / 2; step: times 0.1 at T/2 and again at 0.8 T; exponential: lr decayᵉ in epoch e, from 0;
    each after a linear rise over the warm-up, with t, T and e counted from its end.
    """
    total = experiment.epochs * steps_per_epoch
    warmup = round(experiment.warmup_epochs * steps_per_epoch)
    rest = max(total - warmup, 1)
    lr = experiment.lr
    after = {
        "linear": optax.linear_schedule(lr, 0.0, rest),
        "cosine": optax.cosine_decay_schedule(lr, rest),
        "step": optax.piecewise_constant_schedule(lr, {rest // 2: 0.1, rest * 4 // 5: 0.1}),
        "exponential": optax.exponential_decay(lr, steps_per_epoch, experiment.decay, staircase=True),
        "constant": optax.constant_schedule(lr),
    }[experiment.schedule]
    return optax.join_schedules([optax.linear_schedule(0.0, lr, warmup), after], [warmup]) if warmup else after


def is_weight(leaf: str) -> bool:
    """Whether a leaf, by the path of its name, is a weight: neither a bias nor a gain."""
    return leaf.rpartition("/")[2] not in ("bias", "scale")


class Optimiser(NamedTuple):
    """One optimiser per block, so that a block can be updated before the next one is worked on.

    Attributes:
      init: `params -> opt_state`, both dicts by block.
      update: `(block, gradients, opt_state, params) -> (params, opt_state)`, all of one block.
    """

    init: Callable[[Mapping[str, Any]], dict[str, Any]]
    update: Update


def optimiser(experiment: Experiment, network: Network, steps_per_epoch: int) -> Optimiser:
    """The final classifier's factor, then coupled weight decay on weights (not biases or gains), then SGD with momentum or Adam.

    Momentum is v <- m v + g, w <- w - lr v.
    """
    rate = schedule(experiment, steps_per_epoch)
    base = optax.sgd(rate, experiment.momentum or None) if experiment.optimizer == "sgd" else optax.adam(rate)
    name_of = lambda path: jax.tree_util.keystr(path, simple=True, separator="/")
    weights = lambda params: jax.tree_util.tree_map_with_path(lambda path, _: is_weight(name_of(path)), params)
    plain = optax.chain(optax.add_decayed_weights(experiment.weight_decay, weights), base)
    readout = lambda params: {
        name: jax.tree.map(lambda _, name=name: name == "readout", x) for name, x in params.items()
    }
    classifier = optax.chain(optax.masked(optax.scale(experiment.classifier_lr), readout), plain)
    last = network.blocks[-1].name

    def update(block: str, grads: Any, opt_state: Any, params: Any) -> tuple[Any, Any]:
        updates, opt_state = (classifier if block == last else plain).update(grads, opt_state, params)
        return jax.tree.map(lambda p, u: p + u, params, updates), opt_state

    def init(params: Mapping[str, Any]) -> dict[str, Any]:
        return {name: (classifier if name == last else plain).init(own) for name, own in params.items()}

    return Optimiser(init, update)
