"""Probes (how the scalar is measured) and rules (what is made of it)."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest
from toynets import CELLS, FIXED, TARGETS, N, all_signs, distance, flat, gradient, mixer, once, problem

import forwardgrad as fg
from forwardgrad import taps
from forwardgrad.guesses.base import Guess

pytestmark = pytest.mark.float64


def method(target="local", guess=None, insertion=None, partition=CELLS, network=None, **options):
    return fg.estimator(
        network or mixer(),
        target=TARGETS[target],
        guess=guess or FIXED,
        insertion=insertion or fg.activations(),
        partition=partition,
        **options,
    )


def grads(estimator):
    return jax.jit(lambda: once(estimator, *problem()).grads)()


# ------------------------------------------------------------------------------------------------ probes


def with_probe(probe, insertion):
    partition = ("batch",) if insertion.taps else ()
    smooth = mixer(activation=jnp.tanh)
    return lambda guess: method("global", guess, insertion, partition, smooth, probe=probe)


@pytest.mark.parametrize("insertion", [fg.activations(), fg.weights()], ids=["activations", "weights"])
def test_a_finite_difference_converges_to_the_derivative_in_first_order(insertion):
    exact = grads(with_probe(fg.jvp, insertion)(FIXED))
    step = lambda eps: distance(grads(with_probe(fg.finite_difference(eps), insertion)(FIXED)), exact)
    coarse, fine = step(1e-3), step(1e-4)
    assert 1e-7 < coarse < 1e-1
    assert 8 < coarse / fine < 12, "an error proportional to the step"


def test_a_finite_difference_is_the_derivative_where_the_loss_is_linear():
    def loss(w, x):
        return fg.tap(x @ w, "z", "batch unit").sum(-1)

    args = jax.random.normal(jax.random.key(0), (3, 2)), jax.random.normal(jax.random.key(1), (4, 3))
    for insertion in ("activations", "weights"):
        run = lambda probe, insertion=insertion: fg.value_and_grad(
            loss, guess=fg.rademacher(), insertion=insertion, probe=probe
        )(*args, key=jax.random.key(2))
        assert distance(run(fg.finite_difference(0.5)), run(fg.jvp)) < 1e-13


# ------------------------------------------------------------------------------------------------ rules


@functools.cache
def true_credit():
    """The greedy gradient with respect to the taps of a scope, as a guess."""

    def propose(key, state, view):
        loss = lambda eps: view.forward(
            view.params, taps.displace({n: fg.Named(e, view.sites[n].axes) for n, e in eps.items()})
        )[0]
        zeros = {n: jnp.zeros(site.shape) for n, site in view.sites.items()}
        return {n: fg.Named(g, view.sites[n].axes) for n, g in jax.grad(loss)(zeros).items()}

    return Guess(propose, name="the gradient")


def scaled(guess, factor):
    times = lambda u: fg.Named(factor * u.value, u.axes)
    return guess._replace(propose=lambda *a: {n: times(u) for n, u in guess.propose(*a).items()})


@pytest.mark.parametrize("partition", [(), ("batch",), ("batch", "patch")])
def test_projection_on_the_gradient_is_the_gradient(partition):
    found = grads(method(guess=true_credit(), partition=partition, rule=fg.rules.projection))
    assert distance(found, gradient("local")) < 1e-12


def test_projection_ignores_the_guess_s_length_and_sign_and_shortens():
    run = lambda guess: grads(method(guess=guess, rule=fg.rules.projection))
    assert distance(run(scaled(FIXED, -7.0)), run(FIXED)) < 1e-12
    zero = run(scaled(FIXED, 0.0))
    assert distance(zero["b1"]["readout"], gradient("local")["b1"]["readout"]) < 1e-13
    assert float(jnp.abs(flat({b: g["layers"] for b, g in zero.items()})).max()) == 0, "a zero guess, a zero estimate"


def test_projection_twice_is_projection_once():
    """On weights of one scope: ĝ = P g, and P ĝ = ĝ, |ĝ| <= |g|."""
    w = jax.random.normal(jax.random.key(0), (4, 3))
    u = jax.random.normal(jax.random.key(1), (4, 3))
    project = lambda g: fg.value_and_grad(
        lambda v: (g * v).sum(), guess=fg.given(u), insertion="weights", rule=fg.rules.projection
    )(w, key=jax.random.key(0))[1]
    once_, twice = project(w), project(project(w))
    assert distance(once_, (w * u).sum() / (u * u).sum() * u) < 1e-14
    assert distance(once_, twice) < 1e-14
    assert float((once_**2).sum()) < float((w**2).sum())


def test_the_sign_rule_and_the_unnormalised_one_by_hand():
    def loss(w, x):
        return jnp.sin(fg.tap(x @ w, "z", "batch unit")).sum(-1)

    w, x = jax.random.normal(jax.random.key(0), (3, 2)), jax.random.normal(jax.random.key(1), (4, 3))
    u = jnp.asarray(all_signs(2))
    d = (jnp.cos(x @ w) * u).sum(-1)  # of each example's own loss
    key = jax.random.key(0)
    estimate = lambda rule: fg.value_and_grad(loss, guess=fg.given({"z": u}), insertion="activations", rule=rule)
    run = lambda rule: jax.jit(estimate(rule))(w, x, key=key)[1]
    assert distance(run(fg.rules.unbiased), x.T @ (d[:, None] * u) / 4) < 1e-14
    assert distance(run(fg.rules.unnormalised), x.T @ (d[:, None] * u)) < 1e-14
    assert distance(run(fg.rules.sign), x.T @ (jnp.sign(d)[:, None] * u) / 4) < 1e-14


@pytest.mark.parametrize("recipe", ["fg-a", "fg-w"])
def test_released_scale_is_n_times_the_estimate_per_example(recipe):
    plain = method("global", partition=("batch",) if recipe == "fg-a" else (), insertion=None if recipe == "fg-a" else fg.weights())  # fmt: skip
    (part,) = plain.parts
    released = dataclasses.replace(plain, parts=(dataclasses.replace(part, rule=fg.rules.unnormalised),))
    layers = lambda g: {b: own["layers"] for b, own in g.items()}
    factor = N if recipe == "fg-a" else 1
    expected = jax.tree.map(lambda x: factor * x, layers(grads(plain)))
    assert distance(layers(grads(released)), expected) < 1e-12
    if recipe == "fg-a":
        assert distance(grads(fg.recipes.fg_a(mixer(), guess=FIXED, released=True)), grads(released)) == 0
