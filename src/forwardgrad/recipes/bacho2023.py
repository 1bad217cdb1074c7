"""Direct feedback whose matrices are learned (Bacho & Chu 2023)."""

from __future__ import annotations

from forwardgrad import insertions, rules, targets
from forwardgrad.engine import Estimator, Part
from forwardgrad.guesses import feedback
from forwardgrad.guesses.base import Guess
from forwardgrad.guesses.random import gaussian
from forwardgrad.network import Network
from forwardgrad.recipes.base import recipe


@recipe("bacho2023", passes=lambda draws: 2 + draws)
def fdfa(
    network: Network, *, guess: Guess | None = None, alpha: float = 1e-3, draws: int = 1, mask: bool = True
) -> Estimator:
    """Forward direct feedback alignment: `dfa` whose matrices are learned by forward gradients (Bacho & Chu 2023).

    One tangent pass with directions u at all layers gives the tangent d of the outputs; B_l <- (1 - α) B_l + α mean_b d (x) u_l (Eq. 8, with
    the plus sign of Eqs. 8-10: Algorithm 1, line 22 has it wrong), from B = 0. E[d (x) u_l] is the mean Jacobian of the outputs. The weights
    move by e B with the B before the update. Biased, with less bias the better B is. Cost: K + 2 passes. Memory: as `dfa`.

    Args:
      alpha: rate of the moving average.
      mask: for taps before ReLUs, as in `dfa`; see `feedback.learned_feedback` for what B then is.
    """
    part = Part(
        guess or gaussian(),
        insertions.activations(),
        ("batch",),
        rules.prediction_only,
        feedback.learned_feedback(alpha, mask=mask),
        draws,
    )
    return Estimator(network, targets.global_loss(), (part,))
