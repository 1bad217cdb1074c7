"""Beyond the papers: local greedy activity perturbation with less noise wherever that needs no longer way back."""

from __future__ import annotations

from collections.abc import Callable

from forwardgrad import descent, insertions, targets
from forwardgrad.engine import Estimator, Part
from forwardgrad.errors import unknown
from forwardgrad.guesses import feedback
from forwardgrad.guesses.base import Guess
from forwardgrad.guesses.fitted_feedback import fitted_feedback
from forwardgrad.guesses.given import masked
from forwardgrad.guesses.local import local_gradient
from forwardgrad.guesses.ntk import ntk
from forwardgrad.guesses.random import rademacher
from forwardgrad.guesses.weight_mirror import weight_mirror
from forwardgrad.network import Network
from forwardgrad.recipes.base import recipe
from forwardgrad.recipes.ren2023 import CELLS

PREDICTORS: dict[str, Callable[[float], Guess | None]] = {
    "fitted": fitted_feedback,
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
    predictor_rate: float = 0.2,
    token_by: str = "weights",
) -> Estimator:
    """`lg-fg-a` with three sources of its noise taken away, and no way back through more than one linear layer.

    ĝ = p + <∇ - p, u> u for every unit of the loss cell that it feeds, unbiased for the greedy local gradient (`lg-bp`) where `lg-fg-a` is:

    - *hidden taps*: the tap right below each local loss is not displaced. Its layer gets its exact gradient, one hop through the head's
      weights, and its units add no noise to the scalar of all others.
    - *a predictor* p: the error through feedback matrices that are fitted to the tangents (`guesses.fitted_feedback`). The variance is that of
      ∇ - p in place of ∇.
    - *token mixing by its weights*, in a tangent of its own: a direction per example and output patch. A column of P weights that all C features
      share has P + 1 dimensions where their activities have C. Displaced in one tangent, tokens and channels would drown in each other's noise.

    Total variance of a cell's credits: (D ± 1)|∇ - p|² / K for the D hidden units of a block's channel layer, (P + 1 ± 1)|∇|² / K for a column of
    token weights. Cost: 1 forward pass, 2 K tangents and the pullback of each layer; with token mixing by activities one tangent per draw. Memory: as
    `lg-fg-a`, the feedback's matrices, and a direction of token weights per example.

    With `perturbed="all"`, `predictor="none"`, `token_by="activities"` this is `lg-fg-a`.

    Args:
      mask: leave out units that their ReLU switches off (Ren et al. 2023, section 3.6).
      perturbed: `hidden` or `all` taps.
      predictor: `fitted`; `average`, FDFA's moving average of Bacho & Chu (2023), times the ReLU's derivative; `random` feedback; `local` or
        `ntk`, the gradient of the block's own loss or of one through a random readout (Fournier et al. 2023), and `mirror`, a way back through
        weights learned from the tangents: these three go back through the whole block; `none`.
      predictor_rate: of `fitted` and `average`.
      token_by: `weights` or `activities`. Networks without a layer called "token" are the same with both.

    Raises:
      InputError: unknown `perturbed`, `predictor` or `token_by`.
    """
    for name, value, known in (
        ("choice of perturbed taps", perturbed, ("hidden", "all")),
        ("predictor", predictor, PREDICTORS),
        ("token_by", token_by, ("weights", "activities")),
    ):
        if value not in known:
            raise unknown(name, value, known)
    guess = guess or rademacher()
    leaves = {
        leaf: axes
        for block in network.blocks
        for leaf, axes in (block.weights or {}).items()
        if token_by == "weights" and leaf.startswith("token/")
    }
    but = ("token",) if leaves else ()
    only = insertions.Hidden(but) if perturbed == "hidden" else (lambda name: name not in but)
    directions = masked(guess) if mask else guess
    predicted = PREDICTORS[predictor](predictor_rate)
    parts = (Part(directions, insertions.activations(only), CELLS, predictor=predicted, draws=draws),)
    if leaves:
        noise = {leaf: ("batch", *axes) for leaf, axes in leaves.items()}
        parts += (Part(guess, insertions.weights(list(leaves), noise=noise), CELLS, draws=draws),)
    return Estimator(network, targets.local(), parts)
