"""Beyond the papers: hidden taps, feedback fitted to the tangents, and `lg-fg-a-plus`, on LocalMixer itself."""

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from test_one_way_street import crossed_by, with_streets
from toynets import CELLS, all_signs, along, distance, hadamard, mean, mixer, once, problem, setting, two_steps

import forwardgrad as fg
from forwardgrad import Named, recipes
from forwardgrad.descent import adam
from forwardgrad.guesses.fitted_feedback import fitted_feedback, normalise_relu_and_normalise, relu_and_normalise
from forwardgrad.guesses.given import relu_mask
from forwardgrad.guesses.weight_mirror import weight_mirror
from forwardgrad.models import heads
from forwardgrad.models.localmixer import LocalMixer
from forwardgrad.models.mlp import MLP
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


def begin(method, *case, seed=0):
    """The state of an estimator, compiled as a whole, without its checks."""
    return jax.jit(method.initial_state)(jax.random.key(seed), *case)


# hidden taps


def chosen(network, target, only=fg.hidden):
    found = []

    def look(key):
        batch = complete({"inputs": jnp.ones((2, 4, 4, 1)), "labels": jnp.zeros(2, int)})
        found.extend(Step(network, target, *network.init(key), batch).sites(part))

    part = fg.Part(fg.rademacher(), fg.activations(only=only), ("batch",))
    jax.eval_shape(look, jax.random.key(0))
    return found


def test_hidden_taps_are_all_but_those_right_below_a_loss():
    network = TINY.network((4, 4, 1), 3)
    assert chosen(network, fg.local()) == ["block0/channel", "block1/token", "block1/channel"]
    # the classifier has no tap: what it reads is right below its loss
    below_global = ["block0/channel", "block0/grouped", "block1/token", "block1/channel"]
    assert chosen(network, fg.global_loss()) == below_global
    layers = MLP(hidden=(4, 4)).network((4, 4, 1), 3)
    assert chosen(layers, fg.global_loss()) == ["layer0/input"]
    with pytest.raises(fg.InputError, match="every tap of this network stands right below a loss"):
        chosen(layers, fg.local())


def hidden_alone(network, target):
    """Signs at hidden taps, examples apart, and nothing else."""
    insertion = fg.activations(only=fg.hidden)
    return fg.estimator(network, target=target, guess=fg.rademacher(), insertion=insertion, partition=("batch",))


def skipping():
    """h = σ(a), then layers whose outputs are added to h: from the first tap a skip leads to the loss, and the layers lead to their taps."""
    names = "abc"

    def apply(params, state, h, train):
        first, *rest = (params[name]["kernel"] for name in names)
        h = jax.nn.relu(fg.tap(h.reshape(len(h), -1) @ first, "a", "batch unit"))
        inner = h
        for name, kernel in zip(names[1:], rest, strict=True):
            inner = jax.nn.relu(fg.tap(inner @ kernel, name, "batch unit"))
        return h + inner, state

    def init(key):
        sizes = [16, 5, 5, 5]
        keys = jax.random.split(key, 3)
        draw = lambda i: {"kernel": jax.random.normal(keys[i], sizes[i : i + 2]) / sizes[i] ** 0.5}
        return {name: draw(i) for i, name in enumerate(names)}, ()

    normal = lambda key, shape: jax.random.normal(key, shape) / shape[0] ** 0.5
    return fg.Network((fg.Block("skip", apply, heads.linear(5, 3, normal), init),))


def test_a_tap_from_which_a_skip_leads_to_the_loss_is_displaced():
    network, batch = skipping(), tiny()[3]
    params, state = jax.tree.map(lambda x: x.astype(jnp.float64), network.init(jax.random.key(0)))
    assert chosen(network, fg.global_loss()) == ["skip/a", "skip/b"]
    method = hidden_alone(with_streets(network), fg.global_loss())
    assert crossed_by(method, (params, state, batch)) == ["skip/c"], "one hop"


def test_hidden_taps_under_one_loss_are_not_streamed():
    """A block alone cannot tell which of its taps are right below a loss that another block has."""
    network, params, state, batch = tiny()
    method = hidden_alone(network, fg.global_loss())
    method = dataclasses.replace(method, executor="streamed")
    with pytest.raises(fg.InputError, match="only the network as a whole tells which taps are right below its loss"):
        method.init(jax.random.key(0), params, state, batch)


def test_a_network_without_hidden_taps_is_refused():
    """It would be `lg-bp` under another name."""
    network, *case = setting(MLP(hidden=(4, 4)))
    for method in (hidden_alone(network, fg.local()), fg.recipes.lg_fg_a_plus(network)):
        with pytest.raises(
            fg.InputError, match=r"displace all taps \(only=None, --perturbed all\), or use backpropagation"
        ):
            method.init(jax.random.key(0), *case)


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


@pytest.mark.parametrize(
    ("token_by", "predictor"),
    [
        *(("weights", name) for name in PREDICTORS),
        *(("activities", name) for name in ("fitted", "local", "mirror")),
        *(("together", name) for name in ("fitted", "local")),
    ],
)
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


@pytest.mark.parametrize(
    ("token_by", "predictor"),
    [
        *(("weights", name) for name in ("fitted", "average", "random", "none")),
        ("activities", "fitted"),
        ("together", "fitted"),
    ],
)
def test_it_goes_back_through_one_linear_layer(predictor, token_by):
    network, *case = tiny()
    method = fg.recipes.lg_fg_a_plus(with_streets(network), predictor=predictor, token_by=token_by)
    assert crossed_by(method, case) == ["block0/grouped", "block1/grouped"], "one hop through the heads"


def test_token_mixing_is_displaced_by_whichever_is_fewer():
    """P weights and a bias of an output patch, or the C features that share them; in a tangent of its own."""
    kinds = lambda network, **options: [
        "weights" if part.insertion.weights else part.insertion.taps.only
        for part in fg.recipes.lg_fg_a_plus(network, **options).parts
    ]
    few, many = (dataclasses.replace(TINY, channels=c).network((4, 4, 1), 3) for c in (16, 8))
    but_tokens = fg.insertions.Hidden(("token",))
    assert kinds(few) == [but_tokens, "weights"], "4 + 1 < 16 / 2"
    assert kinds(many) == [but_tokens, "token"], "4 + 1 > 8 / 2, half of the features are off"
    assert kinds(many, mask=False) == [but_tokens, "weights"], "4 + 1 < 8"
    assert kinds(many, token_by="weights") == [but_tokens, "weights"]
    assert kinds(few, token_by="together") == [fg.hidden]
    assert kinds(fg.Network(few.blocks[1:2])) == [but_tokens, "weights"]
    patch = dataclasses.replace(TINY, patches=1, blocks=1).network((4, 4, 1), 3)
    assert kinds(patch) == [fg.hidden], "one patch: no token mixing"


def test_orthogonal_draws_are_exact_with_all_units_of_what_the_taps_share():
    """Token taps lack the groups: a slice is an example and a patch, with 8 token and 8 channel units, on or off; a loss cell feels 12."""
    network, *case = tiny()

    @functools.cache
    def off(draws):
        plus = fg.recipes.lg_fg_a_plus(
            network, guess=fg.orthogonal(), draws=draws, predictor="none", token_by="together"
        )
        return distance(jax.jit(lambda: once(plus, *case).grads)(), exact())

    assert off(16) < 1e-12
    assert off(12) > 1e-3


def of_channels(found):
    """Total variance over estimates of the channel layers in which something is displaced, of later blocks."""
    leaf = found["block1"]["layers"]["channel"]["kernel"]
    return float(leaf.var(0).sum())


def test_tokens_and_channels_in_one_tangent_drown_and_the_docs_say_so():
    network, *case = setting(TINY, 16)
    apart = fg.recipes.lg_fg_a_plus(network, predictor="none", token_by="weights")
    (_, tokens), channels = apart.parts, fg.activations(only=fg.insertions.Hidden(("token",)))
    both = fg.insertions.Insertion(taps=channels.taps, weights=tokens.insertion.weights)
    signs = fg.rademacher()

    def propose(key, state, view):
        """The taps' masked as they are where they are apart."""
        found = signs.propose(key, state, view)
        for site in found.keys() & view.taps.keys():
            z, axes = view.taps[site], ("draw", *view.taps[site].axes)
            found[site] = Named(found[site].to(axes) * relu_mask(z.value), axes)
        return found

    guess = signs._replace(propose=propose)
    together = dataclasses.replace(apart, parts=(dataclasses.replace(tokens, insertion=both, guess=guess),))

    def spread(method):
        state = begin(method, *case)
        one = jax.jit(lambda key: method.estimate(key, state, *case)[0].grads)
        return of_channels(jax.lax.map(one, jax.random.split(jax.random.key(9), 64)))

    assert spread(together) > 5 * spread(apart)
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


def test_what_follows_taps_and_linear_outputs_of_localmixer():
    network, params, state, batch = tiny()
    z = Step(network, fg.local(), params, state, complete(batch)).taps
    into = params["block1"]["layers"]["channel"]
    for name, follows in (("token", relu_and_normalise), ("token/linear", normalise_relu_and_normalise)):
        y = follows(z[f"block1/{name}"].value)
        out = jnp.einsum("npf,fgd->npgd", y, into["kernel"]) + into["bias"]
        assert distance(out, z["block1/channel/linear"].value) < 1e-12, name


# fitted feedback


def taught(method, case, steps):
    """A method and its state after some steps with parameters that stay."""
    state = begin(method, *case)
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
    learned = begin(method, params, state, batch)
    step = jax.jit(lambda key, learned: method.estimate(key, learned, params, state, batch)[1])
    for i in range(150):
        learned = step(jax.random.key(i), learned)
    (b,) = learned[0]["global"]["predictor"].feedback.values()
    assert distance(b.to(("unit", "class")), params["layer0"]["readout"]["kernel"]) < 1e-10
    estimate = method.estimate(jax.random.key(7), learned, params, state, batch)[0]
    true = once(fg.recipes.bp(network), params, state, batch)
    assert distance(estimate.grads, true.grads) < 1e-10, "any single estimate is the gradient"


def sharing(features):
    """z[n, q, c] = Σ_p x[n, p, c] w[p, q]: weights shared by the features, whose tangents are then correlated, and outputs linear in z."""

    def apply(params, state, h, train):
        return fg.tap(jnp.einsum("npc,pq->nqc", h, params["kernel"]), "z", "batch patch feature"), state

    normal = lambda key, shape: jax.random.normal(key, shape) / shape[0] ** 0.5
    init = lambda key: ({"kernel": normal(key, (3, 2))}, ())
    weights = {"kernel": ("in", "patch")}
    return fg.Network((fg.Block("a", apply, heads.linear(2 * features, 3, normal), init, weights=weights),))


def with_features_alike(network):
    params, state = jax.tree.map(lambda x: x.astype(jnp.float64), network.init(jax.random.key(0)))
    alike, apart = (jax.random.normal(jax.random.key(i), (64, 3, c), jnp.float64) for i, c in ((1, 1), (2, 4)))
    return params, state, {"inputs": alike + apart / 2, "labels": jnp.arange(64) % 3}


def with_weights_predicted(network, taps=None):
    """Weights displaced per example, and taps, each example's loss apart, what arrives at a tap handed on as it is."""
    return fg.estimator(
        network,
        target=fg.global_loss(),
        guess=fg.rademacher(),
        insertion=fg.weights(per_example=True)._replace(taps=taps),
        partition=("batch",),
        predictor=fitted_feedback(1.0, through=lambda z: z),
    )


def test_weights_are_predicted_where_they_arrive():
    """Features that are nearly alike: the step is one that is stable, and any single estimate becomes the gradient."""
    network = sharing(4)
    case = with_features_alike(network)
    method = with_weights_predicted(network)
    method, state = taught(method, case, 400)
    (learned,) = [roles["predictor"] for roles in state[0].values()]
    assert list(learned.feedback) == ["a/z"]
    assert learned.feedback["a/z"].axes == ("class", "patch", "feature")

    # Λ is the largest eigenvalue of the mean of v vᵀ D / |v|², over all directions
    rows = jnp.asarray(all_signs(6)).reshape(-1, 3, 2)
    v = jnp.einsum("npc,rpq->nrqc", case[2]["inputs"], rows).reshape(-1, 8)
    eigenvalues = jnp.linalg.eigvalsh((v.T / jnp.square(v).sum(1)) @ v * 8 / len(v))
    assert eigenvalues[-1] > 2.5, "a step of one over it, not of one"
    assert float(learned.largest) == pytest.approx(float(eigenvalues[-1]), rel=0.1)

    true = once(fg.recipes.bp(network), *case)
    for seed in range(3):
        estimate = method.estimate(jax.random.key(900 + seed), state, *case)[0]
        assert distance(estimate.grads, true.grads) < 1e-9
    shared = dataclasses.replace(method, parts=(dataclasses.replace(method.parts[0], insertion=fg.weights()),))
    with pytest.raises(fg.InputError, match="displace the weights per example where taps follow them"):
        shared.init(jax.random.key(0), *case)


def test_a_tap_that_is_displaced_and_arrived_at_learns_from_both():
    network = sharing(4)
    params, state, batch = with_features_alike(network)
    method = with_weights_predicted(network, taps=fg.activations().taps)
    method, learned = taught(method, (params, state, batch), 400)
    (fitted,) = [roles["predictor"] for roles in learned[0].values()]
    true = params["a"]["readout"]["kernel"].reshape(2, 4, 3)
    assert distance(fitted.feedback["a/z"].to(("patch", "feature", "class")), true) < 1e-6


def test_predicted_weights_that_share_their_displacement_are_unbiased():
    """A direction for each example, the same for all output units of a layer."""
    network, (params, model_state, batch) = mixer(1), problem(1)
    insertion = fg.weights(only="tok", noise={"tok": "batch in"})
    build = lambda guess: fg.estimator(
        network, target=fg.local(), guess=guess, insertion=insertion, partition=CELLS, predictor=fitted_feedback(0.5)
    )
    state = moved(build(fg.rademacher()).initial_state(jax.random.key(2), params, model_state, batch))
    each = jax.jit(
        jax.vmap(lambda row: build(along(row)).estimate(jax.random.key(3), state, params, model_state, batch)[0].grads)
    )
    true = jax.jit(lambda: once(fg.recipes.lg_bp(network), params, model_state, batch).grads)()
    found = each(jnp.asarray(hadamard(128)))
    assert distance(mean(found), true) < 1e-11
    assert float(jnp.abs(found["b0"]["layers"]["tok"] - true["b0"]["layers"]["tok"]).max()) > 1e-4


def test_the_prediction_alone_serves_weights():
    """The mask of a prediction is that of taps, of which a part of weights has none to check."""
    network, case = mixer(1), problem(1)
    method = fg.estimator(
        network,
        target=fg.local(),
        guess=fg.rademacher(),
        insertion=fg.weights(only="tok", per_example=True),
        partition=CELLS,
        rule=fg.rules.prediction_only,
        predictor=fitted_feedback(0.5),
    )
    state = method.init(jax.random.key(0), *case)
    estimate, state, _ = method.estimate(jax.random.key(1), state, *case)
    assert float(jnp.abs(estimate.grads["b0"]["layers"]["tok"]).max()) == 0, "nothing is learned before the first step"
    estimate = method.estimate(jax.random.key(2), state, *case)[0]
    assert float(jnp.abs(estimate.grads["b0"]["layers"]["tok"]).max()) > 0


def test_few_cells_teach_slowly_enough():
    """128 units in 4 cells: A of one step is far from its expectation, the identity."""
    weights = {"kernel": ("in", "unit")}
    normal = lambda key, shape: jax.random.normal(key, shape) / shape[0] ** 0.5
    apply = lambda params, state, h, train: (fg.tap(h @ params["kernel"], "z", "batch unit"), state)
    init = lambda key: ({"kernel": normal(key, (5, 128))}, ())
    network = fg.Network((fg.Block("a", apply, heads.linear(128, 3, normal), init, weights=weights),))
    params, state = jax.tree.map(lambda x: x.astype(jnp.float64), network.init(jax.random.key(0)))
    case = (
        params,
        state,
        {"inputs": jax.random.normal(jax.random.key(1), (4, 5), jnp.float64), "labels": jnp.arange(4) % 3},
    )
    method = with_weights_predicted(network)
    _, learned = taught(method, case, 600)
    (fitted,) = [roles["predictor"] for roles in learned[0].values()]
    assert distance(fitted.feedback["a/z"].to(("unit", "class")), params["a"]["readout"]["kernel"]) < 1e-4


def test_groups_are_added_up_where_no_site_keeps_them_apart():
    """Token mixing feeds all groups, whose losses share one error: one matrix for all of them, unless channels are in the same part."""
    network, *case = tiny()
    axes = lambda **options: [
        {name: b.axes for name, b in roles["predictor"].feedback.items()}
        for part in begin(fg.recipes.lg_fg_a_plus(network, **options), *case)
        for scope, roles in part.items()
        if scope == "block1"
    ]
    channel = {"block1/channel": ("class", "group", "channel")}
    assert axes(token_by="weights") == [channel, {"block1/token/linear": ("class", "feature")}]
    assert axes(token_by="activities") == [channel, {"block1/token": ("class", "feature")}]
    assert axes(token_by="together") == [{**channel, "block1/token": ("group", "class", "feature")}]


@pytest.mark.parametrize(("units", "on"), [(32, 2), (64, 3)])
def test_it_settles_with_few_units_on_at_any_rate(units, on):
    """What a unit learns in a step does not depend on how many others are off."""
    bias = jnp.where(jnp.arange(units) < on, 6.0, -6.0)

    def apply(params, state, h, train):
        return jax.nn.relu(fg.tap(h @ params["kernel"] + bias, "z", "batch unit")), state

    normal = lambda key, shape: jax.random.normal(key, shape) / shape[0] ** 0.5
    init = lambda key: ({"kernel": normal(key, (5, units))}, ())
    network = fg.Network((fg.Block("a", apply, heads.linear(units, 3, normal), init),))
    params, state = jax.tree.map(lambda x: x.astype(jnp.float64), network.init(jax.random.key(0)))
    batch = {"inputs": jax.random.normal(jax.random.key(1), (64, 5), jnp.float64), "labels": jnp.arange(64) % 3}
    method = fg.estimator(
        network,
        target=fg.global_loss(),
        guess=fg.masked(fg.rademacher()),
        insertion=fg.activations(),
        partition=("batch",),
        predictor=fitted_feedback(1.0, through=jax.nn.relu),
    )
    learned = begin(method, params, state, batch)
    step = jax.jit(lambda key, learned: method.estimate(key, learned, params, state, batch)[1])
    for i in range(60):
        learned = step(jax.random.key(i), learned)
    (b,) = learned[0]["global"]["predictor"].feedback.values()
    assert distance(b.to(("unit", "class"))[:on], params["a"]["readout"]["kernel"][:on]) < 1e-6


@pytest.mark.parametrize("only", [("chan",), ("tok",), ("tok", "chan", "grp")])
def test_it_is_taught_by_outputs_that_keep_the_cells_apart(only):
    """Outputs [batch, patch, group, class], one for each cell: patches teach one matrix, groups where a tap lacks them have each their own."""
    network, (params, state, batch) = mixer(1), problem(1)
    method = fg.estimator(
        network,
        target=fg.local(),
        guess=fg.rademacher(),
        insertion=fg.activations(only=only),
        partition=CELLS,
        predictor=fitted_feedback(0.5, through=jax.nn.relu),
    )
    start = method.init(jax.random.key(0), params, state, batch)
    (learned,) = [roles["predictor"] for roles in start[0].values()]
    expected = {
        "b0/tok": ("group", "class", "feature"),
        "b0/chan": ("group", "class", "unit"),
        "b0/grp": ("class", "group", "channel"),
    }
    assert {name: b.axes for name, b in learned.feedback.items()} == {
        f"b0/{name}": expected[f"b0/{name}"] for name in only
    }
    step = jax.jit(lambda key, learned: method.estimate(key, learned, params, state, batch))
    estimate, learned, _ = step(jax.random.key(0), start)
    (learned,) = [roles["predictor"] for roles in learned[0].values()]
    assert all(float(jnp.abs(b.value).max()) > 0 for b in learned.feedback.values())
    assert jax.tree.structure(estimate.grads) == jax.tree.structure(params)


def test_token_weights_have_less_variance_with_feedback_where_they_arrive():
    network, *case = setting(TINY, 16)
    plus = lambda predictor: fg.recipes.lg_fg_a_plus(network, token_by="weights", predictor=predictor)

    def spread(method, state):
        token = lambda grads: grads["block1"]["layers"]["token"]["kernel"]
        one = jax.jit(lambda key: token(method.estimate(key, state, *case)[0].grads))
        return float(jax.lax.map(one, jax.random.split(jax.random.key(9), 64)).var(0).sum())

    fitted, none = taught(plus("fitted"), case, 80), plus("none")
    assert spread(*fitted) < 0.97 * spread(none, begin(none, *case))


def test_it_has_less_variance_than_lg_fg_a_by_hidden_taps_and_by_a_predictor():
    """Feedback fitted to the tangents takes more away than its moving average."""
    network, *case = setting(TINY, 16)
    plus = lambda predictor, rate: fg.recipes.lg_fg_a_plus(network, predictor=predictor, predictor_rate=rate)
    plain, none = fg.recipes.lg_fg_a(network, mask=True), plus("none", 0.0)
    fitted, average = (taught(plus(*choice), case, 60) for choice in (("fitted", 0.4), ("average", 0.05)))
    most, more, less, least = (
        variance(*method, case)
        for method in ((plain, begin(plain, *case)), (none, begin(none, *case)), average, fitted)
    )
    assert more < 0.9 * most
    assert less < more
    assert least < 0.95 * more
    assert least < less


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
    build = lambda predictor: fg.estimator(
        network,
        target=fg.local(),
        guess=fg.rademacher(),
        insertion=fg.activations(only=fg.hidden),
        partition=CELLS,
        predictor=predictor,
    )
    method, state = taught(build(weight_mirror(adam(2e-2))), case, 600)
    true = leaf_paths(case[0])
    learned = state[0]["block1"]["predictor"].weights
    for name, inputs in (("channel", 0), ("grouped", 1)):
        path = f"block1/layers/{name}/kernel"
        # a normalised tangent sums to zero: what a layer does to a constant input is never seen, and never needed
        seen = lambda kernel, inputs=inputs: jnp.ravel(kernel - kernel.mean(inputs, keepdims=True))
        w, f = seen(true[path]), seen(learned[path])
        assert float(w @ f / jnp.linalg.norm(w) / jnp.linalg.norm(f)) > 0.98
    assert float(jnp.abs(learned["block1/layers/token/kernel"]).max()) == 0, "nothing is displaced before it"
    none = build(None)
    assert variance(method, state, case) < 0.8 * variance(none, begin(none, *case), case)


def test_what_it_learns_sums_over_microbatches():
    network, params, state, batch = setting(TINY, 4)
    guess = fitted_feedback(0.5, through=relu_and_normalise)
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
    start = moved(begin(method, params, state, batch))
    batch = complete(batch)
    run = jax.jit(lambda some: method.estimate(jax.random.key(1), start, params, state, some)[1])
    half = lambda i: jax.tree.map(lambda x: x[2 * i : 2 * i + 2], batch)
    both = jax.tree.map(jnp.add, run(half(0)), run(half(1)))
    assert distance(both, run(batch)) < 1e-12


@pytest.mark.parametrize(("token_by", "microbatch"), [("weights", 2), ("activities", None)])
def test_streamed_is_whole_and_any_microbatch_is_the_whole_batch(token_by, microbatch):
    network, params, state, batch = setting(TINY, 4)
    plus = fg.recipes.lg_fg_a_plus(network, token_by=token_by)
    whole, streamed = (
        two_steps(dataclasses.replace(plus, executor=executor, microbatch=size), params, state, batch)
        for executor, size in (("whole", None), ("streamed", microbatch))
    )
    assert distance([e.grads for e in streamed[0]], [e.grads for e in whole[0]]) < 1e-11
    assert distance(streamed[1], whole[1]) < 1e-11


@pytest.mark.parametrize("which", ["tokens", "all weights", "weights and taps"])
def test_weights_per_example_move_the_taps_after_them(which, monkeypatch):
    """The tangents are those of the network run one example at a time, and its primal is that of the whole batch."""
    network, *case = tiny() if which == "tokens" else (mixer(1), *problem(1))
    if which == "tokens":
        method = fg.recipes.lg_fg_a_plus(network, token_by="weights", predictor="none")
    else:
        displaced = (
            fg.weights(only=("tok", "chan"), per_example=True) if "taps" in which else fg.weights(per_example=True)
        )
        displaced = displaced._replace(taps=fg.activations(only="grp").taps) if "taps" in which else displaced
        method = fg.estimator(
            network, target=fg.local(), guess=fg.gaussian(), insertion=displaced, partition=CELLS, draws=2
        )
    start = begin(method, *case)
    estimate = lambda: jax.jit(lambda start: method.estimate(jax.random.key(1), start, *case)[0].grads)(start)
    found = estimate()
    asked = []
    monkeypatch.setattr(Step, "at_taps", lambda self, u: asked.append(sorted(u)))
    assert distance(found, estimate()) < 1e-12
    assert asked
