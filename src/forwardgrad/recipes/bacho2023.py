"""Direct feedback whose matrices are learned, and what it brings to forward gradients (Bacho & Chu 2023)."""

from __future__ import annotations

from forwardgrad import descent, insertions, rules, targets
from forwardgrad.engine import Estimator, Part
from forwardgrad.errors import InputError
from forwardgrad.guesses import feedback
from forwardgrad.guesses.base import Guess
from forwardgrad.guesses.given import masked
from forwardgrad.guesses.random import gaussian, rademacher
from forwardgrad.network import Network
from forwardgrad.recipes.base import recipe


def _optimiser(known: dict[str, descent.Optimiser], rule: str) -> descent.Optimiser:
    if rule not in known:
        raise InputError(
            f"feedback rule {rule!r} is not one of this method's, which are {' and '.join(known)}: choose one of them (--feedback-rule)."
        )
    return known[rule]


def _forward_rule(rule: str, feedback_lr: float, alpha: float) -> descent.Optimiser:
    return _optimiser({"adam": descent.adam(feedback_lr), "average": descent.sgd(alpha)}, rule)


@recipe("webster2021", "bacho2023", passes=lambda draws: 2)
def dkp(
    network: Network,
    *,
    rule: str = "adam",
    feedback_lr: float = 1e-4,
    feedback_decay: float = 0.0,
    feedback_rank: int = 0,
    mask: bool = True,
) -> Estimator:
    """Direct Kolen-Pollack: `dfa` whose matrices learn like output weights, B_l along eᵀ y_l, y_l the layer's output (Webster et al. 2021).

    From B = 0, so that hidden layers first move in the second step. The weights move by e B with the B before its update. Biased, with less bias the
    better B aligns; the last hidden layer's B tends to the output weights where both move by one rule at one rate and decay alike (the presets'
    rate of the weights falls, that of B does not). Cost: as `dfa`, and one more such product per layer. Memory: as `dfa`, with Adam three times
    its matrices.

    Args:
      rule: what moves B: `adam` (0.9, 0.999, 1e-8), with which Bacho & Chu (2023) measured it, or `sgd`.
      feedback_lr: its learning rate, which stays as it is while that of the weights falls.
      feedback_decay: this times B is added to B's gradient; 1e-6 is what the code released with Bacho & Chu (2023) recommends.
      feedback_rank: B = Q P of this rank; 0: B whole. See `feedback.kolen_pollack`.
      mask: for taps before ReLUs, as in `dfa`; y is then the ReLU's output. False for taps after.

    Raises:
      InputError: unknown `rule`.
    """
    optimiser = _optimiser({"adam": descent.adam(feedback_lr), "sgd": descent.sgd(feedback_lr)}, rule)
    predictor = feedback.kolen_pollack(optimiser, decay=feedback_decay, mask=mask, rank=feedback_rank or None)
    part = Part(None, insertions.activations(), ("batch",), rules.prediction_only, predictor)
    return Estimator(network, targets.global_loss(), (part,))


@recipe("bacho2023", passes=lambda draws: 2 + draws)
def fdfa(
    network: Network,
    *,
    guess: Guess | None = None,
    draws: int = 1,
    rule: str = "adam",
    feedback_lr: float = 1e-4,
    alpha: float = 1e-3,
    feedback_rank: int = 0,
    mask: bool = True,
) -> Estimator:
    """Forward direct feedback alignment: `dfa` whose matrices are learned by forward gradients (Bacho & Chu 2023).

    One tangent pass with directions u at all layers gives the tangent d of the outputs; B_l moves along B_l - mean_b d ⊗ u_l, from B = 0.
    E[d ⊗ u_l] is the mean Jacobian of the outputs. The weights move by e B with the B before the update, so that hidden layers first move in the
    second step. Biased, with less bias the better B is. Algorithm 1 updates B first. Cost: as `dfa`, K passes and one more product
    [N K, classes, units] per layer. Memory: as `dfa`, with Adam three times its matrices, and all directions.

    Args:
      rule: what moves B. `adam` (0.9, 0.999, 1e-8) is what the paper's experiments use; `average` is its Eq. 8, B <- (1 - α) B + α d ⊗ u (with the
        plus sign of Eqs. 8 to 10: Algorithm 1, line 22 has it wrong).
      feedback_lr: Adam's learning rate, which stays as it is while that of the weights falls.
      alpha: rate of the moving average.
      feedback_rank: B = Q P of this rank; 0: B whole. See `feedback.learned_feedback`.
      mask: for taps before ReLUs, as in `dfa`; see `feedback.learned_feedback` for what B then is.

    Raises:
      InputError: unknown `rule`.
    """
    learned = feedback.learned_feedback(_forward_rule(rule, feedback_lr, alpha), mask=mask, rank=feedback_rank or None)
    part = Part(guess or gaussian(), insertions.activations(), ("batch",), rules.prediction_only, learned, draws)
    return Estimator(network, targets.global_loss(), (part,))


@recipe("bacho2023", "ren2023", passes=lambda draws: 2 + draws)
def fg_a_fdfa(
    network: Network,
    *,
    guess: Guess | None = None,
    draws: int = 1,
    rule: str = "adam",
    feedback_lr: float = 1e-4,
    alpha: float = 1e-3,
    feedback_rank: int = 0,
    mask: bool = False,
) -> Estimator:
    """`fg-a` with the feedback of `fdfa` as a control variate: ĝ = e B + <∇ - e B, u> u, unbiased whatever B is, where `fg-a` is.

    The bias of `fdfa` is measured along the very directions that B learns from, and put right. An example's credits have the total variance
    (D ± 1)|∇ - e B|² / K (+ Gaussian, - signs) in place of the (D ± 1)|∇|² / K of `fg-a`, D the number of units: less as soon as e B is nearer
    to the gradient than zero is. The B used is the one before the step's update, independent of the step's directions, which is what
    unbiasedness needs. Cost: K + 2 passes. Memory: as `fdfa`.

    Args:
      rule, feedback_lr, alpha, feedback_rank: as in `fdfa`.
      mask: leave out units that their ReLU switches off, in directions and feedback; needs taps right below ReLUs.

    Raises:
      InputError: unknown `rule`.
    """
    guess = guess or rademacher()
    learned = feedback.learned_feedback(_forward_rule(rule, feedback_lr, alpha), mask=mask, rank=feedback_rank or None)
    directions = masked(guess) if mask else guess
    part = Part(directions, insertions.activations(), ("batch",), rules.unbiased, learned, draws)
    return Estimator(network, targets.global_loss(), (part,))
