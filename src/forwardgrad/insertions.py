"""Insertions: which sites of a network a part displaces."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import NamedTuple

from forwardgrad.errors import unknown
from forwardgrad.named import axis_names

Only = Callable[[str], bool] | str | Sequence[str] | None


class Choice(NamedTuple):
    """Sites of one kind.

    `only`: a predicate on the site's name within its block, or shell-style patterns, on that name or the one with its block.
    `credit_at`: from the name of a tap within its block to that of the tap its credit is handed to.
    """

    only: Only = None
    shared: tuple[str, ...] = ()
    noise: Mapping[str, tuple[str, ...]] | None = None
    extra: tuple[str, ...] = ()
    credit_at: Callable[[str], str] | None = None

    def select(
        self, names: Mapping[str, str], all_sites: bool = True, passive: Collection[str] = frozenset()
    ) -> list[str]:
        """Of `{site: name within its block}`, the sites chosen: of the passive ones those whose full name, of either kind, is given.

        Raises:
          InputError: these are all sites, and a pattern matches nothing.
        """
        active = {site: name for site, name in names.items() if site not in passive}
        if self.only is None:
            return list(active)
        if callable(self.only):
            return [site for site, name in active.items() if self.only(name)]
        patterns = (self.only,) if isinstance(self.only, str) else tuple(self.only)

        def hit(pattern: str) -> list[str]:
            meant = lambda s, n: fnmatch.fnmatch(n, pattern) or fnmatch.fnmatch(s, pattern)
            return [s for s, n in names.items() if pattern in (n, s) or (s in active and meant(s, n))]

        for pattern in patterns:
            if all_sites and not hit(pattern):
                raise unknown("site", pattern, set(names.values()))
        chosen = {site for pattern in patterns for site in hit(pattern)}
        return [site for site in names if site in chosen]

    def noise_axes(self, name: str, axes: tuple[str, ...]) -> tuple[str, ...]:
        """Axes of the displacement of a site with these axes."""
        if self.noise is not None and name in self.noise:
            return self.noise[name]
        return (*self.extra, *(a for a in axes if a not in self.shared))


class Insertion(NamedTuple):
    """What is displaced. `None`: nothing of that kind."""

    taps: Choice | None = None
    weights: Choice | None = None


def linear_output(name: str) -> str:
    """The passive tap at the output of the linear layer below a tap, as the package's models call it: "channel" to "channel/linear"."""
    return f"{name}/linear"


def activations(
    only: Only = None, *, shared: str | Sequence[str] = (), credit_at: Callable[[str], str] | None = None
) -> Insertion:
    """Displace activations at taps.

    Args:
      only: which taps; by default all that are not passive. A tap that no part displaces is not cut either: the layer above it is
        differentiated one layer deeper.
      shared: axes along which one displacement serves all, e.g. `"batch"` for perturbations shared by all examples (Ren et al., Table 1).
      credit_at: from a displaced tap's name within its block to the name of another tap with the same axes, which gets its credit unchanged:
        the derivative of what lies between the two is skipped, and the estimate biased accordingly. `linear_output` skips normalisations.
    """
    return Insertion(taps=Choice(only, axis_names(shared, "shared"), credit_at=credit_at))


def weights(
    only: Only = None, *, per_example: bool = False, noise: Mapping[str, str | Sequence[str]] | None = None
) -> Insertion:
    """Displace weights.

    Args:
      only: which leaves, by path ("group/kernel"); all that the network lets be displaced by default.
      per_example: an own displacement for each example ("independent" in Ren et al., Table 1). The network then runs one example at a time
        under `vmap`: it costs a matrix product per example.
      noise: `{leaf: axes}` of the displacement, where it is not the leaf's own axes.
    """
    axes = None if noise is None else {leaf: axis_names(a, f"noise of {leaf!r}") for leaf, a in noise.items()}
    return Insertion(weights=Choice(only, noise=axes, extra=("batch",) if per_example else ()))
