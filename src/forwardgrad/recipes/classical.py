"""What came before: perturbation by finite differences, and feedback alignment, by replay and direct."""

from __future__ import annotations

from forwardgrad import insertions, probes, rules, targets
from forwardgrad.engine import Estimator, Part, estimator
from forwardgrad.guesses import feedback
from forwardgrad.guesses.base import Guess
from forwardgrad.guesses.given import masked
from forwardgrad.guesses.layer_readout import layer_readout
from forwardgrad.guesses.random import rademacher
from forwardgrad.guesses.replay import feedback_alignment
from forwardgrad.network import Network
from forwardgrad.recipes.base import recipe


@recipe("jabri1992", passes=lambda draws: 1 + draws)
def wp(network: Network, *, guess: Guess | None = None, draws: int = 1, epsilon: float = 1e-3) -> Estimator:
    """Classical weight perturbation: `fg-w` with the finite difference (L(w + εv) - L(w)) / ε (Jabri & Flower 1992).

    Errs by O(ε), biased by O(ε²). Cost: 1 + K passes; no derivative is ever taken but the last layer's.
    """
    return estimator(
        network,
        target=targets.global_loss(),
        guess=guess or rademacher(),
        insertion=insertions.weights(),
        draws=draws,
        probe=probes.finite_difference(epsilon),
    )


@recipe("lecun1988", "widrow1990", passes=lambda draws: 2 + draws)
def np_(
    network: Network, *, guess: Guess | None = None, draws: int = 1, mask: bool = False, epsilon: float = 1e-3
) -> Estimator:
    """Classical node perturbation: `fg-a` with the finite difference (L(z + εu) - L(z)) / ε (Le Cun et al. 1988; Widrow & Lehr 1990).

    Errs by O(ε), biased by O(ε²). Cost: K + 2 passes.
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


@recipe("lillicrap2016", passes=lambda draws: 3)
def fa(network: Network, *, released: bool = False) -> Estimator:
    """Feedback alignment: backpropagation of the final loss whose way back goes through fixed random weights, δ_l = J_l(δ_{l+1} B) (Lillicrap 2016).

    B is drawn as the weights are, J_l the exact Jacobian of normalisation and nonlinearity. Biased; the weights align with B. No weight is
    used on the way back, which goes through the whole network all the same. Cost: 3 passes. Memory: as `bp`, and B.

    Args:
      released: what the code released with Ren et al. 2023 computes under this name: as `l_fa` with `released`, the final loss reaching no
        layer. Its local heads' gradients are patches times groups times larger there, which changes nothing else, and are not so here.
    """
    return _by_replay(network, targets.local(cut=False) if released else targets.global_loss(), released)


@recipe("lillicrap2016", "ren2023", passes=lambda draws: 3)
def l_fa(network: Network, *, released: bool = False) -> Estimator:
    """Feedback alignment of the sum of all blocks' local losses, end to end: the target of `l-bp` (Ren et al. 2023, section 6).

    Each local head has fixed random feedback weights of its own. Biased. Cost and memory as `fa`.

    Args:
      released: as the released code of Ren et al. 2023: a local error is softmax(h B + b) - y, at the outputs of the *feedback* head, so that
        the head's own kernel influences no layer. Not mirrored: heads here learn by their true error, where the released code trains their
        biases b by that of the feedback head.
    """
    return _by_replay(network, targets.local(cut=False), released)


@recipe("lillicrap2016", "nokland2019", "ren2023", passes=lambda draws: 3)
def lg_fa(network: Network, *, released: bool = False) -> Estimator:
    """Local greedy feedback alignment: within each block, of its own loss: the target of `lg-bp` (Nøkland & Eidnes 2019; Ren et al. 2023).

    Biased. Cost: 3 passes. Memory: one block's activations where blocks are streamed, and B.

    Args:
      released: as in `l_fa`.
    """
    return _by_replay(network, targets.local(), released)


@recipe("nokland2016", passes=lambda draws: 2)
def dfa(network: Network, *, feedback_rank: int = 0, mask: bool = True, released: bool = False) -> Estimator:
    """Direct feedback alignment: the output error through a fixed random matrix is each layer's credit, δ_l = e B_l (Nøkland 2016).

    B_l ~ U(±√(6/n_l)), n_l the layer's units, as Bacho & Chu (2023) draw it. Biased; aligns with the gradient as the weights adapt. Cost: 2 passes
    and a product [N, classes, units] per layer. Memory: all activations, since the error comes after the forward pass, and a matrix [classes, units]
    per layer.

    Args:
      feedback_rank: B = Q P of this rank, for many classes; 0: B whole. See `feedback.direct_feedback`.
      mask: for taps before ReLUs, the ReLU's derivative, so that the feedback arrives at the layer's output as published. False for taps after.
      released: what the code released with Ren et al. 2023 computes under this name, a local loss on every layer with a fixed random readout
        of the mean over patches (over features after token mixing); the output error is not used. See `guesses.layer_readout`.
    """
    fixed = feedback.direct_feedback(mask=mask, rank=feedback_rank or None)
    predictor = layer_readout(relu=mask, averaged={"token": "feature"}) if released else fixed
    part = Part(None, insertions.activations(), ("batch",), rules.prediction_only, predictor)
    return Estimator(network, targets.global_loss(), (part,))
