"""Every promise on every recipe: structure, shape and dtype, one key one result, no second compilation, exact readouts, a stable state."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest
from toynets import distance

import forwardgrad as fg
from forwardgrad.models.mlp import MLP

pytestmark = pytest.mark.float64

N, CLASSES = 4, 3
OPTIONS = {"lg-fg-a-plus": {"perturbed": "all"}}  # this network has no hidden taps


@functools.cache
def problem(dtype):
    with jax.ensure_compile_time_eval():
        network = MLP(hidden=(5, 4)).network((3, 2, 1), CLASSES)
        params, state = jax.tree.map(lambda x: x.astype(dtype), network.init(jax.random.key(0)))
        inputs = jax.random.normal(jax.random.key(1), (N, 3, 2, 1), dtype)
        return network, params, state, {"inputs": inputs, "labels": jnp.arange(N) % CLASSES}


def kinds(tree):
    """Structure, shapes and dtypes."""
    return jax.tree.structure(tree), [(x.shape, x.dtype) for x in jax.tree.leaves(tree)]


@functools.cache
def last_readout(dtype):
    """By hand: loss and gradient of the final classifier, which every method must give exactly."""
    _, params, _, batch = problem(dtype)
    h = batch["inputs"].reshape(N, -1)
    for block in ("layer0", "layer1"):
        layer = params[block]["layers"]["linear"]
        h = jax.nn.relu(h @ layer["kernel"] + layer["bias"])

    def loss(readout):
        log_p = jax.nn.log_softmax(h @ readout["kernel"] + readout["bias"])
        return -log_p[jnp.arange(N), batch["labels"]].mean()

    return jax.value_and_grad(loss)(params["layer1"]["readout"])


@pytest.mark.parametrize("name", fg.recipes.names())
def test_a_recipe_keeps_its_promises(name):
    """In single precision, as users run it."""
    with jax.enable_x64(False):
        network, params, state, batch = problem("float32")
        method = fg.recipes.find(name)(network, **OPTIONS.get(name, {}))
        guess_state = method.init(jax.random.key(2), params, state, batch)
        step = jax.jit(method.estimate)
        found, new_guess, new_state = step(jax.random.key(3), guess_state, params, state, batch)
        again, newer_guess, _ = step(jax.random.key(3), guess_state, params, state, batch)
        step(jax.random.key(4), new_guess, params, new_state, batch)
        loss, readout = last_readout("float32")
    assert kinds(found.grads) == kinds(params)
    assert kinds(new_guess) == kinds(guess_state)
    assert kinds(new_state) == kinds(state)
    assert step._cache_size() == 1, "no compilation on the second and third call"
    assert distance((again, newer_guess), (found, new_guess)) == 0, "one key, one result"
    assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(found))
    assert distance(found.grads["layer1"]["readout"], readout) < 1e-6
    assert found.loss.dtype == jnp.float32
    assert abs(float(list(found.info.losses.values())[-1] - loss)) < 1e-6
    assert float(jnp.abs(found.grads["layer0"]["layers"]["linear"]["kernel"]).max()) > 0 or name in (
        "dkp",
        "fdfa",
    )  # from B = 0


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize("name", fg.recipes.names())
def test_dtypes_are_those_of_the_parameters(name, dtype):
    """In double precision mode, whatever the parameters' own precision: nothing is promoted, in gradients or state."""
    network, params, state, batch = problem(dtype)
    batch = {
        **batch,
        "weight": jnp.full(N, 1 / N, jnp.float32),
        "index": jnp.arange(N),
    }  # as a data pipeline gives them
    method = dataclasses.replace(fg.recipes.find(name)(network, **OPTIONS.get(name, {})), allow_bias=True)

    def step(key):
        guess_state = method.init(key, params, state, batch)
        found, new_guess, new_state = method.estimate(key, guess_state, params, state, batch)
        return found.grads, params, new_guess, guess_state, new_state, state

    grads, params, new_guess, guess_state, new_state, state = jax.eval_shape(step, jax.random.key(0))
    assert kinds(grads) == kinds(params)
    assert kinds(new_guess) == kinds(guess_state)
    assert kinds(new_state) == kinds(state)


@pytest.mark.parametrize("name", fg.recipes.names())
def test_a_recipe_explains_itself(name):
    recipe = fg.recipes.find(name)
    assert recipe.name == name == recipe(problem("float32")[0]).name
    assert len(recipe.about) > 30
    assert "Cost" in recipe.__doc__
    assert recipe.cite


def test_wrappers_edit_every_part():
    method = fg.recipes.lg_fg_a(problem("float64")[0])
    two = dataclasses.replace(method, parts=method.parts * 2)
    assert [part.draws for part in fg.wrappers.with_draws(two, 5).parts] == [5, 5]
    assert {part.guess.name for part in fg.wrappers.with_guess(two, fg.gaussian()).parts} == {"gaussian"}
    edited = fg.wrappers.with_orthogonal_draws(two, 3)
    assert [(part.guess.name, part.draws) for part in edited.parts] == [("orthogonal", 3)] * 2
    assert {part.predictor.name for part in fg.wrappers.with_predictor(two, fg.gaussian()).parts} == {"gaussian"}
    assert (edited.network, edited.target, edited.name) == (method.network, method.target, method.name)
    assert method.parts[0].draws == 1, "the original is as it was"


def test_several_draws_leave_the_baselines_exact():
    """The cost of a baseline does not depend on draws, and its gradient neither."""
    network, params, state, batch = problem("float64")
    for recipe in (fg.recipes.bp, fg.recipes.lg_bp):
        method = fg.wrappers.with_draws(recipe(network), 4)
        found = jax.jit(lambda m=method: m.estimate(jax.random.key(0), (), params, state, batch)[0].grads)()
        assert distance(found["layer1"]["readout"], last_readout("float64")[1]) < 1e-13
