"""Variances, exactly: signs by all sign vectors, Gaussians by quadrature (an estimate's square has degree 4 in each coordinate, and the nodes
-√3, 0, √3 with weights 1/6, 2/3, 1/6 have a Gaussian's moments up to degree 5). No Hadamard rows here: they are right for means only.

Ren et al. 2023, Table 1, for one weight matrix [p, q], batches of N drawn from a population, V the variance of an example's gradient and S the
squared mean gradient, both averaged over elements. Given a batch with examples' shares ∇n = ∇W Ln / N and mean gradient ∇ = Σ ∇n:

    weights, shared noise        ĝ = <∇, v> v                        (pq + a)|∇|²
    weights, independent         ĝ = Σ <∇n, vn> vn                   (pq + a) Σ|∇n|²
    activations, shared          ĝ = Σ xn <∇z Ln / N, u> u = ∇ u uᵀ  (q + a)|∇|²
    activations, independent     ĝ = Σ xn <∇z Ln / N, un> un         (q + a) Σ|∇n|²     since |xn ⊗ ∇z Ln| = |xn| |∇z Ln|

with a = 1 for Gaussians, a = -1 for signs (E[u⁴] = 3, 1: only the term i = j changes). Over batches E|∇|² / pq = V / N + S and
E Σ|∇n|² / pq = (V + S) / N, and the mean of ĝ varies by V / N, so that with D = pq or q the element-wise average variance is

    shared: (D + a + 1) V / N + (D + a) S          independent: (D + a + 1) V / N + (D + a) S / N

For a = 1 this is Table 1.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toynets import all_signs, gauss

import forwardgrad as fg

pytestmark = pytest.mark.float64

M, N = 3, 2  # examples in the population and in a batch


def enumeration(kind, size):
    """All directions with their probabilities, and a = E[u⁴] - 2."""
    return (*gauss(size), 1) if kind == "gaussian" else (all_signs(size), np.full(2**size, 2.0**-size), -1)


def layer(w, x, c):
    z = fg.tap(x @ w, "z", "batch unit")
    return (jnp.tanh(z) @ c) ** 2 + (z**2).sum(-1) / 3


@pytest.mark.parametrize("kind", ["gaussian", "signs"])
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "independent"])
@pytest.mark.parametrize("where", ["weights", "activations"])
@pytest.mark.parametrize(("p", "q"), [(2, 2), (3, 1)])
def test_table_1(p, q, where, shared, kind):
    keys = jax.random.split(jax.random.key(0), 3)
    x, w, c = (jax.random.normal(k, s) for k, s in zip(keys, [(M, p), (p, q), (q,)], strict=True))
    shape = ((p, q) if where == "weights" else (q,)) if shared else ((N, p, q) if where == "weights" else (N, q))
    insertion = (
        fg.weights(per_example=not shared) if where == "weights" else fg.activations(shared="batch" if shared else ())
    )
    partition = () if where == "weights" and shared else ("batch",)
    rows, probability, a = enumeration(kind, int(np.prod(shape)))

    def estimate(row, batch):
        table = row.reshape(shape) if where == "weights" else {"z": row.reshape(shape)}
        vg = fg.value_and_grad(
            lambda w, x: layer(w, x, c),
            guess=fg.given(table),
            insertion=insertion,
            partition=partition,
            allow_bias=True,
        )
        return vg(w, batch, key=jax.random.key(0))[1]

    batches = x[np.array(list(itertools.product(range(M), repeat=N)))]  # all, equally likely
    found = jax.jit(jax.vmap(jax.vmap(estimate, (0, None)), (None, 0)))(
        jnp.asarray(rows), batches
    )  # [batch, row, p, q]
    each = jax.vmap(jax.grad(lambda w, x: layer(w, x[None], c)[0]), (None, 0))(w, x)
    s, v = (each.mean(0) ** 2).mean(), each.var(0).mean()
    average = jnp.einsum("r,brpq->bpq", probability, found)
    assert float(jnp.abs(average.mean(0) - each.mean(0)).max()) < 1e-13, "unbiased"
    d = p * q if where == "weights" else q
    variance = jnp.einsum("r,brpq->pq", probability, (found - each.mean(0)) ** 2).mean() / len(batches)
    assert float(variance) == pytest.approx(float((d + a + 1) * v / N + (d + a) * s / (1 if shared else N)), rel=1e-12)


@pytest.mark.parametrize("kind", ["gaussian", "signs"])
@pytest.mark.parametrize(("name", "draws"), [("weights", 1), ("activations", 1), ("activations", 2)])
def test_one_estimate_has_variance_d_plus_or_minus_one(name, draws, kind):
    """Total variance (D ± 1)|∇|² / K with D the units that share a scalar: all weights, or all units of two layers (their biases' gradients
    are their credits)."""
    w = [jax.random.normal(jax.random.key(i), s) for i, s in enumerate([(2, 2), (2, 1)])]
    x = jnp.array([0.3, -1.1])

    def loss(b):
        z = fg.tap(x @ w[0] + b[0], "a", "unit")
        return (fg.tap(jnp.tanh(z) @ w[1] + b[1], "b", "out") ** 2).sum()

    params = [jnp.array([0.2, -0.4]), jnp.array([0.5])]
    rows, probability, a = enumeration(kind, 3 * draws)

    def estimate(row):
        row = row.reshape(draws, 3)
        table = [row[:, :2], row[:, 2:]]
        table = table if name == "weights" else dict(zip("ab", table, strict=True))
        vg = fg.value_and_grad(loss, guess=fg.given(table), insertion=name, draws=draws, allow_bias=True)
        return jnp.concatenate(vg(params, key=jax.random.key(0))[1])

    found = jax.jit(jax.vmap(estimate))(jnp.asarray(rows))
    true = jnp.concatenate(jax.grad(loss)(params))
    variance = jnp.einsum("r,rd->", probability, (found - true) ** 2)
    assert float(jnp.abs(probability @ found - true).max()) < 1e-13
    assert float(variance) == pytest.approx(float((3 + a) * (true**2).sum() / draws), rel=1e-12)


def quadratic(w):
    return (jnp.arange(1.0, 5.0) * w).sum() + (w**3).sum() / 3


def total_variance(guess, draws, samples=4000):
    """Sample mean of |ĝ - ∇|² and its standard error, fixed keys."""
    w = jnp.array([0.5, -1.0, 2.0, 0.1])
    vg = fg.value_and_grad(quadratic, guess=guess, draws=draws, allow_bias=True)
    found = jax.jit(jax.vmap(lambda key: vg(w, key=key)[1]))(jax.random.split(jax.random.key(1), samples))
    true = jax.grad(quadratic)(w)
    squares = ((found - true) ** 2).sum(1)
    return float(squares.mean()), float(squares.std() / samples**0.5), float((true**2).sum())


@pytest.mark.parametrize("draws", [1, 2])
@pytest.mark.parametrize(
    ("guess", "factor"),
    [
        (fg.gaussian, lambda d, k: (d + 1) / k),
        (fg.rademacher, lambda d, k: (d - 1) / k),
        (fg.orthogonal, lambda d, k: d / k - 1),
    ],
)
def test_the_guesses_that_are_drawn_have_the_variance_of_their_docstrings(guess, factor, draws):
    measured, error, squared = total_variance(guess(), draws)
    assert abs(measured - factor(4, draws) * squared) < 4 * error + 1e-12 * squared


@pytest.mark.parametrize("draws", [4, 8])
def test_complete_orthogonal_sets_have_no_variance(draws):
    assert total_variance(fg.orthogonal(), draws, samples=3)[0] < 1e-24


def test_the_projection_on_signs_is_the_gradient_shrunk_by_the_dimension():
    """The documented bias: E[<g, u> u / |u|²] = g / D, and its variance is (1 / D - 1 / D²)|g|², below the unbiased rule's."""
    w = jnp.array([0.5, -1.0, 2.0, 0.1])

    @functools.partial(jax.vmap)
    def estimate(row):
        vg = fg.value_and_grad(quadratic, guess=fg.given(row), rule=fg.rules.projection, allow_bias=True)
        return vg(w, key=jax.random.key(0))[1]

    found, true = jax.jit(estimate)(jnp.asarray(all_signs(4))), jax.grad(quadratic)(w)
    assert float(jnp.abs(found.mean(0) - true / 4).max()) < 1e-14
    assert float(((found - found.mean(0)) ** 2).sum(1).mean()) == pytest.approx(
        float((1 / 4 - 1 / 16) * (true**2).sum())
    )
