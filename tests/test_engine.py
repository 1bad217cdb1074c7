"""The engine around the identities: batches and microbatches, draws and their cost, keys, wrappings, what is exact in each estimate."""

import jax
import jax.numpy as jnp
import pytest
from toynets import (
    CELLS,
    FIXED,
    TARGETS,
    N,
    along,
    distance,
    estimates,
    gradient,
    hadamard,
    mean,
    mixer,
    once,
    problem,
)

import forwardgrad as fg
from forwardgrad.guesses.base import Guess
from forwardgrad.models.mlp import MLP

pytestmark = pytest.mark.float64


def method(target="local", guess=None, insertion=None, partition=CELLS, network=None, **options):
    return fg.estimator(
        network or mixer(),
        target=TARGETS[target],
        guess=guess or fg.rademacher(),
        insertion=insertion or fg.activations(),
        partition=partition,
        **options,
    )


def grads(estimator, case=None, key=None):
    return jax.jit(lambda: once(estimator, *(case or problem()), key=key).grads)()


# ------------------------------------------------------------------------------------------------ batches

SUMMABLE = {
    "lg-fg-a": lambda guess: method(guess=guess, network=mixer(1)),
    "fg-a": lambda guess: method("global", guess, partition=("batch",)),
    "fg-w": lambda guess: method("global", guess, fg.weights(), ()),
    "per example": lambda guess: method(guess=guess, insertion=fg.weights(per_example=True), network=mixer(1)),
    "three draws": lambda guess: method(guess=guess, network=mixer(1), draws=3),
}


@pytest.mark.parametrize(
    ("name", "guess"),
    [
        ("lg-fg-a", fg.orthogonal),
        ("fg-a", fg.rademacher),
        ("fg-w", fg.rademacher),
        ("per example", fg.rademacher),
        ("three draws", fg.gaussian),
    ],
)
def test_microbatches_sum_to_the_batch_and_padding_counts_nothing(name, guess):
    """Examples 0, 1 | 2, padding: noise belongs to the example's global number, weights stay 1/N of the whole."""
    params, state, batch = problem(2 if name.startswith("fg") else 1)
    whole = {**batch, "weight": jnp.full(N, 1 / N), "index": jnp.arange(N) + 40}
    first = jax.tree.map(lambda x: x[:2], whole)
    last = {name: jnp.stack([x[2], 0 * x[0] + 1]) for name, x in whole.items()}
    last["weight"] = jnp.array([1 / N, 0.0])
    estimate = jax.jit(lambda batch: once(SUMMABLE[name](guess()), params, state, batch)[:2])
    total = jax.tree.map(jnp.add, estimate(first), estimate(last))
    assert distance(total, estimate(whole)) < 1e-13


def test_unequal_weights_are_those_of_the_loss():
    """Any example weights, the expectation follows them."""
    params, state, batch = problem()
    weight = jnp.array([0.7, 0.0, 0.2])
    found = mean(estimates(lambda u: method(guess=u), hadamard(128), (params, state, {**batch, "weight": weight})))
    true = grads(fg.recipes.lg_bp(mixer()), (params, state, {**batch, "weight": weight}))
    assert distance(found, true) < 1e-12
    assert distance(true, gradient("local")) > 1e-2


# ------------------------------------------------------------------------------------- draws, keys and wrappings


def test_draws_share_one_primal():
    """The cost is a fixed number of passes and one tangent per draw; K estimates apart would be K times everything."""
    network = MLP(hidden=(64, 64)).network((32, 1, 1), classes=4)
    case = *network.init(jax.random.key(0)), {"inputs": jnp.ones((16, 32, 1, 1)), "labels": jnp.zeros(16, int)}

    def flops(draws):
        run = jax.jit(lambda row: once(fg.recipes.fg_a(network, guess=along(row), draws=draws), *case).grads)
        return run.lower(jnp.ones(2048)).compile().cost_analysis()["flops"]

    one, two, four = flops(1), flops(2), flops(4)
    assert two - one == pytest.approx((four - two) / 2, rel=0.05), "linear in the number of tangents"
    assert four < 0.6 * 4 * one


def test_draws_differ_and_so_do_sites_blocks_and_examples():
    @jax.jit
    def proposed():
        seen = {}

        def spy(key, state, view):
            seen.update(fg.gaussian().propose(key, state, view))
            return seen

        once(method("global", Guess(spy), partition=("batch",), draws=2), *problem())
        return seen

    found = proposed()
    values = jnp.concatenate([u.value.ravel() for u in found.values()])
    assert len(jnp.unique(values)) == len(values) == 2 * N * 48
    assert all(u.axes[:2] == ("draw", "batch") for u in found.values())


def test_one_key_one_result_and_one_compilation():
    estimator = fg.recipes.lg_fg_a(mixer())
    params, state, batch = problem()
    guess_state = estimator.init(jax.random.key(1), params, state, batch)
    step = jax.jit(estimator.estimate)
    first, guess_state, state = step(jax.random.key(2), guess_state, params, state, batch)
    again, guess_state, state = step(jax.random.key(2), guess_state, params, state, batch)
    other, *_ = step(jax.random.key(3), guess_state, params, state, batch)
    assert step._cache_size() == 1
    assert distance(first.grads, again.grads) == 0
    assert distance(first.grads, other.grads) > 1e-3


def test_an_outer_vmap_over_keys_is_a_loop_over_keys():
    estimator = method(network=mixer(1), draws=2)
    estimate = jax.jit(lambda key: once(estimator, *problem(1), key=key).grads)
    keys = jax.random.split(jax.random.key(5), 3)
    mapped = jax.jit(jax.vmap(estimate))(keys)
    for i, key in enumerate(keys):
        assert distance(jax.tree.map(lambda x, i=i: x[i], mapped), estimate(key)) < 1e-13


def test_readouts_get_their_exact_gradient_in_every_single_estimate():
    for target, recipe in (("local", fg.recipes.lg_fg_a), ("global", fg.recipes.fg_w)):
        found = grads(recipe(mixer(), guess=FIXED))
        for block, own in gradient(target).items():
            assert distance(found[block]["readout"], own["readout"]) < 1e-13


def test_info_holds_the_losses_and_the_prediction():
    params, state, batch = problem()
    found = jax.jit(lambda: once(method(guess=FIXED), params, state, batch))()
    assert list(found.info.losses) == ["b0", "b1"]
    assert abs(float(sum(found.info.losses.values()) - found.loss)) < 1e-14
    prediction = jax.jit(mixer().predict)(params, state, batch["inputs"])
    assert found.info.outputs.axes == prediction.axes
    assert distance(found.info.outputs.value, prediction.value) < 1e-13
