"""Beyond the papers: hidden taps, feedback fitted to the tangents, and `lg-fg-a-plus`, on LocalMixer itself."""

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from test_one_way_street import crossed_by, with_streets
from toynets import CELLS, along, distance, hadamard, mean, once, setting, two_steps

import forwardgrad as fg
from forwardgrad import recipes
from forwardgrad.descent import adam
from forwardgrad.guesses.fitted_feedback import fitted_feedback, relu_and_normalise
from forwardgrad.guesses.weight_mirror import weight_mirror
from forwardgrad.models.localmixer import LocalMixer
from forwardgrad.models.mlp import MLP
from forwardgrad.models.normalisation import normalise
from forwardgrad.network import complete, leaf_paths
from forwardgrad.recipes.frontier import PREDICTORS
from forwardgrad.whole import Step

pytestmark = pytest.mark.float64

TINY = LocalMixer(blocks=2, patches=2, channels=8, groups=2)


@functools.cache
def tiny(n=2):
    with jax.ensure_compile_time_eval():
        return setting(TINY, n)


@functools.cache
def exact():
    network, *case = tiny()
    with jax.ensure_compile_time_eval():
        return jax.jit(lambda: once(fg.recipes.lg_bp(network), *case).grads)()


# hidden taps


def chosen(network, target, only=fg.hidden):
    params, state = network.init(jax.random.key(0))
    batch = complete({"inputs": jnp.ones((2, 4, 4, 1)), "labels": jnp.zeros(2, int)})
    part = fg.Part(fg.rademacher(), fg.activations(only=only), ("batch",))
    return list(Step(network, target, params, state, batch).sites(part))


def test_hidden_taps_are_all_but_those_right_below_a_loss():
    network = TINY.network((4, 4, 1), 3)
    assert chosen(network, fg.local()) == ["block0/channel", "block1/token", "block1/channel"]
    # the classifier has no tap: what it reads is right below its loss
    below_global = ["block0/channel", "block0/grouped", "block1/token", "block1/channel"]
    assert chosen(network, fg.global_loss()) == below_global
    layers = MLP(hidden=(4, 4)).network((4, 4, 1), 3)
    assert chosen(layers, fg.global_loss()) == ["layer0/input"]
    assert chosen(layers, fg.local()) == [], "every tap of it is right below a loss"


def test_hidden_taps_of_a_network_that_has_none_leave_the_exact_gradient():
    network, *case = setting(MLP(hidden=(4, 4)))
    method = fg.estimator(
        network,
        target=fg.local(),
        guess=fg.rademacher(),
        insertion=fg.activations(only=fg.hidden),
        partition=("batch",),
    )
    found, true = (jax.jit(lambda m=m: once(m, *case).grads)() for m in (method, fg.recipes.lg_bp(network)))
    assert distance(found, true) < 1e-13


# lg-fg-a-plus


def test_with_nothing_of_it_it_is_lg_fg_a():
    network, *case = tiny()
    plain = fg.recipes.lg_fg_a_plus(network, perturbed="all", predictor="none", token_by="together")
    one, other = (jax.jit(lambda m=m: once(m, *case).grads)() for m in (plain, fg.recipes.lg_fg_a(network, mask=True)))
    assert distance(one, other) == 0


def moved(state, scale=0.3):
    """A state in which something was learned, whatever it is."""
    leaves, tree = jax.tree.flatten(state)
    noise = lambda i, x: scale * jax.random.normal(jax.random.key(i), x.shape, x.dtype)
    real = lambda x: jnp.issubdtype(x.dtype, jnp.floating)
    return tree.unflatten([x + noise(i, x) if real(x) else x for i, x in enumerate(leaves)])


@pytest.mark.parametrize("predictor", PREDICTORS)
@pytest.mark.parametrize("token_by", ["weights", "activities", "together"])
def test_it_is_unbiased_with_any_predictor(predictor, token_by):
    """Over all rows of a Hadamard matrix the mean is the gradient of the greedy losses, with feedback that is far from zero."""
    network, params, model_state, batch = tiny()
    build = lambda guess: recipes.lg_fg_a_plus(network, guess=guess, predictor=predictor, token_by=token_by)
    with_state = build(fg.rademacher()).initial_state(jax.random.key(2), params, model_state, batch)
    state = moved(with_state)

    @jax.jit
    @jax.vmap
    def each(row):
        return build(along(row)).estimate(jax.random.key(3), state, params, model_state, batch)[0].grads

    found = each(jnp.asarray(hadamard(128)))
    assert distance(mean(found), exact()) < 1e-11
    spread = jax.tree.map(lambda x: jnp.abs(x - x.mean(0)).max(), found)
    last, first = spread["block1"]["layers"]["grouped"], spread["block1"]["layers"]["channel"]
    assert max(jax.tree.leaves(last)) < 1e-11, "right below the loss nothing is estimated"
    # the local gradient is the gradient of the block's own loss, for units that feed one cell
    certain = predictor == "local" and token_by != "together"
    assert max(jax.tree.leaves(first)) < 1e-11 if certain else max(jax.tree.leaves(first)) > 1e-4


@pytest.mark.parametrize("predictor", ["fitted", "average", "random", "none"])
def test_it_goes_back_through_one_linear_layer(predictor):
    network, *case = tiny()
    method = fg.recipes.lg_fg_a_plus(with_streets(network), predictor=predictor)
    assert crossed_by(method, case) == ["block0/grouped", "block1/grouped"], "one hop through the heads"


def test_token_mixing_is_displaced_by_whichever_is_fewer():
    """P weights and a bias of an output patch, or the C features that share them; in a tangent of its own."""
    kinds = lambda network, **options: [
        "weights" if part.insertion.weights else part.insertion.taps.only
        for part in fg.recipes.lg_fg_a_plus(network, **options).parts
    ]
    few, many = TINY.network((4, 4, 1), 3), dataclasses.replace(TINY, patches=4).network((4, 4, 1), 3)
    but_tokens = fg.insertions.Hidden(("token",))
    assert kinds(few) == [but_tokens, "weights"], "4 + 1 < 8"
    assert kinds(many) == [but_tokens, "token"], "16 + 1 > 8"
    assert kinds(many, token_by="weights") == [but_tokens, "weights"]
    assert kinds(few, token_by="together") == [fg.hidden]
    patch = dataclasses.replace(TINY, patches=1, blocks=1).network((4, 4, 1), 3)
    assert kinds(patch) == [fg.hidden], "one patch: no token mixing"


def of_channels(found):
    """Total variance over estimates of the channel layers in which something is displaced, of later blocks."""
    leaf = found["block1"]["layers"]["channel"]["kernel"]
    return float(leaf.var(0).sum())


def test_tokens_and_channels_in_one_tangent_drown_and_the_docs_say_so():
    network, *case = setting(TINY, 16)
    apart = fg.recipes.lg_fg_a_plus(network, predictor="none", token_by="weights")
    (_, tokens), channels = apart.parts, fg.activations(only=fg.insertions.Hidden(("token",)))
    both = fg.insertions.Insertion(taps=channels.taps, weights=tokens.insertion.weights)
    together = dataclasses.replace(apart, parts=(dataclasses.replace(tokens, insertion=both),))

    def spread(method):
        state = method.init(jax.random.key(0), *case)
        one = jax.jit(lambda key: method.estimate(key, state, *case)[0].grads)
        return of_channels(jax.lax.map(one, jax.random.split(jax.random.key(9), 64)))

    assert spread(together) > 3 * spread(apart)
    said = (Path(__file__).parents[1] / "docs/frontier.md").read_text()
    assert "never put both into one part" in said
    assert "drown in each other's noise" in fg.recipes.lg_fg_a_plus.__doc__


def test_unknown_choices_are_refused():
    network = TINY.network((4, 4, 1), 3)
    for option in ("perturbed", "predictor", "token_by"):
        with pytest.raises(fg.InputError, match="unknown"):
            fg.recipes.lg_fg_a_plus(network, **{option: "nothing"})
    with pytest.raises(fg.InputError, match=r"between 0 and 1, not 1\.5"):
        fitted_feedback(1.5)


def test_what_follows_a_tap_of_localmixer():
    z = jax.random.normal(jax.random.key(0), (3, 4, 5), jnp.float64)
    assert distance(relu_and_normalise(z), normalise(jax.nn.relu(z))) < 1e-14


# fitted feedback


def taught(network, case, guess, steps):
    """What a predictor beside signs is after some steps with parameters that stay."""
    insertion = fg.activations(only=fg.hidden)
    method = fg.estimator(
        network, target=fg.local(), guess=fg.rademacher(), insertion=insertion, partition=CELLS, predictor=guess
    )
    state = method.init(jax.random.key(0), *case)
    step = jax.jit(lambda key, state: method.estimate(key, state, *case)[1])
    for i in range(steps):
        state = step(jax.random.key(i), state)
    return method, state


def variance(method, state, case, draws=64):
    """Total over the hidden layers, of one estimate."""
    one = jax.jit(lambda key: method.estimate(key, state, *case)[0].grads)
    found = jax.lax.map(one, jax.random.split(jax.random.key(9), draws))
    return sum(float(x.var(0).sum()) for x in jax.tree.leaves(found))


def test_a_linear_share_is_learned_exactly_and_leaves_no_variance():
    """One hidden layer, displaced after its ReLU: the outputs are linear in what is displaced, and the matrix is the classifier's."""
    network, params, state, batch = setting(MLP(hidden=(6,), taps="after"), 12)
    method = fg.estimator(
        network,
        target=fg.global_loss(),
        guess=fg.rademacher(),
        insertion=fg.activations(),
        partition=("batch",),
        predictor=fitted_feedback(0.8, through=lambda y: y),
    )
    learned = method.init(jax.random.key(0), params, state, batch)
    step = jax.jit(lambda key, learned: method.estimate(key, learned, params, state, batch)[1])
    for i in range(150):
        learned = step(jax.random.key(i), learned)
    (b,) = learned[0]["global"]["predictor"].values()
    assert distance(b.to(("unit", "class")), params["layer0"]["readout"]["kernel"]) < 1e-10
    estimate = method.estimate(jax.random.key(7), learned, params, state, batch)[0]
    true = once(fg.recipes.bp(network), params, state, batch)
    assert distance(estimate.grads, true.grads) < 1e-10, "any single estimate is the gradient"


def test_it_lowers_the_variance_of_localmixer_more_than_a_moving_average():
    network, *case = setting(TINY, 16)
    none = variance(*taught(network, case, None, 1), case)
    fitted = variance(*taught(network, case, fitted_feedback(0.5), 60), case)
    average = variance(*taught(network, case, PREDICTORS["average"](0.05), 60), case)
    assert fitted < 0.9 * none
    assert fitted < average


# weight mirror


def mirrored(state, weights):
    """The estimator's state with the mirror's weights replaced."""
    part, *rest = state
    swap = lambda mirror, name: mirror._replace(weights={path: weights[path] for path in mirror.weights})
    return ({name: {**roles, "predictor": swap(roles["predictor"], name)} for name, roles in part.items()}, *rest)


def test_a_mirror_of_the_true_weights_leaves_no_variance_where_a_unit_feeds_one_cell():
    network, params, model_state, batch = tiny()
    build = lambda guess: recipes.lg_fg_a_plus(network, guess=guess, predictor="mirror")
    state = build(fg.rademacher()).initial_state(jax.random.key(2), params, model_state, batch)
    state = mirrored(state, leaf_paths(params))

    @jax.jit
    @jax.vmap
    def each(row):
        return build(along(row)).estimate(jax.random.key(3), state, params, model_state, batch)[0].grads

    for i, one in enumerate(hadamard(128)[5:8]):
        found = each(jnp.asarray(one)[None])
        for block in ("block0", "block1"):
            channel = [tree[block]["layers"]["channel"] for tree in (found, exact())]
            assert distance(jax.tree.map(lambda x: x[0], channel[0]), channel[1]) < 1e-11, i


def test_a_mirror_learns_the_weights_from_tangents():
    network, *case = setting(TINY, 16)
    method, state = taught(network, case, weight_mirror(adam(2e-2)), 600)
    true = leaf_paths(case[0])
    learned = state[0]["block1"]["predictor"].weights
    for name, inputs in (("channel", 0), ("grouped", 1)):
        path = f"block1/layers/{name}/kernel"
        # a normalised tangent sums to zero: what a layer does to a constant input is never seen, and never needed
        seen = lambda kernel, inputs=inputs: jnp.ravel(kernel - kernel.mean(inputs, keepdims=True))
        w, f = seen(true[path]), seen(learned[path])
        assert float(w @ f / jnp.linalg.norm(w) / jnp.linalg.norm(f)) > 0.98
    assert float(jnp.abs(learned["block1/layers/token/kernel"]).max()) == 0, "nothing is displaced before it"
    none = variance(*taught(network, case, None, 1), case)
    assert variance(method, state, case) < 0.8 * none


def test_it_has_less_variance_than_lg_fg_a():
    network, *case = setting(TINY, 16)
    plus, plain = fg.recipes.lg_fg_a_plus(network), fg.recipes.lg_fg_a(network, mask=True)
    state = plus.init(jax.random.key(0), *case)
    step = jax.jit(lambda key, state: plus.estimate(key, state, *case)[1])
    for i in range(60):
        state = step(jax.random.key(i), state)
    assert variance(plus, state, case) < 0.8 * variance(plain, plain.init(jax.random.key(0), *case), case)


def test_what_it_learns_sums_over_microbatches():
    network, params, state, batch = setting(TINY, 4)
    guess = fitted_feedback(0.5)
    shown = guess._replace(update=lambda old, sample: sample)
    method = fg.estimator(
        network,
        target=fg.local(),
        guess=fg.rademacher(),
        insertion=fg.activations(),
        partition=CELLS,
        predictor=shown,
    )
    method = dataclasses.replace(method, executor="whole")
    start = moved(method.initial_state(jax.random.key(0), params, state, batch))
    batch = complete(batch)
    run = jax.jit(lambda some: method.estimate(jax.random.key(1), start, params, state, some)[1])
    half = lambda i: jax.tree.map(lambda x: x[2 * i : 2 * i + 2], batch)
    both = jax.tree.map(jnp.add, run(half(0)), run(half(1)))
    assert distance(both, run(batch)) < 1e-12


def test_streamed_is_whole_and_any_microbatch_is_the_whole_batch():
    network, params, state, batch = setting(TINY, 4)
    methods = [
        dataclasses.replace(fg.recipes.lg_fg_a_plus(network), executor=executor, microbatch=microbatch)
        for executor, microbatch in (("whole", None), ("streamed", None), ("streamed", 2))
    ]
    whole, *others = (two_steps(method, params, state, batch) for method in methods)
    for other in others:
        assert distance([e.grads for e in other[0]], [e.grads for e in whole[0]]) < 1e-11
        assert distance(other[1], whole[1]) < 1e-11
