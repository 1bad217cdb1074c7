"""Unbiasedness without statistics: the mean over enumerated directions is the gradient of the target, to the last digits of float64."""

import functools

import jax
import jax.numpy as jnp
import pytest
from toynets import (
    CELLS,
    FIXED,
    TARGETS,
    along,
    distance,
    estimates,
    gradient,
    hadamard,
    loss,
    mean,
    mixer,
    once,
    problem,
)

import forwardgrad as fg
from forwardgrad.models.mlp import MLP

pytestmark = pytest.mark.float64

taps, weights = fg.activations, fg.weights

# target, insertion, partition: each an estimator whose expectation must be the target's gradient
CASES = {
    "fg-a, no partition": ("global", taps(), ()),
    "fg-a, batch": ("global", taps(), CELLS[:1]),
    "fg-a, one noise for all examples": ("global", taps(shared="batch"), CELLS[:1]),
    "fg-w": ("global", weights(), ()),
    "fg-w, batch": ("global", weights(), CELLS[:1]),
    "fg-w, per example": ("global", weights(per_example=True), CELLS[:1]),
    "fg-w, per example, no partition": ("global", weights(per_example=True), ()),
    "flowing, taps": ("flowing", taps(), ()),
    "flowing, taps, batch": ("flowing", taps(), CELLS[:1]),
    "flowing, weights": ("flowing", weights(), ()),
    "flowing, weights, per example": ("flowing", weights(per_example=True), CELLS[:1]),
    "lg-fg-a, no partition": ("local", taps(), ()),
    "lg-fg-a, batch": ("local", taps(), CELLS[:1]),
    "lg-fg-a, patches": ("local", taps(), CELLS[:2]),
    "lg-fg-a, groups": ("local", taps(), CELLS),
    "lg-fg-a, group alone": ("local", taps(), ("group",)),
    "lg-fg-a, one noise for all patches": ("local", taps(shared="patch"), CELLS),
    "lg-fg-a, one noise for all cells": ("local", taps(shared="batch patch group"), CELLS),
    "lg-fg-w, no partition": ("local", weights(), ()),
    "lg-fg-w, group": ("local", weights(), ("group",)),
    "lg-fg-w, output patch and group": ("local", weights(), CELLS),
    "lg-fg-w, per example": ("local", weights(per_example=True), CELLS),
    "lg-fg-w, noise by name": ("local", weights(only="tok", noise={"tok": "batch in patch"}), CELLS),
}


@pytest.mark.parametrize("name", CASES)
def test_the_mean_over_directions_is_the_gradient(name):
    target, insertion, partition = CASES[name]
    build = lambda guess: fg.estimator(
        mixer(), target=TARGETS[target], guess=guess, insertion=insertion, partition=partition
    )
    found = estimates(build, hadamard(), problem())
    assert distance(mean(found), gradient(target)) < 1e-12
    spread = jnp.abs(found["b0"]["layers"]["tok"] - gradient(target)["b0"]["layers"]["tok"]).max()
    assert spread > 1e-3, "a single estimate is not the gradient, so the mean proves something"


@pytest.mark.parametrize(
    ("insertion", "partition"),
    [
        (taps(shared="patch"), ()),
        (taps(shared="patch"), CELLS[:1]),
        (taps(shared="batch"), ()),
        (taps(shared="unit"), CELLS),
        (weights(noise={"tok": "patch"}), CELLS),
    ],
)
def test_noise_that_is_shared_without_keeping_its_slices_apart_is_refused(insertion, partition):
    """One displacement for all patches and one scalar for all patches credits each patch with all patches' gradients: refused at the door."""

    def attempt():
        method = fg.estimator(
            mixer(), target=fg.local(), guess=fg.rademacher(), insertion=insertion, partition=partition
        )
        state = method.init(jax.random.key(1), *problem())
        return jax.eval_shape(lambda: method.estimate(jax.random.key(0), state, *problem())[0].grads)

    with pytest.raises(fg.InputError, match="share"):
        attempt()


@pytest.mark.parametrize("build", [fg.recipes.fg_a, fg.recipes.lg_fg_a, fg.recipes.lg_fg_w])
def test_one_block_has_one_target(build):
    """On a network of one block the greedy target is the global one."""
    one = problem(blocks=1)
    found = estimates(lambda guess: build(mixer(1), guess=guess), hadamard(128), one)
    assert distance(mean(found), gradient("global", 1)) < 1e-12
    assert distance(gradient("local", 1), gradient("global", 1)) == 0


@pytest.mark.parametrize("activation", [jax.nn.relu, jnp.tanh], ids=["relu", "tanh"])
def test_a_mask_is_unbiased_below_a_relu_only(activation):
    params, state, batch = problem()
    hidden = fg.activations(only=("tok", "chan"))  # the softplus above "grp" is no ReLU
    build = lambda guess: fg.estimator(
        mixer(activation=activation),
        target=fg.local(),
        guess=fg.masked(guess),
        insertion=hidden,
        partition=CELLS,
    )
    bp = fg.recipes.lg_bp(mixer(activation=activation))
    error = distance(mean(estimates(build, hadamard(128), problem())), jax.jit(lambda: once(bp, *problem()).grads)())
    assert error < 1e-12 if activation is jax.nn.relu else error > 1e-2
    check = lambda: build(fg.rademacher()).init(jax.random.key(0), params, state, batch)
    if activation is jax.nn.relu:
        check()
    else:
        with pytest.raises(fg.InputError, match="leave the mask out"):
            check()


@pytest.mark.parametrize(
    ("recipe", "target"),
    [("bp", "global"), ("bp-checkpointed", "global"), ("l-bp", "flowing"), ("lg-bp", "local")],
)
def test_baselines_are_jax_grad(recipe, target):
    method = fg.recipes.find(recipe)(mixer())
    params, _, batch = problem()
    found = jax.jit(lambda: once(method, *problem()))()
    assert distance(found.grads, gradient(target)) < 1e-13
    assert abs(float(found.loss) - float(loss(params, batch, target))) < 1e-14


def test_l_bp_keeps_a_detached_readout_cut_off():
    """A readout-only block at the end: its loss trains itself and reaches nothing below."""
    classifier = fg.Block("end", lambda p, state, h, train: (h, state), mixer().blocks[-1].readout, detached=True)
    network = fg.Network((*mixer().blocks, classifier))
    params, state = network.init(jax.random.key(0))
    run = jax.jit(lambda recipe: once(recipe(network), params, state, problem()[2]).grads, static_argnums=0)
    found = run(fg.recipes.l_bp)
    own = {name: params[name] for name in ("b0", "b1")}
    expected = jax.jit(lambda own: jax.grad(loss)(own, problem()[2], "flowing"))(own)
    assert distance({name: found[name] for name in own}, expected) < 1e-13
    assert float(jnp.abs(found["end"]["readout"]["head"]).max()) > 1e-3
    end_to_end = run(fg.recipes.bp)
    assert float(jnp.abs(end_to_end["b0"]["layers"]["tok"]).max()) > 1e-3, "the global target does reach below"


@functools.cache
def wrapped(recipe, wrap):
    return jax.jit(lambda: once(fg.recipes.find(recipe)(mixer(wrap=wrap), guess=FIXED), *problem()).grads)()


@pytest.mark.parametrize(
    ("recipe", "wrap"), [("fg-a", "jit"), ("lg-fg-a", "remat"), ("lg-fg-w", "jit"), ("lg-fg-w", "remat")]
)
def test_inner_jit_and_remat_change_nothing(recipe, wrap):
    assert distance(wrapped(recipe, wrap), wrapped(recipe, "plain")) < 1e-13


@pytest.mark.parametrize("insertion", [taps(), weights(), weights(per_example=True)], ids=["taps", "weights", "each"])
def test_directions_as_draws_are_directions_one_by_one(insertion):
    """K draws of one step are the mean of K estimates."""
    build = lambda guess, draws=1: fg.estimator(
        mixer(), target=fg.local(), guess=guess, insertion=insertion, partition=CELLS, draws=draws
    )
    rows = jnp.asarray(hadamard(128))[jnp.array([3, 50, 77])]
    stack = lambda pieces: {
        n: fg.Named(jnp.stack([p[n].value for p in pieces]), ("draw", *u.axes)) for n, u in pieces[0].items()
    }
    together = along(rows[0])._replace(propose=lambda k, s, view: stack([along(r).propose(k, s, view) for r in rows]))
    found = jax.jit(lambda: once(build(together, 3), *problem()).grads)()
    assert distance(found, mean(estimates(build, rows, problem()))) < 1e-13


@pytest.mark.parametrize("taps_at", ["before", "after"])
def test_an_adapted_network_is_as_exact(taps_at):
    """The NNX network: float64 by a cast of its parameters, the gradient by jax.grad of its own readout."""
    network = MLP(hidden=(5, 4), activation="tanh", taps=taps_at).network((3, 1, 1), classes=3)
    params, state = jax.tree.map(lambda x: x.astype("float64"), network.init(jax.random.key(0)))
    batch = {"inputs": jax.random.normal(jax.random.key(1), (3, 3, 1, 1)), "labels": jnp.arange(3)}

    def by_hand(params):
        logits = network.predict(params, state, batch["inputs"]).value
        return -jax.nn.log_softmax(logits)[jnp.arange(3), batch["labels"]].mean()

    for build in (fg.recipes.fg_a, fg.recipes.fg_w):
        found = estimates(lambda guess, build=build: build(network, guess=guess), hadamard(64), (params, state, batch))
        assert distance(mean(found), jax.grad(by_hand)(params)) < 1e-13
