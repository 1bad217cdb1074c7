"""Microbatches are exact: the same estimate, and the same learned state, for any divisor of the batch size."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toynets import setting, two_steps

import forwardgrad as fg
from forwardgrad.descent import adam
from forwardgrad.guesses.feedback import learned_feedback
from forwardgrad.guesses.local import local_gradient
from forwardgrad.models.localmixer import LocalMixer
from forwardgrad.models.mlp import MLP

pytestmark = pytest.mark.float64


METHODS = {name: fg.recipes.find(name) for name in ("bp", "lg-fg-a", "fg-w", "dkp", "fdfa")} | {
    "orthogonal": lambda network: fg.recipes.lg_fg_a(network, guess=fg.orthogonal()),
    "predictor": lambda network: fg.wrappers.with_predictor(
        fg.recipes.lg_fg_a(network, guess=fg.gaussian()), learned_feedback(adam(0.5), mask=True)
    ),
}


@pytest.mark.parametrize("method", METHODS)
def test_any_size_gives_the_whole_batch(method):
    network, params, model_state, batch = setting(LocalMixer(blocks=2, patches=2, channels=8, groups=2))
    whole = METHODS[method](network)
    expected = two_steps(whole, params, model_state, batch)
    for size in (1, 3) if method in ("bp", "predictor") else (1,):
        found = two_steps(dataclasses.replace(whole, microbatch=size), params, model_state, batch)
        for one, other in zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True):
            np.testing.assert_allclose(one, other, atol=1e-12)


def test_padded_examples_change_nothing():
    network, params, model_state, batch = setting(MLP(hidden=(4,)))
    few = jax.tree.map(lambda x: x[:4], batch)
    padded = {**batch, "weight": jnp.array([0.25] * 4 + [0.0] * 2), "index": jnp.arange(6)}
    for name in ("bp", "fg-a", "lg-fg-w"):
        method = fg.recipes.find(name)(network)
        state = method.initial_state(jax.random.key(2), params, model_state, batch)
        estimate = jax.jit(method.estimate)
        one = estimate(jax.random.key(3), state, params, model_state, few)[0]
        other = estimate(jax.random.key(3), state, params, model_state, padded)[0]
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12), one.grads, other.grads)


def test_refusals():
    network, params, model_state, batch = setting(MLP(hidden=(4,)))
    with pytest.raises(fg.InputError, match="choose a divisor"):
        dataclasses.replace(fg.recipes.bp(network), microbatch=4).estimate(
            jax.random.key(0), (), params, model_state, batch
        )
    network, params, model_state, batch = setting(MLP(hidden=(4,), batch_norm=True))
    with pytest.raises(fg.InputError, match=r"BatchNorm.*use the whole batch"):
        dataclasses.replace(fg.recipes.bp(network), microbatch=2).init(jax.random.key(0), params, model_state, batch)


def changed(network, loss):
    """The network with another loss on its last readout."""
    *blocks, last = network.blocks
    return fg.Network((*blocks, last._replace(readout=last.readout._replace(loss=loss, cells=None))))


def of_part(network, **options):
    return fg.estimator(network, target=fg.local(), **({"guess": fg.rademacher(), "insertion": fg.weights()} | options))


REFUSED = {
    "the loss has no batch axis": lambda n: fg.recipes.bp(
        changed(n, lambda out, batch: fg.Named((out.value**2).mean(), ()))
    ),
    "the loss of an example depends on the others": lambda n: fg.recipes.bp(
        changed(n, lambda out, batch: fg.Named(((out.value - out.value.mean(0)) ** 2).sum(1), ("batch",)))
    ),
    "one scalar for all examples": lambda n: of_part(n, insertion=fg.activations()),
    "a rule that is not linear": lambda n: of_part(n, rule=fg.rules.sign),
    "a guided guess of weights": lambda n: of_part(
        n,
        guess=local_gradient(),
        insertion=fg.weights(per_example=True),
        rule=fg.rules.projection,
        partition=("batch",),
    ),
}


@pytest.mark.parametrize("why", REFUSED)
def test_what_would_not_add_up_is_refused(why):
    network, params, model_state, batch = setting(MLP(hidden=(4,)))
    method = dataclasses.replace(REFUSED[why](network), microbatch=2)
    with pytest.raises(fg.InputError, match=f"{why}.*use the whole batch"):
        method.init(jax.random.key(0), params, model_state, batch)
