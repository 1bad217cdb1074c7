"""Guesses that look at the network: feedback matrices, local gradients, random readouts. Each against a computation by hand on the MLP."""

import functools

import jax
import jax.numpy as jnp
import pytest
from toynets import along, distance, hadamard, mean, once

import forwardgrad as fg
from forwardgrad.guesses import feedback
from forwardgrad.guesses.local import local_gradient
from forwardgrad.guesses.ntk import ntk
from forwardgrad.models.mlp import MLP

pytestmark = pytest.mark.float64

HIDDEN, CLASSES, N = (5, 4), 3, 4
BLOCKS = ("layer0", "layer1")
SITES = {"before": ("layer0/input", "layer1/input"), "after": ("layer0/output", "layer1/output")}


@functools.cache
def problem(taps="before"):
    with jax.ensure_compile_time_eval():
        network = MLP(hidden=HIDDEN, taps=taps).network((3, 1, 1), CLASSES)
        params, state = jax.tree.map(lambda x: x.astype("float64"), network.init(jax.random.key(0)))
        params = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(x.size), x.shape), params)
        inputs = jax.random.normal(jax.random.key(1), (N, 3, 1, 1))
        return network, params, state, {"inputs": inputs, "labels": jnp.arange(N) % CLASSES}


def forward(params, x, eps=(0.0, 0.0), cut=False, readouts=None):
    """By hand: inputs of the layers, pre-activations, and mean cross-entropies of every layer's readout; eps is added before the ReLUs."""
    h, inputs, zs, losses = x.reshape(N, -1), [], [], []
    for i, block in enumerate(BLOCKS):
        h = jax.lax.stop_gradient(h) if cut else h
        layer = params[block]["layers"]["linear"]
        readout = (readouts or {}).get(block, params[block]["readout"])
        inputs.append(h)
        zs.append(h @ layer["kernel"] + layer["bias"] + eps[i])
        h = jax.nn.relu(zs[-1])
        logits = h @ readout["kernel"] + readout["bias"]
        losses.append(-jax.nn.log_softmax(logits)[jnp.arange(N), jnp.arange(N) % CLASSES].mean())
    return inputs, zs, losses, logits


def zeros():
    return tuple(jnp.zeros((N, n)) for n in HIDDEN)


def error(params, x):
    logits = forward(params, x)[3]
    return (jax.nn.softmax(logits) - jax.nn.one_hot(jnp.arange(N) % CLASSES, CLASSES)) / N


def layer_gradients(params, x, deltas):
    """From credits at the pre-activations to the gradients of the layers."""
    inputs = forward(params, x)[0]
    return {
        block: {"linear": {"kernel": h.T @ delta, "bias": delta.sum(0)}}
        for block, h, delta in zip(BLOCKS, inputs, deltas, strict=True)
    }


def layers(grads):
    return {block: own["layers"] for block, own in grads.items()}


def predicted_by(predictor, insertion=None, target=None, taps="before"):
    part = fg.Part(None, insertion or fg.activations(), ("batch",), fg.rules.prediction_only, predictor)
    return fg.Estimator(problem(taps)[0], target or fg.global_loss(), (part,))


@pytest.mark.parametrize(("taps", "mask"), [("before", True), ("after", False), ("before", False)])
def test_direct_feedback_by_hand(taps, mask):
    network, params, state, batch = problem(taps)
    method = fg.recipes.dfa(network, mask=mask)
    guess_state = method.init(jax.random.key(5), params, state, batch)
    found, after, _ = jax.jit(method.estimate)(jax.random.key(6), guess_state, params, state, batch)
    matrices = [guess_state[0]["global"]["predictor"][site] for site in SITES[taps]]
    assert [(b.axes, b.value.shape) for b in matrices] == [(("class", "unit"), (CLASSES, n)) for n in HIDDEN]
    for b, n in zip(matrices, HIDDEN, strict=True):
        assert (6 / n) ** 0.5 * 0.7 < float(jnp.abs(b.value).max()) <= (6 / n) ** 0.5
    on = [(z > 0) if mask or taps == "after" else 1.0 for z in forward(params, batch["inputs"])[1]]
    deltas = [error(params, batch["inputs"]) @ b.value * m for b, m in zip(matrices, on, strict=True)]
    assert distance(layers(found.grads), layer_gradients(params, batch["inputs"], deltas)) < 1e-13
    assert distance(after, guess_state) == 0, "fixed"


def test_learned_feedback_moves_towards_the_mean_jacobian_and_uses_the_matrix_before_the_update():
    """Mean over directions of the new B: (1 - α) B + α J; its fixed point is J, the mean Jacobian of the outputs."""
    network, params, state, batch = problem()
    alpha = 0.3
    build = lambda guess: fg.recipes.fdfa(network, guess=guess, rule="average", alpha=alpha)
    start = build(fg.gaussian()).init(jax.random.key(5), params, state, batch)
    assert all(float(jnp.abs(b).max()) == 0 for b in jax.tree.leaves(start)), "learning starts from zero"
    old = jax.tree.map(lambda b: jax.random.normal(jax.random.key(b.size), b.shape), start)

    @jax.jit
    @jax.vmap
    def step(row):
        found, new, _ = build(along(row)).estimate(jax.random.key(0), old, params, state, batch)
        return layers(found.grads), new[0]["global"]["predictor"].matrices

    grads, new = step(jnp.asarray(hadamard(64)))
    jacobian = jax.jacrev(lambda eps: forward(params, batch["inputs"], eps)[3].sum(0) / N)(zeros())
    for site, j in zip(SITES["before"], jacobian, strict=True):
        b = old[0]["global"]["predictor"].matrices[site].value
        assert distance(new[site].value.mean(0), (1 - alpha) * b + alpha * j.sum(1)) < 1e-13
    matrices = [old[0]["global"]["predictor"].matrices[site].value for site in SITES["before"]]
    on = [z > 0 for z in forward(params, batch["inputs"])[1]]
    deltas = [error(params, batch["inputs"]) @ b * m for b, m in zip(matrices, on, strict=True)]
    for i in (0, 17):  # whatever the direction
        own = jax.tree.map(lambda x, i=i: x[i], grads)
        assert distance(own, layer_gradients(params, batch["inputs"], deltas)) < 1e-13


def test_more_draws_average_the_learned_sample():
    network, params, state, batch = problem()
    rows = jnp.asarray(hadamard(64))[jnp.array([5, 9])]
    stacked = lambda k, s, view: {
        n: fg.Named(jnp.stack([along(r).propose(k, s, view)[n].value for r in rows]), ("draw", *u.axes))
        for n, u in along(rows[0]).propose(k, s, view).items()
    }

    def learned(guess, draws):
        method = fg.recipes.fdfa(network, guess=guess, rule="average", alpha=1.0, draws=draws)
        start = method.init(jax.random.key(5), params, state, batch)
        return jax.jit(method.estimate)(jax.random.key(0), start, params, state, batch)[1][0]["global"][
            "predictor"
        ].matrices

    together = learned(along(rows[0])._replace(propose=stacked), 2)
    apart = [learned(along(row), 1) for row in rows]
    assert distance(together, mean(jax.tree.map(lambda *x: jnp.stack(x), *apart))) < 1e-14


@pytest.mark.parametrize("insertion", [fg.activations(), fg.weights()], ids=["activations", "weights"])
def test_the_local_gradient_is_that_of_greedy_backpropagation(insertion):
    _, params, state, batch = problem()
    found = jax.jit(lambda: once(predicted_by(local_gradient(), insertion), params, state, batch).grads)()
    greedy = jax.grad(lambda p: sum(forward(p, batch["inputs"], cut=True)[2]))(params)
    assert distance(layers(found), layers(greedy)) < 1e-13
    last = jax.grad(lambda p: forward(p, batch["inputs"])[2][-1])(params)
    assert distance(found["layer1"], last["layer1"]) < 1e-13, "the last block's local loss is the global one"


def test_projection_on_the_local_gradient_by_hand():
    """One coefficient per example, over all layers jointly: <g, u> / |u|²."""
    network, params, state, batch = problem()
    method = fg.estimator(
        network,
        target=fg.global_loss(),
        guess=local_gradient(),
        insertion=fg.activations(),
        partition=("batch",),
        rule=fg.rules.projection,
    )
    found = jax.jit(lambda: once(method, params, state, batch).grads)()
    x = batch["inputs"]
    u = jax.grad(lambda eps: sum(forward(params, x, eps, cut=True)[2]))(zeros())
    g = jax.grad(lambda eps: forward(params, x, eps)[2][-1])(zeros())
    dot = lambda a, b: sum((x * y).sum(1, keepdims=True) for x, y in zip(a, b, strict=True))
    deltas = [dot(g, u) / dot(u, u) * each for each in u]
    assert distance(layers(found), layer_gradients(params, x, deltas)) < 1e-13


def test_a_fixed_random_readout_by_hand():
    _, params, state, batch = problem()
    method = predicted_by(ntk(redraw=False))
    guess_state = method.init(jax.random.key(5), params, state, batch)
    readouts = guess_state[0]["global"]["predictor"]
    estimate = jax.jit(method.estimate)
    first, second = (estimate(jax.random.key(i), guess_state, params, state, batch)[0].grads for i in (0, 1))
    assert distance(first, second) == 0, "the readout is fixed"
    by_hand = jax.grad(lambda p: sum(forward(p, batch["inputs"], cut=True, readouts=readouts)[2]))(params)
    assert distance(layers(first), layers(by_hand)) < 1e-13
    assert distance(layers(first), layers(jax.grad(lambda p: sum(forward(p, batch["inputs"], cut=True)[2]))(params))) > 1e-2  # fmt: skip
    assert readouts["layer0"]["kernel"].dtype == params["layer0"]["readout"]["kernel"].dtype


def test_a_redrawn_readout_changes_with_the_step_and_not_with_the_microbatch():
    _, params, state, batch = problem()
    whole = {**batch, "weight": jnp.full(N, 1 / N), "index": jnp.arange(N)}
    run = jax.jit(lambda key, b: layers(once(predicted_by(ntk()), params, state, b, key=key).grads))
    halves = [run(jax.random.key(0), jax.tree.map(lambda x, i=i: x[i : i + 2], whole)) for i in (0, 2)]
    expected = run(jax.random.key(0), whole)
    assert distance(jax.tree.map(jnp.add, *halves), expected) < 1e-13
    assert distance(run(jax.random.key(1), whole), expected) > 1e-3


@pytest.mark.parametrize("target", [fg.global_loss(), fg.local()], ids=["global", "local"])
def test_redrawn_readouts_of_different_blocks_are_different(target):
    network, params, state, batch = problem()
    keys = []

    def spied(readout):
        return readout._replace(init=lambda key: keys.append(jax.random.key_data(key)) or readout.init(key))

    network = fg.Network(tuple(block._replace(readout=spied(block.readout)) for block in network.blocks))
    part = fg.Part(None, fg.activations(), (), fg.rules.prediction_only, ntk())
    step = lambda: once(fg.Estimator(network, target, (part,)), params, state, batch)
    first, second = jax.jit(lambda: (step(), keys[-2:])[1])()
    assert first.tolist() != second.tolist()


@pytest.mark.parametrize("block", BLOCKS)
def test_local_targets_feed_back_the_local_error(block):
    """Under greedy targets each scope's matrices carry its own readout's error."""
    _, params, state, batch = problem()
    method = predicted_by(feedback.direct_feedback(), target=fg.local())
    guess_state = method.init(jax.random.key(5), params, state, batch)
    found = jax.jit(method.estimate)(jax.random.key(6), guess_state, params, state, batch)[0].grads
    inputs, zs, *_ = forward(params, batch["inputs"])
    i = BLOCKS.index(block)
    logits = jax.nn.relu(zs[i]) @ params[block]["readout"]["kernel"] + params[block]["readout"]["bias"]
    e = (jax.nn.softmax(logits) - jax.nn.one_hot(batch["labels"], CLASSES)) / N
    delta = e @ guess_state[0][block]["predictor"][f"{block}/input"].value
    assert distance(found[block]["layers"]["linear"]["kernel"], inputs[i].T @ delta) < 1e-13
