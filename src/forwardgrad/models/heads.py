"""Readouts that several models share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

from forwardgrad.losses.cross_entropy import cross_entropy, replicated_cross_entropy
from forwardgrad.losses.products import product
from forwardgrad.named import Named
from forwardgrad.network import Readout
from forwardgrad.normalise import normalise

Initializer = Callable[[jax.Array, tuple[int, ...]], jax.Array]

# Where a network ends: in a readout, whose gradient every method has exactly, or in a layer that methods estimate as any other, with a readout
# that only compares
Output = Literal["readout", "layer"]


def _linear_init(
    features: int, classes: int, init: Initializer, bias: Callable[[int], Initializer] | None = None
) -> Callable[[jax.Array], Any]:
    def start(key: jax.Array) -> Any:
        first = jnp.zeros(classes) if bias is None else bias(features)(jax.random.fold_in(key, 1), (classes,))
        return {"kernel": init(key, (features, classes)), "bias": first}

    return start


def linear(features: int, classes: int, init: Initializer, bias: Callable[[int], Initializer] | None = None) -> Readout:
    """Linear classifier with cross-entropy per example.

    Args:
      features: inputs per example, of [batch, ...] with any axes.
      classes: outputs.
      init: `(key, shape) -> kernel`.
      bias: from the fan-in to `(key, shape) -> bias`; zeros by default.
    """

    def outputs(params: Any, h: jax.Array) -> Named:
        h = h.reshape(h.shape[0], -1)
        return Named(product(h, params["kernel"]) + params["bias"], ("batch", "class"))

    return Readout(outputs, cross_entropy, init=_linear_init(features, classes, init, bias))


def comparison() -> Readout:
    """Cross-entropy per example of what the block gives, [batch, class]; no parameters."""
    return Readout(lambda params, h: Named(h, ("batch", "class")), cross_entropy)


def replicated(features: int, classes: int, init: Initializer) -> Readout:
    """Ren et al.'s local head on [batch, patch, group, channel]: each group normalised, patches averaged, one linear classifier shared by all
    patches and groups, the loss replicated over both."""

    def outputs(params: Any, h: jax.Array) -> Named:
        mean = normalise(h).mean(1).reshape(h.shape[0], -1)
        return Named(product(mean, params["kernel"]) + params["bias"], ("batch", "class"))

    def cells(params: Any, h: jax.Array, batch: Any) -> Named:
        value = replicated_cross_entropy(normalise(h), params["kernel"], params["bias"], batch["labels"])
        return Named(value, ("batch", "patch", "group"))

    def shares(params: Any, h: jax.Array) -> Named:
        patches, groups, channels = h.shape[1:]
        kernel = params["kernel"].reshape(groups, channels, classes)
        value = jax.lax.dot_general(normalise(h), kernel, (((3,), (1,)), ((2,), (0,))))
        return Named(value / patches, ("group", "batch", "patch", "class"))

    return Readout(outputs, cross_entropy, cells, _linear_init(features, classes, init), shares)
