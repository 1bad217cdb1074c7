"""What a recipe is."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable

from forwardgrad.engine import Estimator
from forwardgrad.network import Network


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A named method. Calling it builds the estimator.

    Attributes:
      name: on the command line.
      build: the function that the recipe decorates.
      cite: keys of `forwardgrad.cite`.
      passes: from the number of draws to the matrix products of a step, in units of a forward pass: what "Cost" states, where a tangent that
        moves weights and activations takes two, and a backward pass one each for weights and activations.
    """

    name: str
    build: Callable[..., Estimator]
    cite: tuple[str, ...]
    passes: Callable[[int], int]

    def __call__(self, network: Network, **options) -> Estimator:
        return dataclasses.replace(self.build(network, **options), name=self.name)

    @property
    def options(self) -> tuple[str, ...]:
        """Names of its keyword arguments."""
        return tuple(inspect.signature(self.build).parameters)[1:]

    @property
    def about(self) -> str:
        """First line of the docstring."""
        return (self.build.__doc__ or "").strip().splitlines()[0]


def recipe(*cite: str, passes: Callable[[int], int]) -> Callable[[Callable[..., Estimator]], Recipe]:
    """Make a function a recipe, named after it.

    Args:
      cite, passes: as in `Recipe`.
    """

    def wrap(build: Callable[..., Estimator]) -> Recipe:
        made = Recipe(build.__name__.strip("_").replace("_", "-"), build, cite, passes)
        object.__setattr__(made, "__doc__", build.__doc__)
        return made

    return wrap
