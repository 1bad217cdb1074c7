"""No backpropagation: an identity stands after every tap that tangents may cross and cotangents may not.

The crossings of the reverse pass are recorded while JAX transposes, by the name of the tap; a street can also be closed, and then it raises.
"""

import jax
import jax.numpy as jnp
import pytest
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from toynets import CELLS, FIXED, distance, gradient, loss, mixer, once, problem

import forwardgrad as fg
from forwardgrad import taps
from forwardgrad.guesses import feedback
from forwardgrad.guesses.local import local_gradient

pytestmark = pytest.mark.float64

CROSSED: list[str] = []
CLOSED = "closed:"


def identity(name):
    p = Primitive(name)
    p.def_impl(lambda z, **_: z)
    p.def_abstract_eval(lambda z, **_: z)
    mlir.register_lowering(p, lambda ctx, z, **_: [z])
    batching.defvectorized(p)
    ad.primitive_jvps[p] = lambda primals, tangents, **params: (
        p.bind(*primals, **params),
        tangents[0] if isinstance(tangents[0], ad.Zero) else lane_p.bind(tangents[0], **params),
    )
    return p


street_p, lane_p = identity("one_way_street"), None
lane_p = identity("one_way_lane")  # what tangents pass through


def _backwards(cotangent, z, *, name):
    if name.startswith(CLOSED):
        raise RuntimeError(f"reverse mode crossed {name}")
    CROSSED.append(name)
    return (cotangent,)


ad.primitive_transposes[lane_p] = _backwards


def with_streets(network, closed=False):
    """The network with a street after every tap but the package's passive ones, which stand within a layer."""

    def place(block):
        def apply(p, state, h, train):
            name = lambda tap: (CLOSED if closed else "") + f"{block.name}/{tap}"

            def visit(tap, axes, z):
                if tap.endswith("/linear"):
                    return None, fg.tap(z, tap, axes, passive=True)
                return None, street_p.bind(fg.tap(z, tap, axes), name=name(tap))

            return taps.visited(lambda p, state, h: block.apply(p, state, h, train), visit)(p, state, h)[0]

        return block._replace(apply=apply)

    return fg.Network(tuple(place(block) for block in network.blocks))


def crossed_by(method, case):
    """Names of the taps that the reverse passes of one estimate cross: traced, not computed."""
    CROSSED.clear()
    jax.eval_shape(lambda: once(method, *case).grads)
    return sorted(set(CROSSED))


def crossed(method):
    return crossed_by(method, problem())


ALL = sorted(f"{block}/{tap}" for block in ("b0", "b1") for tap in ("tok", "chan", "grp"))
BACKPROP_FREE = ["fg-w", "fg-a", "lg-fg-w", "lg-fg-a", "wp", "np", "dfa", "dkp", "fdfa", "fg-a-fdfa"]
BACKPROP = ["bp", "lg-bp", "l-bp", "bp-checkpointed", "fa", "l-fa", "lg-fa"]


def test_a_street_is_open_forwards_and_seen_backwards():
    f = lambda closed: lambda x: street_p.bind(jnp.sin(x), name=CLOSED if closed else "here") ** 2
    _, slope = jax.jvp(f(True), (0.3,), (1.0,))
    assert abs(float(slope) - float(jax.grad(lambda x: jnp.sin(x) ** 2)(0.3))) < 1e-15
    CROSSED.clear()
    assert abs(float(jax.grad(f(False))(0.3)) - float(slope)) < 1e-15
    assert CROSSED == ["here"]
    with pytest.raises(RuntimeError, match="reverse mode crossed"):
        jax.grad(f(True))(0.3)


@pytest.mark.parametrize("name", BACKPROP_FREE)
def test_forward_methods_cross_no_street(name):
    assert crossed(fg.recipes.find(name)(with_streets(mixer()))) == []


@pytest.mark.parametrize("name", BACKPROP)
def test_backpropagation_crosses_every_street_and_raises_where_they_are_closed(name):
    assert crossed(fg.recipes.find(name)(with_streets(mixer()))) == ALL
    with pytest.raises(RuntimeError, match="reverse mode crossed"):
        crossed(fg.recipes.find(name)(with_streets(mixer(), closed=True)))


def test_jax_grad_raises_where_a_forward_method_gives_its_estimate():
    closed, (params, state, batch) = with_streets(mixer(), closed=True), problem()

    def by_jax(params):
        h = batch["inputs"]
        for block in closed.blocks:
            h, _ = block.apply(params[block.name]["layers"], (), h, True)
        return block.readout.loss(block.readout.outputs(params["b1"]["readout"], h), batch).value.sum((1, 2)).mean()

    assert abs(float(by_jax(params)) - float(loss(params, batch, "global"))) < 1e-14
    with pytest.raises(RuntimeError, match="reverse mode crossed"):
        jax.grad(by_jax)(params)
    method = lambda network: fg.recipes.lg_fg_a(network, guess=FIXED)
    found, plain = (jax.jit(lambda m=m: once(m, params, state, batch).grads)() for m in map(method, (closed, mixer())))
    assert distance(found, plain) < 1e-14
    assert distance(found["b1"]["readout"], gradient("local")["b1"]["readout"]) < 1e-13


@pytest.mark.parametrize(
    ("insertion", "promised"),
    [
        (fg.activations(only=("tok", "chan")), ["b0/grp", "b1/grp"]),
        (fg.activations(only=("tok", "grp")), ["b0/chan", "b1/chan"]),
        (fg.activations(only="tok"), ["b0/chan", "b0/grp", "b1/chan", "b1/grp"]),
        (fg.activations(only=("chan", "grp")), ["b0/tok", "b1/tok"]),
        (fg.activations(only="b0/*"), ["b1/chan", "b1/grp", "b1/tok"]),
        (fg.weights(only=("tok", "chan")), ["b0/grp", "b1/grp"]),
        (fg.weights(per_example=True), []),
        (fg.activations(shared="batch"), []),
    ],
)
def test_a_site_left_out_costs_its_own_street_and_no_other(insertion, promised):
    """The layer above a tap that is left out is differentiated with it: one layer deeper, exactly there."""
    method = fg.estimator(
        with_streets(mixer()), target=fg.local(), guess=fg.rademacher(), insertion=insertion, partition=CELLS
    )
    assert crossed(method) == promised


def test_parts_cut_at_the_union_of_their_taps():
    parts = tuple(
        fg.Part(fg.rademacher(), insertion, CELLS)
        for insertion in (fg.weights(only="tok", per_example=True), fg.activations(only="chan"))
    )
    assert crossed(fg.Estimator(with_streets(mixer()), fg.local(), parts)) == ["b0/grp", "b1/grp"]
    alone = tuple(fg.Part(fg.rademacher(), fg.activations(only=tap), CELLS) for tap in ("tok", "chan", "grp"))
    assert crossed(fg.Estimator(with_streets(mixer()), fg.local(), alone)) == []


@pytest.mark.parametrize(
    ("predictor", "crosses"),
    [
        (feedback.direct_feedback(), []),
        (feedback.learned_feedback(), []),
        (feedback.kolen_pollack(), []),
        (local_gradient(), ALL),
    ],
)
def test_what_predictors_cross(predictor, crosses):
    """Feedback matrices cross nothing; a local gradient is backpropagation within its block."""
    method = fg.wrappers.with_predictor(fg.recipes.lg_fg_a(with_streets(mixer())), predictor)
    assert crossed(method) == crosses
