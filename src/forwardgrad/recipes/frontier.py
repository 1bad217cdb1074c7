"""Beyond the papers: local greedy activity perturbation with less noise wherever that needs no longer way back."""

from __future__ import annotations

from collections.abc import Callable

import jax

from forwardgrad import descent, insertions, targets
from forwardgrad.engine import Estimator, Part
from forwardgrad.errors import InputError, unknown
from forwardgrad.guesses import feedback
from forwardgrad.guesses.base import Guess
from forwardgrad.guesses.fitted_feedback import (
    fitted_feedback,
    normalise_relu_and_normalise,
    relu_and_normalise,
)
from forwardgrad.guesses.given import masked
from forwardgrad.guesses.local import local_gradient
from forwardgrad.guesses.ntk import ntk
from forwardgrad.guesses.random import rademacher
from forwardgrad.guesses.weight_mirror import weight_mirror
from forwardgrad.network import Network, leaf_paths
from forwardgrad.recipes.base import recipe
from forwardgrad.recipes.ren2023 import CELLS

PREDICTORS: dict[str, Callable[[float], Guess | None]] = {
    "fitted": lambda rate: fitted_feedback(rate, through=relu_and_normalise),
    "average": lambda rate: feedback.learned_feedback(descent.sgd(rate), mask=True),
    "random": lambda rate: feedback.direct_feedback(mask=True),
    "local": lambda rate: local_gradient(),
    "ntk": lambda rate: ntk(),
    "mirror": lambda rate: weight_mirror(),
    "none": lambda rate: None,
}
"""From the rate of those that learn to the predictor of a block's taps."""


@recipe("ren2023", "bacho2023", passes=lambda draws: 2 + 2 * draws)
def lg_fg_a_plus(
    network: Network,
    *,
    guess: Guess | None = None,
    draws: int = 1,
    mask: bool = True,
    perturbed: str = "hidden",
    predictor: str = "fitted",
    predictor_rate: float = 0.4,
    token_by: str = "fewest",
) -> Estimator:
    """`lg-fg-a` with three sources of its noise taken away, and no way back through more than one linear layer.

    ĝ = p + <∇ - p, u> u for every unit of the loss cell that it feeds, unbiased for the greedy local gradient (`lg-bp`) where `lg-fg-a` is:

    - *hidden taps*: the tap right below each local loss is not displaced. Its layer gets its exact gradient, one hop through the head's
      weights, and its units add no noise to the scalar of all others.
    - *a predictor* p: the error through feedback matrices that are fitted to the tangents (`fitted_feedback` of `guesses.fitted_feedback`, through
      LocalMixer's ReLU and normalisations), of token weights at the linear output where they arrive. The variance is that of ∇ - p in place of ∇.
    - *token mixing in a tangent of its own, by whichever is fewer*: the column of P weights and a bias that makes an output patch, a direction
      per example, or the activities that share the column: C features, about C/2 where those that are off are left out. In one tangent tokens
      and channels drown in each other's noise, the channel layers most of all where the tokens' weights are displaced.

    Total variance of a cell's credits: (D ± 1)|∇ - p|² / K for the D hidden units of a block's channel layer, (P + 1 ± 1)|∇ - p|² / K for a column
    of token weights. Cost: 1 forward pass, K tangents, K more where there is token mixing, and the pullback of each layer. Memory: as `lg-fg-a`,
    the feedback's matrices, a direction and a prediction of token weights per example; with `together` a prediction for token activities has their
    size times the groups.

    With `perturbed="all"`, `predictor="none"`, `token_by="together"` this is `lg-fg-a` with its mask. On networks with skips past a tap,
    which LocalMixer does not have, `hidden` leaves fewer taps out (see `insertions.Hidden`).

    Args:
      mask: leave out units that their ReLU switches off (Ren et al. 2023, section 3.6).
      perturbed: `hidden` or `all` taps.
      predictor: `fitted`; `average`, FDFA's moving average of Bacho & Chu (2023), times the ReLU's derivative; `random` feedback; `local` or
        `ntk`, the gradient of the block's own loss or of one through a random readout (Fournier et al. 2023), and `mirror`, a way back through
        weights learned from the tangents: these three go back through the whole block; `none`. Token weights are predicted by `fitted` alone.
      predictor_rate: of `fitted` and `average`, which wants less: 0.02 was its best on held-out images (docs/frontier.md).
      token_by: `weights`, `activities` or `fewest` of the two, in a tangent of their own; `together`: activities, in the tangent of all others.
        Networks without weights of a layer called "token" are the same with all.

    Raises:
      InputError: unknown `perturbed`, `predictor` or `token_by`; an average with a rate above one; (when used) `fitted`, and token weights from
        which a way leads past all taps.
    """
    for name, value, known in (
        ("choice of perturbed taps", perturbed, ("hidden", "all")),
        ("predictor", predictor, PREDICTORS),
        ("token_by", token_by, ("fewest", "weights", "activities", "together")),
    ):
        if value not in known:
            raise unknown(name, value, known)
    if predictor == "average" and predictor_rate > 1:
        raise InputError(f"a moving average has a rate of at most 1, not {predictor_rate}: set --predictor-rate.")
    guess = guess or rademacher()
    tokens = _token_weights(network)
    but = ("token",) if tokens and token_by != "together" else ()
    only = insertions.Hidden(but) if perturbed == "hidden" else (lambda name: name not in but)
    directions = masked(guess) if mask else guess
    predicted = PREDICTORS[predictor](predictor_rate)
    parts = (Part(directions, insertions.activations(only), CELLS, predictor=predicted, draws=draws),)
    if but and (token_by == "weights" or (token_by == "fewest" and _fewer_weights(network, mask))):
        noise = {leaf: ("batch", *axes) for leaf, axes in tokens.items()}
        back = fitted_feedback(predictor_rate, through=normalise_relu_and_normalise) if predictor == "fitted" else None
        parts += (Part(guess, insertions.weights(list(tokens), noise=noise), CELLS, predictor=back, draws=draws),)
    elif but:
        parts += (Part(directions, insertions.activations("token"), CELLS, predictor=predicted, draws=draws),)
    return Estimator(network, targets.local(), parts)


def _token_weights(network: Network) -> dict[str, tuple[str, ...]]:
    """`{leaf: axes}` of the weights of token mixing, one block for all: they have the same axes everywhere."""
    named = (block.weights or {} for block in network.blocks)
    return {leaf: axes for weights in named for leaf, axes in weights.items() if leaf.startswith("token/")}


def _fewer_weights(network: Network, mask: bool) -> bool:
    """Whether the weights that make an output patch, with its bias, are fewer than the features that share them and are displaced."""
    params = jax.eval_shape(lambda key: network.init(key)[0], jax.random.key(0))
    for leaves in (leaf_paths(params[block.name]["layers"]) for block in network.blocks):
        if {"token/kernel", "channel/kernel"} <= set(leaves):
            weights, features = leaves["token/kernel"].shape[0] + 1, leaves["channel/kernel"].shape[0]
            return weights < (features / 2 if mask else features)
    return False
