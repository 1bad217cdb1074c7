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

import functools
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from forwardgrad import credit, taps
from forwardgrad.errors import InputError, unknown
from forwardgrad.guesses.base import Site, View
from forwardgrad.insertions import Hidden
from forwardgrad.named import Named, axis_names, contract
from forwardgrad.network import Network, Ran, Runner, Term, leaf_paths, weighed, with_leaves
from forwardgrad.parts import Estimate, Info, Part
from forwardgrad.targets import Scope, Target


class Measured(NamedTuple):
    """An estimate on some examples, the statistics that guesses learn from, the model's new state, and the last block's output.

    Estimate and statistics sum over disjoint sets of examples.
    """

    estimate: Estimate
    statistics: tuple[Any, ...]
    model_state: Any
    hidden: Any


def measure(
    method: Method,
    key: jax.Array,
    state: tuple[Any, ...],
    params: Any,
    model_state: Any,
    batch: Mapping[str, Any],
    first: int | jax.Array | None = None,
) -> Measured:
    """One estimate by the whole network.

    Args:
      method: network, target and parts.
      key, state, params, model_state, batch: as in `Estimator.estimate`.
      first: number of the network's first block, where the network is a piece of a larger one.
    """
    step = Step(method.network, method.target, params, model_state, batch, first)
    credits: dict[str, Named] = {}
    statistics = []
    for number, (part, part_state) in enumerate(zip(method.parts, state, strict=True)):
        got, observed = step.run_part(part, jax.random.fold_in(key, number), part_state)
        twice = sorted(set(got) & set(credits))
        if twice:
            raise InputError(f"two parts estimate {', '.join(twice)}: give each site to one part (only=...).")
        credits.update(got)
        statistics.append(observed)
    weights = {site: c for site, c in credits.items() if site not in step.taps}
    estimate, model_state = step.pull({site: c for site, c in credits.items() if site in step.taps}, set(weights))
    estimate = estimate._replace(grads=step.with_estimated(estimate.grads, weights))
    return Measured(estimate, tuple(statistics), model_state, step.hidden)


class Piece(NamedTuple):
    """A method on a part of its network."""

    network: Network
    target: Target
    parts: tuple[Part, ...]


class Method(Protocol):
    """What an estimator is to an executor."""

    @property
    def network(self) -> Network: ...
    @property
    def target(self) -> Target: ...
    @property
    def parts(self) -> tuple[Part, ...]: ...


class Pushed(NamedTuple):
    """Tangents: of each loss's outputs and cells, of the last block's output, and of taps (none where examples run one at a time)."""

    terms: dict[int, Term]
    hidden: Any
    taps: dict[str, Named]


class Step:
    """One batch of an estimator: the recorded run, and the passes over it.

    Args:
      first: number of the network's first block, where it is a piece of a larger network, in which a part may have nothing to do.
      cells: lengths of the loss's axes, for a piece without a loss (its target's scope has no terms).
    """

    def __init__(
        self,
        network: Network,
        target: Target,
        params: Any,
        model_state: Any,
        batch: Mapping[str, Any],
        first: int | jax.Array | None = None,
        cells: Mapping[str, int] | None = None,
    ):
        self.network, self.params, self.batch = network, params, batch
        self.alone, self.first = first is None, 0 if first is None else first
        self.scopes = target.scopes(network)
        terms = tuple(t for scope in self.scopes for t in scope.terms)
        self.run = Runner(network, target.cuts(network), terms, model_state, batch)
        self.terms, self.taps, self.state, self.hidden = self.run(params, taps.record)
        self.lengths = {a: n for term in self.terms.values() for a, n in term.cells.sizes.items()}
        self.lengths |= cells or {}

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
            names = {site: name for site, (_, name) in self.run.where.items()}
            for site in choice.select(names, self.alone, self.run.passive, lambda: self.below_loss):
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
                    self.first + block,
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
            for site in choice.select({site: leaf[1] for site, leaf in leaves.items()}, self.alone):
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
                    axes,
                    jnp.shape(leaf),
                    noise,
                    self._lengths(site, noise, sizes),
                    leaf.dtype,
                    "weight",
                    self.first + i,
                    name,
                )
        hidden = part.insertion.taps is not None and isinstance(part.insertion.taps.only, Hidden)
        if self.alone and not out and hidden and set(self.run.where) - set(self.run.passive) == self.below_loss:
            raise InputError(
                "every tap of this network stands right below a loss, so that none is hidden, nothing is displaced and the gradient is exact by "
                "itself: displace all taps (only=None, --perturbed all), or use backpropagation (lg-bp, bp)."
            )
        if self.alone and not out and not hidden and (part.insertion.taps or part.insertion.weights):
            kind = "taps" if part.insertion.taps else "weights"
            raise InputError(
                f"the network has no {kind} to displace: mark activations with forwardgrad.tap, or perturb the other kind."
            )
        return out

    @functools.cached_property
    def below_loss(self) -> set[str]:
        """Taps from which every way leads to a loss, or to a cut, past no other tap, passive taps apart."""
        out: set[str] = set()
        for site, (i, name) in self.run.where.items():
            if site in self.run.passive:
                continue
            ends, on = self.run.leads(i, name)
            lost = ends and i in self.terms
            while ends and not on and i + 1 < len(self.network.blocks) and i + 1 not in self.run.cuts:
                i += 1
                ends, on = self.run.leads(i, self.run.input_flags(i))
                lost = lost or (ends and i in self.terms)
            if lost and not on:
                out.add(site)
        return out

    def landings(self, part: Part) -> dict[str, str]:
        """For each site of the part the site that its credit is handed to: itself, unless the insertion says otherwise (`credit_at`).

        Raises:
          InputError: that is no tap, or one of another shape.
        """
        out = {}
        for site, displaced in self.sites(part).items():
            out[site] = site
            if displaced.kind == "weight" or part.insertion.taps is None or part.insertion.taps.credit_at is None:
                continue
            name = part.insertion.taps.credit_at(displaced.name)
            other = out[site] = site.removesuffix(displaced.name) + name
            if other not in self.taps or self.taps[other].sizes != self.taps[site].sizes:
                raise InputError(
                    f"the credit of {site!r} cannot be handed to {other!r}, which is no tap with the axes {' '.join(displaced.axes)}: mark the "
                    f"layer's output with forwardgrad.tap(z, {name!r}, ..., passive=True), or leave credit_at out (--norm-gradient)."
                )
        for site, other in out.items():
            if list(out.values()).count(other) > 1:
                raise InputError(
                    f"{other!r} would get the credit of {site!r} and of another site: let credit_at give each tap one of its own."
                )
        return out

    def position(self, site: str) -> int:
        """Position of a site's block in this network."""
        if site in self.run.where:
            return self.run.where[site][0]
        block = site.split("#", 1)[0]
        return next(i for i, b in enumerate(self.network.blocks) if b.name == block)

    def _refuse_axes(self, site: str, part: Part, noise: tuple[str, ...], sizes: Mapping[str, int]) -> None:
        """Refuse axes that cannot mean what they say."""
        for a, n in sizes.items():
            if a in part.partition and self.lengths.get(a, n) != n:
                raise InputError(
                    f"axis {a!r} has length {n} at {site!r} and {self.lengths[a]} in the loss: give it another name there."
                )
            if a not in noise and (a not in part.partition or a not in self.lengths):
                raise InputError(
                    f"{site!r} shares one displacement along {a!r}, along which losses are not kept apart: add {a!r} to the partition, or do not "
                    "share it."
                )

    def _lengths(self, site: str, axes: tuple[str, ...], sizes: Mapping[str, int]) -> tuple[int, ...]:
        known = {**self.lengths, **sizes}
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
            sites = {name: site for name, site in all_sites.items() if self.position(name) in scope.blocks}
            if not sites:
                continue
            last = self.terms[scope.terms[-1]] if scope.terms else None
            errors = {self.network.blocks[t].name: self._error(t) for t in scope.terms}
            own = tuple(self.network.blocks[i] for i in scope.blocks)
            out[scope] = View(
                sites=sites,
                taps={name: z for name, z in self.taps.items() if self.run.where[name][0] in scope.blocks},
                outputs=last and last.outputs,  # pyright: ignore[reportArgumentType]
                shares=last and last.shares,  # pyright: ignore[reportArgumentType]
                error=list(errors.values())[-1] if errors else None,  # pyright: ignore[reportArgumentType]
                errors=errors,
                readouts={b.name: b.readout for b in own if b.readout is not None},
                params={b.name: self.params[b.name] for b in own},
                batch=self.batch,
                partition=part.partition,
                draws=part.draws,
                forward=lambda params, visit, greedy=False, scope=scope: self.forward(scope, params, visit, greedy),
                read=lambda params, visit, scope=scope: self.read(scope, params, visit),
                draw=lambda key, own=own: Network(own).init(key)[0],
            )
        return out

    def _error(self, term: int) -> Named:
        """Derivative of a loss with respect to its readout's outputs."""
        outputs, readout = self.terms[term].outputs, self.network.blocks[term].readout
        assert readout is not None
        loss = lambda value: weighed(readout.loss(Named(value, outputs.axes), self.batch), self.batch).value.sum()
        return Named(jax.grad(loss)(outputs.value), outputs.axes)

    def forward(
        self, scope: Scope, params: Mapping[str, Any], visit: taps.Visit, greedy: bool
    ) -> tuple[jax.Array, dict[str, Any]]:
        """The scope's loss with other parameters for its blocks; greedily: all local losses of its blocks, cut between them."""
        run = self.run
        if greedy:
            own = tuple(i for i in scope.blocks if self.network.blocks[i].readout is not None)
            run = Runner(self.network, frozenset(range(1, len(self.network.blocks))), own, run.state, self.batch)
        terms, records, _, _ = run({**self.params, **params}, visit)
        wanted = terms if greedy else {t: terms[t] for t in scope.terms}
        return jnp.sum(jnp.stack([term.loss for term in wanted.values()])), records

    def read(self, scope: Scope, params: Mapping[str, Any], visit: taps.Visit) -> dict[str, Named]:
        """The outputs of every readout whose loss the scope receives, with other parameters for its blocks."""
        terms = self.run({**self.params, **params}, visit).terms
        return {self.network.blocks[t].name: terms[t].outputs for t in scope.terms}

    def run_part(self, part: Part, key: jax.Array, state: Any) -> tuple[dict[str, Named], Any]:
        """Credits of the part's sites, where they land, and what its guesses observed."""
        views, landings = self.views(part), self.landings(part)
        u: dict[str, Named] = {}
        p: dict[str, Named] = {}
        for scope, view in views.items():
            if part.guess is not None:
                own = jax.random.fold_in(jax.random.fold_in(key, 0), self.first + scope.blocks[0])
                u.update(directions(part, own, state[scope.name]["guess"], view))
            if part.predictor is not None:
                own = jax.random.fold_in(jax.random.fold_in(key, 1), self.first + scope.blocks[0])
                seen = self.predicted(part, view)
                proposed = part.predictor.propose(own, state[scope.name]["predictor"], seen)
                mask = part.guess.mask if part.guess is not None else None
                q = {site: jax.lax.stop_gradient(self._masked(site, q, mask)) for site, q in proposed.items()}
                arrived = {site: at for site, at in view.sites.items() if site not in seen.sites}
                if arrived:
                    q |= self.from_taps(q, arrived)
                p.update(q)
        moved = self.push(part, u) if part.guess is not None else Pushed({}, None, {})
        pushed = moved.terms
        credits, statistics = {}, {}
        weight = Named(self.batch["weight"], ("batch",))
        for scope, view in views.items():
            own_u = {site: u[site] for site in view.sites if site in u}
            own_p = {site: p[site] for site in view.sites if site in p}
            coefficient, du = None, {}
            if part.guess is not None:
                last = pushed[scope.terms[-1]]
                own_taps = {name: moved.taps[name] for name in view.taps if name in moved.taps}
                du = {
                    "cells": self.cells(scope, pushed),
                    "outputs": last.outputs,
                    "shares": last.shares,
                    "taps": own_taps,
                }
            if part.guess is not None and part.rule.coefficient is not None:
                scalar, squared = credit.scalars(du["cells"], own_u, own_p, part.partition)
                coefficient = credit.coefficients(part.rule, scalar, squared, weight)
            for name, site in view.sites.items():
                credits[landings[name]] = credit.credit(site.axes, coefficient, own_u.get(name), own_p.get(name))
            roles = {}
            if part.guess is not None:
                roles["guess"] = part.guess.observe(state[scope.name]["guess"], view, own_u, du)
            if part.predictor is not None:
                seen = self.predicted(part, view)
                along = own_u if seen is view or not own_u else self.along_taps(own_u)
                roles["predictor"] = part.predictor.observe(state[scope.name]["predictor"], seen, along, du)
            statistics[scope.name] = roles
        return credits, statistics

    def _masked(self, site: str, prediction: Named, mask: Any) -> Named:
        """Units that the guess's mask leaves out have no gradient: a prediction there could not be corrected by the measurement."""
        if mask is None or site not in self.taps:
            return prediction
        z = self.taps[site]
        return contract(prediction.axes, prediction, Named(mask(z.value), z.axes))

    def displaced(self, eps: Mapping[str, Named], batch: Mapping[str, Any] | None = None) -> Ran:
        """A run with sites displaced by `eps`, its taps' displaced activations as records; an axis that a displacement lacks shares it."""
        displace = taps.displace({site: move for site, move in eps.items() if site in self.taps})

        def visit(name: str, axes: tuple[str, ...], z: jax.Array) -> tuple[Named, jax.Array]:
            _, z = displace(name, axes, z)
            return Named(z, axes), z

        return self.run(self._moved(eps), visit, batch=batch)

    def _moved(self, eps: Mapping[str, Named]) -> Any:
        """Parameters displaced by what `eps` holds for weights."""
        flat, moved = leaf_paths(self.params), {}
        for site, move in eps.items():
            if site not in self.taps:
                block, leaf = site.split("#", 1)
                path = _leaf_path(block, leaf)
                moved[path] = flat[path] + move.to(self._weight_axes(block, leaf, move.axes)).astype(flat[path].dtype)
        return with_leaves(self.params, moved)

    def arrivals(self, weights: Collection[str]) -> set[str] | None:
        """The taps, passive ones too, that some weights reach past no other tap; None where a way leads past all, or to one without a batch axis."""
        found: set[str] = set()
        for i, block in enumerate(self.network.blocks):
            leaves = [f"{block.name}#{path}" in weights for path in leaf_paths(self.params[block.name]["layers"])]
            if not any(leaves):
                continue
            rest = len(self.run.programs[i].closed.in_avals) - len(leaves)
            ends, names = self.run.leads(i, [*leaves, *[False] * rest], passive=True)
            sites = {site for site, where in self.run.where.items() if where[0] == i and where[1] in names}
            if ends or any("batch" not in self.taps[site].axes for site in sites):
                return None
            found |= sites
        return found

    def at_taps(self, u: Mapping[str, Named]) -> dict[str, Named] | None:
        """Tangents of the taps at which weights displaced per example arrive.

        Displacing these taps by them moves all that follows as the weights do. The network runs one example at a time under `vmap`, but only
        from tap to tap, each with its activation in the batch: the rest has one primal with the whole step.

        Args:
          u: directions with axes draw and batch, by site of a weight.

        Returns:
          `{tap: Named}`, axis draw first; None where `arrivals` finds none.
        """
        found = self.arrivals(u)
        if found is None:
            return None
        axes = {site: direction.axes[1:] for site, direction in u.items()}
        where = {site: own.index("batch") for site, own in axes.items()}
        stored = {site: z for site, z in self.taps.items() if "batch" in z.axes}
        slots = {site: z.axes.index("batch") for site, z in stored.items()}

        def one_draw(eps: dict[str, jax.Array]) -> dict[str, jax.Array]:
            def example(eps: dict[str, jax.Array], kept: dict[str, jax.Array], batch: dict[str, Any]) -> Any:
                def visit(name: str, tap_axes: tuple[str, ...], z: jax.Array) -> tuple[Named, jax.Array]:
                    here = jnp.expand_dims(kept[name], slots[name]) if name in kept else jax.lax.stop_gradient(z)
                    return Named(z, tap_axes), here

                one = jax.tree.map(lambda x: x[None], batch)
                own = lambda eps: {s: Named(e, tuple(a for a in axes[s] if a != "batch")) for s, e in eps.items()}
                records = lambda eps: self.run(self._moved(own(eps)), visit, batch=one).records
                values = lambda eps: {
                    site: jnp.squeeze(records(eps)[site].value, slots[site]) for site in sorted(found)
                }
                return jax.jvp(values, (jax.tree.map(jnp.zeros_like, eps),), (eps,))[1]

            places = {site: slots[site] for site in sorted(found)}
            values = {site: z.value for site, z in stored.items()}
            return jax.vmap(example, in_axes=(where, slots, 0), out_axes=places)(eps, values, dict(self.batch))

        out = jax.vmap(one_draw)({site: direction.value for site, direction in u.items()})
        return {site: Named(value, ("draw", *self.taps[site].axes)) for site, value in out.items()}

    def along_taps(self, u: Mapping[str, Named]) -> Mapping[str, Named]:
        """The directions, those of weights per example replaced by tangents of the taps where they arrive; `u` itself where there are none."""
        per_example = {site: d for site, d in u.items() if site not in self.taps and "batch" in d.axes}
        moved = self.at_taps(per_example) if per_example else None
        if moved is None:
            return u
        both = {site: direction for site, direction in u.items() if site not in per_example}
        for site, along in moved.items():
            own = both[site].to(along.axes) if site in both else 0
            both[site] = Named(along.value + own, along.axes)
        return both

    def predicted(self, part: Part, view: View) -> View:
        """What the part's predictor sees: in place of weights displaced per example the taps where they arrive, if it predicts those."""
        per_example = {site for site, at in view.sites.items() if at.kind == "weight" and "batch" in at.noise_axes}
        if part.predictor is None or not part.predictor.at_arrivals or not per_example:
            return view
        found = self.arrivals(per_example)
        if found is None:
            return view
        sites = {site: at for site, at in view.sites.items() if site not in per_example}
        for site in sorted(found):
            z, (block, name) = self.taps[site], self.run.where[site]
            shape = jnp.shape(z.value)
            sites[site] = Site(z.axes, shape, z.axes, shape, z.value.dtype, "arrival", self.first + block, name)
        return view._replace(sites=sites)

    def from_taps(self, predictions: Mapping[str, Named], sites: Mapping[str, Site]) -> dict[str, Named]:
        """Predictions for the given sites, from those for the taps where these weights arrive: the transpose of `at_taps`.

        Args:
          predictions: by tap; others than those where the weights arrive are passed over. Axes of the loss that the tap lacks are summed.
          sites: weights displaced per example.
        """
        # an own weight for each example, whatever else its displacement is shared along
        like = {s: jax.ShapeDtypeStruct((1, len(self.batch["weight"]), *at.shape), at.dtype) for s, at in sites.items()}
        axes = {site: ("draw", "batch", *at.axes) for site, at in sites.items()}

        def forward(values: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
            moved = self.at_taps({site: Named(value, axes[site]) for site, value in values.items()})
            assert moved is not None
            return {site: along.value for site, along in moved.items()}

        given = {}
        for site in jax.eval_shape(forward, like):
            z = self.taps[site]
            value = predictions[site].sum_to(z.axes).to(("draw", *z.axes))
            given[site] = jnp.broadcast_to(value, (1, *jnp.shape(z.value))).astype(z.value.dtype)
        (back,) = jax.linear_transpose(forward, like)(given)
        return {site: Named(value[0], axes[site][1:]) for site, value in back.items()}

    def push(self, part: Part, u: Mapping[str, Named], inputs: Any = None) -> Pushed:
        """Tangents along the directions, with a leading draw axis.

        A weight direction with a batch axis runs the network one example at a time under `vmap`: as far as the taps after the weight where there are
        some and derivatives are exact, else as a whole.

        Args:
          part: whose probe measures.
          u: directions by site, with a leading draw axis.
          inputs: tangents of `batch["inputs"]`, draw axis first, where a streamed network's earlier blocks are displaced as well.
        """
        axes = {site: direction.axes[1:] for site, direction in u.items()}
        per_example = {site: a.index("batch") for site, a in axes.items() if site not in self.taps and "batch" in a}
        if per_example and any("batch" not in term.cells.axes for term in self.terms.values()):
            raise InputError(
                "a displacement per example needs one loss per example: return a vector of losses, not their mean."
            )
        if per_example and part.probe.exact and inputs is None:
            moved = self.along_taps(u)
            if moved is not u:
                return self.push(part, moved)._replace(taps={})

        def values(
            eps: Mapping[str, jax.Array], batch: Mapping[str, Any]
        ) -> tuple[dict[int, Any], Any, dict[str, Any]]:
            own = {site: tuple(a for a in axes[site] if site not in per_example or a != "batch") for site in eps}
            ran = self.displaced({site: Named(value, own[site]) for site, value in eps.items()}, batch)
            seen = {} if per_example else {name: z.value for name, z in ran.records.items()}
            return {t: tuple(named.value for named in term) for t, term in ran.terms.items()}, ran.hidden, seen

        def tangent(eps: Mapping[str, jax.Array], batch: Mapping[str, Any], moving: Any = None) -> Any:
            zeros = jax.tree.map(jnp.zeros_like, eps)
            if moving is None:
                return part.probe.push(lambda e: values(e, batch), (zeros,), (eps,))[1]
            f = lambda e, x: values(e, {**batch, "inputs": x})
            return part.probe.push(f, (zeros, batch["inputs"]), (eps, moving))[1]

        def one_draw(eps: Mapping[str, jax.Array], moving: Any) -> Any:
            if not per_example:
                return tangent(eps, self.batch, moving)
            where = {site: a.index("batch") for site, a in axes.items() if "batch" in a}
            fixed = {site: e for site, e in eps.items() if site not in where}
            examples = {t: tuple(named.axes.index("batch") for named in term) for t, term in self.terms.items()}

            def example(moving: Mapping[str, jax.Array], batch: Mapping[str, Any]) -> Any:
                # taps keep a batch axis of length one, weights lose theirs
                moving = {s: e if s in per_example else jnp.expand_dims(e, where[s]) for s, e in moving.items()}
                one = jax.tree.map(lambda x: x[None], batch)
                terms, hidden, seen = tangent({**fixed, **moving}, one)
                alone = {t: tuple(map(jnp.squeeze, term, examples[t])) for t, term in terms.items()}
                return alone, jax.tree.map(lambda x: x[0], hidden), seen

            return jax.vmap(example, in_axes=(where, 0), out_axes=(examples, 0, 0))(
                {site: eps[site] for site in where}, dict(self.batch)
            )

        values_of_u = {site: direction.value for site, direction in u.items()}
        draws = None if u else part.draws  # without a direction nothing else says how many
        out, hidden, seen = jax.vmap(one_draw, axis_size=draws)(values_of_u, inputs)
        named = lambda value, like: Named(value, ("draw", *like.axes))
        terms = {t: Term(*map(named, values, self.terms[t])) for t, values in out.items()}
        return Pushed(terms, hidden, {name: named(value, self.taps[name]) for name, value in seen.items()})

    def _weight_axes(self, block: str, leaf: str, default: tuple[str, ...]) -> tuple[str, ...]:
        (named,) = (b.weights for b in self.network.blocks if b.name == block)
        return default if named is None else named[leaf]

    def pull(self, credits: Mapping[str, Named], estimated: Collection[str] = ()) -> tuple[Estimate, Any]:
        """From credits of taps to parameter gradients: every displaced tap cut, readouts exact.

        Args:
          credits: by tap.
          estimated: weight sites whose gradient is estimated: they are left out of the vjp, and their gradient is zero here.

        Returns:
          The estimate and the model's new state.
        """
        leave = {_leaf_path(*site.split("#", 1)) for site in estimated}
        flat = leaf_paths(self.params)
        free = {path: leaf for path, leaf in flat.items() if path not in leave}

        def cut_run(free: Mapping[str, jax.Array]):
            ran = self.run(with_leaves(self.params, free), taps.cut(credits))
            losses = {self.network.blocks[t].name: term.loss for t, term in ran.terms.items()}
            loss = sum(losses.values(), jnp.zeros((), jnp.result_type(*losses.values()) if losses else None))
            outputs = ran.terms[max(ran.terms)].outputs if ran.terms else None
            return (loss, {site: z.value for site, z in ran.records.items()}), (Info(losses, outputs), ran.state)  # pyright: ignore[reportArgumentType]

        (loss, seen), back, (info, state) = jax.vjp(cut_run, free, has_aux=True)
        cotangents = {site: credits[site].to(self.taps[site].axes).astype(z.dtype) for site, z in seen.items()}
        (grads,) = back((jnp.ones_like(loss), cotangents))
        grads |= {path: jnp.zeros_like(flat[path]) for path in leave}
        return Estimate(loss, with_leaves(self.params, grads), info), state

    def with_estimated(self, grads: Any, credits: Mapping[str, Named]) -> Any:
        """The gradients with those of weight sites put in."""
        flat = leaf_paths(self.params)
        paths = {_leaf_path(*site.split("#", 1)): c for site, c in credits.items()}
        return with_leaves(grads, {path: c.value.astype(flat[path].dtype) for path, c in paths.items()})


def directions(part: Part, key: jax.Array, state: Any, view: View) -> dict[str, Named]:
    """What the part's guess proposes, with a leading draw axis, as constants."""
    assert part.guess is not None
    proposed = part.guess.propose(key, state, view)
    return {site: _drawn(jax.lax.stop_gradient(direction), part.draws) for site, direction in proposed.items()}


def _drawn(direction: Named, draws: int) -> Named:
    """With a leading draw axis; a direction without one serves every draw."""
    rest = tuple(a for a in direction.axes if a != "draw")
    value = direction.to(("draw", *rest))
    return Named(jnp.broadcast_to(value, (draws, *value.shape[1:])), ("draw", *rest))


def _leaf_path(block: str, leaf: str) -> str:
    return f"{block}/layers/{leaf}" if leaf else f"{block}/layers"
