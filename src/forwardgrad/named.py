"""Arrays that know their axes, and the two products of them that the engine needs.

Axes go by name, never by position: `vmap` moves positions, and a partition is a statement about names.
"""

from __future__ import annotations

import dataclasses
import math
import string
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp

from forwardgrad.errors import InputError


def axis_names(axes: str | Sequence[str], what: str) -> tuple[str, ...]:
    """`"batch unit"` or `("batch", "unit")` as a tuple of distinct names.

    Args:
      axes: names separated by spaces, or a sequence of names.
      what: whose axes these are, for the error message.

    Raises:
      InputError: a name appears twice.
    """
    names = tuple(axes.split()) if isinstance(axes, str) else tuple(axes)
    if len(set(names)) != len(names):
        raise InputError(f"{what} names an axis twice in {' '.join(names)!r}: give each axis its own name.")
    return names


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Named:
    """An array and the names of its axes, in order. A pytree whose only leaf is `value`.

    Example:
      >>> import jax.numpy as jnp
      >>> from forwardgrad import Named
      >>> Named(jnp.zeros((8, 3)), ("batch", "unit")).sizes
      {'batch': 8, 'unit': 3}
    """

    value: jax.Array
    axes: tuple[str, ...] = dataclasses.field(metadata={"static": True})

    @property
    def sizes(self) -> dict[str, int]:
        """Length of each axis."""
        return dict(zip(self.axes, jnp.shape(self.value), strict=True))

    def to(self, axes: Sequence[str]) -> jax.Array:
        """The value laid out along `axes`, with length 1 where this array lacks the axis."""
        order = [self.axes.index(a) for a in axes if a in self.axes]
        if len(order) != len(self.axes):
            raise InputError(f"an array with axes {self.axes} cannot be laid out along {tuple(axes)}.")
        sizes = self.sizes
        return jnp.transpose(self.value, order).reshape([sizes.get(a, 1) for a in axes])

    def sum_to(self, axes: Sequence[str]) -> Named:
        """Summed over every axis that is not in `axes`; the order of the rest is kept."""
        lost = tuple(i for i, a in enumerate(self.axes) if a not in axes)
        return Named(self.value.sum(lost), tuple(a for a in self.axes if a in axes)) if lost else self


def contract(axes: Sequence[str], left: Named, right: Named) -> Named:
    """Product of two named arrays, summed over every axis not in `axes`: an einsum over names.

    Args:
      axes: the axes of the result, in order; names that neither factor has are left out.
      left, right: factors; equal names mean the same index.

    Returns:
      The product along the names of `axes` that exist.
    """
    axes = tuple(a for a in axes if a in left.axes or a in right.axes)
    left = left.sum_to((*axes, *right.axes))
    right = right.sum_to((*axes, *left.axes))
    summed = [a for a in left.axes if a in right.axes and a not in axes]
    inner = math.prod(left.sizes[a] for a in summed)
    own_left = math.prod(n for a, n in left.sizes.items() if a not in right.axes)
    own_right = math.prod(n for a, n in right.sizes.items() if a not in left.axes)
    if inner > 1 and own_left > 1 and own_right > 1:  # a matrix product
        letters = dict(zip(dict.fromkeys((*left.axes, *right.axes)), string.ascii_letters, strict=False))
        spell = lambda names: "".join(letters[a] for a in names)
        spec = f"{spell(left.axes)},{spell(right.axes)}->{spell(axes)}"
        return Named(jnp.einsum(spec, left.value, right.value), axes)
    # XLA turns an elementwise product with a sum into one fused loop, and a batched product of tiny matrices into many calls
    union = (*axes, *summed)
    return Named(left.to(union) * right.to(union), union).sum_to(axes)


def spread(array: Named, sizes: Mapping[str, int], owned: Sequence[str] | None = None) -> Named:
    """Broadcast to the axes of `sizes`, divided by the length of every axis that `owned` lacks.

    With `owned=None` nothing is divided: the value is repeated. With `owned=array.axes` the sum over the new axes is the old value.
    """
    owned = tuple(sizes) if owned is None else owned
    share = math.prod(n for a, n in sizes.items() if a not in owned)
    value = jnp.broadcast_to(array.to(tuple(sizes)), tuple(sizes.values()))
    return Named(value / share if share != 1 else value, tuple(sizes))
