"""How linear layers, convolutions and readouts start, by name: what models offer as their option `init`.

| name | kernel | bias | readout's kernel and bias |
|---|---|---|---|
| he | N(0, 2/fan-in), cut at two standard deviations | 0 | N(0, 1/fan-in), likewise cut; 0 |
| kaiming-uniform | U(±√(6/fan-in)) | 0 | as the layers' |
| torch | U(±1/√fan-in) | U(±1/√fan-in) | as the layers' |

The fan-in is the number of inputs of one output: all axes of a kernel but the last, which are `(row, column, in, out)` or `(in, out)`.
`torch` is what PyTorch's `Linear` and `Conv2d` draw unasked; `kaiming-uniform` is √6 = 2.4 times larger.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from forwardgrad.errors import unknown

Initializer = Callable[..., jax.Array]  # (key, shape, dtype)
Name = Literal["he", "kaiming-uniform", "torch"]


class Initial(NamedTuple):
    """Initialisers of layers' and readouts' kernels, and, from the fan-in, of all biases."""

    kernel: Initializer
    readout: Initializer
    bias: Callable[[int], Initializer]


def _zeros(fan_in: int) -> Initializer:
    return jax.nn.initializers.zeros


def _uniform(fan_in: int) -> Initializer:
    bound = fan_in**-0.5

    def init(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32, *_, **__) -> jax.Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


_kaiming = jax.nn.initializers.variance_scaling(2.0, "fan_in", "uniform")
_torch = jax.nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")

KNOWN = {
    "he": Initial(jax.nn.initializers.he_normal(), jax.nn.initializers.lecun_normal(), _zeros),
    "kaiming-uniform": Initial(_kaiming, _kaiming, _zeros),
    "torch": Initial(_torch, _torch, _uniform),
}


def find(name: str) -> Initial:
    """The initialisers of a name of the table above.

    Raises:
      InputError: there is none.
    """
    if name not in KNOWN:
        raise unknown("init", name, KNOWN)
    return KNOWN[name]
