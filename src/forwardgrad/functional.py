"""`value_and_grad` for any JAX function: the engine on a network of one nameless block."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from forwardgrad import checks, insertions, probes, rules, taps
from forwardgrad.engine import Estimator, Part
from forwardgrad.errors import InputError
from forwardgrad.guesses.base import Guess
from forwardgrad.insertions import Insertion
from forwardgrad.named import Named
from forwardgrad.network import Block, Network, Readout, leaf_paths
from forwardgrad.targets import global_loss


def value_and_grad(
    loss: Callable[..., Any],
    *,
    guess: Guess,
    insertion: str | Insertion = "weights",
    partition: tuple[str, ...] | None = None,
    rule: rules.Rule = rules.unbiased,
    predictor: Guess | None = None,
    draws: int = 1,
    probe: probes.Probe = probes.jvp,
    allow_bias: bool = False,
) -> Callable[..., tuple[jax.Array, Any]]:
    """A forward-gradient counterpart of `jax.value_and_grad`.

    Args:
      loss: `loss(params, *args)` returns a scalar, one loss per example (rank 1; their mean is the loss), or a `Named` of loss cells with a
        batch axis (the mean over examples of the sum over the other axes is the loss).
      guess: the directions, e.g. `forwardgrad.rademacher()`.
      insertion: "weights", "activations" (the function then marks them with `forwardgrad.tap`), or an `Insertion`.
      partition: loss axes that stay apart. Default: none for weights; for activations the loss's own axes, so that with one loss per example
        and taps with a batch axis (from `vmap(axis_name="batch")`, or named so) each example is credited with its own loss.
      rule, predictor, draws, probe: as in `forwardgrad.estimator`. The predictor must be without state.
      allow_bias: skip the check that slices named apart are apart.

    Returns:
      `(params, *args, key) -> (loss, grads)`, to be used under `jit` as you like. The estimate is unbiased where guess and rule are, on the
      scale of `jax.grad` of the mean loss. With activations, parameters above the last tap get their exact gradient.
      Cost: one forward pass with `draws` tangents, and for activations one vjp that is one layer deep.

    Raises:
      InputError: no taps, axes that do not match, a network that couples examples although they are kept apart, a loss of another rank.

    Example:
      >>> import jax, jax.numpy as jnp, forwardgrad as fg
      >>> def loss(w, x, y):
      ...     z = fg.tap(x @ w, "z", "batch unit")
      ...     return (jnp.tanh(z).sum(-1) - y) ** 2
      >>> vg = fg.value_and_grad(loss, guess=fg.rademacher(), insertion="activations")
      >>> value, grads = jax.jit(vg)(jnp.ones((3, 2)), jnp.ones((5, 3)), jnp.zeros(5), key=jax.random.key(0))
      >>> grads.shape
      (3, 2)
    """
    if isinstance(insertion, str):
        if insertion not in ("weights", "activations"):
            raise InputError(f"insertion {insertion!r} does not exist: use 'weights', 'activations' or an Insertion.")
        insertion = insertions.weights() if insertion == "weights" else insertions.activations()
    checked: set[Any] = set()

    def cells(params: Any, args: tuple[Any, ...]) -> Named:
        value = loss(params, *args)
        if isinstance(value, Named):
            return value
        if jnp.ndim(value) > 1:
            raise InputError(
                f"the loss has shape {jnp.shape(value)}: return a scalar, one loss per example, or a forwardgrad.Named that names its axes."
            )
        return Named(value, ("batch",)[: jnp.ndim(value)])

    def network_of(program: taps.Program) -> Network:
        apply = lambda params, state, args, train: (taps.run(program, (params, args)), state)
        readout = Readout(outputs=lambda params, h: h, loss=lambda outputs, batch: outputs)
        return Network((Block("", apply, readout),))

    def estimate(params: Any, *args: Any, key: jax.Array) -> tuple[jax.Array, Any]:
        program = taps.trace(cells, params, args)
        shapes = jax.eval_shape(cells, params, args)
        if not probe.exact and len(shapes.axes) > 1:
            raise InputError(
                f"a {probe.name} needs one loss per example at most, not cells {shapes.axes}: use the jvp probe."
            )
        # without a batch axis there are no examples: the loss is taken as it is and noise has one key
        n = shapes.sizes.get("batch")
        examples = (
            {"weight": jnp.ones(()), "index": None}
            if n is None
            else {"weight": jnp.full(n, 1 / n), "index": jnp.arange(n)}
        )
        if n is not None and insertion.weights is not None and "batch" in insertion.weights.extra:
            for path, leaf in leaf_paths(args).items():
                if jnp.ndim(leaf) == 0 or jnp.shape(leaf)[0] != n:
                    raise InputError(
                        f"a displacement per example maps over every argument, and argument {path} has shape {jnp.shape(leaf)}: let the function "
                        "close over what is not per example."
                    )
        batch = {"inputs": args, **examples}
        apart = partition if partition is not None else shapes.axes if insertion.taps is not None else ()
        part = Part(guess, insertion, tuple(apart), rule, predictor, draws, probe)
        tree = {"": {"layers": params, "readout": ()}}
        method = Estimator(network_of(program), global_loss(), (part,), allow_bias, "value_and_grad", executor="whole")
        signature = jax.tree.structure((tree, batch)), tuple(jax.typeof(x) for x in jax.tree.leaves((tree, batch)))
        if not allow_bias and signature not in checked:
            # what the function closes over may be known only as a tracer, as its arguments may
            with jax.ensure_compile_time_eval():
                concrete = program._replace(closed=program.closed.replace(consts=checks.values(program.closed.consts)))
            known = dataclasses.replace(method, network=network_of(concrete))
            checks.refuse_bias(known, tree, {"": ()}, batch, shrink=False)
            checked.add(signature)
        state = method.initial_state(key, tree, {"": ()}, batch)
        if jax.tree.leaves(state):
            raise InputError(
                "value_and_grad keeps no state between calls, and this guess or predictor learns: use forwardgrad.estimator."
            )
        found, _, _ = method.estimate(key, state, tree, {"": ()}, batch)
        return found.loss, found.grads[""]["layers"]

    return estimate
