"""Every published method in a few lines: each is a point of the grid.

A recipe takes a network and returns an `Estimator`. On the command line `lg_fg_a` is called `lg-fg-a`. In every recipe the last readout and the
local heads get their exact gradient, one layer deep. D is the number of displaced units that share a scalar, K the number of draws, N the batch size,
"pass" one forward pass. Estimates are on the scale of the mean loss over the batch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from forwardgrad import insertions, probes, rules, targets
from forwardgrad.engine import Estimator, Part, estimator
from forwardgrad.errors import unknown
from forwardgrad.guesses import feedback
from forwardgrad.guesses.base import Guess
from forwardgrad.guesses.given import masked
from forwardgrad.guesses.layer_readout import layer_readout
from forwardgrad.guesses.random import gaussian, rademacher
from forwardgrad.guesses.replay import feedback_alignment
from forwardgrad.network import Network

CELLS = ("batch", "patch", "group")

# Which losses lg-fg-a has: the target, and what stays apart (Ren et al. 2023, Figure 6)
LOSSES = {
    "block+patch+group": (targets.local(), CELLS),
    "block+patch": (targets.local(), ("batch", "patch")),
    "block": (targets.local(), ("batch",)),
    "patch+group": (targets.last_local(), CELLS),
    "global": (targets.global_loss(), ("batch",)),
}


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A named method. Calling it builds the estimator.

    Attributes:
      name: on the command line.
      build: the function below.
      cite: keys of `forwardgrad.cite`.
      passes: from the number of draws to the matrix products of a step, in units of a forward pass: what "Cost" states, where a tangent that
        moves weights and activations takes two, and a backward pass one each for weights and activations.
    """

    name: str
    build: Callable[..., Estimator]
    cite: tuple[str, ...]
    passes: Callable[[int], int]

    def __call__(self, network: Network, **options) -> Estimator:
        return dataclasses.replace(self.build(network, **options), name=self.name)

    @property
    def about(self) -> str:
        """First line of the docstring."""
        return (self.build.__doc__ or "").strip().splitlines()[0]


def _recipe(*cite: str, passes: Callable[[int], int]) -> Callable[[Callable[..., Estimator]], Recipe]:
    def wrap(build: Callable[..., Estimator]) -> Recipe:
        recipe = Recipe(build.__name__.strip("_").replace("_", "-"), build, cite, passes)
        object.__setattr__(recipe, "__doc__", build.__doc__)
        return recipe

    return wrap


def names() -> list[str]:
    """Command-line names of all recipes, in the order of this file."""
    return [value.name for value in globals().values() if isinstance(value, Recipe)]


def find(name: str) -> Recipe:
    """The recipe with a command-line name.

    Raises:
      InputError: there is none; the nearest names are given.
    """
    for value in globals().values():
        if isinstance(value, Recipe) and value.name == name:
            return value
    raise unknown("method", name, names())


@_recipe("rumelhart1986", passes=lambda draws: 3)
def bp(network: Network) -> Estimator:
    """Backpropagation of the final loss: the exact gradient. Local heads, where there are any, get none.

    Cost: 3 passes. Memory: every activation of the network.
    """
    return Estimator(network, targets.global_loss())


@_recipe("rumelhart1986", "chen2016", passes=lambda draws: 4)
def bp_checkpointed(network: Network) -> Estimator:
    """Backpropagation that stores block inputs only and computes each block again on the way back: the same gradient.

    Cost: 4 passes. Memory: the inputs of all blocks and the activations of one (Chen et al. 2016). The fair opponent of memory claims.
    """
    return Estimator(network.checkpointed(), targets.global_loss())


@_recipe("ren2023", passes=lambda draws: 3)
def l_bp(network: Network) -> Estimator:
    """Backpropagation of the sum of all blocks' local losses, end to end (Ren et al. 2023, section 6).

    A detached final classifier is trained on its own; the last block's local head stands in for it, as in the paper's experiments.
    Cost and memory as `bp`.
    """
    return Estimator(network, targets.local(cut=False))


@_recipe("ren2023", "belilovsky2019", passes=lambda draws: 3)
def lg_bp(network: Network) -> Estimator:
    """Local greedy backpropagation: each block by the exact gradient of its own loss (Belilovsky et al. 2019; Ren et al. 2023).

    The target that `lg-fg-a` and `lg-fg-w` estimate. Cost: 3 passes. Memory: one block's activations, where blocks are streamed.
    """
    return Estimator(network, targets.local())


@_recipe("baydin2022", passes=lambda draws: 1 + 2 * draws)
def fg_w(network: Network, *, guess: Guess | None = None, draws: int = 1) -> Estimator:
    """Forward gradient by weight perturbation: ĝ = <∇L, v> v, one direction v for all weights and the whole batch (Baydin et al. 2022).

    Ren et al. 2023, Eq. 2. Unbiased for E[v vᵀ] = I. Total variance (D ± 1)|∇L|² / K with D the number of weights (+ Gaussian, - signs): it
    does not fall with N. Cost: 1 + K tangents of one pass. Memory: two activations and a direction as large as the weights.
    """
    return estimator(
        network,
        target=targets.global_loss(),
        guess=guess or rademacher(),
        insertion=insertions.weights(),
        draws=draws,
    )


@_recipe("ren2023", "lecun1988", passes=lambda draws: 2 + draws)
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


@_recipe("ren2023", passes=lambda draws: 1 + 2 * draws)
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


@_recipe("ren2023", passes=lambda draws: 2 + draws)
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


@_recipe("jabri1992", passes=lambda draws: 1 + draws)
def wp(network: Network, *, guess: Guess | None = None, draws: int = 1, epsilon: float = 1e-3) -> Estimator:
    """Classical weight perturbation: `fg-w` with the finite difference (L(w + εv) - L(w)) / ε (Jabri & Flower 1992).

    Biased by O(ε). Cost: 1 + K passes; no derivative is ever taken but the last layer's.
    """
    return estimator(
        network,
        target=targets.global_loss(),
        guess=guess or rademacher(),
        insertion=insertions.weights(),
        draws=draws,
        probe=probes.finite_difference(epsilon),
    )


@_recipe("lecun1988", "widrow1990", passes=lambda draws: 2 + draws)
def np_(
    network: Network, *, guess: Guess | None = None, draws: int = 1, mask: bool = False, epsilon: float = 1e-3
) -> Estimator:
    """Classical node perturbation: `fg-a` with the finite difference (L(z + εu) - L(z)) / ε (Le Cun et al. 1988; Widrow & Lehr 1990).

    Biased by O(ε). Cost: K + 2 passes.
    """
    guess = guess or rademacher()
    return estimator(
        network,
        target=targets.global_loss(),
        guess=masked(guess) if mask else guess,
        insertion=insertions.activations(),
        partition=("batch",),
        draws=draws,
        probe=probes.finite_difference(epsilon),
    )


def _by_replay(network: Network, target: targets.Target, released: bool) -> Estimator:
    predictor = feedback_alignment(at_feedback_readouts=released)
    part = Part(None, insertions.activations(), ("batch",), rules.prediction_only, predictor)
    return Estimator(network, target, (part,))


@_recipe("lillicrap2016", passes=lambda draws: 3)
def fa(network: Network, *, released: bool = False) -> Estimator:
    """Feedback alignment: backpropagation of the final loss whose way back goes through fixed random weights, δ_l = J_l(δ_{l+1} B) (Lillicrap 2016).

    B is drawn as the weights are, J_l the exact Jacobian of normalisation and nonlinearity. Biased; the weights align with B. No weight is
    used on the way back, which goes through the whole network all the same. Cost: 3 passes. Memory: as `bp`, and B.

    Args:
      released: what the code released with Ren et al. 2023 computes under this name: as `l_fa` with `released`, the final loss reaching no
        layer. Its local heads' gradients are patches times groups times larger there, which changes nothing else, and are not so here.
    """
    return _by_replay(network, targets.local(cut=False) if released else targets.global_loss(), released)


@_recipe("lillicrap2016", "ren2023", passes=lambda draws: 3)
def l_fa(network: Network, *, released: bool = False) -> Estimator:
    """Feedback alignment of the sum of all blocks' local losses, end to end: the target of `l-bp` (Ren et al. 2023, section 6).

    Each local head has fixed random feedback weights of its own. Biased. Cost and memory as `fa`.

    Args:
      released: as the released code of Ren et al. 2023: a local error is softmax(h B + b) - y, at the outputs of the *feedback* head, so that
        the head's own kernel influences no layer. Not mirrored: heads here learn by their true error, where the released code trains their
        biases b by that of the feedback head.
    """
    return _by_replay(network, targets.local(cut=False), released)


@_recipe("lillicrap2016", "nokland2019", "ren2023", passes=lambda draws: 3)
def lg_fa(network: Network, *, released: bool = False) -> Estimator:
    """Local greedy feedback alignment: within each block, of its own loss: the target of `lg-bp` (Nøkland & Eidnes 2019; Ren et al. 2023).

    Biased. Cost: 3 passes. Memory: one block's activations where blocks are streamed, and B.

    Args:
      released: as in `l_fa`.
    """
    return _by_replay(network, targets.local(), released)


@_recipe("nokland2016", passes=lambda draws: 2)
def dfa(network: Network, *, mask: bool = True, released: bool = False) -> Estimator:
    """Direct feedback alignment: the output error through a fixed random matrix is each layer's credit, δ_l = e B_l (Nøkland 2016).

    B_l ~ U(±√(6/n_l)), n_l the layer's units. Biased; aligns with the gradient as the weights adapt. Cost: 2 passes. Memory: one matrix
    [classes, units] per layer.

    Args:
      mask: for taps before ReLUs, the ReLU's derivative, so that the feedback arrives at the layer's output as published. False for taps after.
      released: what the code released with Ren et al. 2023 computes under this name, a local loss on every layer with a fixed random readout
        of the mean over patches (over features after token mixing); the output error is not used. See `guesses.layer_readout`.
    """
    fixed = feedback.direct_feedback(mask=mask)
    predictor = layer_readout(relu=mask, averaged={"token": "feature"}) if released else fixed
    part = Part(None, insertions.activations(), ("batch",), rules.prediction_only, predictor)
    return Estimator(network, targets.global_loss(), (part,))


@_recipe("bacho2023", passes=lambda draws: 2 + draws)
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
