"""Cross-entropy and its replicated form: fused against the definition, cells against the plain loss; normalisation against autodiff."""

import jax
import jax.numpy as jnp
import pytest
from toynets import distance

from forwardgrad import Named
from forwardgrad.losses.cross_entropy import (
    cross_entropy,
    naive_replicated_cross_entropy,
    replicated_cross_entropy,
)
from forwardgrad.models import heads
from forwardgrad.normalise import EPSILON, normalise

pytestmark = pytest.mark.float64

SIZES = [(1, 1, 1, 1, 2), (3, 2, 2, 4, 5), (4, 1, 3, 2, 3), (2, 4, 1, 3, 10), (5, 3, 4, 1, 2)]  # N, P, G, D, K


def arrays(sizes, seed):
    n, p, g, d, k = sizes
    shapes = (n, p, g, d), (g * d, k), (k,)
    keys = jax.random.split(jax.random.key(seed), 3)
    return tuple(jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True))


def labels(sizes):
    return jax.random.randint(jax.random.key(9), (sizes[0],), 0, sizes[-1])


@pytest.fixture(params=SIZES, ids=str, scope="module")
def both(request):
    """Values, tangents in every argument, and pullbacks of unequal cotangents: of the fused form and of the definition."""
    sizes, y = request.param, labels(request.param)
    cotangent = jax.random.normal(jax.random.key(4), sizes[:3])

    @jax.jit
    def run(primals, tangents):
        out = []
        for f in (replicated_cross_entropy, naive_replicated_cross_entropy):
            g = lambda *a, f=f: f(*a, y)
            one_by_one = [
                jax.jvp(g, primals, tuple(t if i == j else jnp.zeros_like(t) for j, t in enumerate(tangents)))[1]
                for i in range(3)
            ]
            out.append((*jax.jvp(g, primals, tangents), one_by_one, jax.vjp(g, *primals)[1](cotangent)))
        return out

    with jax.enable_x64(True):
        return sizes, run(arrays(sizes, 0), arrays(sizes, 1))


@pytest.mark.parametrize("part", range(4), ids=["value", "tangent", "tangent in one argument", "pullback"])
def test_fused_is_naive(both, part):
    _, (fused, naive) = both
    assert distance(fused[part], naive[part]) < 1e-12


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_cells_sum_to_the_loss_of_the_mean_features(sizes):
    """Value, and gradient in features, weights and bias."""
    args, y = arrays(sizes, 0), labels(sizes)

    def plain(x, kernel, bias):
        logits = x.mean(1).reshape(sizes[0], -1) @ kernel + bias
        return -jax.nn.log_softmax(logits)[jnp.arange(sizes[0]), y].sum()

    both = jax.jit(lambda f, *a: jax.value_and_grad(f, (0, 1, 2))(*a), static_argnums=0)
    fused = both(lambda *a: replicated_cross_entropy(*a, y).sum(), *args)
    assert distance(fused, both(plain, *args)) < 1e-12
    cells = replicated_cross_entropy(*args, y)
    assert cells.shape == sizes[:3]
    assert distance(cells, jnp.broadcast_to(cells[:, :1, :1], cells.shape)) == 0, "every copy has the same value"


def test_a_cell_feels_its_own_features_only():
    sizes = SIZES[1]
    x, kernel, bias = arrays(sizes, 0)
    jacobian = jax.jacfwd(lambda x: replicated_cross_entropy(x, kernel, bias, labels(sizes)))(x)
    for n in range(3):
        for p in range(2):
            for g in range(2):
                other = jacobian[n, p, g].at[n, p, g].set(0)
                assert float(jnp.abs(other).max()) == 0
                assert float(jnp.abs(jacobian[n, p, g, n, p, g]).max()) > 1e-3


def test_the_replicated_head_is_its_plain_readout():
    """The cells' sum over patches and groups is the loss of the outputs, in value and gradient; they normalise each group."""
    readout = heads.replicated(4, 3, jax.nn.initializers.normal(1.0))
    params, h = readout.init(jax.random.key(0)), jax.random.normal(jax.random.key(1), (3, 5, 2, 2))
    batch = {"labels": jnp.array([0, 2, 1])}
    through_cells = lambda params, h: readout.cells(params, h, batch).value.sum()
    through_outputs = lambda params, h: readout.loss(readout.outputs(params, h), batch).value.sum()
    run = lambda f: jax.jit(jax.value_and_grad(f, (0, 1)))(params, h)
    assert distance(run(through_cells), run(through_outputs)) < 1e-12
    assert readout.cells(params, h, batch).axes == ("batch", "patch", "group")


def test_plain_cross_entropy():
    logits = 30 * jax.random.normal(jax.random.key(0), (4, 3))
    y = jnp.array([0, 2, 1, 1], jnp.uint8)
    expected = -jax.nn.log_softmax(logits)[jnp.arange(4), y]
    found = cross_entropy(Named(logits, ("batch", "class")), {"labels": y})
    assert found.axes == ("batch",)
    assert distance(found.value, expected) < 1e-13
    assert distance(cross_entropy(Named(logits.T, ("class", "batch")), {"labels": y}).value, expected) < 1e-13
    assert jnp.isfinite(cross_entropy(Named(1e4 * logits, ("batch", "class")), {"labels": y}).value).all()


@pytest.mark.parametrize("axes", [(-1,), (1, 2), (0, 1, 2)], ids=str)
@pytest.mark.parametrize("offset", [0.0, 10.0])
def test_normalisation_has_the_derivatives_of_its_formula(axes, offset):
    def plain(x):
        centred = x - x.mean(axes, keepdims=True)
        return centred / jnp.sqrt((centred**2).mean(axes, keepdims=True) + EPSILON)

    x, v, ct = (jax.random.normal(jax.random.key(i), (3, 4, 5)) for i in range(3))
    run = jax.jit(
        lambda f, x: (
            jax.jvp(f, (x,), (v,)),
            jax.vjp(f, x)[1](ct),
            jax.jvp(jax.grad(lambda x: (ct * f(x)).sum()), (x,), (v,))[1],
        ),
        static_argnums=0,
    )  # value, jvp, vjp and second derivative
    assert distance(run(lambda x: normalise(x, axes), x + offset), run(plain, x + offset)) < 1e-10


def test_normalisation_of_a_constant_is_zero_and_finite():
    value, tangent = jax.jvp(normalise, (jnp.full((2, 3), 7.0),), (jnp.ones((2, 3)),))
    assert distance((value, tangent), (jnp.zeros((2, 3)), jnp.zeros((2, 3)))) < 1e-10
