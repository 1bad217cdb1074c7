"""Targets: whose derivative is estimated.

A target says where gradients are cut between blocks, which losses exist, and, as scopes, which blocks each of them is credited to.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from forwardgrad.errors import InputError
from forwardgrad.network import Network


class Scope(NamedTuple):
    """Blocks and the losses they are credited with. Scopes never share a block.

    Attributes:
      name: key of the scope's state.
      blocks: positions of the blocks.
      terms: positions of the blocks whose losses they receive; the last one's outputs are what feedback guesses look at.
    """

    name: str
    blocks: tuple[int, ...]
    terms: tuple[int, ...]


class Target(NamedTuple):
    """Attributes: `name`; `cuts(network)`, positions of blocks whose input gradient is stopped; `scopes(network)`."""

    name: str
    cuts: Callable[[Network], frozenset[int]]
    scopes: Callable[[Network], tuple[Scope, ...]]


def global_loss() -> Target:
    """The last readout's loss, credited to all blocks: backpropagation's own target. Other readouts get no gradient."""
    return Target(
        "global",
        lambda network: frozenset(),
        lambda network: (Scope("global", tuple(range(len(network.blocks))), (len(network.blocks) - 1,)),),
    )


def local(cut: bool = True) -> Target:
    """Every block's own loss.

    Args:
      cut: True is *greedy*: gradients stop between blocks, so that a block is credited with its own loss alone. False adds all local losses
        and lets them flow end to end; only a detached readout stays cut off.

    Raises:
      InputError: (when used) a block has no readout.
    """

    def check(network: Network) -> None:
        bare = [block.name or "(the function)" for block in network.blocks if block.readout is None]
        if bare:
            raise InputError(
                f"local losses need a readout on every block, and {', '.join(bare)} has none: use a method with a global loss, such as "
                "bp, fg-a or fg-w, or give the model local readouts."
            )

    def cuts(network: Network) -> frozenset[int]:
        return frozenset(i for i, block in enumerate(network.blocks) if i and (cut or block.detached))

    def scopes(network: Network) -> tuple[Scope, ...]:
        check(network)
        return tuple(Scope(network.blocks[span[-1]].name, span, span) for span in _spans(network, cuts(network)))

    return Target("local" if cut else "local, not cut", cuts, scopes)


def last_local() -> Target:
    """The last block's own loss, credited to all blocks, with nothing cut between them; a detached final readout is trained on its own.

    What is left of local losses where only the last of them stays (Ren et al. 2023, Figure 6, "patch + group"). Where no readout is detached
    this is `global_loss`.
    """

    def cuts(network: Network) -> frozenset[int]:
        return frozenset(i for i, block in enumerate(network.blocks) if i and block.detached)

    def scopes(network: Network) -> tuple[Scope, ...]:
        spans = _spans(network, cuts(network))
        return tuple(Scope(network.blocks[span[-1]].name, span, span[-1:]) for span in spans)

    return Target("last local", cuts, scopes)


def _spans(network: Network, cuts: frozenset[int]) -> list[tuple[int, ...]]:
    """Positions of the blocks between cuts."""
    starts = sorted({0, *cuts})
    ends = [*starts[1:], len(network.blocks)]
    return [tuple(range(start, end)) for start, end in zip(starts, ends, strict=True)]
