"""Blocks from Flax NNX modules: parameters as plain pytrees, every other variable as explicit state.

The adapter places nothing and changes nothing: the module's own code calls `forwardgrad.tap`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax import nnx

from forwardgrad.network import Block, Readout


def _split(module: nnx.Module) -> tuple[Any, Any, Any]:
    graph, params, rest = nnx.split(module, nnx.Param, ...)
    return graph, nnx.to_pure_dict(params), nnx.to_pure_dict(rest)


def block(
    name: str,
    make: Callable[[nnx.Rngs], nnx.Module],
    *,
    readout: Readout | None = None,
    weights: Mapping[str, tuple[str, ...]] | None = None,
    detached: bool = False,
    code: Any = None,
) -> Block:
    """A block whose layers are an NNX module called on the hidden state.

    Args:
      name: of the block.
      make: builds the module from random streams; called once abstractly, and once per `init`.
      readout, weights, detached, code: as in `Block`. Leaf paths are attribute names: `"group/kernel"`.

    The module's `train()` or `eval()` mode is set on each call, so that BatchNorm uses batch or running statistics; its updated statistics come
    out as the block's state.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from flax import nnx
      >>> from forwardgrad.adapters import flax_nnx
      >>> b = flax_nnx.block("first", lambda rngs: nnx.Linear(3, 2, rngs=rngs))
      >>> params, state = b.init(jax.random.key(0))
      >>> b.apply(params, state, jnp.ones((4, 3)), True)[0].shape
      (4, 2)
    """
    graph = nnx.graphdef(nnx.eval_shape(lambda: make(nnx.Rngs(0))))

    def apply(params: Any, state: Any, h: Any, train: bool) -> tuple[Any, Any]:
        module = nnx.merge(graph, params, state)  # from arguments: closed-over variables could not be updated
        module.train() if train else module.eval()
        out = module(h)
        return out, _split(module)[2]

    def init(key: jax.Array) -> tuple[Any, Any]:
        _, params, rest = _split(make(nnx.Rngs(key)))
        return params, rest

    return Block(name, apply, readout, init, weights, detached, code)
