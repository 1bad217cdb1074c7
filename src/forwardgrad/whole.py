"""The *whole* executor: the network as one function, for any model. The reference, and the oracle of every other executor.

1. **record**: the network once, activations written down; scopes pair blocks with their losses.
2. **propose**: each part's guess proposes directions, its predictor a gradient.
3. **push**: the derivative of every loss cell along the directions, draws under one `vmap`, so that they share one primal.
4. **credit**: from scalars and directions to one array per site (`credit.py`).
5. **pull**: one vjp with every displaced tap cut, from credits to weight gradients: one layer deep where every path from a loss, or from a
   displaced tap, to a leaf that it trains crosses no further layer; a tap that is left out (`only=`) makes it one layer deeper there.

The passes repeat the same forward computation under different visitors; inside one `jit` XLA keeps a single copy.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from forwardgrad import credit, taps
from forwardgrad.errors import InputError, unknown
from forwardgrad.guesses.base import Site, View
from forwardgrad.named import Named, axis_names, contract
from forwardgrad.network import Network, Runner, Term, leaf_paths, weighed, with_leaves
from forwardgrad.parts import Estimate, Info, Part
from forwardgrad.targets import Scope, Target


class Step:
    """One batch of an estimator: the recorded run, and the passes over it."""

    def __init__(self, network: Network, target: Target, params: Any, model_state: Any, batch: Mapping[str, Any]):
        self.network, self.params, self.batch = network, params, batch
        self.scopes = target.scopes(network)
        terms = tuple(t for scope in self.scopes for t in scope.terms)
        self.run = Runner(network, target.cuts(network), terms, model_state, batch)
        self.terms, self.taps, _ = self.run(params, taps.record)

    def cells(self, scope: Scope, terms: Mapping[int, Term]) -> Named:
        """The scope's loss cells; several losses are added along the axes that all of them have."""
        several = [terms[t].cells for t in scope.terms]
        axes = tuple(a for a in several[0].axes if all(a in cells.axes for cells in several))
        return Named(sum((cells.sum_to(axes).to(axes) for cells in several[1:]), several[0].sum_to(axes).value), axes)

    def sites(self, part: Part) -> dict[str, Site]:
        """All sites that the part displaces, by full name."""
        out: dict[str, Site] = {}
        if part.insertion.taps is not None:
            choice = part.insertion.taps
            for site in choice.select({site: name for site, (_, name) in self.run.where.items()}):
                block, name = self.run.where[site]
                z = self.taps[site]
                noise = choice.noise_axes(name, z.axes)
                self._refuse_axes(site, part, noise, z.sizes)
                out[site] = Site(
                    z.axes,
                    jnp.shape(z.value),
                    noise,
                    self._lengths(site, noise, z.sizes),
                    z.value.dtype,
                    "tap",
                    block,
                    name,
                )
        if part.insertion.weights is not None:
            choice = part.insertion.weights
            for block in self.network.blocks:
                known = leaf_paths(self.params[block.name]["layers"])
                for name in block.weights or ():
                    if name not in known:
                        raise unknown("weight", name, known, f"Block {block.name!r} names its axes.")
            leaves = {
                f"{block.name}#{name}": (i, name, leaf)
                for i, block in enumerate(self.network.blocks)
                for name, leaf in leaf_paths(self.params[block.name]["layers"]).items()
                if block.weights is None or name in block.weights
            }
            for site in choice.select({site: leaf[1] for site, leaf in leaves.items()}):
                i, name, leaf = leaves[site]
                anonymous = tuple(f"{site}:{k}" for k in range(jnp.ndim(leaf)))
                axes = axis_names(self._weight_axes(self.network.blocks[i].name, name, anonymous), f"weight {site!r}")
                if len(axes) != jnp.ndim(leaf):
                    raise InputError(
                        f"weight {site!r} has shape {jnp.shape(leaf)} and {len(axes)} axes named: name every axis once, in order."
                    )
                noise = choice.noise_axes(name, axes)
                sizes = dict(zip(axes, jnp.shape(leaf), strict=True))
                self._refuse_axes(site, part, noise, sizes)
                out[site] = Site(
                    axes, jnp.shape(leaf), noise, self._lengths(site, noise, sizes), leaf.dtype, "weight", i, name
                )
        if not out and (part.insertion.taps or part.insertion.weights):
            kind = "taps" if part.insertion.taps else "weights"
            raise InputError(
                f"the network has no {kind} to displace: mark activations with forwardgrad.tap, or perturb the other kind."
            )
        return out

    def _refuse_axes(self, site: str, part: Part, noise: tuple[str, ...], sizes: Mapping[str, int]) -> None:
        """Refuse axes that cannot mean what they say."""
        cells: dict[str, int] = {}
        for term in self.terms.values():
            cells.update(term.cells.sizes)
        for a, n in sizes.items():
            if a in part.partition and a in cells and cells[a] != n:
                raise InputError(
                    f"axis {a!r} has length {n} at {site!r} and {cells[a]} in the loss: give it another name there."
                )
            if a not in noise and (a not in part.partition or a not in cells):
                raise InputError(
                    f"{site!r} shares one displacement along {a!r}, along which losses are not kept apart: add {a!r} to the partition, or do not "
                    "share it."
                )

    def _lengths(self, site: str, axes: tuple[str, ...], sizes: Mapping[str, int]) -> tuple[int, ...]:
        known: dict[str, int] = {}
        for term in self.terms.values():
            known.update(term.cells.sizes)
        known.update(sizes)
        for a in axes:
            if a not in known:
                raise InputError(
                    f"noise of {site!r} names axis {a!r}, which neither the site nor the loss has: known are {sorted(known)}."
                )
        return tuple(known[a] for a in axes)

    def views(self, part: Part) -> dict[Scope, View]:
        """What the part's guesses see, scope by scope; scopes without displaced sites are left out."""
        all_sites, out = self.sites(part), {}
        for scope in self.scopes:
            sites = {name: site for name, site in all_sites.items() if site.block in scope.blocks}
            if not sites:
                continue
            readouts = {
                b.name: b.readout for b in (self.network.blocks[i] for i in scope.blocks) if b.readout is not None
            }
            outputs = self.terms[scope.terms[-1]].outputs
            last = readouts[self.network.blocks[scope.terms[-1]].name].loss
            loss = lambda value, axes=outputs.axes, last=last: weighed(
                last(Named(value, axes), self.batch), self.batch
            ).value.sum()
            out[scope] = View(
                sites=sites,
                taps={name: z for name, z in self.taps.items() if self.run.where[name][0] in scope.blocks},
                outputs=outputs,
                error=Named(jax.grad(loss)(outputs.value), outputs.axes),
                readouts=readouts,
                params={self.network.blocks[i].name: self.params[self.network.blocks[i].name] for i in scope.blocks},
                batch=self.batch,
                partition=part.partition,
                draws=part.draws,
                forward=lambda params, visit, greedy=False, scope=scope: self.forward(scope, params, visit, greedy),
            )
        return out

    def forward(
        self, scope: Scope, params: Mapping[str, Any], visit: taps.Visit, greedy: bool
    ) -> tuple[jax.Array, dict[str, Any]]:
        """The scope's loss with other parameters for its blocks; greedily: all local losses of its blocks, cut between them."""
        run = self.run
        if greedy:
            own = tuple(i for i in scope.blocks if self.network.blocks[i].readout is not None)
            run = Runner(self.network, frozenset(range(1, len(self.network.blocks))), own, run.state, self.batch)
        terms, records, _ = run({**self.params, **params}, visit)
        wanted = terms if greedy else {t: terms[t] for t in scope.terms}
        return jnp.sum(jnp.stack([term.loss for term in wanted.values()])), records

    def run_part(self, part: Part, key: jax.Array, state: Any) -> tuple[dict[str, Named], Any]:
        """Credits of the part's sites, and what its guesses observed."""
        views = self.views(part)
        u: dict[str, Named] = {}
        p: dict[str, Named] = {}
        for scope, view in views.items():
            if part.guess is not None:
                own = jax.random.fold_in(jax.random.fold_in(key, 0), scope.blocks[0])
                proposed = part.guess.propose(own, state[scope.name]["guess"], view)
                u.update(
                    {site: _drawn(jax.lax.stop_gradient(direction), part.draws) for site, direction in proposed.items()}
                )
            if part.predictor is not None:
                own = jax.random.fold_in(jax.random.fold_in(key, 1), scope.blocks[0])
                proposed = part.predictor.propose(own, state[scope.name]["predictor"], view)
                mask = part.guess.mask if part.guess is not None else None
                p.update({site: jax.lax.stop_gradient(self._masked(site, q, mask)) for site, q in proposed.items()})
        pushed = self.push(part, u) if part.guess is not None else {}
        credits, statistics = {}, {}
        weight = Named(self.batch["weight"], ("batch",))
        for scope, view in views.items():
            own_u = {site: u[site] for site in view.sites if site in u}
            own_p = {site: p[site] for site in view.sites if site in p}
            coefficient, du = None, {}
            if part.guess is not None:
                du = {"cells": self.cells(scope, pushed), "outputs": pushed[scope.terms[-1]].outputs}
            if part.guess is not None and part.rule.coefficient is not None:
                scalar, squared = credit.scalars(du["cells"], own_u, own_p, part.partition)
                coefficient = credit.coefficients(part.rule, scalar, squared, weight)
            for name, site in view.sites.items():
                credits[name] = credit.credit(site.axes, coefficient, own_u.get(name), own_p.get(name))
            learning = {"guess": part.guess, "predictor": part.predictor}
            statistics[scope.name] = {
                role: guess.observe(state[scope.name][role], view, own_u, du)
                for role, guess in learning.items()
                if guess is not None
            }
        return credits, statistics

    def _masked(self, site: str, prediction: Named, mask: Any) -> Named:
        """Units that the guess's mask leaves out have no gradient: a prediction there could not be corrected by the measurement."""
        if mask is None or site not in self.taps:
            return prediction
        z = self.taps[site]
        return contract(prediction.axes, prediction, Named(mask(z.value), z.axes))

    def displaced(self, eps: Mapping[str, Named], batch: Mapping[str, Any] | None = None) -> dict[int, Term]:
        """All losses with sites displaced by `eps`; an axis that a displacement lacks shares it."""
        flat, moved = leaf_paths(self.params), {}
        for site, move in eps.items():
            if site not in self.taps:
                block, leaf = site.split("#", 1)
                path = _leaf_path(block, leaf)
                moved[path] = flat[path] + move.to(self._weight_axes(block, leaf, move.axes)).astype(flat[path].dtype)
        at_taps = {site: move for site, move in eps.items() if site in self.taps}
        return self.run(with_leaves(self.params, moved), taps.displace(at_taps), batch=batch)[0]

    def push(self, part: Part, u: Mapping[str, Named]) -> dict[int, Term]:
        """Tangents of every loss's outputs and cells along the directions, with a leading draw axis.

        A weight direction with a batch axis runs the network one example at a time under `vmap`.
        """
        axes = {site: direction.axes[1:] for site, direction in u.items()}
        per_example = {site: a.index("batch") for site, a in axes.items() if site not in self.taps and "batch" in a}

        def values(eps: Mapping[str, jax.Array], batch: Mapping[str, Any]) -> dict[int, Any]:
            own = {site: tuple(a for a in axes[site] if site not in per_example or a != "batch") for site in eps}
            terms = self.displaced({site: Named(value, own[site]) for site, value in eps.items()}, batch)
            return {t: (term.outputs.value, term.cells.value) for t, term in terms.items()}

        def tangent(eps: Mapping[str, jax.Array], batch: Mapping[str, Any]) -> dict[int, Any]:
            zeros = jax.tree.map(jnp.zeros_like, eps)
            return part.probe.push(lambda e: values(e, batch), (zeros,), (eps,))[1]

        def one_draw(eps: Mapping[str, jax.Array]) -> dict[int, Any]:
            if not per_example:
                return tangent(eps, self.batch)
            if any("batch" not in term.cells.axes for term in self.terms.values()):
                raise InputError(
                    "a displacement per example needs one loss per example: return a vector of losses, not their mean."
                )
            where = {site: a.index("batch") for site, a in axes.items() if "batch" in a}
            fixed = {site: e for site, e in eps.items() if site not in where}

            def example(moving: Mapping[str, jax.Array], batch: Mapping[str, Any]) -> dict[int, Any]:
                # taps keep a batch axis of length one, weights lose theirs
                moving = {s: e if s in per_example else jnp.expand_dims(e, where[s]) for s, e in moving.items()}
                one = jax.tree.map(lambda x: x[None], batch)
                return jax.tree.map(lambda x: x[0], tangent({**fixed, **moving}, one))

            return jax.vmap(example, in_axes=(where, 0))({site: eps[site] for site in where}, dict(self.batch))

        out = jax.vmap(one_draw)({site: direction.value for site, direction in u.items()})
        named = lambda value, like: Named(value, ("draw", *like.axes))
        return {t: Term(named(o, self.terms[t].outputs), named(c, self.terms[t].cells)) for t, (o, c) in out.items()}

    def _weight_axes(self, block: str, leaf: str, default: tuple[str, ...]) -> tuple[str, ...]:
        (named,) = (b.weights for b in self.network.blocks if b.name == block)
        return default if named is None else named[leaf]

    def pull(self, credits: Mapping[str, Named]) -> tuple[Estimate, Any]:
        """From credits to parameter gradients: every displaced tap cut, readouts exact, estimated leaves left out of the vjp."""
        estimated = {_leaf_path(*site.split("#", 1)): c for site, c in credits.items() if site not in self.taps}
        at_taps = {site: c for site, c in credits.items() if site in self.taps}
        free = {path: leaf for path, leaf in leaf_paths(self.params).items() if path not in estimated}

        def cut_run(free: Mapping[str, jax.Array]):
            terms, records, state = self.run(with_leaves(self.params, free), taps.cut(at_taps))
            losses = {self.network.blocks[t].name: term.loss for t, term in terms.items()}
            loss = jnp.sum(jnp.stack(list(losses.values())))
            return (loss, {site: z.value for site, z in records.items()}), (
                Info(losses, terms[max(terms)].outputs),
                state,
            )

        (loss, seen), back, (info, state) = jax.vjp(cut_run, free, has_aux=True)
        cotangents = {site: at_taps[site].to(self.taps[site].axes).astype(z.dtype) for site, z in seen.items()}
        (grads,) = back((jnp.ones_like(loss), cotangents))
        flat = leaf_paths(self.params)
        for path, c in estimated.items():
            grads[path] = c.value.astype(flat[path].dtype)
        return Estimate(loss, with_leaves(self.params, grads), info), state


def _drawn(direction: Named, draws: int) -> Named:
    """With a leading draw axis; a direction without one serves every draw."""
    rest = tuple(a for a in direction.axes if a != "draw")
    value = direction.to(("draw", *rest))
    return Named(jnp.broadcast_to(value, (draws, *value.shape[1:])), ("draw", *rest))


def _leaf_path(block: str, leaf: str) -> str:
    return f"{block}/layers/{leaf}" if leaf else f"{block}/layers"
