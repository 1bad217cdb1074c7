"""`tap`: one marker that names an activation, and one rewrite that visits every marked activation.

`tap(z, name, axes)` is the identity. `visited(function, visit)` evaluates the function's jaxpr again and asks `visit(name, axes, z)` at each
tap for a pair `(record, downstream)`: what to write down, and what the rest of the network sees instead of `z`. Four visitors give everything:

| visitor | downstream | serves |
|---|---|---|
| `record` | `z` | reading activations |
| `displace` | `z + eps` | directional derivatives with respect to activations |
| `cut` | `stop_gradient(z)` | a gradient that is one layer deep |
| `replay` | the value stored, with the derivative of `z` | a backward pass through other weights: feedback alignment |

Taps survive `jit`, `vmap`, `jax.checkpoint` and `grad`, nested in any way. Under `vmap` a tap gains the mapped axis in front, under its
`axis_name` (an anonymous name where there is none, which no loss shares). Every import of private JAX names of this project is in this file.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax._src import core
from jax.extend.core import Literal, Primitive
from jax.interpreters import ad, batching, mlir

from forwardgrad.errors import InputError, unknown
from forwardgrad.named import Named, axis_names, spread

Visit = Callable[[str, tuple[str, ...], jax.Array], tuple[Any, jax.Array]]

tap_p = Primitive("tap")
tap_p.def_impl(lambda z, **_: z)
tap_p.def_abstract_eval(lambda z, **_: z)
mlir.register_lowering(tap_p, lambda ctx, z, **_: [z])
# Only the primal is an activation: tangents and cotangents pass unmarked.
ad.primitive_jvps[tap_p] = lambda primals, tangents, **params: (tap_p.bind(*primals, **params), tangents[0])
ad.primitive_transposes[tap_p] = lambda cotangent, z, **params: (cotangent,)


def _batch(axis_data: Any, args: Any, dims: Any, *, name: str, axes: tuple[str, ...], passive: bool) -> tuple[Any, Any]:
    """The mapped axis goes to the front, so that a tap's layout does not depend on how the layer below happened to be batched."""
    (z,), (dim,) = args, dims
    if dim is None:  # not mapped
        return tap_p.bind(z, name=name, axes=axes, passive=passive), dim
    mapped = axis_data.name if isinstance(axis_data.name, str) else f"~{len(axes)}"
    axes = axis_names((mapped, *axes), f"tap {name!r} under vmap")
    return tap_p.bind(jnp.moveaxis(z, dim, 0), name=name, axes=axes, passive=passive), 0


# The plain batching table does not see the name of the mapped axis; this one does.
batching.fancy_primitive_batchers[tap_p] = _batch


def tap(z: jax.Array, name: str, axes: str | Sequence[str], *, passive: bool = False) -> jax.Array:
    """Mark an activation, so that estimators can displace it, cut it or read it. The identity otherwise.

    Put it right before the nonlinearity, or at a layer's output; an estimator differentiates one layer deep below it.

    Args:
      z: the activation, any shape.
      name: its name, unique within one block (or within the function, where there are no blocks).
      axes: the names of its axes, e.g. `"batch patch group channel"`. A name that the loss has too asserts that the slices along that axis
        reach no other slice of the loss; `forwardgrad.checks.separable` verifies it.
      passive: recorded and replayed, but displaced and cut only where `only=` gives its full name, or `credit_at` hands it
        another's credit (it is then cut instead of that one). For the output of a linear layer that a
        normalisation follows, next to the tap below the nonlinearity: feedback alignment needs its value.

    Returns:
      `z`.

    Raises:
      InputError: as many names as `z` has axes were not given, or one was given twice.

    Example:
      >>> import jax.numpy as jnp
      >>> from forwardgrad import tap
      >>> tap(jnp.ones((2, 3)), "hidden", "batch unit").shape
      (2, 3)
    """
    names = axis_names(axes, f"tap {name!r}")
    if len(names) != jnp.ndim(z):
        raise InputError(
            f"tap {name!r} names {len(names)} axes ({' '.join(names)}) but the array has rank {jnp.ndim(z)} and shape {jnp.shape(z)}: "
            "name every axis once, in order."
        )
    return tap_p.bind(jnp.asarray(z), name=name, axes=names, passive=passive)


class Program(NamedTuple):
    """A function with its taps, traced once, to be evaluated under any visitor."""

    closed: Any
    structure: Any

    @property
    def taps(self) -> list[str]:
        """Names of all taps, in order of execution."""
        return [params["name"] for params in _taps(self.closed.jaxpr)]

    @property
    def passive(self) -> list[str]:
        """Names of the passive ones."""
        return [params["name"] for params in _taps(self.closed.jaxpr) if params["passive"]]


def _inner(eqn: Any) -> list[Any]:
    return [getattr(j, "jaxpr", j) for j in core.jaxprs_in_params(eqn.params)]


def _taps(jaxpr: Any, within: str = "") -> Iterator[Mapping[str, Any]]:
    """What all taps were marked with; raises where a tap cannot be visited."""
    for eqn in jaxpr.eqns:
        primitive = eqn.primitive.name
        if eqn.primitive is tap_p:
            if within:
                raise InputError(
                    f"tap {eqn.params['name']!r} is inside `{within}`, where it cannot be visited: move it out, unroll the loop, "
                    "or give the network as blocks."
                )
            yield eqn.params
        else:
            reachable = primitive in ("jit", "pjit", "checkpoint", "remat", "remat2")
            for inner in _inner(eqn):
                yield from _taps(inner, within or ("" if reachable else primitive))


def trace(function: Callable, *args: Any) -> Program:
    """Trace `function` at `args` and check its taps.

    Raises:
      InputError: two taps have one name, or a tap is inside `scan`, `while`, `cond` or a function with custom derivatives.
    """
    flat, structure = jax.tree.flatten(args)
    closed, out = jax.make_jaxpr(lambda *leaves: function(*structure.unflatten(leaves)), return_shape=True)(*flat)
    program = Program(closed, jax.tree.structure(out))
    seen: set[str] = set()
    for name in program.taps:
        if name in seen:
            raise InputError(
                f"two taps are called {name!r}: give each tap of a block its own name (a gradient of a jax.checkpoint inside the function also "
                "repeats its taps: take the gradient outside)."
            )
        seen.add(name)
    return program


def evaluate(program: Program, args: Sequence[Any], visit: Visit) -> tuple[Any, dict[str, Any]]:
    """Run a traced function under a visitor.

    Returns:
      The function's result, and `{tap name: record}` of all records that are not `None`.
    """
    leaves = jax.tree.leaves(tuple(args))
    outs, records = _evaluate(program.closed.jaxpr, program.closed.consts, leaves, visit)
    return jax.tree.unflatten(program.structure, outs), records


def run(program: Program, args: Sequence[Any]) -> Any:
    """Run a traced function as it is, with its taps."""
    outs = core.eval_jaxpr(program.closed.jaxpr, program.closed.consts, *jax.tree.leaves(tuple(args)))
    return jax.tree.unflatten(program.structure, outs)


def reached(program: Program, sources: Sequence[bool], cut: Collection[str]) -> Any:
    """Which results may depend on some arguments otherwise than through cut taps.

    Args:
      program: traced.
      sources: for the first leaves of the arguments, whether they are asked about; the others are not.
      cut: names of taps at which a dependence ends.

    Returns:
      The function's result with True or False in place of each leaf. True where it cannot be told.
    """
    jaxpr = program.closed.jaxpr
    flags = [*sources, *[False] * (len(jaxpr.invars) - len(sources))]
    return jax.tree.unflatten(program.structure, _reached(jaxpr, flags, cut))


def _reached(jaxpr: Any, flags: Sequence[bool], cut: Collection[str]) -> list[bool]:
    marked = {v for v, flag in zip(jaxpr.invars, flags, strict=True) if flag}
    hit = lambda v: not isinstance(v, Literal) and v in marked
    for eqn in jaxpr.eqns:
        ins = [hit(v) for v in eqn.invars]
        inner = [j for j in _inner(eqn) if any(True for _ in _taps(j))]
        if inner:  # `jit` or `checkpoint`: nothing else may hold taps
            outs = _reached(inner[0], ins, cut)
        else:
            ends = eqn.primitive is tap_p and eqn.params["name"] in cut
            outs = [any(ins) and not ends] * len(eqn.outvars)
        marked |= {v for v, out in zip(eqn.outvars, outs, strict=True) if out}
    return [hit(v) for v in jaxpr.outvars]


def visited(function: Callable, visit: Visit) -> Callable:
    """`function(*args) -> out` becomes `(*args) -> (out, {tap name: record})`.

    Example:
      >>> import jax.numpy as jnp
      >>> from forwardgrad.taps import record, tap, visited
      >>> f = lambda x: tap(2 * x, "double", "unit").sum()
      >>> visited(f, record)(jnp.ones(3))[1]["double"].axes
      ('unit',)
    """
    return lambda *args: evaluate(trace(function, *args), args, visit)


def _evaluate(jaxpr: Any, consts: Sequence[Any], args: Sequence[Any], visit: Visit) -> tuple[list[Any], dict[str, Any]]:
    env: dict[Any, Any] = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *args), strict=True))
    records: dict[str, Any] = {}
    for eqn in jaxpr.eqns:
        ins = [v.val if isinstance(v, Literal) else env[v] for v in eqn.invars]
        if eqn.primitive is tap_p:
            name, axes = eqn.params["name"], eqn.params["axes"]
            written, downstream = visit(name, axes, ins[0])
            if written is not None:
                records[name] = written
            outs = [downstream]
        elif any(True for inner in _inner(eqn) for _ in _taps(inner)):
            outs, written = _enter(eqn, ins, visit)
            records.update(written)
        else:
            with eqn.ctx.manager:
                ans = eqn.primitive.bind(*ins, **eqn.primitive.get_bind_params(eqn.params))
            outs = ans if eqn.primitive.multiple_results else [ans]
        env.update(zip(eqn.outvars, outs, strict=True))
    return [v.val if isinstance(v, Literal) else env[v] for v in jaxpr.outvars], records


def _enter(eqn: Any, ins: list[Any], visit: Visit) -> tuple[list[Any], dict[str, Any]]:
    """Visit the taps inside an inner `jit` (inlined: the caller compiles the whole) or `jax.checkpoint` (kept: it is there for memory)."""
    inner = eqn.params["jaxpr"]
    jaxpr, consts = getattr(inner, "jaxpr", inner), getattr(inner, "consts", ())
    if eqn.primitive.name in ("jit", "pjit"):
        return _evaluate(jaxpr, consts, ins, visit)
    body = jax.checkpoint(
        lambda *args: _evaluate(jaxpr, consts, args, visit),
        policy=eqn.params["policy"],
        prevent_cse=eqn.params["prevent_cse"],
    )
    return body(*ins)


def record(name: str, axes: tuple[str, ...], z: jax.Array) -> tuple[Named, jax.Array]:
    """Visitor: write down every activation as a `Named`, change nothing."""
    return Named(z, axes), z


def displace(eps: Mapping[str, Named]) -> Visit:
    """Visitor: add `eps[name]` to the activations named in it. An axis that `eps` lacks shares one displacement."""

    def visit(name: str, axes: tuple[str, ...], z: jax.Array) -> tuple[None, jax.Array]:
        if name not in eps:
            return None, z
        return None, z + eps[name].to(axes).astype(z.dtype)

    return visit


def cut(names: Collection[str]) -> Visit:
    """Visitor: write down the named activations and stop their gradient; what lies below is reached only through the record."""

    def visit(name: str, axes: tuple[str, ...], z: jax.Array) -> tuple[Any, jax.Array]:
        return (Named(z, axes), jax.lax.stop_gradient(z)) if name in names else (None, z)

    return visit


def replay(stored: Mapping[str, Named]) -> Visit:
    """Visitor: downstream sees the stored values, with the derivative of the computation that runs now.

    Run with other weights, the backward pass goes through those weights at the stored activations (feedback alignment); with the weights
    that made the stored values it is backpropagation exactly. A tap, passive or not, must stand at each linear layer's output: what follows
    it, normalisation and nonlinearity, then has the derivative at the true activations.
    """

    def visit(name: str, axes: tuple[str, ...], z: jax.Array) -> tuple[None, jax.Array]:
        if name not in stored:
            raise unknown("stored activation", name, stored, "Replay what the same network recorded.")
        value = spread(stored[name], dict(zip(axes, z.shape, strict=True))).value
        return None, _pinned(value.astype(z.dtype), z)

    return visit


@jax.custom_jvp
def _pinned(value: jax.Array, z: jax.Array) -> jax.Array:
    """`value`, with the derivative of `z`, whose own value nobody asks for: XLA leaves out what only it needs."""
    return value


_pinned.defjvp(lambda primals, tangents: (primals[0], tangents[1]))
