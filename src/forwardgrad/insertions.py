"""Insertions: which sites of a network a part displaces."""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import NamedTuple

from forwardgrad.errors import unknown
from forwardgrad.named import axis_names


@dataclasses.dataclass(frozen=True)
class Hidden:
    """All taps but those right below a loss: from which every way leads to a loss, or to a cut, past no other tap, passive ones apart.

    The layer below such a tap then gets the exact gradient of that loss. It costs one hop backwards through the head's weights,
    and takes this layer's noise out of the scalars of all others. A tap from which a skip leads to the loss, and another way to a tap, is displaced.

    Attributes:
      but: names within the block that are left out too, e.g. those of a layer that another part displaces by its weights.
    """

    but: tuple[str, ...] = ()


hidden = Hidden()
"""`fg.activations(only=fg.hidden)`: see `Hidden`."""

Only = Callable[[str], bool] | str | Sequence[str] | Hidden | None


class Choice(NamedTuple):
    """Sites of one kind.

    `only`: a predicate on the site's name within its block; shell-style patterns, on that name or the one with its block; or `hidden`.
    `credit_at`: from the name of a tap within its block to that of the tap its credit is handed to.
    """

    only: Only = None
    shared: tuple[str, ...] = ()
    noise: Mapping[str, tuple[str, ...]] | None = None
    extra: tuple[str, ...] = ()
    credit_at: Callable[[str], str] | None = None

    def select(
        self,
        names: Mapping[str, str],
        all_sites: bool = True,
        passive: Collection[str] = frozenset(),
        below_loss: Callable[[], Collection[str]] = frozenset,
    ) -> list[str]:
        """Of `{site: name within its block}`, the sites chosen: of the passive ones those whose full name, of either kind, is given.

        Args:
          names: of all sites of one kind.
          all_sites: these are all of the network's, and not those of a piece of it.
          passive: sites that are chosen only by name.
          below_loss: tells which sites are right below a loss, where it is asked.

        Raises:
          InputError: these are all sites, and a pattern matches nothing.
        """
        active = {site: name for site, name in names.items() if site not in passive}
        if self.only is None:
            return list(active)
        if isinstance(self.only, Hidden):
            exact = below_loss()
            return [site for site, name in active.items() if site not in exact and name not in self.only.but]
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
        differentiated one layer deeper. `fg.hidden` leaves out the taps right below each loss.
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
      per_example: an own displacement for each example ("independent" in Ren et al., Table 1). It costs a matrix product per example, and runs
        the network one example at a time under `vmap`: as far as the next taps, or as a whole where there are none.
      noise: `{leaf: axes}` of the displacement, where it is not the leaf's own axes.
    """
    axes = None if noise is None else {leaf: axis_names(a, f"noise of {leaf!r}") for leaf, a in noise.items()}
    return Insertion(weights=Choice(only, noise=axes, extra=("batch",) if per_example else ()))
