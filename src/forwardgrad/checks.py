"""Numeric checks that an estimator means what its names say. Each takes one push on a few examples.

`separable`: naming a loss axis on a site asserts that the site's slices reach no other cell of the loss. BatchNorm breaks it for the batch, token
mixing under a global loss for patches, a wrong name anywhere: the estimate would be biased without a sign of it.
`mask_is_exact`: a mask asserts that the units it leaves out have no gradient.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from forwardgrad import taps
from forwardgrad.engine import Estimator
from forwardgrad.errors import InputError
from forwardgrad.guesses.base import Site
from forwardgrad.named import Named
from forwardgrad.network import complete
from forwardgrad.parts import Part
from forwardgrad.probes import jvp
from forwardgrad.targets import Scope
from forwardgrad.whole import Step


class Leak(NamedTuple):
    """A displacement that reaches where it must not: largest tangent found there, relative to the largest anywhere."""

    site: str
    axis: str
    size: float


def refuse_bias(
    estimator: Estimator, params: Any, model_state: Any, batch: Mapping[str, Any], *, shrink: bool = True
) -> None:
    """Raise where the expected estimate would not be the gradient.

    Args:
      estimator, params, model_state, batch: as for `Estimator.init`. Under `jit` random values of the same shapes take their place.
      shrink: look at the first four examples only (on two, BatchNorm's Jacobian all but vanishes).

    Raises:
      InputError: which site leaks along which axis, and what to do.
    """
    for leak in leaks(estimator, params, model_state, batch, shrink=shrink):
        if leak.axis == "mask":
            why = "a unit that its mask leaves out changes the loss: the mask must be the one of the nonlinearity right above the tap"
            remedy = "leave the mask out (mask=False)"
        elif leak.axis == "credit":
            why = "its credit is handed to another tap, and what lies between the two changes the gradient"
            remedy = "leave credit_at out (--norm-gradient)"
        elif leak.axis == "example":
            why = (
                "the network couples examples (BatchNorm does), and a displacement per example runs them one at a time"
            )
            remedy = "share the displacement between examples"
        elif leak.axis == "batch":
            why = "a displacement in one example changes the loss of others (BatchNorm couples examples)"
            remedy = "train without BatchNorm (--no-batch-norm, --batch-norm none or --norm local, whichever the model has), or leave 'batch' out "
            remedy += "of the partition"
        else:
            why = f"a displacement in one slice along {leak.axis!r} changes the loss of other slices"
            remedy = f"leave {leak.axis!r} out of the partition, use a network that keeps these slices apart, or name the axis differently at the tap"
        raise InputError(
            f"{estimator.name} would be biased at {leak.site!r}: {why} (by {leak.size:.1e} of the largest effect); {remedy}, or accept the "
            "bias with allow_bias=True (--allow-bias)."
        )


def refuse_microbatches(estimator: Estimator, params: Any, model_state: Any, batch: Mapping[str, Any]) -> None:
    """Raise where the estimate on microbatches would not add up to the estimate on the whole batch.

    Raises:
      InputError: model state; a loss without examples, or that couples them; a part whose noise or rule mixes examples.
    """
    why = ""
    with jax.ensure_compile_time_eval():
        arguments = generic(params, model_state, batch, True)
    step = jax.eval_shape(lambda *a: _outline(estimator, *a), *arguments)
    mixing = [
        part
        for part in estimator.parts
        if part.guess is not None and part.rule.coefficient is not None and "batch" not in part.partition
    ]
    if jax.tree.leaves(model_state):
        why = "this model has state (BatchNorm's statistics)"
    elif any("batch" not in term.cells.axes for term in step.values()):
        why = "the loss has no batch axis"
    elif any(
        part.rule.name != "unbiased" or not part.guess.isotropic or part.insertion.taps is not None
        for part in mixing
        if part.guess
    ):
        why = f"{estimator.name} has one scalar for all examples of activations, or of a rule that is not linear"
    elif any(
        part.guess is not None and not part.guess.isotropic and part.insertion.weights is not None
        for part in estimator.parts
    ):
        why = "a guided guess of weights depends on all examples"
    elif couples_examples(estimator, params, model_state, batch) > 1e-4:
        why = "the loss of an example depends on the others"
    if why:
        raise InputError(f"microbatches would change the result, because {why}: use the whole batch (--microbatch 0).")


def _outline(estimator: Estimator, params: Any, model_state: Any, batch: Mapping[str, Any]) -> dict[int, Any]:
    return Step(estimator.network, estimator.target, params, model_state, batch).terms


def separable(
    estimator: Estimator, params: Any, model_state: Any, batch: Mapping[str, Any], *, shrink: bool = True
) -> list[Leak]:
    """Sites and axes along which slices are not apart. Empty: every name holds."""
    about = ("mask", "credit")
    return [leak for leak in leaks(estimator, params, model_state, batch, shrink=shrink) if leak.axis not in about]


def mask_is_exact(
    estimator: Estimator, params: Any, model_state: Any, batch: Mapping[str, Any], *, shrink: bool = True
) -> bool:
    """Whether units that masks leave out have no gradient."""
    return all(leak.axis != "mask" for leak in leaks(estimator, params, model_state, batch, shrink=shrink))


def leaks(estimator: Estimator, params: Any, model_state: Any, batch: Mapping[str, Any], *, shrink: bool) -> list[Leak]:
    """All leaks of all parts. See `separable` and `mask_is_exact`."""
    found = []
    for part in estimator.parts:
        # where the prediction alone is the credit, only its mask says something about the network
        apart = part.guess is not None and part.rule.coefficient is not None
        if part.insertion.taps is not None and part.insertion.taps.credit_at is not None:
            with jax.ensure_compile_time_eval():
                found += _handed_on(estimator, part, *generic(params, model_state, batch, shrink))
        credited = part.guess if apart else part.predictor
        mask = credited.mask if credited is not None else None
        if apart or mask is not None:
            with jax.ensure_compile_time_eval():
                found += _leaks_of(estimator, part, apart, mask, *generic(params, model_state, batch, shrink))
    return found


def gradients(step: Step, sites: Mapping[str, Site]) -> dict[str, jax.Array]:
    """Gradient of all cells of the batch with respect to displacements of the given sites."""

    def loss(eps: dict[str, jax.Array]) -> jax.Array:
        terms = step.displaced({name: Named(value, sites[name].axes) for name, value in eps.items()}).terms
        return jnp.sum(jnp.stack([term.loss for term in terms.values()]))

    return jax.grad(loss)({name: jnp.zeros(site.shape, site.dtype) for name, site in sites.items()})


def _handed_on(estimator: Estimator, part: Part, params: Any, model_state: Any, batch: Mapping[str, Any]) -> list[Leak]:
    """Sites whose credit lands elsewhere, where the gradient is another one."""

    @jax.jit
    def differences(params: Any, model_state: Any, batch: Mapping[str, Any]) -> dict[str, jax.Array]:
        step = Step(estimator.network, estimator.target, params, model_state, batch)
        sites, landings = step.sites(part), step.landings(part)
        here, there = gradients(step, sites), gradients(step, {landings[name]: sites[name] for name in sites})
        size = lambda x: jnp.abs(x).max()
        return {name: size(here[name] - there[landings[name]]) / size(here[name]) for name in sites}

    off = {name: float(x) for name, x in differences(params, model_state, batch).items()}
    return [Leak(name, "credit", x) for name, x in off.items() if x > 1e-5]


def couples_examples(
    estimator: Estimator, params: Any, model_state: Any, batch: Mapping[str, Any], *, shrink: bool = True
) -> float:
    """How much the losses of examples differ when each is run alone: largest difference over largest loss. Zero where examples are apart."""
    with jax.ensure_compile_time_eval():
        arguments = generic(params, model_state, batch, shrink)

        @jax.jit
        def difference(params: Any, model_state: Any, batch: Mapping[str, Any]) -> jax.Array:
            step = Step(estimator.network, estimator.target, params, model_state, batch)
            cells = {t: term.cells.value for t, term in step.terms.items()}
            off = {t: jnp.abs(_one_by_one(step, t) - x).max() for t, x in cells.items()}
            return jnp.stack([jnp.where(d > 0, d / jnp.abs(cells[t]).max(), 0) for t, d in off.items()]).max()

        return float(difference(*arguments))


def generic(params: Any, model_state: Any, batch: Mapping[str, Any], shrink: bool) -> tuple[Any, Any, dict[str, Any]]:
    """Values at which nothing is zero by accident: parameters a little off (a classifier that starts at zero has no derivatives), full weights."""
    rng = np.random.default_rng(2)

    def moved(x: Any) -> Any:
        if not jnp.issubdtype(jnp.result_type(x), jnp.floating):
            return x
        scale = jnp.where(x == 0, 1.0, jnp.abs(x))
        return jnp.asarray(x + 0.1 * scale * rng.normal(size=jnp.shape(x)), jnp.result_type(x))

    params, model_state, batch = values((params, model_state, dict(complete(batch))))
    if shrink:
        batch = jax.tree.map(lambda x: x[:4], batch)
    return jax.tree.map(moved, params), model_state, {**batch, "weight": jnp.ones_like(batch["weight"])}


def values(tree: Any) -> Any:
    """Concrete values; random ones of the same shape where only a tracer is known."""
    rng = np.random.default_rng(0)

    def value(x: Any) -> Any:
        if not isinstance(x, Tracer):
            return x
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            return jnp.broadcast_to(jax.random.key(0), x.shape)
        if jnp.issubdtype(x.dtype, jnp.inexact):
            return jnp.asarray(rng.normal(size=x.shape), x.dtype)
        return jnp.zeros(x.shape, x.dtype)

    return jax.tree.map(value, tree)


def _leaks_of(
    estimator: Estimator, part: Part, apart: bool, mask: Any, params: Any, model_state: Any, batch: Mapping[str, Any]
) -> list[Leak]:
    """One row per case. A row displaces half of the slices along one axis, at every site that has it, and looks at the other half of the
    cells: over the bits of the slice's number, both ways, every pair of slices is seen. The first row displaces everything, for scale;
    the last, with a mask, displaces what it leaves out. Only where a row leaks are sites tried one by one.
    """
    sites: dict[str, Site] = {}  # known while tracing
    cells: dict[str, int] = {}
    part = dataclasses.replace(part, probe=jvp)  # names are statements about derivatives

    @jax.jit
    def record(params: Any, model_state: Any, batch: Mapping[str, Any]) -> dict[str, Named]:
        step = Step(estimator.network, estimator.target, params, model_state, batch)
        sites.update(step.sites(part))
        for term in step.terms.values():
            cells.update(term.cells.sizes)
        return step.taps

    activations = record(params, model_state, batch)
    if not sites:  # nothing is displaced
        return []
    found = []
    if any(site.kind == "weight" for site in sites.values()):
        mask = None  # of a prediction for weights, at the taps where they arrive: nothing of them is left out
    alone = [name for name, site in sites.items() if site.kind == "weight" and "batch" in site.noise_axes]
    if alone:
        coupling = couples_examples(estimator, params, model_state, batch, shrink=False)
        found += [Leak(alone[0], "example", coupling)] if coupling > 1e-4 else []
    axes = [
        a
        for a in part.partition
        if apart and cells.get(a, 1) > 1 and any(a in _lengths(site) for site in sites.values())
    ]
    rows = [("all", np.ones(0))]
    for a in axes:
        bits = [(np.arange(cells[a]) >> b) & 1 for b in range((cells[a] - 1).bit_length())]
        rows += [(a, half) for bit in bits for half in (bit, 1 - bit)]
    rows += [("mask", np.ones(0))] if mask is not None else []
    here = {a: jnp.asarray(np.stack([half if name == a else np.ones(cells[a]) for name, half in rows])) for a in axes}
    there = {
        a: jnp.asarray(np.stack([1 - half if name == a else np.ones(cells[a]) for name, half in rows])) for a in axes
    }
    rng = np.random.default_rng(1)
    full, active = {}, {}
    for name, site in sites.items():
        lengths = _lengths(site)
        full[name] = jnp.asarray(rng.normal(size=tuple(lengths.values())), site.dtype)
        active[name] = jnp.asarray([row == "all" or row in lengths or row == "mask" for row, _ in rows])
    off = {name: 1 - mask(activations[name].value) for name in sites} if mask is not None else {}
    is_mask = jnp.asarray([row == "mask" for row, _ in rows])
    is_row = {a: jnp.asarray([row == a for row, _ in rows]) for a in axes}

    @jax.jit
    def push(params: Any, model_state: Any, batch: Mapping[str, Any], active: dict[str, jax.Array]) -> jax.Array:
        step = Step(estimator.network, estimator.target, params, model_state, batch)

        def one(case: tuple[Any, ...]) -> jax.Array:
            here, there, active, masked, row = case
            u = {}
            for name, site in sites.items():
                names = tuple(_lengths(site))
                value = full[name] * active[name]
                for a in axes:
                    if a in names:
                        value = value * Named(here[a], (a,)).to(names).astype(value.dtype)
                if off:
                    value = value * jnp.where(masked, off[name], 1)
                u[name] = Named(value[None], ("draw", *names))
            pushed, largest = step.push(part, u).terms, []
            for scope in step.scopes:
                kept = step.cells(scope, pushed).sum_to(part.partition)
                value = jnp.abs(kept.value)
                for a in axes:  # along an axis that it lacks all slices share the cells: no claim, nothing to find
                    own = a in kept.axes
                    value = value * (Named(there[a], (a,)).to(kept.axes) if own else jnp.where(row[a], 0, 1))
                largest.append(value.max())
            return jnp.stack(largest)

        return jax.lax.map(one, (here, there, active, is_mask, is_row))

    def sizes(active: dict[str, jax.Array]) -> np.ndarray:
        """[row, scope], relative to the first row."""
        return np.asarray(push(params, model_state, batch, active))

    largest = sizes(active)
    scale = largest[0]
    displaced = [
        i for i, scope in enumerate(_scopes(estimator)) if any(site.block in scope.blocks for site in sites.values())
    ]
    if apart and not scale[displaced].any():
        raise InputError(
            f"{estimator.name} displaces {', '.join(sites)} and no loss changes: let the loss depend on what is displaced, or accept it with "
            "allow_bias=True (--allow-bias)."
        )
    limit = 1e-5 * np.where(scale > 0, scale, np.inf)
    for row in np.flatnonzero((largest[1:] > limit).any(1)) + 1:
        axis = rows[row][0]
        for name in sites:
            if any(leak.site == name and leak.axis == axis for leak in found):
                continue
            alone = sizes({other: x * (other == name) for other, x in active.items()})[row]
            if (alone > limit).any():
                found.append(Leak(name, axis, float((alone / np.where(scale > 0, scale, 1)).max())))
    return found


def _scopes(estimator: Estimator) -> tuple[Scope, ...]:
    return estimator.target.scopes(estimator.network)


def _lengths(site: Site) -> dict[str, int]:
    """Axes along which a check displaces a site: its own, shared noise or not, and those that the noise alone has (the batch, for weights)."""
    own = dict(zip(site.axes, site.shape, strict=True))
    noise = dict(zip(site.noise_axes, site.noise_shape, strict=True))
    return {**{a: n for a, n in noise.items() if a not in own}, **own}


def _one_by_one(step: Step, term: int) -> jax.Array:
    """Loss cells of each example run alone; differ from the batch's where the network couples examples."""

    def example(batch: Mapping[str, Any]) -> jax.Array:
        ran = step.run(step.params, taps.displace({}), batch=jax.tree.map(lambda x: x[None], batch))
        return ran.terms[term].cells.value[0]

    return jax.vmap(example)(dict(step.batch))
