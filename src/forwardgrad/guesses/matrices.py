"""Feedback matrices B, whole or as a product Q P of two thin ones: how an error is sent through them, and what they learn by.

B has the axes of the outputs, without the batch, and the site's own: one entry per output and unit, for convolutional sites
[class, height, width, channel], where units of a channel share none. A site's axis that the outputs have too has no second axis in B: each slice has
its own matrix there.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from forwardgrad.errors import InputError
from forwardgrad.guesses.base import Site, View
from forwardgrad.named import Named, contract

RANK = "feedback rank"  # a name that no axis given by words can have
OTHER = "other feedback rank"


class Factors(NamedTuple):
    """B = Q P. Attributes: `q` [outputs, rank] and `p` [rank, site], named arrays; axes that outputs and site share are those of `q`."""

    q: Named
    p: Named


Matrix = Named | Factors


def _axes(site: Site, view: View, per_cell: tuple[str, ...]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Axes of B that the outputs have: shared with the site, a matrix each (`per_cell`), summed; and those that the site alone has."""
    outputs, own = view.outputs.axes, site.axes
    shared = tuple(a for a in own if a in outputs and a != "batch")
    cells = tuple(a for a in outputs if a in per_cell and a not in own and a != "batch")
    summed = tuple(a for a in outputs if a not in (*own, *cells, "batch"))
    return (*shared, *cells, *summed), tuple(a for a in own if a not in outputs)


def random(key: jax.Array, site: Site, view: View, per_cell: tuple[str, ...], rank: int | None, dtype: Any) -> Matrix:
    """A matrix whose entries have the variance 2 / n, for n units per example: U(±√(6/n)), or Q ~ N(0, 2/rank) and P ~ N(0, 1/n).

    Args:
      key: of all sites; each draws by its own.
      per_cell: axes of the outputs that get a matrix each where the site lacks them.
      rank: of the factors; `None`: B whole.

    Raises:
      InputError: a rank that no such matrix has.
    """
    outer, inner = _axes(site, view, per_cell)
    sizes = {**view.outputs.sizes, **dict(zip(site.axes, site.shape, strict=True))}
    ends = [math.prod(sizes[a] for a in axes) for axes in (outer, inner)]
    if rank is not None and rank > min(ends):
        raise InputError(
            f"feedback from {ends[0]} outputs to {ends[1]} units has a rank of {min(ends)} at most, not {rank}: give it a smaller one "
            "(--feedback-rank), or leave it whole."
        )
    units = math.prod(n for a, n in zip(site.axes, site.shape, strict=True) if a != "batch")
    if rank is None:
        bound, axes = (6 / units) ** 0.5, (*outer, *inner)
        shape = tuple(sizes[a] for a in axes)
        return Named(jax.random.uniform(site.key(key), shape, dtype, -bound, bound), axes)

    def normal(number: int, axes: tuple[str, ...], variance: float) -> Named:
        shape = tuple(rank if a == RANK else sizes[a] for a in axes)
        own = jax.random.fold_in(site.key(key), number)
        return Named(variance**0.5 * jax.random.normal(own, shape, dtype), axes)

    return Factors(normal(0, (*outer, RANK), 2 / rank), normal(1, (RANK, *inner), 1 / units))


def emptied(matrix: Matrix) -> Matrix:
    """B = 0: in factors by Q = 0 alone, since neither of two zeros would learn."""
    zero = lambda b: Named(jnp.zeros_like(b.value), b.axes)
    return Factors(zero(matrix.q), matrix.p) if isinstance(matrix, Factors) else zero(matrix)


def sent(error: Named, matrix: Matrix, axes: tuple[str, ...]) -> Named:
    """e B, with these axes."""
    if isinstance(matrix, Factors):
        return contract(axes, contract((*axes, RANK), error, matrix.q), matrix.p)
    return contract(axes, error, matrix)


def paired(matrix: Matrix, left: Named, right: Named) -> Matrix:
    """Gradient of <S, B> with S = Σ left ⊗ right, summed over examples and draws: S, or of the factors S Pᵀ and Qᵀ S.

    One matrix product, or two thin ones each: neither S per example, nor S where B is in factors, is formed.
    """
    if not isinstance(matrix, Factors):
        return contract(matrix.axes, left, right)
    q, p = matrix
    onto_p, onto_q = (*left.axes, RANK), (*right.axes, RANK)
    return Factors(
        contract(q.axes, left, contract(onto_p, right, p)), contract(p.axes, contract(onto_q, left, q), right)
    )


def shrinking(matrix: Matrix) -> Matrix:
    """Gradient of |B|² / 2: B, or of the factors Q P Pᵀ and Qᵀ Q P, without forming B."""
    if not isinstance(matrix, Factors):
        return matrix
    q, p = matrix
    other = lambda b: Named(b.value, tuple(OTHER if a == RANK else a for a in b.axes))
    gram = lambda b: contract((RANK, OTHER), b, other(b))
    return Factors(contract(q.axes, other(q), gram(p)), contract(p.axes, gram(q), other(p)))
