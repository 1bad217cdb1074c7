"""Feedback guesses: the output error sent straight to every layer, through fixed or learned matrices.

No layer's matrix, nor what it learns from, depends on another layer's: all can be used and updated at once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from forwardgrad import descent
from forwardgrad.errors import InputError
from forwardgrad.guesses import matrices
from forwardgrad.guesses.base import Guess, View
from forwardgrad.guesses.given import relu_mask
from forwardgrad.guesses.matrices import Matrix
from forwardgrad.named import Named, contract


def _sent(feedback: Mapping[str, Matrix], view: View, mask: bool, per_cell: tuple[str, ...]) -> dict[str, Named]:
    out = {}
    for name, site in view.sites.items():
        axes = (*(a for a in view.error.axes if a in per_cell and a not in site.axes), *site.axes)
        out[name] = matrices.sent(view.error, feedback[name], axes)
        if mask:
            z = view.taps[name]
            out[name] = contract(axes, out[name], Named(relu_mask(z.value), z.axes))
    return out


def _refuse_rank(rank: int | None) -> None:
    if rank is not None and rank < 1:
        raise InputError(f"a feedback matrix of rank {rank} feeds nothing back: give a rank of at least 1, or None.")


def direct_feedback(*, mask: bool = False, per_cell: tuple[str, ...] = (), rank: int | None = None) -> Guess:
    """p_l = e B_l with fixed random B_l (Nøkland 2016), drawn U(±√(6/n_l)) as by Bacho & Chu (2023).

    e is the exact error at the scope's outputs, [batch, class]; B_l has the axes class x the site's own, one entry per unit (convolutional units
    share none). n_l is the number of units per example. As a predictor of a random guess it leaves the estimate unbiased, as any predictor. State:
    classes x units numbers per layer, for a convolution classes x height x width x channels; with a rank, rank x (classes + units).

    Args:
      mask: multiply by the derivative of the ReLU above the tap, 1[z > 0]: the tap stands before the ReLU, the published rule feeds back
        to the layer's *output*, and this is the exact pullback from there.
      per_cell: axes of the outputs (loss axes such as "group") that get a matrix of their own where the site lacks them.
      rank: B_l = Q_l P_l with Q [class, rank] and P [rank, units], entries of B of the same variance; for many classes. `None`: B whole.

    Raises:
      InputError: a rank below 1, or (when used) above that of any such matrix.
    """
    _refuse_rank(rank)

    def init(key: jax.Array, view: View) -> dict[str, Matrix]:
        return {n: matrices.random(key, site, view, per_cell, rank, site.dtype) for n, site in view.sites.items()}

    return Guess(
        lambda key, state, view: _sent(state, view, mask, per_cell),
        init,
        name="direct feedback",
        mask=relu_mask if mask else None,
        isotropic=False,
    )


class Learned(NamedTuple):
    """State of learned feedback. Attributes: `matrices` `{site: B}`; `memory`, the optimiser's state."""

    matrices: dict[str, Matrix]
    memory: Any


def _learned(
    name: str,
    optimiser: descent.Optimiser,
    mask: bool,
    per_cell: tuple[str, ...],
    rank: int | None,
    observe: Callable[[Mapping[str, Matrix], View, Mapping[str, Named], Mapping[str, Named]], dict[str, Matrix]],
    gradient: Callable[[Matrix, Matrix], Matrix],
) -> Guess:
    """Feedback from B = 0, moved by an optimiser along `gradient(B, what was observed)`."""
    _refuse_rank(rank)

    def init(key: jax.Array, view: View) -> Learned:
        dtype = view.outputs.value.dtype  # not the activations': small steps need the precision of parameters
        drawn = {n: matrices.random(key, site, view, per_cell, rank, dtype) for n, site in view.sites.items()}
        start = {n: matrices.emptied(b) for n, b in drawn.items()}
        return Learned(start, optimiser.init(start))

    def seen(state: Learned, view: View, u: Mapping[str, Named], du: Mapping[str, Named]) -> dict[str, Matrix]:
        as_state = lambda b, s: s.astype(b.dtype)
        return jax.tree.map(as_state, state.matrices, observe(state.matrices, view, u, du))

    def update(state: Learned, observed: dict[str, Matrix]) -> Learned:
        grads = {n: gradient(b, observed[n]) for n, b in state.matrices.items()}
        steps, memory = optimiser.update(grads, state.memory, state.matrices)
        return Learned(jax.tree.map(jnp.add, state.matrices, steps), memory)

    return Guess(
        lambda key, state, view: _sent(state.matrices, view, mask, per_cell),
        init,
        seen,
        update,
        name=name,
        mask=relu_mask if mask else None,
        isotropic=False,
    )


def learned_feedback(
    optimiser: descent.Optimiser | None = None,
    *,
    mask: bool = False,
    per_cell: tuple[str, ...] = (),
    rank: int | None = None,
) -> Guess:
    """p_l = e B_l with B_l learned by forward gradients, from zero (Bacho & Chu 2023, Eqs. 7 to 12).

    B_l descends ½|B_l - S_l|², S_l = Σ_b w_b d_b ⊗ u_b, with d the tangent of the outputs along the part's directions u at all layers, w the example
    weights, which sum to one: the gradient is B_l - S_l. By SGD at the rate α this is B_l <- (1 - α) B_l + α S_l, the moving average of Eq. 8. For
    E[u uᵀ] = I the mean of S_l is the mean Jacobian J_l of the outputs with respect to the site, and so is the fixed point of the expected moving
    average (near it Adam's, whose steps are no linear function of B - S, where S is skewed). Given B, the moving average's new B has α² times the
    variance of S (Proposition 2); at rest, with nothing else moving, α / (2 - α) times. S is one matrix product over examples and draws.

    With a rank, B_l = Q_l P_l, and both factors descend the same ½|Q P - S|²: their gradients are Q P Pᵀ - Σ w d ⊗ (P u) and
    Qᵀ Q P - Σ w (Qᵀ d) ⊗ u, without S. Q starts at zero, P ~ N(0, 1/n_l): in expectation what Q learns at first is J Pᵀ.

    State: classes x units numbers per layer and as many as the optimiser keeps (Adam twice that), for a convolution
    classes x height x width x channels; with a rank, rank x (classes + units) in place of classes x units.

    Args:
      optimiser: what moves B; by default Adam at 1e-4, as in the published experiments. `descent.sgd(α)` is the moving average.
      mask, per_cell: as in `direct_feedback`. At a tap before a ReLU, B is learned for the Jacobian there, which is zero for units that are
        off: the mean over examples is smaller by how often the unit is on. The published rule has its taps after the ReLU and no mask.
      rank: of B; `None`: whole.

    Raises:
      InputError: a rank below 1; (when used) one above that of any such matrix, a part without directions.
    """

    def observe(
        feedback: Mapping[str, Matrix], view: View, u: Mapping[str, Named], du: Mapping[str, Named]
    ) -> dict[str, Matrix]:
        if not du:
            raise InputError(
                "learned feedback learns from directions, and its part has none: give the part a random guess, or use direct_feedback."
            )
        d = contract(du["outputs"].axes, du["outputs"], Named(view.batch["weight"] / view.draws, ("batch",)))
        return {name: matrices.paired(b, d, u[name]) for name, b in feedback.items()}

    residual = lambda b, sample: jax.tree.map(jnp.subtract, matrices.shrinking(b), sample)
    optimiser = optimiser or descent.adam(1e-4)
    return _learned("learned feedback", optimiser, mask, per_cell, rank, observe, residual)


def kolen_pollack(
    optimiser: descent.Optimiser | None = None,
    *,
    decay: float = 0.0,
    mask: bool = False,
    per_cell: tuple[str, ...] = (),
    rank: int | None = None,
) -> Guess:
    """p_l = e B_l with B_l learned as if it were the output layer's weights on this layer's output (Webster et al. 2021, after Kolen & Pollack 1994).

    B_l descends, from zero, along Σ_b e_b ⊗ y_b + decay B_l, y_l the layer's output, e with the example weights: one matrix product, and no
    direction is needed. At the last hidden layer this is, transposed, the output weights' own gradient: moved by the same rule and both
    decaying, they become equal. With a rank, B_l = Q_l P_l as in `learned_feedback`: the gradients are Σ e ⊗ (P y) + decay Q and
    Σ (Qᵀ e) ⊗ y + decay P. State as there.

    Args:
      optimiser: what moves B; by default Adam at 1e-4.
      decay: coupled L2 on B.
      mask: the tap stands before a ReLU: y = max(z, 0), and the feedback arrives at the layer's output, as in `direct_feedback`. Without it y is
        the tapped activation.
      per_cell, rank: as in `direct_feedback`.

    Raises:
      InputError: a rank below 1; (when used) one above that of any such matrix, sites that are weights.
    """

    def observe(
        feedback: Mapping[str, Matrix], view: View, u: Mapping[str, Named], du: Mapping[str, Named]
    ) -> dict[str, Matrix]:
        out = {}
        for name, b in feedback.items():
            if name not in view.taps:
                raise InputError(
                    f"Kolen-Pollack feedback learns from activations, and {name!r} is a weight: use fg.activations()."
                )
            y = view.taps[name]
            y = Named(jax.nn.relu(y.value), y.axes) if mask else y
            out[name] = matrices.paired(b, view.error, y)
        return out

    decayed = lambda b, sample: jax.tree.map(lambda x, s: s + decay * x, b, sample)
    optimiser = optimiser or descent.adam(1e-4)
    return _learned("Kolen-Pollack feedback", optimiser, mask, per_cell, rank, observe, decayed)
