"""Checks at the door: what would be biased without a sign of it is found, measured by enumeration, and refused; what is right passes."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from toynets import CELLS, FIXED, distance, estimates, gradient, hadamard, layers, mean, mixer, once, problem, readout

import forwardgrad as fg
from forwardgrad import checks
from forwardgrad.models.mlp import MLP

pytestmark = pytest.mark.float64


def renamed(**names):
    """The mixer with other axis names at its taps."""
    mark = lambda z, name, axes: fg.tap(z, name, names.get(name, axes))
    return fg.Network(tuple(b._replace(apply=lambda p, s, h, train: (layers(p, h, mark), s)) for b in mixer().blocks))


def misnamed_weights():
    """The dense layer's input features are called groups: they feed all groups."""
    return fg.Network(tuple(b._replace(weights={**b.weights, "chan": ("group", "unit")}) for b in mixer().blocks))


def normalised(scale=1.0):
    """One dense layer, a tap, BatchNorm, the readout of the mixer."""

    def apply(p, state, h, train):
        z = fg.tap(h.reshape(len(h), -1) @ p["w"], "z", "batch unit") * scale
        z = (z - z.mean(0)) / jnp.sqrt(z.var(0) + 1e-5)
        return jnp.tanh(z).reshape(-1, 2, 2, 2), state

    init = lambda key: ({"w": jax.random.normal(key, (8, 8))}, ())
    return fg.Network((fg.Block("only", apply, readout(), init),))


def batch_norm_mlp(seed=0, hidden=(6, 5)):
    network = MLP(hidden=hidden, batch_norm=True).network((4, 1, 1), classes=3)
    params, state = network.init(jax.random.key(seed))
    inputs = jax.random.normal(jax.random.key(seed + 1), (8, 4, 1, 1), jnp.float32)
    return network, params, state, {"inputs": inputs, "labels": jnp.arange(8) % 3}


def method(network, target=None, insertion=None, partition=CELLS, guess=None, **options):
    return fg.estimator(
        network,
        target=target or fg.local(),
        guess=guess or fg.rademacher(),
        insertion=insertion or fg.activations(),
        partition=partition,
        **options,
    )


def leaks(estimator, params, state, batch, **options):
    return {(leak.site, leak.axis) for leak in checks.separable(estimator, params, state, batch, **options)}


# what is wrong: an estimator on the mixer, the (site, axis) that leak, and part of the message
WRONG = {
    "patches under a global loss": (
        method(mixer(), fg.global_loss()),
        {("b0/tok", "patch"), ("b0/chan", "patch"), ("b0/grp", "patch"), ("b0/grp", "group")},
        r"'b0/tok'.*slice along 'patch'.*leave 'patch' out of the partition",
    ),
    "a wrong name at a tap": (
        method(renamed(tok="batch patch group")),
        None,
        "in the loss: give it another name there",
    ),
    "two names exchanged": (
        method(renamed(grp="batch group patch channel")),
        {("b0/grp", "group"), ("b0/grp", "patch"), ("b1/grp", "group"), ("b1/grp", "patch")},
        "slice along '(patch|group)'.*name the axis differently at the tap",
    ),
    "one noise for all examples that are not apart": (
        method(normalised(), insertion=fg.activations(shared="batch"), partition=("batch",)),
        {("only/z", "batch")},
        "leave 'batch' out of the partition",
    ),
    "one noise for all patches under a global loss": (
        method(mixer(), fg.global_loss(), fg.activations(shared="patch"), ("batch", "patch")),
        None,
        "leave 'patch' out of the partition",
    ),
    "weights named by the wrong axis": (
        method(misnamed_weights(), insertion=fg.weights(only="chan"), partition=("group",)),
        None,
        "in the loss: give it another name there",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_separation_is_found_and_refused(name):
    estimator, expected, message = WRONG[name]
    params, state = estimator.network.init(jax.random.key(4))
    batch = problem()[2]
    with pytest.raises(fg.InputError, match=message):
        estimator.init(jax.random.key(0), params, state, batch)
    if "in the loss: give it another name" in message:  # a length that differs is no matter of bias
        return
    if expected is not None:
        assert leaks(estimator, params, state, batch) == expected
    allowed = dataclasses.replace(estimator, allow_bias=True)
    allowed.init(jax.random.key(0), params, state, batch)


RIGHT = {
    "lg-fg-a": method(mixer()),
    "lg-fg-w with named output patches": method(mixer(), insertion=fg.weights()),
    "per example": method(mixer(), insertion=fg.weights(per_example=True)),
    "fg-a": method(mixer(), fg.global_loss(), partition=("batch",)),
    "no partition": method(mixer(), fg.global_loss(), partition=()),
    "shared": method(mixer(), insertion=fg.activations(shared="batch patch")),
    "BatchNorm, nothing apart": method(normalised(), partition=()),
    "masked hidden taps": method(mixer(), insertion=fg.activations(only=["tok", "chan"]), guess=fg.masked(FIXED)),
    "backpropagation": fg.recipes.bp(normalised()),
}


@pytest.mark.parametrize("name", RIGHT)
def test_a_right_separation_passes(name):
    estimator = RIGHT[name]
    params, state = estimator.network.init(jax.random.key(4))
    assert checks.leaks(estimator, params, state, problem()[2], shrink=True) == []
    assert checks.mask_is_exact(estimator, params, state, problem()[2])


def test_what_is_refused_is_biased():
    """The measured bias of a patch partition under a global loss, next to the same estimator without patches."""
    error = lambda partition: distance(
        mean(estimates(lambda u: method(mixer(), fg.global_loss(), None, partition, u), hadamard(), problem())),
        gradient("global"),
    )
    assert error(("batch", "patch")) > 1e-2
    assert error(("batch",)) < 1e-12


@pytest.mark.parametrize("seed", [0, 3])
def test_batch_norm_is_found_whatever_the_values(seed):
    """BatchNorm of two examples has hardly any derivative (its output is ±1): the check must not look at two."""
    network, params, state, batch = batch_norm_mlp(seed)
    found = checks.separable(fg.recipes.fg_a(network), params, state, batch)
    assert {(leak.site, leak.axis) for leak in found} == {("layer0/input", "batch")}
    assert found[0].size > 1e-2, "the leak is as large as on the whole batch"


@pytest.mark.parametrize("scale", [1.0, 1e3])
def test_batch_norm_of_large_activations_is_found(scale):
    network = normalised(scale)
    params, state = network.init(jax.random.key(0))
    estimator = method(network, partition=("batch",))
    assert leaks(estimator, params, state, problem(n=8)[2], shrink=False) == {("only/z", "batch")}
    assert leaks(estimator, params, state, problem(n=8)[2]) == {("only/z", "batch")}


@pytest.mark.parametrize("name", ["fg-a", "lg-fg-a", "fg-w", "fdfa", "bp"])
def test_batch_norm_is_refused_where_examples_are_kept_apart_and_nowhere_else(name):
    """FDFA's credit is a prediction: its published networks have BatchNorm everywhere."""
    network, params, state, batch = batch_norm_mlp()
    init = lambda **changes: dataclasses.replace(fg.recipes.find(name)(network), **changes).init(jax.random.key(0), params, state, batch)  # fmt: skip
    if name == "fg-a":
        with pytest.raises(
            fg.InputError, match=rf"^{name} would be biased at 'layer0/input'.*leave 'batch' out.*--allow-bias"
        ):
            init()
        init(allow_bias=True)
    else:
        init()


def test_weights_per_example_on_batch_norm_are_refused():
    network, params, state, batch = batch_norm_mlp()
    estimator = method(network, fg.global_loss(), fg.weights(per_example=True), ("batch",))
    with pytest.raises(fg.InputError, match=r"couples examples.*share the displacement between examples"):
        estimator.init(jax.random.key(0), params, state, batch)


@pytest.mark.parametrize("name", ["patches under a global loss", "two names exchanged"])
def test_checks_work_on_tracers(name):
    """Under `jit` the values are not known: random ones of the same shapes are looked at."""
    estimator, expected, _ = WRONG[name]
    params, state = estimator.network.init(jax.random.key(4))
    found = []

    @jax.jit
    def inside(params, batch):
        found.append(leaks(estimator, params, state, batch))
        with pytest.raises(fg.InputError, match="allow_bias=True"):
            estimator.init(jax.random.key(0), params, state, batch)
        return params

    jax.eval_shape(inside, params, problem()[2])
    assert found[0]
    assert found[0] <= expected
    right = jax.jit(lambda batch: once(RIGHT["lg-fg-a"], params, state, batch).loss)
    jax.eval_shape(right, problem()[2])


def test_the_mask_is_checked_tap_by_tap():
    params, state, batch = problem()
    network = mixer(activation=jax.nn.relu)
    masked = lambda only: method(network, insertion=fg.activations(only=only), guess=fg.masked(fg.rademacher()))
    assert checks.mask_is_exact(masked(["tok", "chan"]), params, state, batch)
    assert not checks.mask_is_exact(masked("grp"), params, state, batch), "a softplus is above"
    with pytest.raises(fg.InputError, match=r"'b0/grp'.*mask=False"):
        masked(None).init(jax.random.key(0), params, state, batch)


@pytest.mark.parametrize("name", ["dfa", "fdfa"])
def test_the_mask_of_a_prediction_is_checked_where_nothing_is_measured(name):
    def init(activation, mask):
        network = MLP(hidden=(4,), activation=activation).network((3, 1, 1), classes=3)
        batch = {"inputs": jax.random.normal(jax.random.key(1), (4, 3, 1, 1)), "labels": jnp.arange(4) % 3}
        fg.recipes.find(name)(network, mask=mask).init(jax.random.key(2), *network.init(jax.random.key(0)), batch)

    init("relu", mask=True)
    init("tanh", mask=False)
    with pytest.raises(fg.InputError, match=rf"^{name}.*'layer0/input'.*a unit that its mask leaves out.*mask=False"):
        init("tanh", mask=True)


@pytest.mark.parametrize(
    ("estimator", "expected"),
    [(method(normalised(), partition=("batch",)), {("only/z", "batch")}), (method(mixer(1)), set())],
    ids=["leaking", "sound"],
)
def test_a_classifier_that_starts_at_zero_hides_no_leak_and_is_none(estimator, expected):
    """No loss has a derivative there, whether it leaks or not: the checks look a little off the given parameters."""
    params, state = estimator.network.init(jax.random.key(4))
    (name,) = params
    params = {name: {**params[name], "readout": jax.tree.map(jnp.zeros_like, params[name]["readout"])}}
    given = params, state, problem()[2]
    grads = jax.jit(lambda: once(fg.recipes.bp(estimator.network), *given).grads)()[name]["layers"]
    assert distance(grads, jax.tree.map(jnp.zeros_like, grads)) == 0
    assert leaks(estimator, *given) == expected


def sliced(mix):
    """A block of `mix` on [batch, slice], where loss cells are slices as well."""
    apply = lambda p, s, h, train: (mix(h * p["w"]), s)
    outputs, loss = lambda p, h: fg.Named(h, ("batch", "slice")), lambda out, batch: fg.Named(out.value**2, out.axes)
    return fg.Network((fg.Block("only", apply, fg.Readout(outputs, loss)),))


@pytest.mark.parametrize("n", [2, 3, 5, 8])
def test_every_pair_of_slices_is_seen(n):
    """Tap "ij" couples slice i to slice j and nothing else; "ii" couples none."""

    def pairs(z):
        numbered = [(i, j, fg.tap(z, f"{i}{j}", "batch slice")) for i in range(n) for j in range(n)]
        return sum(own.at[:, j].add(own[:, i]) for i, j, own in numbered)

    given = {"only": {"layers": {"w": jnp.ones(n)}, "readout": ()}}, {"only": ()}, {"inputs": jnp.ones((2, n))}
    estimator = method(sliced(pairs), partition=("batch", "slice"))
    assert leaks(estimator, *given) == {(f"only/{i}{j}", "slice") for i in range(n) for j in range(n) if i != j}
    for way in (1, -1):
        sums = sliced(lambda z, way=way: jnp.cumsum(fg.tap(z, "z", "batch slice")[:, ::way], 1)[:, ::way])
        with pytest.raises(fg.InputError, match="'only/z': a displacement in one slice along 'slice' changes the loss"):
            method(sums, partition=("batch", "slice")).init(jax.random.key(0), *given)


def test_cells_that_lack_an_axis_are_no_leak():
    """One block's loss has cells per example alone: its slices along the others share them, and the estimate stays unbiased."""
    network = mixer(2)
    coarse = lambda cells: lambda *args: cells(*args).sum_to(("batch",))
    readout = network.blocks[1].readout
    last = network.blocks[1]._replace(readout=readout._replace(loss=coarse(readout.loss)))
    mixed = fg.Network((network.blocks[0], last))
    method = fg.estimator(
        mixed,
        target=fg.local(),
        guess=fg.rademacher(),
        insertion=fg.activations(),
        partition=("batch", "patch", "group"),
    )
    assert checks.separable(method, *problem(2)) == []


def test_a_predictors_mask_beside_an_unmasked_guess_is_no_claim():
    network = mixer(1, activation=jnp.tanh)
    method = fg.estimator(
        network,
        target=fg.local(),
        guess=fg.rademacher(),
        insertion=fg.activations(only="chan"),
        partition=("batch", "patch"),
        predictor=fg.guesses.feedback.direct_feedback(mask=True),
    )
    assert checks.mask_is_exact(method, *problem(1))
