"""Forward gradients by weight and activity perturbation, of a global loss and of local ones (Ren et al. 2023)."""

from __future__ import annotations

from forwardgrad import insertions, rules, targets
from forwardgrad.engine import Estimator, estimator
from forwardgrad.errors import unknown
from forwardgrad.guesses.base import Guess
from forwardgrad.guesses.given import masked
from forwardgrad.guesses.random import rademacher
from forwardgrad.network import Network
from forwardgrad.recipes.base import recipe

CELLS = ("batch", "patch", "group")

# Which losses lg-fg-a has: the target, and what stays apart (Ren et al. 2023, Figure 6)
LOSSES = {
    "block+patch+group": (targets.local(), CELLS),
    "block+patch": (targets.local(), ("batch", "patch")),
    "block": (targets.local(), ("batch",)),
    "patch+group": (targets.last_local(), CELLS),
    "global": (targets.global_loss(), ("batch",)),
}


@recipe("baydin2022", passes=lambda draws: 1 + 2 * draws)
def fg_w(network: Network, *, guess: Guess | None = None, draws: int = 1) -> Estimator:
    """Forward gradient by weight perturbation: ĝ = <∇L, v> v, one direction v for all layers' weights and the whole batch (Baydin et al. 2022).

    Ren et al. 2023, Eq. 2. Readouts are exact. Unbiased for E[v vᵀ] = I. Total variance (D ± 1)|∇L|² / K with D the number of weights (+ Gaussian,
    - signs): it does not fall with N. Cost: 1 + K tangents of one pass. Memory: two activations and a direction as large as the weights.
    """
    return estimator(
        network,
        target=targets.global_loss(),
        guess=guess or rademacher(),
        insertion=insertions.weights(),
        draws=draws,
    )


@recipe("ren2023", "lecun1988", passes=lambda draws: 2 + draws)
def fg_a(
    network: Network, *, guess: Guess | None = None, draws: int = 1, mask: bool = False, released: bool = False
) -> Estimator:
    """Forward gradient by activity perturbation: ĝ(w) = Σₙ xₙ <∇zₙ Lₙ, uₙ> uₙ, an own direction for each example (Ren et al. 2023, Eq. 3).

    Each example is credited with its own loss. Unbiased for E[u uᵀ] = I on networks that keep examples apart. D is the number of units,
    smaller than the number of weights by the fan-in, and the variance falls as 1/N. Cost: K + 2 passes. Memory: all activations and directions.

    Args:
      mask: leave out units that their ReLU switches off (section 3.6); needs taps right below ReLUs.
      released: N times the estimate, which is what the authors' released code computes (it does not average over the batch here).
    """
    guess = guess or rademacher()
    return estimator(
        network,
        target=targets.global_loss(),
        guess=masked(guess) if mask else guess,
        insertion=insertions.activations(),
        partition=("batch",),
        rule=rules.unnormalised if released else rules.unbiased,
        draws=draws,
    )


@recipe("ren2023", passes=lambda draws: 1 + 2 * draws)
def lg_fg_w(network: Network, *, guess: Guess | None = None, draws: int = 1) -> Estimator:
    """Local greedy weight perturbation: each block, and in it each group of units, by its own loss (Ren et al. 2023, section 4).

    Weights with a group axis get their group's derivative, others the sum. Patches share weights and cannot be told apart. Unbiased for the
    greedy local gradient where that axis is named truly: a displaced weight's effect runs through the normalisation after its layer, which
    mixes groups after LocalMixer's ungrouped linear layer. The released code uses the group's derivative there too, a bias of 10 to 20 % of
    the gradient on small networks (LocalMixer's option `weights_by_group`). Cost as `fg-w`.
    """
    return estimator(
        network,
        target=targets.local(),
        guess=guess or rademacher(),
        insertion=insertions.weights(),
        partition=("group",),
        draws=draws,
    )


@recipe("ren2023", passes=lambda draws: 2 + draws)
def lg_fg_a(
    network: Network,
    *,
    guess: Guess | None = None,
    draws: int = 1,
    mask: bool = False,
    losses: str = "block+patch+group",
    norm_gradient: bool = True,
) -> Estimator:
    """Local greedy activity perturbation: each unit by the loss of its own block, example, patch and group (Ren et al. 2023, section 4).

    ĝ(w) = Σ x[n,p] Σ_g d[n,p,g] u[n,p,·], d the tangent of the loss cell that the unit feeds; g is summed for units that feed all groups.
    Unbiased for the greedy local gradient (`lg-bp`) where names hold, which is checked. D is the number of units of one cell. (With orthogonal
    draws a cell is what all of a block's taps share: on LocalMixer's later blocks example and patch, so that 3 C draws are exact.) Cost: K + 2
    passes. Memory: one block's activations and directions where blocks are streamed, else the network's.

    Args:
      mask: leave out units that their ReLU switches off (section 3.6).
      losses: where local losses are (Figure 6). `block+patch` and `block` add up what `block+patch+group` keeps apart: the same expectation, more
        variance. `global` is the final loss, `fg-a`. `patch+group` has the last block's losses alone, no cut between blocks, and every unit of
        any block credited with its own patch's and group's: biased, because token mixing carries it to the others too; refused without
        `allow_bias`. All on the scale of the mean loss; the released code divides by the number of patches where patches are not apart.
      norm_gradient: False hands the credit of what a normalisation gives to the linear layer below it unchanged, leaving out the Jacobian of
        the normalisation (Table 5, columns "NG"). Biased, refused without `allow_bias`; the same where nothing is normalised after the linear
        layers.

    Raises:
      InputError: unknown `losses`.
    """
    guess = guess or rademacher()
    if losses not in LOSSES:
        raise unknown("choice of losses", losses, LOSSES)
    target, partition = LOSSES[losses]
    return estimator(
        network,
        target=target,
        guess=masked(guess) if mask else guess,
        insertion=insertions.activations(credit_at=None if norm_gradient else insertions.linear_output),
        partition=partition,
        draws=draws,
    )
