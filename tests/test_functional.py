"""`value_and_grad` on plain JAX functions: exact against jax.grad by enumeration, however the function is written."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toynets import CELLS, FIXED, all_signs, along, distance, hadamard, mean

import forwardgrad as fg
from forwardgrad.named import Named

pytestmark = pytest.mark.float64

N = 4


def arrays():
    keys = jax.random.split(jax.random.key(0), 5)
    shapes = (3, 3), (3,), (3, 2), (N, 3), (N,)
    w1, b, w2, x, y = (jax.random.normal(k, s) for k, s in zip(keys, shapes, strict=True))
    return {"first": (w1, b), "second": w2}, x, y


def example(params, x, y):
    """One example's loss: a tap in each layer and an exact last layer above them."""
    (w1, b), w2 = params["first"], params["second"]
    z = fg.tap(x @ w1 + b, "z", "unit")
    return jnp.sum(jnp.tanh(fg.tap(jnp.tanh(z), "h", "hidden")) @ w2) ** 2 + y * z.sum()


def whole(params, x, y):
    (w1, b), w2 = params["first"], params["second"]
    z = fg.tap(x @ w1 + b, "z", "batch unit")
    h = fg.tap(jnp.tanh(z), "h", "batch hidden")
    return jnp.sum(jnp.tanh(h) @ w2, -1) ** 2 + y * z.sum(-1)


mapped = lambda **options: lambda params, *args: jax.vmap(example, (None, 0, 0), **options)(params, *args)
SPELLINGS = {
    "batched": whole,
    "vmap, named": mapped(axis_name="batch"),
    "vmap of jit": lambda p, *args: jax.vmap(jax.jit(example), (None, 0, 0), axis_name="batch")(p, *args),
    "remat": jax.checkpoint(whole),
    "mean": lambda *args: whole(*args).mean(),
    "vmap, unnamed, mean": lambda *args: mapped()(*args).mean(),
    "Named": lambda *args: Named(jnp.outer(whole(*args), jnp.array([0.3, 0.7])), ("batch", "half")),
}


def true(params, x, y):
    return jax.jit(jax.value_and_grad(lambda p: whole(p, x, y).mean()))(params)


def estimates(loss, rows, args, **options):
    run = lambda row: fg.value_and_grad(loss, guess=along(row), allow_bias=True, **options)(
        *args, key=jax.random.key(0)
    )
    return jax.jit(jax.vmap(run))(jnp.asarray(rows))


@pytest.mark.parametrize("insertion", ["weights", "activations"])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_is_unbiased(spelling, insertion):
    value, grads = estimates(SPELLINGS[spelling], hadamard(32), arrays(), insertion=insertion)
    expected_value, expected = true(*arrays())
    assert distance(value, jnp.full(32, expected_value)) < 1e-13
    assert distance(mean(grads), expected) < 1e-13
    last = grads["second"]
    if insertion == "activations":
        assert distance(last, jnp.broadcast_to(expected["second"], last.shape)) < 1e-13, "exact above the taps"


def test_one_loss_per_example_has_less_variance_than_their_mean():
    """Same function, same signs: with losses and taps per example each is credited with its own."""
    signs = jax.random.rademacher(jax.random.key(3), (500, 2 * N * 3), float)
    spread = lambda name: (
        estimates(SPELLINGS[name], signs, arrays(), insertion="activations")[1]["first"][0].var(0).sum()
    )
    assert float(spread("batched")) < 0.5 * float(spread("mean"))


@pytest.mark.parametrize(
    "options",
    [
        {"insertion": fg.weights(per_example=True), "partition": ("batch",)},
        {"insertion": fg.activations(only="z")},
        {"insertion": fg.activations(shared="batch")},
        {"insertion": "activations", "partition": ()},
        {"insertion": "weights", "predictor": fg.Guess(lambda k, s, view: {n: Named(jnp.full(i.shape, 0.3), i.axes) for n, i in view.sites.items()})},
    ],
    ids=["per example", "only", "shared", "no partition", "predictor"],
)  # fmt: skip
def test_options_are_the_estimator_s(options):
    _, grads = estimates(whole, hadamard(128), arrays(), **options)
    assert distance(mean(grads), true(*arrays())[1]) < 1e-12


def test_arguments_that_are_no_examples_are_refused_where_examples_run_one_at_a_time():
    params, x, y = arrays()
    loss = lambda p, x, y, scale: scale * whole(p, x, y)
    insertion = fg.weights(per_example=True)
    estimate = fg.value_and_grad(loss, guess=fg.rademacher(), insertion=insertion, partition=("batch",))
    with pytest.raises(fg.InputError, match="close over"):
        estimate(params, x, y, jnp.array(2.0), key=jax.random.key(0))


@pytest.mark.parametrize("insertion", ["weights", "activations"])
def test_a_loss_may_close_over_values_of_an_outer_jit(insertion):
    params, x, y = arrays()

    @jax.jit
    def step(params, scale, key):
        loss = lambda p, x: scale * whole(p, x, y)
        return fg.value_and_grad(loss, guess=fg.rademacher(), insertion=insertion)(params, x, key=key)

    value, grads = step(params, 2.0, jax.random.key(0))
    assert abs(float(value) - 2 * float(true(*arrays())[0])) < 1e-13
    assert jax.tree.structure(grads) == jax.tree.structure(params)


def test_it_is_checked_once_and_compiles_once():
    calls = []

    def loss(*args):
        calls.append(1)
        return whole(*args)

    step = jax.jit(fg.value_and_grad(loss, guess=fg.gaussian(), insertion="activations"))
    first = step(*arrays(), key=jax.random.key(0))
    traces = len(calls)
    again, other = step(*arrays(), key=jax.random.key(0)), step(*arrays(), key=jax.random.key(1))
    assert step._cache_size() == 1
    assert len(calls) == traces
    assert distance(first, again) == 0
    assert distance(first[1], other[1]) > 1e-3
    keys = jnp.stack([jax.random.key(0), jax.random.key(1)])
    mapped = jax.jit(jax.vmap(lambda key: step(*arrays(), key=key)))(keys)
    assert distance(mapped, jax.tree.map(lambda *x: jnp.stack(x), first, other)) < 1e-13


def test_scalar_params_and_single_arrays():
    for w in (jnp.array(0.7), jnp.array([0.7, -0.2])):
        rows = jnp.asarray(all_signs(w.size))
        _, grads = estimates(lambda w: jnp.sin(w).sum(), rows, (w,), insertion="weights")
        assert distance(mean(grads), jnp.cos(w)) < 1e-14


def test_more_draws_average():
    u = jnp.asarray(np.random.default_rng(0).normal(size=(3, 3, 2)))
    loss = lambda w: (w**3).sum()
    run = lambda table, draws: fg.value_and_grad(loss, guess=fg.given(table), draws=draws)(W, key=jax.random.key(0))[1]
    W = jnp.arange(6.0).reshape(3, 2)
    assert distance(run(u, 3), mean(jnp.stack([run(each, 1) for each in u]))) < 1e-12


def test_a_loss_that_couples_examples_is_refused_also_under_jit():
    params, x, y = arrays()

    def coupled(p, x, y):
        h = fg.tap(x @ p["first"][0], "z", "batch unit")
        return ((h - h.mean(0)) ** 2).sum(-1)

    vg = lambda **options: fg.value_and_grad(coupled, guess=fg.rademacher(), insertion="activations", **options)
    for wrap in (lambda f: f, jax.jit):
        with pytest.raises(
            fg.InputError, match=r"'z'.*in one example changes the loss of others.*leave 'batch' out of the partition"
        ):
            wrap(vg())(params, x, y, key=jax.random.key(0))
    jax.eval_shape(vg(allow_bias=True), params, x, y, key=jax.random.key(0))
    rows, expected = hadamard(16), jax.grad(lambda p: coupled(p, x, y).mean())(params)
    _, grads = estimates(coupled, rows, (params, x, y), insertion="activations", partition=())
    assert distance(mean(grads), expected) < 1e-13
    _, grads = estimates(coupled, rows, (params, x, y), insertion="activations")
    assert distance(mean(grads), expected) > 1e-2, "what is refused is biased"
    jax.eval_shape(vg(partition=()), params, x, y, key=jax.random.key(0))
    with pytest.raises(fg.InputError, match="share the displacement between examples"):
        fg.value_and_grad(coupled, guess=FIXED, insertion=fg.weights(per_example=True), partition=CELLS)(
            params, x, y, key=jax.random.key(0)
        )


@pytest.mark.parametrize(
    ("options", "loss", "remedy"),
    [
        ({"insertion": "wieghts"}, whole, "use 'weights', 'activations' or an Insertion"),
        ({}, lambda p, x, y: whole(p, x, y)[:, None], "return a scalar, one loss per example, or a forwardgrad.Named"),
        ({"probe": fg.finite_difference()}, SPELLINGS["Named"], "use the jvp probe"),
        ({"insertion": "activations"}, lambda p, x, y: (x @ p["first"][0]).sum(-1), "mark activations with forwardgrad.tap"),
        ({"insertion": fg.activations(only="zz")}, whole, "did you mean 'z'"),
        ({"insertion": fg.weights(per_example=True)}, SPELLINGS["mean"], "names axis 'batch', which neither the site nor the loss has"),
        ({"draws": 0}, whole, "at least one draw"),
    ],
)  # fmt: skip
def test_what_cannot_be_estimated_is_refused(options, loss, remedy):
    estimate = lambda: fg.value_and_grad(loss, guess=fg.rademacher(), **options)(*arrays(), key=jax.random.key(0))
    with pytest.raises(fg.InputError, match=remedy):
        estimate()
