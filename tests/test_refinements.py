"""Refinements: predictors, several parts, and leaving taps out. Each is a second way to the same expectation."""

import jax
import jax.numpy as jnp
import pytest
from toynets import CELLS, TARGETS, G, N, P, along, distance, estimates, gradient, hadamard, mean, mixer, once, problem

import forwardgrad as fg
from forwardgrad import taps
from forwardgrad.descent import sgd
from forwardgrad.guesses import feedback
from forwardgrad.guesses.base import Guess
from forwardgrad.guesses.local import local_gradient
from forwardgrad.guesses.ntk import ntk
from forwardgrad.insertions import Insertion
from forwardgrad.models.mlp import MLP
from forwardgrad.named import Named

pytestmark = pytest.mark.float64


def constant(per_cell=(), scale=1.0):
    """A prediction unrelated to the gradient, with the cells' axes `per_cell` where a site lacks them."""
    sizes = {"batch": N, "patch": P, "group": G}

    def propose(key, state, view):
        out = {}
        for i, (name, site) in enumerate(view.sites.items()):
            extra = tuple(a for a in per_cell if a not in site.axes)
            shape = (*(sizes[a] for a in extra), *site.shape)
            out[name] = Named(scale * jax.random.normal(jax.random.key(i), shape), (*extra, *site.axes))
        return out

    return Guess(propose, name="constant")


def cells_of(block, own, h, labels, site, x):
    """Loss cells of one block, divided by N, with x in the place of a weight or added to an activation."""
    layers = own["layers"] if site.kind == "tap" else {**own["layers"], site.name: x}
    eps = {site.name: Named(x, site.axes)} if site.kind == "tap" else {}
    h, _ = taps.visited(lambda p, h: block.apply(p, (), h, True)[0], taps.displace(eps))(layers, h)
    return Named(block.readout.loss(block.readout.outputs(own["readout"], h), {"labels": labels}).value / N, CELLS)


def truth(apart):
    """The gradient of the greedy losses, kept apart along the loss axes `apart`: by one reverse pass per cell."""

    def propose(key, state, view):
        params, labels, out = view.params, view.batch["labels"], {}
        for name, site in view.sites.items():
            block = mixer().blocks[site.block]
            h = problem()[2]["inputs"]
            for below in mixer().blocks[: site.block]:
                h, _ = below.apply(problem()[0][below.name]["layers"], (), h, True)
            extra = tuple(a for a in apart if a not in site.axes)
            at = jnp.zeros(site.shape) if site.kind == "tap" else params[block.name]["layers"][site.name]

            def kept(x, site=site, block=block, h=h, extra=extra):
                return cells_of(block, params[block.name], h, labels, site, x).sum_to(extra).to(extra)

            out[name] = Named(jax.jacrev(kept)(at), (*extra, *site.axes))
        return out

    return Guess(propose, name="truth")


# a part's insertion and partition, and a predictor
PREDICTORS = {
    "zero": (fg.activations(), CELLS, constant(scale=0.0)),
    "any": (fg.activations(), CELLS, constant()),
    "any, per group": (fg.activations(), CELLS, constant(("group",))),
    "any, per group, coarse partition": (fg.activations(), CELLS[:1], constant(("group",))),
    "any, no partition": (fg.activations(), (), constant()),
    "the gradient, on the taps' axes": (fg.activations(), CELLS, truth(())),
    "any, shared noise": (fg.activations(shared="batch"), CELLS, constant()),
    "any, some taps": (fg.activations(only=("tok", "chan")), CELLS, constant()),
    "any, weights": (fg.weights(), ("group",), constant()),
    "any, weights, per group": (fg.weights(), ("group",), constant(("group",))),
    "any, weights per example": (fg.weights(per_example=True), CELLS, constant()),
    "any per example, weights per example": (fg.weights(per_example=True), CELLS, constant(("batch",))),
    "any, weights per example, no partition": (fg.weights(per_example=True), (), constant()),
    "any, weights per example, group alone": (fg.weights(per_example=True), ("group",), constant()),
    "local gradient": (fg.activations(), CELLS, local_gradient()),
    "random readout": (fg.activations(), CELLS, ntk()),
    "fixed random readout": (fg.weights(), ("group",), ntk(redraw=False)),
    "feedback": (fg.activations(), CELLS, feedback.direct_feedback(mask=True)),
    "feedback per group": (fg.activations(), CELLS, feedback.direct_feedback(per_cell=("group",))),
}


def with_predictor(insertion, partition, predictor, guess):
    return fg.estimator(
        mixer(1), target=fg.local(), guess=guess, insertion=insertion, partition=partition, predictor=predictor
    )


@pytest.mark.parametrize("name", PREDICTORS)
def test_any_predictor_leaves_the_expectation(name):
    found = estimates(lambda u: with_predictor(*PREDICTORS[name], u), hadamard(), problem(1))
    assert distance(mean(found), gradient("local", 1)) < 1e-11


@pytest.mark.parametrize(
    ("insertion", "partition", "apart"),
    [
        (fg.activations(), CELLS, CELLS),
        (fg.activations(), CELLS[:1], CELLS),
        (fg.activations(), (), ()),
        (fg.activations(only=("tok", "chan")), CELLS, CELLS),
        (fg.activations(shared="batch"), CELLS, CELLS),
        (fg.weights(), ("group",), ("group",)),
        (fg.weights(), (), ()),
        (fg.weights(per_example=True), CELLS, CELLS),
    ],
)
def test_the_gradient_of_each_cell_as_predictor_has_no_variance(insertion, partition, apart):
    """Every single estimate is exact; rows with entries that are no signs, so that nothing cancels by luck."""
    rows = jax.random.normal(jax.random.key(7), (3, 256))
    found = estimates(lambda u: with_predictor(insertion, partition, truth(apart), u), rows, problem(1))
    for i in range(len(rows)):
        assert distance(jax.tree.map(lambda x, i=i: x[i], found), gradient("local", 1)) < 1e-11


def test_a_predictor_alone_is_the_credit():
    """No guess: the prediction, summed over axes that the taps lack, and nothing measured."""
    for predictor in (truth(()), truth(CELLS)):
        part = fg.Part(None, fg.activations(), CELLS, fg.rules.prediction_only, predictor)
        found = jax.jit(lambda part=part: once(fg.Estimator(mixer(), fg.local(), (part,)), *problem()).grads)()
        assert distance(found, gradient("local")) < 1e-12


def test_a_predictor_without_a_guess_beside_it_observes_nothing_and_may_learn():
    seen = []
    counting = constant()._replace(
        init=lambda key, view: jnp.zeros(()),
        observe=lambda state, view, u, du: seen.append((u, du)) or jnp.ones(()),
        update=lambda state, statistics: state + statistics,
    )
    method = fg.Estimator(mixer(), fg.local(), (fg.Part(None, fg.activations(), CELLS, predictor=counting),))
    start = method.init(jax.random.key(0), *problem())
    after = jax.jit(method.estimate)(jax.random.key(1), start, *problem())[1]
    assert jax.tree.leaves(after) == [1, 1], "one for each block"
    assert seen
    assert all(pair == ({}, {}) for pair in seen)


@pytest.mark.parametrize(
    "predictor", [constant(), constant(("group",)), feedback.direct_feedback()], ids=lambda p: p.name
)
def test_a_prediction_is_masked_with_the_guess_beside_it(predictor):
    """What a prediction says of units that are off could not be corrected: no direction goes there."""
    hidden = fg.activations(only=("tok", "chan"))
    build = lambda u: with_predictor(hidden, CELLS, predictor, fg.masked(u))
    assert distance(mean(estimates(build, hadamard(), problem(1))), gradient("local", 1)) < 1e-11


def test_a_learned_predictor_is_unbiased_at_every_stage_and_its_statistics_sum():
    network = MLP(hidden=(4, 4)).network((3, 1, 1), classes=3)
    params, state = jax.tree.map(lambda x: x.astype("float64"), network.init(jax.random.key(0)))
    batch = {"inputs": jax.random.normal(jax.random.key(1), (4, 3, 1, 1)), "labels": jnp.array([0, 1, 2, 0])}
    batch |= {"weight": jnp.full(4, 0.25), "index": jnp.arange(4)}
    learned = feedback.learned_feedback(sgd(0.3), mask=True)
    build = lambda guess, predictor: fg.wrappers.with_predictor(fg.recipes.fg_a(network, guess=guess), predictor)

    @jax.jit
    def step(key, predictor_state):
        method = build(fg.gaussian(), learned)
        return method.estimate(key, predictor_state, params, state, batch)[1]

    states = [build(fg.gaussian(), learned).init(jax.random.key(0), params, state, batch)]
    for i in range(3):
        states.append(step(jax.random.key(i), states[-1]))
    assert float(jnp.abs(jax.tree.leaves(states[-1])[0]).max()) > 0.02, "something was learned"
    true = jax.jit(lambda: once(fg.recipes.bp(network), params, state, batch).grads)()

    @jax.jit
    @jax.vmap
    def along_row(row):
        return build(along(row), learned).estimate(jax.random.key(0), states[-1], params, state, batch)[0].grads

    assert distance(mean(along_row(jnp.asarray(hadamard(32)))), true) < 1e-12

    seen = lambda old, statistics: old._replace(matrices=statistics)  # the new state is what was observed
    shown = learned._replace(update=seen)
    run = jax.jit(lambda b: build(fg.rademacher(), shown).estimate(jax.random.key(9), states[1], params, state, b)[1])
    half = lambda i: jax.tree.map(lambda x: x[2 * i : 2 * i + 2], batch)
    both = jax.tree.map(jnp.add, run(half(0)), run(half(1)))
    assert distance(both, run(batch)) < 1e-13


# ------------------------------------------------------------------------------------------------ parts and only=

PER_EXAMPLE_TOKEN = fg.weights(only="tok", noise={"tok": "batch in patch"})
PARTS = {
    "token mixing by weights, the rest by taps": (PER_EXAMPLE_TOKEN, fg.activations(only=("chan", "grp"))),
    "token mixing by weights, one hidden tap": (PER_EXAMPLE_TOKEN, fg.activations(only="chan")),
    "a tap each": (fg.activations(only="tok"), fg.activations(only="chan"), fg.activations(only="grp")),
    "a weight each": (fg.weights(only="tok"), fg.weights(only=["chan", "grp"])),
}


def several(insertions, guess, target="local", partition=CELLS):
    parts = tuple(fg.Part(guess, insertion, partition) for insertion in insertions)
    return fg.Estimator(mixer(), TARGETS[target], parts)


@pytest.mark.parametrize("name", PARTS)
def test_parts_add_up_to_the_gradient(name):
    found = estimates(lambda guess: several(PARTS[name], guess), hadamard(), problem())
    assert distance(mean(found), gradient("local")) < 1e-12


def test_one_tangent_may_displace_a_weight_and_a_tap():
    both = Insertion(taps=fg.activations(only=("chan", "grp")).taps, weights=PER_EXAMPLE_TOKEN.weights)
    found = estimates(lambda guess: several((both,), guess), hadamard(), problem())
    assert distance(mean(found), gradient("local")) < 1e-12


def test_parts_of_a_global_target():
    insertions = (fg.activations(only="b0/*"), fg.weights(only=["b1#tok", "b1#chan"]))
    found = estimates(lambda guess: several(insertions, guess, "global", CELLS[:1]), hadamard(), problem())
    assert distance(mean(found), gradient("global")) < 1e-12


@pytest.mark.parametrize(
    "only",
    ["tok", "chan", "grp", ("tok", "chan"), lambda name: name == "chan", "b0/*"],
    ids=lambda only: "predicate" if callable(only) else str(only),
)
def test_taps_left_out_leave_the_expectation(only):
    found = estimates(lambda guess: several((fg.activations(only),), guess), hadamard(), problem())
    assert distance(mean(found), gradient("local")) < 1e-12


def test_what_no_displacement_is_above_is_exact():
    """Without a displaced tap above it a weight has no noise: "grp" below the loss, and all of b1 where only b0 is displaced."""
    row = jnp.asarray(hadamard()[77:78])
    first = lambda only: jax.tree.map(
        lambda x: x[0], estimates(lambda u: several((fg.activations(only),), u), row, problem())
    )
    true = gradient("local")
    without_last, first_block = first(("tok", "chan")), first("b0/*")
    for block in true:
        assert distance(without_last[block]["layers"]["grp"], true[block]["layers"]["grp"]) < 1e-13
        assert distance(without_last[block]["layers"]["chan"], true[block]["layers"]["chan"]) > 1e-3
    assert distance(first_block["b1"], true["b1"]) < 1e-13
