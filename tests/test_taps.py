"""Taps: the four visitors under every wrapping, and where a tap must be refused."""

import functools

import jax
import jax.numpy as jnp
import pytest
from toynets import distance

from forwardgrad import InputError, Named, tap, taps

pytestmark = pytest.mark.float64


def two_layers(p, x, mark=tap):
    z = mark(x @ p["a"], "a", "batch unit")
    return jnp.tanh(mark(jnp.tanh(z) @ p["b"], "b", "batch out")).sum(-1)


def inputs():
    keys = jax.random.split(jax.random.key(0), 3)
    p = {"a": jax.random.normal(keys[0], (3, 4)), "b": jax.random.normal(keys[1], (4, 2))}
    return p, jax.random.normal(keys[2], (5, 3))


# name: a rewriting of two_layers that means the same; the taps stay reachable
WRAPPINGS = {
    "plain": lambda f: f,
    "jit": jax.jit,
    "nested jit": lambda f: jax.jit(lambda p, x: jax.jit(f)(p, 1.0 * x)),
    "remat": jax.checkpoint,
    "jit in remat in jit": lambda f: jax.jit(jax.checkpoint(jax.jit(f))),
    "remat with a policy": functools.partial(jax.checkpoint, policy=jax.checkpoint_policies.dots_saveable),
    "vmap named": lambda f: lambda p, x: jax.vmap(lambda one: f(p, one[None])[0], axis_name="example")(x),
    "vmap last axis": lambda f: lambda p, x: jax.vmap(lambda one: f(p, one[None])[0], in_axes=1, axis_name="e")(x.T),
    "vmap in_axes=-1": lambda f: lambda p, x: jax.vmap(lambda one: f(p, one[None])[0], in_axes=-1)(x.T),
    "nested vmap": lambda f: lambda p, x: jax.vmap(jax.vmap(lambda one: f(p, one[None])[0]), in_axes=1)(x[:, None])[0],
    "vmap over jit": lambda f: lambda p, x: jax.vmap(lambda one: jax.jit(f)(p, one[None])[0])(x),
}


@pytest.fixture(params=WRAPPINGS, scope="module")
def wrapped(request):
    return WRAPPINGS[request.param](two_layers)


def by_name(f):
    """Axes and values that the taps of f record."""
    return taps.visited(f, taps.record)(*inputs())[1]


def flattened(z, size):
    return jnp.asarray(z).reshape(-1, size)


def test_record_sees_the_activations_and_changes_nothing(wrapped):
    p, x = inputs()
    out, seen = taps.visited(wrapped, taps.record)(p, x)
    assert jnp.allclose(out, two_layers(p, x), atol=1e-14)
    assert jnp.allclose(flattened(seen["a"].value, 4), x @ p["a"], atol=1e-14)
    assert jnp.allclose(flattened(seen["b"].value, 2), jnp.tanh(x @ p["a"]) @ p["b"], atol=1e-14)
    assert all(len(z.axes) == z.value.ndim for z in seen.values())


def test_displacement_has_the_derivative_of_an_added_input(wrapped):
    p, x = inputs()
    shift = jax.random.normal(jax.random.key(4), (5, 4))
    seen = by_name(wrapped)["a"]
    eps = lambda s: {"a": Named(s.reshape(seen.value.shape), seen.axes)}
    value, slope = jax.jvp(lambda s: taps.visited(wrapped, taps.displace(eps(s)))(p, x)[0], (shift,), (shift,))
    by_hand = lambda s: two_layers(p, x, lambda z, name, axes: z + s if name == "a" else z)
    expected = jax.jvp(by_hand, (shift,), (shift,))
    assert distance((value, slope), expected) < 1e-13


def test_a_cut_stops_the_gradient_below_and_records_it(wrapped):
    p, x = inputs()
    cut = jax.grad(lambda p: taps.visited(wrapped, taps.cut(["a"]))(p, x)[0].sum())(p)
    true = jax.grad(lambda p: two_layers(p, x).sum())(p)
    assert float(jnp.abs(cut["a"]).max()) == 0
    assert distance(cut["b"], true["b"]) < 1e-13
    through = jax.grad(lambda p: (taps.visited(wrapped, taps.cut(["a"]))(p, x)[1]["a"].value ** 2).sum())(p)
    assert distance(through["a"], 2 * x.T @ x @ p["a"]) < 1e-12


def test_replay_of_the_forward_weights_is_backpropagation(wrapped):
    p, x = inputs()
    stored = by_name(wrapped)
    replayed = jax.grad(lambda p: taps.visited(wrapped, taps.replay(stored))(p, x)[0].sum())(p)
    assert distance(replayed, jax.grad(lambda p: two_layers(p, x).sum())(p)) < 1e-13


def test_replay_of_other_weights_is_feedback_alignment(wrapped):
    p, x = inputs()
    feedback = jax.random.normal(jax.random.key(5), p["b"].shape)
    stored = by_name(wrapped)
    run = lambda p: taps.visited(wrapped, taps.replay(stored))(p, x)[0]
    assert jnp.allclose(run({**p, "b": feedback}), two_layers(p, x), atol=1e-14), "values are the stored ones"
    got = jax.grad(lambda a: run({"a": a, "b": feedback}).sum())(p["a"])
    z = x @ p["a"]
    delta = (1 - jnp.tanh(jnp.tanh(z) @ p["b"]) ** 2) @ feedback.T * (1 - jnp.tanh(z) ** 2)
    assert distance(got, x.T @ delta) < 1e-13


def test_gradients_pass_a_tap_and_a_tap_under_grad_is_visited(wrapped):
    p, x = inputs()
    slope = jax.grad(lambda p, x: wrapped(p, x).sum())
    assert distance(slope(p, x), jax.grad(lambda p: two_layers(p, x).sum())(p)) < 1e-13
    if "remat" in str(jax.make_jaxpr(slope)(p, x)):
        return  # the recomputation holds a second copy: see test_a_tap_that_remat_computes_twice_is_refused
    out, seen = taps.visited(slope, taps.record)(p, x)
    assert distance(out, slope(p, x)) < 1e-13
    assert jnp.allclose(flattened(seen["a"].value, 4), x @ p["a"], atol=1e-14)
    moved = taps.visited(slope, taps.displace({"b": Named(jnp.ones_like(seen["b"].value), seen["b"].axes)}))(p, x)[0]
    by_hand = jax.grad(lambda p: two_layers(p, x, lambda z, name, axes: z + (name == "b")).sum())(p)
    assert distance(moved, by_hand) < 1e-13


def test_a_tap_that_remat_computes_twice_is_refused():
    p, x = inputs()
    slope = jax.grad(lambda p, x: jax.checkpoint(two_layers)(p, x).sum())
    with pytest.raises(InputError, match="checkpoint"):
        taps.visited(slope, taps.record)(p, x)


def test_mapped_axes_come_first_whatever_the_layout():
    w, x = jnp.ones((3, 3)), jnp.ones((4, 3))
    for spelling in (lambda h: tap(w @ h, "z", "unit").sum(), lambda h: tap(h @ w.T, "z", "unit").sum()):
        for f, args in (
            (jax.vmap(spelling, axis_name="batch"), x),
            (jax.vmap(spelling, in_axes=1, axis_name="batch"), x.T),
            (jax.vmap(spelling, in_axes=-1, axis_name="batch"), x.T),
        ):
            seen = taps.visited(f, taps.record)(args)[1]["z"]
            assert (seen.axes, seen.value.shape) == (("batch", "unit"), (4, 3))
    nested = jax.vmap(jax.vmap(lambda h: tap(h, "z", "unit"), axis_name="inner"), in_axes=1, axis_name="outer")
    assert taps.visited(nested, taps.record)(jnp.ones((2, 5, 3)))[1]["z"].axes == ("outer", "inner", "unit")
    unnamed = jax.vmap(jax.vmap(lambda h: tap(h, "z", "unit")))
    axes = taps.visited(unnamed, taps.record)(jnp.ones((2, 5, 3)))[1]["z"].axes
    assert len(set(axes)) == 3
    assert axes[-1] == "unit"
    unmapped = lambda h: jax.vmap(lambda y: tap(h, "z", "unit") + y)(jnp.ones((7, 3)))
    assert taps.visited(unmapped, taps.record)(jnp.ones(3))[1]["z"].axes == ("unit",)


@pytest.mark.parametrize("wrap", [jax.jit, jax.checkpoint, lambda f: jax.jit(jax.checkpoint(jax.jit(f)))])
def test_constants_of_an_inner_function_are_kept(wrap):
    table = jnp.arange(6.0).reshape(3, 2)
    f = wrap(lambda x: tap(x @ table, "z", "unit").sum())
    assert float(taps.visited(f, taps.record)(jnp.ones(3))[0]) == float(table.sum())


def test_an_axis_that_the_displacement_lacks_is_shared():
    p, x = inputs()
    shift = jnp.arange(4.0)
    out, _ = taps.visited(two_layers, taps.displace({"a": Named(shift, ("unit",))}))(p, x)
    assert distance(out, two_layers(p, x, lambda z, name, axes: z + shift if name == "a" else z)) < 1e-14


def test_records_come_out_of_second_derivatives_once():
    p, x = inputs()
    second = jax.jacfwd(jax.grad(lambda a: two_layers({**p, "a": a}, x).sum()))
    out, seen = jax.jit(taps.visited(second, taps.record))(p["a"])
    assert jnp.allclose(out, jax.jit(second)(p["a"]))
    assert set(seen) == {"a", "b"}
    assert seen["a"].value.shape == (5, 4)


@jax.custom_jvp
def with_rule(x):
    return tap(x, "z", "unit")


with_rule.defjvp(lambda primals, tangents: (with_rule(*primals), tangents[0]))


@jax.custom_vjp
def with_reverse_rule(x):
    return tap(x, "z", "unit")


with_reverse_rule.defvjp(lambda x: (with_reverse_rule(x), None), lambda _, ct: (ct,))
marked = lambda x: tap(x, "z", "unit")

UNREACHABLE = {
    "scan": lambda x: jax.lax.scan(lambda c, _: (marked(c), None), x, length=2)[0],
    "while": lambda x: jax.lax.while_loop(lambda c: c.sum() < 9, lambda c: marked(c) + 1, x),
    "cond": lambda x: jax.lax.cond(x.sum() > 0, marked, lambda y: y, x),
    "custom_jvp": with_rule,
    "custom_vjp": with_reverse_rule,
    "jit in scan": lambda x: jax.lax.scan(lambda c, _: (jax.jit(marked)(c), None), x, length=2)[0],
    "scan in jit": jax.jit(lambda x: jax.lax.scan(lambda c, _: (marked(c), None), x, length=2)[0]),
}


@pytest.mark.parametrize("where", UNREACHABLE)
def test_a_tap_that_cannot_be_visited_is_refused(where):
    inside = next(word for word in ("scan", "while", "cond", "custom_jvp", "custom_vjp") if word in where)
    with pytest.raises(
        InputError, match=f"inside `{inside}.*move it out, unroll the loop, or give the network as blocks"
    ):
        taps.visited(UNREACHABLE[where], taps.record)(jnp.ones(3))


@pytest.mark.parametrize(
    ("function", "remedy"),
    [
        (lambda x: tap(tap(x, "z", "unit"), "z", "unit"), "two taps are called 'z': give each tap of a block its own"),
        (lambda x: jax.jit(marked)(jax.jit(marked)(x)), "two taps are called 'z': give each tap of a block its own"),
        (lambda x: tap(x, "z", "batch unit"), "names 2 axes .batch unit. but the array has rank 1.*every axis once"),
        (lambda x: tap(x[None], "z", "unit unit"), "'z' names an axis twice in 'unit unit': give each axis its own"),
        (
            lambda x: jax.vmap(lambda y: tap(y[None], "z", "unit"), axis_name="unit")(x),
            "under vmap names an axis twice",
        ),
    ],
)
def test_a_tap_with_wrong_names_is_refused(function, remedy):
    with pytest.raises(InputError, match=remedy):
        taps.visited(function, taps.record)(jnp.ones(3))
