"""Ren et al. 2023, Lemma 1 and Table 1: the variance of perturbed gradient estimates of one weight matrix.

A layer z = x W has p inputs and q outputs, W is [p, q]. A batch B of N examples is drawn independently from a population; ∇n is the gradient of
example n's loss by W, and ∇B = (1/N) Σ ∇n that of the batch. With v and u of zero mean and unit covariance, and δn the gradient of example n's
loss by zn, so that ∇n = xn δnᵀ, the estimate is ĝ = (1/N) Σ ĝn with

    weights        ĝn = <∇n, vn> vn                  vn [p, q], D = p q entries
    activations    ĝn = xn <δn, un> unᵀ = ∇n un unᵀ  un [q],    D = q entries

"Shared" noise is one v (u) for all examples of a batch, "independent" noise one for each. No other weight or activation is displaced: if one is, the
square of its gradient adds to all that is multiplied by D below.

**Lemma 1** splits the variance of ĝ, over batches and noise, in three:

    Z1 = Var_B(∇B)                                              what backpropagation has, too
    Z2 = (1/N)  E_n[Var(ĝn | n)]                                noise of each example's estimate
    Z3 = (1/N²) E_B[Σ_n Σ_{m≠n} Cov(ĝn, ĝm | n, m)]             noise that examples have in common

**The sums over the elements of W.** Let a = E[u⁴] - 2: 1 for Gaussian, -1 for random signs. For independent entries of v, and any two matrices A, B,

    Σ_ij Cov(<A, v> vij, <B, v> vij) = (D + a) <A, B>

since E[<A, v> <B, v> vij²] = <A, B> + (E[v⁴] - 1) Aij Bij, whose sum over the D elements is (D + a + 1) <A, B>, and the means take one <A, B> away.
Weights: A = ∇n, B = ∇m, D = p q. Activations: the same for each row of ∇n uuᵀ, with D = q, and the rows' products add up to <∇n, ∇m>. Let

    V = average over elements of Var_n(∇n)        S = average over elements of (E_n[∇n])²

Then the averages over elements of E|∇n|² and, for two different examples, of E<∇n, ∇m> are V + S and S, and with N (N - 1) pairs

    Z1 = V / N        Z2 = (D + a) (V + S) / N        Z3 = (D + a) S (N - 1) / N  with shared noise, 0 with independent noise

    shared       (D + a + 1) V / N + (D + a) S
    independent  (D + a + 1) V / N + (D + a) S / N

For a = 1 this is Table 1 (appendix 9, Propositions 3 and 4). It is exact, for any network above and any distribution of the examples: nothing is
assumed about how x and δ depend on each other, because |xn δnᵀ|² = |xn|² |δn|² for each example. What it holds for is the average over all elements
of W; a single element's variance depends on its own gradient.
"""

from __future__ import annotations

from typing import NamedTuple

import forwardgrad as fg
from forwardgrad.insertions import Insertion


class Estimate(NamedTuple):
    """One row of the table.

    Attributes:
      label: in pictures.
      insertion, partition: as `forwardgrad.value_and_grad` takes them.
      shared: one displacement for all examples.
    """

    label: str
    insertion: Insertion
    partition: tuple[str, ...]
    shared: bool

    def entries(self, p: int, q: int) -> int:
        """D: entries of a displacement of the [p, q] layer."""
        return q if self.insertion.weights is None else p * q


ESTIMATES = {
    "weights-shared": Estimate("weights, shared", fg.weights(), (), True),
    "weights-independent": Estimate("weights, independent", fg.weights(per_example=True), ("batch",), False),
    "activations-shared": Estimate("activations, shared", fg.activations(shared="batch"), ("batch",), True),
    "activations-independent": Estimate("activations, independent", fg.activations(), ("batch",), False),
}


class Terms(NamedTuple):
    """Z1, Z2 and Z3 of Lemma 1, averages over the elements of the matrix."""

    z1: float
    z2: float
    z3: float

    @property
    def total(self) -> float:
        return self.z1 + self.z2 + self.z3


def backpropagation(n: int, v: float) -> Terms:
    """Of the exact gradient of a batch."""
    return Terms(v / n, 0.0, 0.0)


def terms(estimate: Estimate, n: int, p: int, q: int, v: float, s: float, fourth_moment: float = 3.0) -> Terms:
    """Lemma 1 for a batch of n examples.

    Args:
      n, p, q: batch size, inputs and outputs.
      v, s: the population's V and S, see above.
      fourth_moment: of the noise's entries; 3 for Gaussians, 1 for signs.
    """
    factor = estimate.entries(p, q) + fourth_moment - 2
    return Terms(v / n, factor * (v + s) / n, factor * s * (n - 1) / n if estimate.shared else 0.0)
