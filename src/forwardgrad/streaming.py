"""The *streamed* executor: one block at a time, so that memory does not grow with depth.

**Greedy targets.** A block's own loss is all that it needs: `whole.measure` on a network of this one block, its update, then the next block.
Equal neighbours (`Block.code`) run as one compiled loop over their stacked parameters, updated in place.

**A global loss.** A directional derivative needs no way back, and noise is drawn again from its key instead of being kept:

1. forwards: values and tangents go from block to block, and end in the scalars d;
2. once more: each block's directions are drawn again, credited with d, pulled back one layer deep, and the block is updated.

Cost against the whole executor: nothing for greedy targets and for weights; one more forward pass for activations under a global loss.
Noise is keyed by the block's number, so that both executors draw the same, and agree.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from forwardgrad import credit, taps
from forwardgrad.insertions import Hidden
from forwardgrad.named import Named
from forwardgrad.network import Block, Network, complete, leaf_paths, term_of
from forwardgrad.parts import Carry, Info, Update, learn
from forwardgrad.pieces import in_pieces
from forwardgrad.targets import Scope, Target, local
from forwardgrad.whole import Method, Piece, Step, directions, measure

INNER = Target("inner block", lambda network: frozenset(), lambda network: (Scope("global", (0,), ()),))
LAST = Target("last block", lambda network: frozenset(), lambda network: (Scope("global", (0,), (0,)),))


class Held(NamedTuple):
    """What one block holds between steps. `state`: for each part, the state of its guess and predictor."""

    params: Any
    model_state: Any
    opt_state: Any
    state: tuple[Any, ...]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Packed:
    """All blocks' `Held`, equal neighbours stacked into one pytree with the structure of the first of them.

    Attributes:
      stacks: a `Held` per run of equal blocks; where there are several, its leaves have a leading axis.
      lengths: how many blocks are in each run.
      structures: of each block's own pytree, whose keys may contain its name.
    """

    stacks: tuple[Any, ...]
    lengths: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    structures: tuple[Any, ...] = dataclasses.field(metadata={"static": True})


# what a method needs to be streamed


def is_greedy(method: Method) -> bool:
    """Whether every block has its own loss, cut off from the others."""
    scopes, blocks = method.target.scopes(method.network), method.network.blocks
    own = lambda scope: (
        len(scope.blocks) == 1 and scope.terms == scope.blocks and scope.name == blocks[scope.blocks[0]].name
    )
    return all(own(scope) for scope in scopes) and method.target.cuts(method.network) == frozenset(
        range(1, len(method.network.blocks))
    )


def is_looped(method: Method) -> bool:
    """Whether an exact gradient is taken with equal blocks in one loop: where they are checkpointed.

    Outside of loops XLA merges the second computation with the first on a CPU, and nothing is saved. Without checkpoints a loop keeps more than
    XLA keeps by itself, and takes a quarter longer.
    """
    return not method.parts and not is_greedy(method) and all(block.checkpointed for block in method.network.blocks)


def why_not(method: Method, params: Any, model_state: Any, batch: Mapping[str, Any]) -> str:
    """Why a method cannot be streamed on a network; empty where it can."""
    if is_greedy(method):
        return ""
    last = len(method.network.blocks) - 1
    scopes = method.target.scopes(method.network)
    if len(scopes) != 1 or scopes[0].terms != (last,) or method.target.cuts(method.network):
        return "its target is neither one loss per block, cut between blocks, nor the last block's alone"
    if not method.parts:
        return "it goes back through the whole network"
    for part in method.parts:
        if part.guess is None or not part.guess.sitewise or part.predictor is not None:
            return "it needs directions or predictions that look at the whole network"
        if part.rule.name not in ("unbiased", "unnormalised", "sign"):
            return f"the {part.rule.name} rule needs the length of the whole direction"
        if not part.probe.exact:
            return f"a {part.probe.name} amplifies rounding errors from block to block"
        if part.insertion.taps is not None and isinstance(part.insertion.taps.only, Hidden):
            return "only the network as a whole tells which taps are right below its loss"
        weights = part.insertion.weights
        if weights is not None and any("batch" in axes for axes in (weights.extra, *(weights.noise or {}).values())):
            return "a displacement of weights per example runs one example at a time"
    return _passage(method, params, model_state, batch)


def _passage(method: Method, params: Any, model_state: Any, batch: Mapping[str, Any]) -> str:
    """Whether a leaf with an exact gradient feeds a later block past all displaced taps: that gradient would need a way back."""
    open_blocks: list[str] = []

    def look(params: Any, model_state: Any, batch: Mapping[str, Any]) -> None:
        step = Step(method.network, method.target, params, model_state, batch)
        sites = {site for part in method.parts for site in step.landings(part).values()}
        for i, block in enumerate(method.network.blocks[:-1]):
            leaves = [f"{block.name}#{path}" not in sites for path in leaf_paths(params[block.name]["layers"])]
            cut = {name for site, (position, name) in step.run.where.items() if position == i and site in sites}
            hidden, _ = taps.reached(step.run.programs[i], leaves, cut)
            if any(jax.tree.leaves(hidden)):
                open_blocks.append(block.name)

    jax.eval_shape(look, params, model_state, complete(batch))
    if not open_blocks:
        return ""
    return f"block {open_blocks[0]!r} ends in layers that no displaced tap cuts off from the blocks after it"


# between the trees of a training run, keyed by block, and stacks


def pack(method: Method, carry: Carry, batch: Mapping[str, Any]) -> Packed:
    """Stack what equal neighbours hold. Under a global loss the last block stays alone."""
    blocks = method.network.blocks
    held = [
        Held(
            carry.params[b.name],
            carry.model_state[b.name],
            carry.opt_state[b.name],
            tuple(part.get(b.name, {}) for part in carry.state),
        )
        for b in blocks
    ]
    layout = [tuple((jnp.shape(x), jnp.result_type(x)) for x in jax.tree.leaves(h)) for h in held]
    chosen = _chosen(method, carry, batch)
    runs: list[list[int]] = []
    for i, block in enumerate(blocks):
        before = blocks[i - 1] if i else block
        equal = i > 0 and block.code is not None and block.code == before.code
        equal = equal and layout[i] == layout[i - 1] and chosen[i] == chosen[i - 1]
        if equal and (is_greedy(method) or i < len(blocks) - 1):
            runs[-1].append(i)
        else:
            runs.append([i])
    stacks = []
    for run in runs:
        structure = jax.tree.structure(held[run[0]])
        leaves = zip(*(jax.tree.leaves(held[i]) for i in run), strict=True)
        stacks.append(held[run[0]] if len(run) == 1 else structure.unflatten([jnp.stack(x) for x in leaves]))
    return Packed(tuple(stacks), tuple(map(len, runs)), tuple(map(jax.tree.structure, held)))


def _chosen(method: Method, carry: Carry, batch: Mapping[str, Any]) -> list[Any]:
    """For each block the names of the sites that each part displaces in it: a pattern may name a block."""
    if all(choice is None or choice.only is None for p in method.parts for choice in p.insertion):
        return [None] * len(method.network.blocks)
    chosen = [[set() for _ in method.parts] for _ in method.network.blocks]

    def look(params: Any, model_state: Any, batch: Mapping[str, Any]) -> None:
        step = Step(method.network, method.target, params, model_state, batch)
        for number, part in enumerate(method.parts):
            for name, site in step.sites(part).items():
                chosen[step.position(name)][number].add((site.kind, site.name))

    jax.eval_shape(look, carry.params, carry.model_state, complete(batch))
    return chosen


def unpack(method: Method, packed: Packed, state: tuple[Any, ...]) -> Carry:
    """The inverse of `pack`. `state` is the method's state before; scopes of several blocks, which hold nothing, are taken from it."""
    held = []
    for stack, length in zip(packed.stacks, packed.lengths, strict=True):
        for k in range(length):
            leaves = jax.tree.leaves(stack if length == 1 else jax.tree.map(lambda x, k=k: x[k], stack))
            held.append(packed.structures[len(held)].unflatten(leaves))
    blocks = {b.name: h for b, h in zip(method.network.blocks, held, strict=True)}
    new_state = tuple(
        {scope: blocks[scope].state[number] if scope in blocks else roles for scope, roles in part.items()}
        for number, part in enumerate(state)
    )
    by_name = lambda field: {name: getattr(h, field) for name, h in blocks.items()}
    return Carry(by_name("params"), by_name("model_state"), by_name("opt_state"), new_state)


def _look(
    method: Method, packed: Packed, visit: Callable[[Block, Any, Held, Any], tuple[Any, Any]], moving: Any
) -> tuple[Any, list[Any]]:
    """Visit the blocks in order, changing nothing: `visit(block, number, held, moving) -> (moving, out)`.

    Returns:
      What moved on, and the `out` of each run, stacked where the run has several blocks.
    """
    outs, start = [], 0
    for stack, length in zip(packed.stacks, packed.lengths, strict=True):
        block = method.network.blocks[start]
        if length == 1:
            moving, out = visit(block, start, stack, moving)
        else:

            def one(moving: Any, k: jax.Array, block=block, start=start, stack=stack) -> tuple[Any, Any]:
                return visit(block, start + k, _at(stack, k), moving)

            moving, out = jax.lax.scan(one, moving, jnp.arange(length))
        outs.append(out)
        start += length
    return moving, outs


def _change(
    method: Method, packed: Packed, visit: Callable[[Block, Any, Held, Any], tuple[Held, Any, Any]], moving: Any
) -> tuple[Packed, list[Any]]:
    """Visit the blocks in order, changing what they hold in place: `visit(block, number, held, moving) -> (held, moving, out)`."""
    stacks, outs, start = [], [], 0
    for stack, length in zip(packed.stacks, packed.lengths, strict=True):
        block = method.network.blocks[start]
        if length == 1:
            stack, moving, out = visit(block, start, stack, moving)
        else:

            def one(carry: tuple[Any, Any], k: jax.Array, block=block, start=start) -> tuple[tuple[Any, Any], Any]:
                stack, moving = carry
                held, moving, out = visit(block, start + k, _at(stack, k), moving)
                put = lambda x, new: jax.lax.dynamic_update_index_in_dim(x, new.astype(x.dtype), k, 0)
                return (jax.tree.map(put, stack, held), moving), out

            (stack, moving), out = jax.lax.scan(one, (stack, moving), jnp.arange(length))
        stacks.append(stack)
        outs.append(out)
        start += length
    return dataclasses.replace(packed, stacks=tuple(stacks)), outs


def _updated(update: Update, name: str, number: int | jax.Array, grads: Any, held: Held) -> tuple[Any, Any]:
    """The update of one block: new parameters and optimiser state.

    In a loop over blocks, in buffers of its own: an update that reads both and writes both would otherwise have XLA copy all blocks' parameters.
    A loop of one turn, whose number of turns XLA cannot know, is what keeps it from merging the reading with the writing.
    """
    if isinstance(number, int):
        return update(name, grads, held.opt_state, held.params)
    turns = jnp.minimum(number + 1, 1)
    turn = lambda _, both: update(name, grads, both[1], both[0])
    return jax.lax.fori_loop(0, turns, turn, (held.params, held.opt_state))


def _at(stack: Held, k: jax.Array) -> Held:
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, k, keepdims=False), stack)


# one step


def step(
    method: Method, key: jax.Array, packed: Packed, batch: Mapping[str, Any], microbatch: int | None, update: Update
) -> tuple[Packed, jax.Array, Info]:
    """One training step: what the blocks hold afterwards, the target's loss, and the reader's information."""
    run = _greedy if is_greedy(method) else _global if method.parts else _exact
    packed, outs = run(method, key, packed, batch, microbatch, update)
    losses, start = {}, 0
    for (loss, _), length in zip(outs, packed.lengths, strict=True):
        if loss is not None:  # under a global loss all but the last block have none
            own = [loss] if length == 1 else list(loss)
            losses |= {method.network.blocks[start + k].name: x for k, x in enumerate(own)}
        start += length
    outputs = outs[-1][1] if packed.lengths[-1] == 1 else jax.tree.map(lambda x: x[-1], outs[-1][1])
    return packed, sum(losses.values(), jnp.zeros_like(next(iter(losses.values())))), Info(losses, outputs)


def _greedy(
    method: Method, key: jax.Array, packed: Packed, batch: Mapping[str, Any], microbatch: int | None, update: Update
) -> tuple[Packed, list[Any]]:
    def visit(block: Block, number: Any, held: Held, h: Any) -> tuple[Held, Any, Any]:
        one = Piece(Network((block,)), local(), method.parts)
        params, model_state = {block.name: held.params}, {block.name: held.model_state}
        state = tuple({block.name: roles} if roles else {} for roles in held.state)

        def some(batch: Mapping[str, Any]) -> tuple[Any, Any]:
            m = measure(one, key, state, params, model_state, batch, number)
            sums = m.estimate.loss, m.estimate.grads[block.name], m.statistics, m.model_state[block.name]
            return sums, (m.hidden, m.estimate.info.outputs)

        (loss, grads, statistics, new), (h, outputs) = in_pieces(some, {**batch, "inputs": h}, microbatch)
        learned = learn(method.parts, state, statistics)
        params, opt_state = _updated(update, block.name, number, grads, held)
        held = Held(params, new, opt_state, tuple(part.get(block.name, {}) for part in learned))
        return held, h, (loss, outputs)

    return _change(method, packed, visit, batch["inputs"])


def _exact(
    method: Method, key: jax.Array, packed: Packed, batch: Mapping[str, Any], microbatch: int | None, update: Update
) -> tuple[Packed, list[Any]]:
    """Backpropagation, not streamed: equal blocks in one loop forwards and one back. See `is_looped`."""
    blocks, cuts = method.network.blocks, method.target.cuts(method.network)
    wanted = {t for scope in method.target.scopes(method.network) for t in scope.terms}
    starts = [sum(packed.lengths[:i]) for i in range(len(packed.lengths))]

    def some(batch: Mapping[str, Any]) -> tuple[Any, Any]:
        def total(params: list[Any]) -> tuple[jax.Array, Any]:
            h, terms, states, loss = batch["inputs"], [], [], jnp.zeros(())
            for start, length, stack, own in zip(starts, packed.lengths, packed.stacks, params, strict=True):
                block = blocks[start]

                def one(h: Any, held: Any, block=block, start=start) -> tuple[Any, Any]:
                    params, state = held
                    h, state = block.apply(params["layers"], state, h, True)
                    return h, (state, term_of(block, params["readout"], h, batch) if start in wanted else None)

                h = jax.lax.stop_gradient(h) if start in cuts else h
                held = (own, stack.model_state)
                h, (state, term) = one(h, held) if length == 1 else jax.lax.scan(one, h, held)
                states.append(state)
                terms.append(term)
                if term is not None:
                    loss += term.cells.value.sum()
            losses = [
                None if t is None else t.cells.value.sum(tuple(range(n > 1, t.cells.value.ndim)))
                for t, n in zip(terms, packed.lengths, strict=True)
            ]
            return loss, (losses, states, terms[-1].outputs)

        (_, (losses, states, outputs)), grads = jax.value_and_grad(total, has_aux=True)(
            [s.params for s in packed.stacks]
        )
        return (losses, grads, states), outputs

    (losses, grads, states), outputs = in_pieces(some, batch, microbatch)
    stacks, outs = [], []
    for i, (start, length, stack) in enumerate(zip(starts, packed.lengths, packed.stacks, strict=True)):
        one = lambda *own, name=blocks[start].name: update(name, *own)
        change = one if length == 1 else jax.vmap(one)
        params, opt_state = change(grads[i], stack.opt_state, stack.params)
        stacks.append(stack._replace(params=params, opt_state=opt_state, model_state=states[i]))
        outs.append((losses[i], outputs))
    return dataclasses.replace(packed, stacks=tuple(stacks)), outs


def _global(
    method: Method, key: jax.Array, packed: Packed, batch: Mapping[str, Any], microbatch: int | None, update: Update
) -> tuple[Packed, list[Any]]:
    last = method.network.blocks[-1]
    cells: dict[str, int] = {}

    def step_of(block: Block, number: Any, held: Held, batch: Mapping[str, Any]) -> Step:
        target = LAST if block is last else INNER
        params, model_state = {block.name: held.params}, {block.name: held.model_state}
        sizes = {a: len(batch["weight"]) if a == "batch" else n for a, n in cells.items()}
        return Step(Network((block,)), target, params, model_state, batch, number, sizes)

    def measure_axes(block: Block, number: Any, held: Held, h: Any) -> tuple[Any, None]:
        step = step_of(block, number, held, {**batch, "inputs": h})
        cells.update(step.lengths)
        return step.hidden, None

    jax.eval_shape(lambda packed: _look(method, packed, measure_axes, batch["inputs"]), packed)

    def drawn(step: Step) -> list[dict[str, Named]]:
        """Each part's directions in this block: the same whenever they are asked for."""
        out = []
        for number, part in enumerate(method.parts):
            own = jax.random.fold_in(jax.random.fold_in(jax.random.fold_in(key, number), 0), 0)
            views = list(step.views(part).values())
            out.append(directions(part, own, (), views[0]) if views else {})
        return out

    def forwards(batch: Mapping[str, Any]) -> tuple[Any, Any]:
        """Coefficients of every part, those of examples apart; the new model state; the last block's input."""

        def visit(block: Block, number: Any, held: Held, moving: Any) -> tuple[Any, Any]:
            h, tangents = moving
            step = step_of(block, number, held, {**batch, "inputs": h})
            new, coefficients = [], []
            for part, u, tangent in zip(method.parts, drawn(step), tangents, strict=True):
                if not u and tangent is None:
                    new.append(jax.tree.map(lambda x, k=part.draws: jnp.zeros((k, *x.shape), x.dtype), step.hidden))
                    continue
                pushed = step.push(part, u, tangent)
                new.append(pushed.hidden)
                if block is last:
                    d = step.cells(step.scopes[0], pushed.terms)
                    scalar, squared = credit.scalars(d, {}, {}, part.partition)
                    weight = Named(batch["weight"], ("batch",))
                    coefficients.append(credit.coefficients(part.rule, scalar, squared, weight))
            return (step.hidden, tuple(new)), (step.state[block.name], coefficients, h if block is last else None)

        h = batch["inputs"]
        still = lambda part: jax.tree.map(lambda x: jnp.zeros((part.draws, *x.shape), x.dtype), h)
        tangents = tuple(None if packed.lengths[0] == 1 else still(part) for part in method.parts)
        _, outs = _look(method, packed, visit, (h, tangents))
        _, coefficients, h = outs[-1]
        apart = {i: c for i, c in enumerate(coefficients) if "batch" in c.axes}
        apart = {i: Named(c.to(axes), axes) for i, c in apart.items() for axes in [_batch_first(c.axes)]}
        together = {i: c for i, c in enumerate(coefficients) if i not in apart}
        return (together, [out[0] for out in outs]), (apart, h)

    (together, model_states), (apart, last_input) = in_pieces(forwards, batch, microbatch)
    again = any(part.insertion.taps is not None for part in method.parts)
    if not again:  # weights need no second look at the data, which alone would bring the new model state
        stacks = [stack._replace(model_state=new) for stack, new in zip(packed.stacks, model_states, strict=True)]
        packed = dataclasses.replace(packed, stacks=tuple(stacks))

    def credited(step: Step, apart: Mapping[int, Named], taps: bool) -> dict[str, Named]:
        coefficients = {**together, **apart}
        return {
            landing: credit.credit(where.axes, coefficients[number], u[site], None)
            for number, (part, u) in enumerate(zip(method.parts, drawn(step), strict=True))
            for (site, where), landing in zip(step.sites(part).items(), step.landings(part).values(), strict=True)
            if (where.kind == "tap") == taps
        }

    def visit(block: Block, number: Any, held: Held, h: Any) -> tuple[Held, Any, Any]:
        h = last_input if block is last and not again else h
        few = step_of(block, number, held, jax.tree.map(lambda x: x[:1], {**batch, "inputs": h}))
        weights = credited(few, apart, taps=False)

        def some(batch: Mapping[str, Any]) -> tuple[Any, Any]:
            step = step_of(block, number, held, {k: v for k, v in batch.items() if k != "apart"})
            estimate, state = step.pull(credited(step, batch["apart"], taps=True), set(weights))
            loss, outputs = (estimate.loss, estimate.info.outputs) if block is last else (None, None)
            return (loss, estimate.grads[block.name], state[block.name]), (step.hidden, outputs)

        if again or block is last:
            (loss, grads, state), (h, outputs) = in_pieces(some, {**batch, "inputs": h, "apart": apart}, microbatch)
        else:
            loss, outputs, state = None, None, held.model_state
            grads = jax.tree.map(jnp.zeros_like, held.params)
            h = jax.tree.map(lambda x: jnp.zeros((len(batch["weight"]), *x.shape[1:]), x.dtype), few.hidden)
        grads = few.with_estimated({block.name: grads}, weights)[block.name]
        params, opt_state = _updated(update, block.name, number, grads, held)
        state = state if again else held.model_state
        return held._replace(params=params, model_state=state, opt_state=opt_state), h, (loss, outputs)

    return _change(method, packed, visit, batch["inputs"])


def _batch_first(axes: tuple[str, ...]) -> tuple[str, ...]:
    return ("batch", *(a for a in axes if a != "batch"))
