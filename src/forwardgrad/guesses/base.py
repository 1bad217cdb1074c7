"""What a guess is, and all that it may look at."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

from forwardgrad.named import Named
from forwardgrad.network import Readout


class Site(NamedTuple):
    """A place where a network is displaced: a tap, or a leaf of a block's layers.

    Attributes:
      axes, shape: of the activation or the weight.
      noise_axes, noise_shape: of its displacement.
      dtype: of both.
      kind: "tap" or "weight"; to a predictor that has `at_arrivals` also "arrival", a tap at which weights displaced per example arrive.
      block: number of its block in the network, possibly a traced integer; enters the noise key.
      name: within its block.
    """

    axes: tuple[str, ...]
    shape: tuple[int, ...]
    noise_axes: tuple[str, ...]
    noise_shape: tuple[int, ...]
    dtype: Any
    kind: str
    block: int | jax.Array
    name: str

    def key(self, key: jax.Array) -> jax.Array:
        """This site's own key: a function of the block's position and the name within the block."""
        return jax.random.fold_in(jax.random.fold_in(key, self.block), zlib.crc32(f"{self.kind}/{self.name}".encode()))


class View(NamedTuple):
    """One scope of a step, as a guess sees it.

    Attributes:
      sites: `{site: Site}` that the part displaces.
      taps: `{tap: Named}` activations of all taps of the scope.
      outputs: of the scope's last readout; it, `shares` and `error` are `None` where a sitewise guess is asked block by block.
      shares: what each cell of its loss contributes to them (`Readout.shares`).
      error: derivative of the scope's last loss with respect to `outputs`; contains the example weights.
      errors: the same for every loss of the scope, by block; empty where a sitewise guess is asked block by block.
      readouts: `{block: readout}` of all blocks of the scope that have one; the last is the one of `outputs`.
      params: of the scope's blocks.
      batch: `inputs` (of the network, or of the block where blocks are streamed), `labels`, `weight`, `index` (global numbers of the examples).
      partition: axes of the loss that stay apart.
      draws: how many directions are wanted.
      forward: `(params, visit, greedy=False) -> (loss, records)`, the scope's loss under another visitor or other parameters. With
        `greedy=True` every block's local loss, cut between blocks.
      read: `(params, visit) -> {block: outputs}` likewise, of the readouts that `errors` names.
      draw: `key -> params`, fresh parameters for the scope's blocks, drawn as the network's own initial ones.
    """

    sites: Mapping[str, Site]
    taps: Mapping[str, Named]
    outputs: Named
    shares: Named
    error: Named
    errors: Mapping[str, Named]
    readouts: Mapping[str, Readout]
    params: Any
    batch: Mapping[str, Any]
    partition: tuple[str, ...]
    draws: int
    forward: Callable[..., tuple[jax.Array, Mapping[str, Any]]]
    read: Callable[..., Mapping[str, Named]]
    draw: Callable[[jax.Array], Mapping[str, Any]]


def _no_state(key: jax.Array, view: View) -> tuple[()]:
    return ()


def _no_statistics(state: Any, view: View, u: Mapping[str, Named], du: Mapping[str, Any]) -> tuple[()]:
    return ()


def _unchanged(state: Any, statistics: Any) -> Any:
    return state


class Guess(NamedTuple):
    """A way to propose directions; also a way to predict gradients.

    Attributes:
      propose: `(key, state, view) -> {site: Named}`. As a *direction* on the site's noise axes, with a leading `"draw"` axis of length
        `view.draws` (left out: the same direction for every draw). As a *prediction* on the site's axes and any axes of the loss.
      init: `(key, view) -> state`; only shapes of the view may be used.
      observe: `(state, view, u, du) -> statistics` that *sum* over microbatches; `du` holds the tangents `outputs`, `shares` and `cells`, and
        those of the scope's taps by name, `taps` (none where weights are displaced per example). Both are empty in a part without a guess.
      update: `(state, statistics) -> state`, once per step.
      name: for messages and listings.
      mask: of a masked guess, `activation -> 0 or 1`, so that checks can verify it.
      isotropic: E[u uᵀ] = I as a direction (on the units that the mask leaves), which the unbiased rule needs; False for guided guesses,
        whose directions depend on the data.
      sitewise: a site's direction depends on the key, the site and its own activation alone, so that it can be drawn again where it is
        needed instead of being kept.
      at_arrivals: as a predictor of weights that are displaced per example it is asked for the taps where they arrive, and told the tangents
        there as `u`; its prediction is taken back to the weights, through that one layer.
    """

    propose: Callable[[jax.Array, Any, View], Mapping[str, Named]]
    init: Callable[[jax.Array, View], Any] = _no_state
    observe: Callable[[Any, View, Mapping[str, Named], Mapping[str, Any]], Any] = _no_statistics
    update: Callable[[Any, Any], Any] = _unchanged
    name: str = "guess"
    mask: Callable[[jax.Array], jax.Array] | None = None
    isotropic: bool = True
    sitewise: bool = False
    at_arrivals: bool = False
