"""Baselines: exact gradients, of the final loss and of local losses."""

from __future__ import annotations

from forwardgrad import targets
from forwardgrad.engine import Estimator
from forwardgrad.network import Network
from forwardgrad.recipes.base import recipe


@recipe("rumelhart1986", passes=lambda draws: 3)
def bp(network: Network) -> Estimator:
    """Backpropagation of the final loss: the exact gradient. Local heads, where there are any, get none.

    Cost: 3 passes. Memory: every activation of the network.
    """
    return Estimator(network, targets.global_loss())


@recipe("rumelhart1986", "chen2016", passes=lambda draws: 4)
def bp_checkpointed(network: Network) -> Estimator:
    """Backpropagation that stores block inputs only and computes each block again on the way back: the same gradient.

    Cost: 4 passes. Memory: the inputs of all blocks and the activations of one (Chen et al. 2016). The fair opponent of memory claims.
    """
    return Estimator(network.checkpointed(), targets.global_loss())


@recipe("ren2023", passes=lambda draws: 3)
def l_bp(network: Network) -> Estimator:
    """Backpropagation of the sum of all blocks' local losses, end to end (Ren et al. 2023, section 6).

    A detached final classifier is trained on its own; the last block's local head stands in for it, as in the paper's experiments.
    Cost and memory as `bp`.
    """
    return Estimator(network, targets.local(cut=False))


@recipe("ren2023", "belilovsky2019", passes=lambda draws: 3)
def lg_bp(network: Network) -> Estimator:
    """Local greedy backpropagation: each block by the exact gradient of its own loss (Belilovsky et al. 2019; Ren et al. 2023).

    The target that `lg-fg-a` and `lg-fg-w` estimate. Cost: 3 passes. Memory: one block's activations, where blocks are streamed.
    """
    return Estimator(network, targets.local())
