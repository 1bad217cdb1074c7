"""The measured bias: that of the mean credit over all directions, whatever is displaced, shared, masked, kept apart or run alone."""

import jax
import jax.numpy as jnp
import pytest
from toynets import CELLS, along, hadamard, layers, mixer, norm, once, problem

import forwardgrad as fg
from forwardgrad import checks, taps
from forwardgrad.bias import bias
from forwardgrad.insertions import Insertion, linear_output
from forwardgrad.models.mlp import MLP
from forwardgrad.network import complete, leaf_paths
from forwardgrad.whole import Step

pytestmark = pytest.mark.float64


def coupled():
    """One block of the mixer whose output lacks half of the batch's mean: every example feels the others, and is another one when run alone."""

    def apply(p, s, h, train):
        h = layers(p, h, fg.tap)
        return h - h.mean(0) / 2, s

    return fg.Network((mixer(1).blocks[0]._replace(apply=apply),))


def coarse():
    """Two blocks, and the loss of the first is one number per example: where both losses are added, patches and groups are not apart."""
    first, second = mixer(2).blocks
    loss = lambda outputs, batch: first.readout.loss(outputs, batch).sum_to(("batch",))
    return fg.Network((first._replace(readout=first.readout._replace(loss=loss)), second))


def normalised(z, name, axes):
    """A tap after a normalisation, and a passive one before it."""
    return fg.tap(norm(fg.tap(z, linear_output(name), axes, passive=True), (-1,)), name, axes)


PER_EXAMPLE = fg.weights(per_example=True)
BOTH = Insertion(fg.activations(only=["chan", "grp"]).taps, fg.weights(only="tok", per_example=True).weights)
# network, target, insertion, partition, guess
BIASED = {
    "weights per example": (coupled(), fg.local(), PER_EXAMPLE, ("batch",), along),
    "weights per example, cells apart": (coupled(), fg.local(), PER_EXAMPLE, CELLS, along),
    "a weight per example and taps in one tangent": (coupled(), fg.local(), BOTH, CELLS, along),
    "activations": (coupled(), fg.local(), fg.activations(), CELLS, along),
    "one noise for all examples": (coupled(), fg.local(), fg.activations(shared="batch"), CELLS, along),
    "the same, masked": (coupled(), fg.local(), fg.activations(shared="batch"), CELLS, lambda row: fg.masked(along(row))),
    "credit that skips a normalisation": (mixer(1, mark=normalised), fg.local(), fg.activations(credit_at=linear_output), CELLS, along),
    "patches under a global loss": (mixer(2), fg.global_loss(), fg.activations(), ("batch", "patch"), along),
}  # fmt: skip
UNBIASED = {
    "weights per example": (mixer(1), fg.local(), PER_EXAMPLE, CELLS, along),
    "one noise for all examples": (mixer(1), fg.local(), fg.activations(shared="batch"), CELLS, along),
    "weights per example, examples coupled after the taps, nothing apart": (
        coupled(),
        fg.local(),
        PER_EXAMPLE,
        (),
        along,
    ),
    "masked": (mixer(1), fg.local(), fg.activations(only=["tok", "chan"]), CELLS, lambda row: fg.masked(along(row))),
    "a loss that lacks axes": (coarse(), fg.local(cut=False), fg.activations(), CELLS, along),
    "weights, examples coupled": (coupled(), fg.local(), fg.weights(), (), along),
}


def setting(network, target, insertion, partition, guess):
    """What `bias` is given, with a guess from a row."""
    build = lambda row: fg.estimator(network, target=target, guess=guess(row), insertion=insertion, partition=partition)
    return build, *network.init(jax.random.key(4)), problem()[2]


def enumerated(build, params, state, batch):
    """Relative bias of the mean credit over the rows of a Hadamard matrix."""
    params, state, batch = checks.generic(params, state, complete(batch), shrink=False)  # where `bias` looks
    rows = jnp.asarray(hadamard())

    def step_of(row):
        method = build(row)
        return Step(method.network, method.target, params, state, batch), method.parts[0]

    def credits(row):
        step, part = step_of(row)
        states = {scope.name: {"guess": ()} for scope in step.scopes}
        sites = step.sites(part)
        axes = {step.landings(part)[name]: site.axes for name, site in sites.items()}
        return {name: c.to(axes[name]) for name, c in step.run_part(part, jax.random.key(0), states)[0].items()}

    @jax.jit
    def relative():
        step, part = step_of(rows[0])
        landings = step.landings(part)
        sites = {landings[name]: site for name, site in step.sites(part).items()}

        def loss(eps):
            terms = step.displaced({name: fg.Named(e, sites[name].axes) for name, e in eps.items()}).terms
            return sum(term.loss for term in terms.values())

        true = jax.grad(loss)({name: jnp.zeros(site.shape) for name, site in sites.items()})
        found = jax.tree.map(lambda x: x.mean(0), jax.vmap(credits)(rows))
        norm = lambda x: jnp.linalg.norm(x.ravel())
        return {name: norm(found[name] - true[name]) / norm(true[name]) for name in true}

    return {name: float(x) for name, x in relative().items()}


@pytest.mark.parametrize("name", BIASED)
def test_the_measured_bias_is_that_of_enumerated_credits(name):
    build, *given = setting(*BIASED[name])
    assert bias(build(hadamard()[0]), *given) == pytest.approx(expected := enumerated(build, *given), abs=1e-12)
    assert max(expected.values()) > 1e-2


@pytest.mark.parametrize("name", UNBIASED)
def test_what_holds_has_none(name):
    build, *given = setting(*UNBIASED[name])
    assert set(bias(build(hadamard()[0]), *given).values()) == {0.0}
    assert max(enumerated(build, *given).values()) < 1e-12


@pytest.mark.parametrize("marked", [True, False], ids=["with taps", "without taps"])
def test_weights_per_example_under_batch_norm(marked):
    """From tap to tap an example runs alone, where normalised it is zero; the rest is the batch's. Without taps all of it is alone."""
    network = MLP(hidden=(6, 5), batch_norm=True).network((4, 1, 1), classes=3)
    if not marked:
        network = fg.Network(tuple(without_taps(block) for block in network.blocks))
    params, state = jax.tree.map(lambda x: x.astype("float64"), network.init(jax.random.key(0)))
    batch = {"inputs": jax.random.normal(jax.random.key(1), (4, 4, 1, 1)), "labels": jnp.arange(4) % 3}
    method = fg.estimator(network, target=fg.global_loss(), guess=fg.rademacher(), insertion=PER_EXAMPLE)
    found = bias(method, params, state, batch)
    params, state, batch = checks.generic(params, state, batch, shrink=True)
    gradient = lambda batch: leaf_paths(once(fg.recipes.bp(network), params, state, batch).grads)
    one_each = jax.tree.map(lambda x: x[:, None], batch)
    true, alone = jax.jit(lambda: (gradient(batch), jax.vmap(gradient)(one_each)))()
    for name in ("layer0#linear/kernel", "layer0#norm/scale", "layer1#linear/kernel", "layer1#norm/bias"):
        path = name.replace("#", "/layers/")
        off = jnp.linalg.norm(alone[path].sum(0) - true[path]) / jnp.linalg.norm(true[path])
        assert off > 0.1
        exact = marked and "scale" not in name  # from tap to tap, only the scale meets a normalised example
        assert found[name] == pytest.approx(0.0 if exact else float(off), abs=1e-12), name
    assert found["layer0#linear/bias"] == 0, "below BatchNorm its gradient is zero, whichever way"


def without_taps(block):
    """The block with its taps taken out."""
    plain = lambda name, axes, z: (None, z)

    def apply(params, state, h, train):
        return taps.visited(lambda *args: block.apply(*args, train), plain)(params, state, h)[0]

    return block._replace(apply=apply)
