"""The streamed executor: the whole executor's numbers, block by block; what it refuses; memory that does not grow with depth."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toynets import mixer, problem, setting, two_steps

import forwardgrad as fg
from forwardgrad import streaming
from forwardgrad.descent import sgd
from forwardgrad.guesses.feedback import learned_feedback
from forwardgrad.guesses.local import local_gradient
from forwardgrad.guesses.ntk import ntk
from forwardgrad.models.localmixer import LocalMixer
from forwardgrad.models.mlp import MLP
from forwardgrad.parts import Carry

pytestmark = pytest.mark.float64

MODELS = {
    "mixer": LocalMixer(blocks=4, patches=2, channels=8, groups=2),
    "mlp": MLP(hidden=(5, 5, 5, 4)),
    "batch norm": MLP(hidden=(5, 5, 5), batch_norm=True),
}
R = fg.recipes
METHODS = {
    "lg-bp": R.lg_bp,
    "lg-fg-a": lambda n: R.lg_fg_a(n, mask=True, draws=2),
    "lg-fg-a, orthogonal": lambda n: R.lg_fg_a(n, guess=fg.orthogonal(), draws=2),
    "lg-fg-w": R.lg_fg_w,
    "local ntk": lambda n: fg.estimator(
        n,
        target=fg.local(),
        guess=ntk(redraw=True),
        insertion=fg.activations(),
        partition=("batch",),
        rule=fg.rules.projection,
    ),
    "learning predictor": lambda n: fg.wrappers.with_predictor(R.lg_fg_a(n), learned_feedback(sgd(0.5), mask=True)),
    "two parts": lambda n: dataclasses.replace(
        R.lg_fg_a(n),
        parts=(
            fg.Part(fg.rademacher(), fg.weights(only="*kernel")),
            fg.Part(fg.gaussian(), fg.weights(only="*bias"), draws=2),
        ),
    ),
    "fg-a": lambda n: R.fg_a(n, mask=True, draws=2),
    "fg-a, released": lambda n: R.fg_a(n, released=True),
    "lg-fa": R.lg_fa,
    "fg-w": lambda n: R.fg_w(n, draws=3),
    "global, two parts": lambda n: dataclasses.replace(
        R.fg_w(n),
        parts=(
            fg.Part(fg.rademacher(), fg.weights(only="*kernel")),
            fg.Part(fg.gaussian(), fg.weights(only="*bias"), draws=2),
        ),
    ),
}


def assert_same(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)


CASES = [("mixer", method) for method in ("lg-bp", "lg-fg-a", "lg-fg-w", "learning predictor", "fg-a", "fg-w")]
CASES += [("mlp", method) for method in METHODS]
CASES += [("batch norm", method) for method in ("lg-bp", "lg-fg-w", "fg-a", "fg-w")]
BY_MICROBATCHES = ("lg-bp", "lg-fg-a", "local ntk", "global, two parts", "fg-a", "fg-w")


@pytest.mark.parametrize(("model", "method"), CASES)
def test_streamed_is_whole(model, method):
    network, params, state, batch = setting(MODELS[model])
    made = METHODS[method](network)
    whole = two_steps(dataclasses.replace(made, executor="whole"), params, state, batch)
    streamed = dataclasses.replace(made, executor="streamed")
    assert_same(whole, two_steps(streamed, params, state, batch))
    if model == "mlp" and method in BY_MICROBATCHES:
        assert_same(whole, two_steps(dataclasses.replace(streamed, microbatch=2), params, state, batch))


def test_equal_neighbours_are_stacked_and_others_are_not():
    lengths = lambda method, *rest: method.pack(carry(method, *rest), rest[-1]).lengths
    network, *rest = setting(MODELS["mixer"])
    assert lengths(R.lg_fg_a(network), *rest) == (1, 3, 1)
    assert lengths(R.fg_w(network), *rest) == (1, 3, 1)
    named = fg.Part(fg.rademacher(), fg.activations(only=("block2/token", "grouped")), ("batch", "patch", "group"))
    assert lengths(dataclasses.replace(R.lg_fg_a(network), parts=(named,)), *rest) == (1, 1, 1, 1, 1)
    network, *rest = setting(MODELS["batch norm"])
    assert lengths(R.lg_bp(network), *rest) == (1, 2)
    assert lengths(dataclasses.replace(R.fg_w(network), executor="streamed"), *rest) == (1, 1, 1)


@pytest.mark.parametrize("size", [None, 2])
def test_checkpointed_backpropagation_in_a_loop_is_backpropagation(size):
    network, params, state, batch = setting(MODELS["mixer"])
    made = dataclasses.replace(R.bp_checkpointed(network), microbatch=size)
    assert made.pack(carry(made, params, state, batch), batch).lengths == (1, 3, 1)
    assert not made.streams(params, state, batch)
    whole = two_steps(dataclasses.replace(R.bp(network), executor="whole"), params, state, batch)
    assert_same(whole, two_steps(made, params, state, batch))


def carry(method, params, model_state, batch):
    state = method.initial_state(jax.random.key(2), params, model_state, batch)
    return Carry(params, model_state, jax.tree.map(jnp.zeros_like, params), state)


def test_a_pattern_that_names_a_block_means_that_block():
    network, params, state, batch = setting(MODELS["mixer"])
    part = fg.Part(fg.rademacher(), fg.activations(only=("block2/token", "grouped")), ("batch", "patch", "group"))
    method = dataclasses.replace(R.lg_fg_a(network), parts=(part,))
    whole = two_steps(dataclasses.replace(method, executor="whole"), params, state, batch)
    assert_same(whole, two_steps(dataclasses.replace(method, executor="streamed"), params, state, batch))


def test_pack_and_unpack_are_inverse():
    network, params, state, batch = setting(MODELS["mixer"])
    method = fg.wrappers.with_predictor(R.lg_fg_a(network), learned_feedback(sgd(0.5), mask=True))
    before = carry(method, params, state, batch)
    after = method.unpack(method.pack(before, batch), before.state)
    assert jax.tree.structure(before) == jax.tree.structure(after)
    jax.tree.map(np.testing.assert_array_equal, before, after)


def test_updates_block_by_block_are_updates_of_the_whole():
    """A block's update comes before the next block is looked at, and changes nothing that the next block sees."""
    network, params, state, batch = setting(MODELS["mixer"])

    def update(block, grads, opt_state, params):
        new = jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)
        return new, jax.tree.map(jnp.add, opt_state, grads)

    def two_updates(executor):
        method = dataclasses.replace(R.lg_fg_a(network), executor=executor)
        start = carry(method, params, state, batch)
        take = jax.jit(lambda packed: method.step(jax.random.key(5), packed, batch, update)[0])
        return method.unpack(take(take(method.pack(start, batch))), start.state)

    assert_same(two_updates("whole"), two_updates("streamed"))


REFUSED = {
    "goes back through the whole network": R.bp,
    "target is neither one loss per block": R.l_bp,
    "look at the whole network": lambda n: R.fg_a(n, guess=fg.orthogonal()),
    "projection rule needs the length": lambda n: fg.estimator(
        n,
        target=fg.global_loss(),
        guess=fg.rademacher(),
        insertion=fg.activations(),
        partition=("batch",),
        rule=fg.rules.projection,
    ),
    "finite difference amplifies": R.np_,
    "one example at a time": lambda n: fg.estimator(
        n, target=fg.global_loss(), guess=fg.rademacher(), insertion=fg.weights(per_example=True), partition=("batch",)
    ),
    "ends in layers that no displaced tap cuts off": lambda n: fg.estimator(
        n, target=fg.global_loss(), guess=fg.rademacher(), insertion=fg.activations(only="token"), partition=("batch",)
    ),
}


@pytest.mark.parametrize("why", REFUSED)
def test_what_cannot_be_streamed_is_refused_with_the_remedy_and_run_whole_by_default(why):
    network, params, state, batch = setting(MODELS["mixer"])
    method = REFUSED[why](network)
    assert not method.streams(params, state, batch)
    with pytest.raises(fg.InputError, match=f"{why}.*--executor whole"):
        dataclasses.replace(method, executor="streamed").streams(params, state, batch)


def test_a_guess_that_looks_at_the_whole_network_is_streamed_where_the_block_is_all():
    network, params, state, batch = setting(MODELS["mlp"])
    part = fg.Part(local_gradient(), fg.activations(), ("batch",), fg.rules.projection)
    method = fg.Estimator(network, fg.local(), (part,))
    assert method.streams(params, state, batch)
    assert not dataclasses.replace(method, target=fg.global_loss()).streams(params, state, batch)


def test_auto_streams_where_it_costs_nothing():
    network, params, state, batch = setting(MODELS["mixer"])
    streams = lambda method: method.streams(params, state, batch)
    assert streams(R.lg_fg_a(network))
    assert streams(R.lg_bp(network))
    assert streams(R.fg_w(network))
    assert not streams(R.fg_a(network))  # one more forward pass: only where depth makes memory count
    deep = LocalMixer(blocks=9, patches=2, channels=8, groups=2).network((4, 4, 1), 3)
    deep_params, deep_state = deep.init(jax.random.key(0))
    assert R.fg_a(deep).streams(deep_params, deep_state, batch)
    assert not dataclasses.replace(R.lg_fg_a(network), executor="whole").streams(params, state, batch)
    with pytest.raises(fg.InputError, match="use auto, whole or streamed"):
        dataclasses.replace(R.lg_fg_a(network), executor="fast")


def test_hand_written_blocks_stream_too():
    params, state, batch = problem(blocks=2)
    method = dataclasses.replace(R.lg_fg_a(mixer(2)), allow_bias=True)
    whole = two_steps(dataclasses.replace(method, executor="whole"), params, state, batch)
    assert_same(whole, two_steps(dataclasses.replace(method, executor="streamed"), params, state, batch))


@pytest.mark.parametrize("method", ["lg-bp", "lg-fg-a", "fg-a", "fg-w"])
def test_memory_does_not_grow_with_depth(method):
    """XLA's own figure for temporaries, with parameters, gradients and optimiser as arguments updated in place."""

    def temporaries(blocks):
        network = LocalMixer(blocks=blocks, patches=2, channels=64, groups=4).network((8, 8, 1), 10)
        made = dataclasses.replace(R.find(method)(network), executor="streamed")
        shapes = {
            "inputs": jax.ShapeDtypeStruct((512, 8, 8, 1), jnp.float32),
            "labels": jax.ShapeDtypeStruct((512,), jnp.int32),
        }

        def start(batch):
            return made.pack(carry(made, *network.init(jax.random.key(0)), batch), batch)

        def update(block, grads, velocity, params):  # reads both and writes both, as momentum with weight decay does
            new = jax.tree.map(lambda v, g, p: 0.9 * v + g + 1e-4 * p, velocity, grads, params)
            return jax.tree.map(jnp.subtract, params, new), new

        step = jax.jit(lambda packed, batch: made.step(jax.random.key(1), packed, batch, update)[0], donate_argnums=0)
        return step.lower(jax.eval_shape(start, shapes), shapes).compile().memory_analysis().temp_size_in_bytes

    with jax.enable_x64(False):
        assert temporaries(24) <= 1.05 * temporaries(4)


def test_reached_follows_everything_but_cut_taps():
    def function(a, b, h):
        z = fg.tap(h @ a, "z", "batch unit")
        inner = jax.jit(lambda z, b: fg.tap(z * b, "y", "batch unit"))(jax.nn.relu(z), b)
        return inner, z.sum()

    program = fg.taps.trace(function, jnp.ones((3, 3)), jnp.ones(3), jnp.ones((2, 3)))
    reached = lambda *flags, cut=(): tuple(fg.taps.reached(program, flags, cut))
    assert reached(True, False) == (True, True)
    assert reached(False, True) == (True, False)
    assert reached(True, True, cut=("z",)) == (True, False)
    assert reached(True, True, cut=("z", "y")) == (False, False)
    assert reached(False, False) == (False, False)


def test_greedy_is_one_loss_per_block_cut_off():
    network = setting(MODELS["mlp"])[0]
    assert streaming.is_greedy(R.lg_bp(network))
    assert not streaming.is_greedy(R.l_bp(network))
    assert not streaming.is_greedy(R.bp(network))
    assert not streaming.is_greedy(R.bp(fg.Network(network.blocks[:1])))
