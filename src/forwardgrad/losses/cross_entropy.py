"""Cross-entropy, plain and replicated over patches and groups.

The replicated loss of Ren et al. 2023 (section 4, Eqs. 4 and 5): each patch p and group g sees the logits of all features, but only its own slice
carries a derivative. Every copy has the same value CE[n]. Here the cell [n, p, g] holds the share CE[n] / (P G), so that cells sum to the loss, and
its derivative is that of the copy: with e = softmax(logits) - onehot(y),

    d cell[n,p,g] = (1/P) sum_d dx[n,p,g,d] (W_g e_n)[d]  +  (1/(P G)) (x̄_n dW + db) · e_n

Summed over p and g this is the derivative of CE[n] exactly: features, weights and biases alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from forwardgrad.losses.products import product
from forwardgrad.named import Named


def cross_entropy(outputs: Named, batch: Mapping[str, Any]) -> Named:
    """Cross-entropy of each example.

    Args:
      outputs: logits, axes `("batch", "class")`.
      batch: `labels`, integers [batch].

    Returns:
      `Named`, axes `("batch",)`, in nats.
    """
    logits = outputs.to(("batch", "class"))
    chosen = jnp.take_along_axis(logits, batch["labels"][:, None].astype(jnp.int32), 1)[:, 0]
    return Named(jax.nn.logsumexp(logits, 1) - chosen, ("batch",))


def _error(x: jax.Array, kernel: jax.Array, bias: jax.Array, labels: jax.Array) -> tuple[jax.Array, ...]:
    """Features summed over patches [N, G D], cross-entropy [N], and its derivative by the logits [N, K]."""
    n, p = x.shape[:2]
    total = x.sum(1).reshape(n, -1)
    logits = product(total, kernel) / p + bias  # the mean is taken here, where it is smallest
    log_p = jax.nn.log_softmax(logits)
    onehot = jax.nn.one_hot(labels, logits.shape[1], dtype=logits.dtype)
    return total, -(onehot * log_p).sum(1), jnp.exp(log_p) - onehot


@jax.custom_jvp
def replicated_cross_entropy(x: jax.Array, kernel: jax.Array, bias: jax.Array, labels: jax.Array) -> jax.Array:
    """The fused form: average, concatenation, classifier and cross-entropy in one.

    Its cost does not grow with the groups: 64 cost what one does (in between up to 40 % more on a CPU; see docs/performance.md).

    One rule serves both modes: the directional derivative above is linear in the tangents, and JAX transposes it, which is right for unequal
    cotangents too.

    Args:
      x: features [N, P, G, D].
      kernel, bias: classifier [G D, K] and [K], shared by all patches and groups.
      labels: integers [N].

    Returns:
      Cells [N, P, G], not divided by N.
    """
    n, p, g, _ = x.shape
    _, loss, _ = _error(x, kernel, bias, labels)
    return jnp.broadcast_to((loss / (p * g))[:, None, None], (n, p, g))


def _replicated_jvp(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    (x, kernel, bias, labels), (dx, dkernel, dbias, _) = primals, tangents
    n, p, g, d = x.shape
    total, loss, error = _error(x, kernel, bias, labels)
    slope = (error / p @ kernel.T).reshape(n, 1, g, d)  # W_g e_n / P
    still = lambda tangent: isinstance(tangent, SymbolicZero)
    moved = jnp.zeros((n, p, g), x.dtype) if still(dx) else _sum(dx * slope)
    logits = ([] if still(dkernel) else [product(total, dkernel) / p]) + ([] if still(dbias) else [dbias])
    if logits:
        moved += ((sum(logits[1:], logits[0]) * error).sum(1) / (p * g))[:, None, None]
    return jnp.broadcast_to((loss / (p * g))[:, None, None], (n, p, g)), moved


# symbolic zeros: where the classifier does not move, nothing is multiplied by its tangent
replicated_cross_entropy.defjvp(_replicated_jvp, symbolic_zeros=True)


def _sum(x: jax.Array) -> jax.Array:
    """Over the last axis, without writing out what is summed, which costs G D numbers per patch instead of G.

    On a CPU, XLA sums more than 32 numbers as a tree and keeps its leaves in memory; a product with ones it takes in one loop. Of a product it
    keeps the result, G numbers, before anything is added to it; of a short sum it does not.
    """
    if x.shape[-1] <= 32:
        return x.sum(-1)
    return jnp.matmul(x, jnp.ones((x.shape[-1], 1), x.dtype), precision=jax.lax.Precision.HIGHEST)[..., 0]


def naive_replicated_cross_entropy(x: jax.Array, kernel: jax.Array, bias: jax.Array, labels: jax.Array) -> jax.Array:
    """The same by the definition, with the copies [N, P, G, G, D] and stop-gradients: the baseline of Figure 5 and the test oracle."""
    n, p, g, d = x.shape
    stop = jax.lax.stop_gradient
    mean = x.mean(1, keepdims=True)
    # each patch sees the mean over patches, with a derivative in its own patch alone (Eq. 5) ...
    patches = x / p + stop(mean - x / p)
    # ... and the features of all groups, with a derivative in its own group alone (Eq. 4)
    own = jnp.eye(g, dtype=x.dtype)[:, :, None]
    copies = own * patches[:, :, None] + (1 - own) * stop(patches)[:, :, None]
    copies = copies.reshape(n, p, g, g * d)

    def copy_loss(features: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
        log_p = jax.nn.log_softmax(features @ kernel + bias)
        return -jnp.take_along_axis(
            log_p, labels.astype(jnp.int32)[:, None, None, None] + jnp.zeros((n, p, g, 1), jnp.int32), -1
        )[..., 0]

    through_features = copy_loss(copies, stop(kernel), stop(bias))
    through_weights = copy_loss(stop(copies), kernel, bias) / (p * g)
    return through_features - stop(through_features) + through_weights
