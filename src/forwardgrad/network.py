"""What is trained: blocks with readouts, every parameter and every state explicit.

A network is a tuple of blocks. A block maps a hidden state to a hidden state; its readout, where it has one, maps that to outputs and a
loss. The last block's readout is the network's prediction. Parameters are `{block: {"layers": ..., "readout": ...}}`, two pytrees a block:
estimators may displace the layers, a readout always gets its exact gradient, which is one layer deep.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from forwardgrad import taps
from forwardgrad.errors import InputError
from forwardgrad.named import Named


def _nothing(key: jax.Array) -> tuple[()]:
    return ()


class Readout(NamedTuple):
    """From a hidden state to outputs and a loss.

    Attributes:
      outputs: `(params, h) -> Named`, e.g. logits with axes `("batch", "class")`; the batch axis, where there is one, comes first.
      loss: `(outputs, batch) -> Named`, loss cells, the batch axis first: one number per example and, where there are more axes, per patch,
        group, ... The cells of an example sum to its loss. They are *not* divided by the number of examples: the engine weighs them with
        `batch["weight"]`.
      cells: `(params, h, batch) -> Named`, the same cells straight from the hidden state, where fusing both is cheaper or where outputs do
        not keep the cells apart. `None`: `loss(outputs(params, h), batch)`.
      init: `key -> params`.
      shares: `(params, h) -> Named`, what each cell contributes to the outputs, with the outputs' axes and those of the cells: summed over the cells
        it is, up to constants, the outputs, and the slice of a cell depends on that cell alone. What feedback for cells is learned from.
        `None`: outputs, whose cells are the examples.
    """

    outputs: Callable[[Any, Any], Named]
    loss: Callable[[Named, Mapping[str, Any]], Named]
    cells: Callable[[Any, Any, Mapping[str, Any]], Named] | None = None
    init: Callable[[jax.Array], Any] = _nothing
    shares: Callable[[Any, Any], Named] | None = None


class Block(NamedTuple):
    """One block of layers.

    Attributes:
      name: unique within the network; the first half of its sites' names.
      apply: `(params, state, h, train) -> (h, state)`; `params` are the layers' alone. `train` is a Python bool.
      readout: its readout or `None`. Greedy targets need one on every block.
      init: `key -> (params, state)`.
      weights: `{leaf path: axes}` of the leaves that may be displaced, e.g. `{"group/kernel": ("group", "in", "channel")}`. An axis that the
        loss has too keeps its cells apart there. `None`: every leaf, with axes that no loss shares.
      detached: a readout only, as Ren et al.'s final classifier: with local targets its loss never reaches the blocks below.
      code: neighbours whose `code` is equal and not `None` compute the same function of parameters of equal shapes, so that the streamed
        executor may compile one of them for all.
      checkpointed: `apply` computes again on the way back what it does not keep (`Network.checkpointed`).
    """

    name: str
    apply: Callable[[Any, Any, Any, bool], tuple[Any, Any]]
    readout: Readout | None = None
    init: Callable[[jax.Array], tuple[Any, Any]] = lambda key: ((), ())
    weights: Mapping[str, tuple[str, ...]] | None = None
    detached: bool = False
    code: Any = None
    checkpointed: bool = False


class Network(NamedTuple):
    """Blocks in order. See the module's docstring."""

    blocks: tuple[Block, ...]

    def init(self, key: jax.Array) -> tuple[dict[str, Any], dict[str, Any]]:
        """Parameters `{block: {"layers", "readout"}}` and model state `{block: ...}`."""
        params, state = {}, {}
        for i, block in enumerate(self.blocks):
            layers_key, readout_key = jax.random.split(jax.random.fold_in(key, i))
            layers, state[block.name] = block.init(layers_key)
            params[block.name] = {"layers": layers, "readout": block.readout.init(readout_key) if block.readout else ()}
        return params, state

    def predict(self, params: Any, state: Any, inputs: Any) -> Named:
        """Outputs of the last readout in evaluation mode."""
        h = inputs
        for block in self.blocks:
            h, _ = block.apply(params[block.name]["layers"], state[block.name], h, False)
        last = self.blocks[-1]
        if last.readout is None:
            raise InputError(
                f"block {last.name!r} is the last one and has no readout: give it one, so that there is a prediction."
            )
        return last.readout.outputs(params[last.name]["readout"], h)

    def checkpointed(self) -> Network:
        """The same network with `jax.checkpoint` around every block: backpropagation that stores block inputs only."""
        again = lambda block: jax.checkpoint(block.apply, static_argnums=(3,), prevent_cse=True)
        return Network(tuple(b._replace(apply=again(b), checkpointed=True) for b in self.blocks))


def in_precision(network: Network, dtype: Any) -> Network:
    """The same network with its layers computed in another floating-point type, such as `jnp.bfloat16`.

    Parameters, model state, readouts, losses and gradients stay as they are; activations, their tangents and perturbations have the new type.
    """

    def cast(tree: Any) -> Any:
        return jax.tree.map(lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree)

    def layers(block: Block) -> Callable:
        def apply(params: Any, state: Any, h: Any, train: bool) -> tuple[Any, Any]:
            h, new = block.apply(cast(params), state, cast(h), train)
            return cast(h), jax.tree.map(lambda x, old: x.astype(old.dtype), new, state)

        return apply

    def readout(block: Block) -> Readout | None:
        own = block.readout
        if own is None:
            return None
        like = lambda params, h: jax.tree.map(lambda x: x.astype(_widest(params)), h)
        outputs = lambda params, h: own.outputs(params, like(params, h))
        cells = own.cells
        wide = None if cells is None else lambda params, h, batch: cells(params, like(params, h), batch)
        shares = own.shares
        apart = None if shares is None else lambda params, h: shares(params, like(params, h))
        return own._replace(outputs=outputs, cells=wide, shares=apart)

    return Network(tuple(b._replace(apply=layers(b), readout=readout(b)) for b in network.blocks))


def _widest(params: Any) -> Any:
    leaves = jax.tree.leaves(params)
    return jnp.result_type(*leaves) if leaves else jnp.float32


def leaf_paths(tree: Any) -> dict[str, Any]:
    """`{"path/to/leaf": leaf}` of a pytree; a `Named` is one leaf."""
    flat = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda x: isinstance(x, Named))[0]
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in flat}


def with_leaves(tree: Any, leaves: Mapping[str, Any]) -> Any:
    """The pytree with the leaves at the given paths replaced."""
    name = lambda path: jax.tree_util.keystr(path, simple=True, separator="/")
    return jax.tree_util.tree_map_with_path(lambda path, leaf: leaves.get(name(path), leaf), tree)


class Term(NamedTuple):
    """One loss of a run: the readout's outputs, its cells, weighed so that they sum to the mean loss, and the cells' shares of the outputs."""

    outputs: Named
    cells: Named
    shares: Named

    @property
    def loss(self) -> jax.Array:
        return self.cells.value.sum()


class Ran(NamedTuple):
    """A run of a network: `{position: Term}`, `{tap site: record}`, model state, and the last block's output."""

    terms: dict[int, Term]
    records: dict[str, Any]
    state: dict[str, Any]
    hidden: Any


def prefix(block: Block) -> str:
    """What stands before a tap's name in a site's name: nothing for a nameless block (a plain function)."""
    return f"{block.name}/" if block.name else ""


def complete(batch: Mapping[str, Any]) -> dict[str, Any]:
    """Fill in `weight` (1/N each) and `index` (0 ... N-1), whose defaults make the loss the mean over the batch.

    `index` numbers the examples of the whole batch: noise is keyed by it, so that microbatches draw what the whole batch would draw.
    """
    batch = dict(batch)
    if "weight" not in batch or "index" not in batch:
        size = jnp.shape(jax.tree.leaves(batch["inputs"])[0])[0]
        batch.setdefault("weight", jnp.full(size, 1 / size))
        batch.setdefault("index", jnp.arange(size))
    return batch


def weighed(cells: Named, batch: Mapping[str, Any]) -> Named:
    """Cells times their example's weight: after this they *sum* to the loss. Cells without a batch axis are already a loss."""
    if "batch" not in cells.axes:
        return cells
    weight = Named(batch["weight"].astype(cells.value.dtype), ("batch",))
    return Named(cells.value * weight.to(cells.axes), cells.axes)


class Runner:
    """Runs a network on one batch under any visitor, tracing each block once.

    Args:
      network: the blocks.
      cuts: positions of blocks whose input gradient is stopped.
      terms: positions of blocks whose losses are wanted.
      state: model state before the step.
      batch: `inputs`, `labels`, `weight`, `index`.

    Attributes:
      where: `{tap site: (position of its block, name within it)}`, known after a run.
      passive: sites of the passive taps among them.
      programs: the blocks as they were traced last, known after a run.
      inputs: how many leaves their inputs have, the last of the programs' arguments.
    """

    def __init__(
        self, network: Network, cuts: frozenset[int], terms: tuple[int, ...], state: Any, batch: Mapping[str, Any]
    ):
        names = [block.name for block in network.blocks]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise InputError(f"two blocks are called {twice[0]!r}: give each block its own name.")
        self.network, self.cuts, self.terms, self.state, self.batch = network, cuts, terms, state, batch
        self.where: dict[str, tuple[int, str]] = {}
        self.passive: set[str] = set()
        self.programs: dict[int, taps.Program] = {}
        self.inputs: dict[int, int] = {}
        self._programs: dict[Any, taps.Program] = {}

    def __call__(
        self, params: Any, visit: taps.Visit, state: Any = None, batch: Mapping[str, Any] | None = None
    ) -> Ran:
        """One forward pass under a visitor."""
        state, batch = self.state if state is None else state, self.batch if batch is None else batch
        h, records, terms, new_state = batch["inputs"], {}, {}, {}
        for i, block in enumerate(self.network.blocks):
            if i in self.cuts:
                h = jax.lax.stop_gradient(h)
            here = prefix(block)
            args = (params[block.name]["layers"], state[block.name], h)
            program = self.programs[i] = self._program(i, args)
            self.inputs[i] = len(jax.tree.leaves(h))
            self.where.update({here + name: (i, name) for name in program.taps})
            self.passive.update(here + name for name in program.passive)
            (h, new_state[block.name]), seen = taps.evaluate(
                program, args, lambda name, axes, z, here=here: visit(here + name, axes, z)
            )
            records.update({here + name: value for name, value in seen.items()})
            if i in self.terms:
                terms[i] = term_of(block, params[block.name]["readout"], h, batch)
        return Ran(terms, records, new_state, h)

    def leads(self, i: int, source: str | Sequence[bool], passive: bool = False) -> tuple[bool, set[str]]:
        """What in block `i` depends on something past no other tap: whether what it gives does, and names of the taps that do.

        Args:
          source: a tap's name; or for each leaf of the block's layers, state and input whether it is asked about.
          passive: whether passive taps are taps here.
        """
        program = self.programs[i]
        args = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in program.closed.in_avals]
        others = {name for name in program.taps if name != source and (passive or name not in program.passive)}
        records = jax.eval_shape(lambda *args: taps.evaluate(program, args, taps.record)[1], *args)
        start, flags = ([records[source].value], [True]) if isinstance(source, str) else ([], source)

        def after(*args: Any) -> Any:
            def visit(name: str, axes: tuple[str, ...], value: jax.Array) -> tuple[Any, jax.Array]:
                return value if name in others else None, args[0] if name == source else taps.tap(value, name, axes)

            return taps.evaluate(program, args[len(start) :], visit)

        out, seen = taps.reached(taps.trace(after, *start, *args), flags, others)
        return any(jax.tree.leaves(out)), {name for name, hit in seen.items() if hit}

    def input_flags(self, i: int) -> list[bool]:
        """For `leads`: what depends on the block's input."""
        leaves = len(self.programs[i].closed.in_avals)
        return [False] * (leaves - self.inputs[i]) + [True] * self.inputs[i]

    def _program(self, i: int, args: Any) -> taps.Program:
        leaves, structure = jax.tree.flatten(args)
        key = (i, structure, tuple(jax.typeof(leaf) for leaf in leaves))
        if key not in self._programs:
            apply = self.network.blocks[i].apply
            self._programs[key] = taps.trace(lambda params, state, h: apply(params, state, h, True), *args)
        return self._programs[key]


def term_of(block: Block, params: Any, h: Any, batch: Mapping[str, Any]) -> Term:
    """The readout's outputs and its cells, weighed."""
    readout = block.readout
    if readout is None:
        raise InputError(
            f"block {block.name!r} has no readout, but this target needs its loss: give the block a readout, or use a method with a "
            "global loss."
        )
    outputs = readout.outputs(params, h)
    cells = readout.loss(outputs, batch) if readout.cells is None else readout.cells(params, h, batch)
    shares = outputs if readout.shares is None else readout.shares(params, h)
    return Term(outputs, weighed(cells, batch), shares)
