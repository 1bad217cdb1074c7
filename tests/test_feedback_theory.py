"""Bacho & Chu (2023) in theory, exactly: two layers y = σ(W x), outputs V y, one example, Gaussian directions by quadrature (see `gauss`).

With δ = ∂L/∂y, one hidden unit i, one input j, and the outputs' Jacobian J = V:

    Proposition 5   FG-W   Var = (∂L/∂w_ij)² + |∂L/∂W|²
    Proposition 6   FG-A   Var = (δ_i² + |δ|²)(∂y_i/∂w_ij)²
    Proposition 2   FDFA   Var = α² (δ_i² + |δ|²)(∂y_i/∂w_ij)² given the B before, after one update; the paper's Eq. 19 leaves out the sum over
                           outputs with the error, δ = e J. The B before varies as well: at rest B's variance is α / (2 - α) times that of
                           a sample, of first order in α.
    Proposition 1          over examples x and directions, Var = Var_x E[g | x] + E_x Var[g | x]
    Table 4                summed over W, relative to |∂L/∂W|², with σ the identity: n1 n0 + 1 (FG-W), n1 + 1 (FG-A), 0 (BP, DFA), and
                           α² (n1 + 1), which goes to 0 with α (FDFA).
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toynets import along, distance, estimates, gauss

import forwardgrad as fg

pytestmark = pytest.mark.float64

CLASSES = 3
ALPHAS = np.array([1.0, 0.3, 0.1, 0.03, 0.01, 0.001])


def network(activation):
    def apply(p, s, x, train):
        return fg.tap(activation(x @ p["kernel"]), "y", "batch unit"), s

    def loss(out, batch):
        return fg.Named(-jax.nn.log_softmax(out.value)[jnp.arange(len(batch["labels"])), batch["labels"]], ("batch",))

    readout = fg.Readout(lambda p, h: fg.Named(h @ p["kernel"], ("batch", "class")), loss)
    return fg.Network((fg.Block("hidden", apply, readout, weights={"kernel": ("in", "unit")}),))


def setting(n0, n1, example=0):
    normal = lambda i, *shape: jax.random.normal(jax.random.fold_in(jax.random.key(7), i), shape)
    params = {"hidden": {"layers": {"kernel": normal(1, n0, n1)}, "readout": {"kernel": normal(2, n1, CLASSES)}}}
    batch = {"inputs": normal(10 + example, 1, n0), "labels": jnp.array([example % CLASSES])}
    return params, {"hidden": ()}, batch


class Truth:
    """By hand, for one example: ∂L/∂W [n0, n1], δ [n1], ∂y_i/∂w_ij [n0, n1]."""

    def __init__(self, activation, params, batch):
        w, v = params["hidden"]["layers"]["kernel"], params["hidden"]["readout"]["kernel"]
        (x,), (label,) = batch["inputs"], batch["labels"]
        loss = lambda y: -jax.nn.log_softmax(y @ v)[label]
        self.w = jax.grad(lambda w: loss(activation(x @ w)))(w)
        self.delta = jax.grad(loss)(activation(x @ w))
        self.local = x[:, None] * jax.vmap(jax.grad(activation))(x @ w)
        self.fg_w = self.w**2 + (self.w**2).sum()  # Proposition 5
        self.fg_a = (self.delta**2 + (self.delta**2).sum()) * self.local**2  # Proposition 6


def kernels(grads):
    return grads["hidden"]["layers"]["kernel"]


def moments(values, probability):
    """Mean and variance over the first axis."""
    mean = jnp.tensordot(probability, values, 1)
    return mean, jnp.tensordot(probability, (values - mean) ** 2, 1)


def measured(method, activation, case):
    """Mean and variance of the estimates of W, over all directions."""
    params = case[0]
    n0, n1 = kernels(params).shape
    rows, probability = gauss(n0 * n1 if method == "fg-w" else n1)
    build = lambda guess: fg.recipes.find(method)(network(activation), guess=guess)
    return moments(kernels(estimates(build, rows, case)), probability)


@pytest.mark.parametrize("method", ["fg-w", "fg-a"])
def test_propositions_1_5_and_6(method):
    """Three examples, equally likely."""
    cases = [setting(2, 3, example) for example in range(3)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *(case[2] for case in cases))
    means, variances = jax.vmap(lambda batch: measured(method, jnp.tanh, (*cases[0][:2], batch)))(stacked)
    truths = [Truth(jnp.tanh, cases[0][0], case[2]) for case in cases]
    each = jnp.stack([truth.w for truth in truths])
    predicted = jnp.stack([getattr(truth, method.replace("-", "_")) for truth in truths])
    assert distance(means, each) < 1e-13
    assert distance(variances, predicted) < 1e-12
    both = (variances + (means - means.mean(0)) ** 2).mean(0)  # over examples and directions at once
    assert distance(both, each.var(0) + predicted.mean(0)) < 1e-12


def updates(n0, n1, activation):
    """`step(alpha, b, row)`: B after one update of Eq. 8 along a direction, and the estimate of W by the B before; all directions; the setting."""
    params, state, batch = setting(n0, n1)

    def method(alpha, row):
        return fg.recipes.fdfa(network(activation), guess=along(row), rule="average", alpha=alpha, mask=False)

    def holding(alpha, row, b):
        start = method(alpha, row).initial_state(jax.random.key(0), params, state, batch)
        return jax.tree.map(lambda old: b.astype(old.dtype), start)

    def step(alpha, b, row):
        found, new, _ = method(alpha, row).estimate(jax.random.key(0), holding(alpha, row, b), params, state, batch)
        return new[0]["global"]["predictor"].matrices["hidden/y"].value, kernels(found.grads)

    rows, probability = gauss(n1)
    return step, jnp.asarray(rows), jnp.asarray(probability), (params, state, batch)


def jacobian(params):
    return params["hidden"]["readout"]["kernel"].T  # the outputs are linear: Eq. 13


def test_proposition_2_and_the_fixed_point():
    """From any B: the mean moves to the Jacobian, which is the fixed point, and the variance is α² times that of a sample, with slope 2."""
    step, rows, probability, (params, _, batch) = updates(2, 3, jnp.tanh)
    j, truth = jacobian(params), Truth(jnp.tanh, params, batch)
    b = jax.random.normal(jax.random.key(3), j.shape)

    @jax.jit
    @functools.partial(jax.vmap, in_axes=(0, None))
    def over_rows(alpha, b):
        new = jax.vmap(lambda row: step(alpha, b, row)[0])(rows)
        credited = jax.vmap(lambda b, row: step(alpha, b, row)[1])(new, rows)  # the next step's estimate: e B
        return *moments(new, probability), moments(credited, probability)[1]

    for start in (j, b):
        mean, variance, of_gradient = over_rows(ALPHAS, start)
        weights = ALPHAS[:, None, None]
        assert distance(mean, (1 - weights) * start + weights * j) < 1e-12
        sample = j**2 + (j**2).sum(1, keepdims=True)  # Lemma 4, with d_o = <J_o, u>
        assert distance(variance, weights**2 * sample) < 1e-12
        assert distance(of_gradient, weights**2 * truth.fg_a) < 1e-12
        slope = np.polyfit(np.log(ALPHAS), np.log(of_gradient.sum((1, 2))), 1)[0]
        assert abs(slope - 2) < 1e-9


def test_the_variance_at_rest_is_alpha_over_two_minus_alpha():
    """Matrices before that vary by this much vary by this much after, over all pairs of the past and the new direction."""
    step, rows, probability, (params, _, _) = updates(2, 2, jnp.tanh)
    j = jacobian(params)
    samples = jax.jit(jax.vmap(lambda row: step(1.0, j, row)[0]))(rows)
    sample = moments(samples, probability)[1]

    @jax.jit
    @jax.vmap
    def after(alpha):
        before = j + (alpha / (2 - alpha)) ** 0.5 * (samples - j)
        new = jax.vmap(lambda b: jax.vmap(lambda row: step(alpha, b, row)[0])(rows))(before)
        return moments(new.reshape(-1, *j.shape), jnp.outer(probability, probability).ravel())

    mean, variance = after(ALPHAS)
    assert distance(mean, jnp.broadcast_to(j, mean.shape)) < 1e-12
    assert distance(variance, (ALPHAS / (2 - ALPHAS))[:, None, None] * sample) < 1e-12


@pytest.mark.parametrize(("n0", "n1"), [(1, 2), (2, 3)])
def test_table_4(n0, n1):
    linear = lambda z: z
    case = setting(n0, n1)
    squared = (Truth(linear, case[0], case[2]).w ** 2).sum()
    relative = {method: measured(method, linear, case)[1].sum() / squared for method in ("fg-w", "fg-a")}
    assert float(relative["fg-w"]) == pytest.approx(n1 * n0 + 1, rel=1e-12)
    assert float(relative["fg-a"]) == pytest.approx(n1 + 1, rel=1e-12)

    step, rows, probability, (params, _, _) = updates(n0, n1, linear)
    new = lambda alpha: jax.vmap(lambda row: step(alpha, jacobian(params), row)[0])(rows)
    credited = lambda alpha: jax.vmap(lambda b, row: step(alpha, b, row)[1])(new(alpha), rows)
    variance = jax.jit(jax.vmap(lambda alpha: moments(credited(alpha), probability)[1].sum()))(ALPHAS)
    assert distance(variance / squared, ALPHAS**2 * (n1 + 1)) < 1e-12


def test_table_4_where_it_says_zero():
    """Backpropagation and fixed feedback draw nothing in a step: whatever the key, the same estimate."""
    params, state, batch = setting(2, 3)
    for recipe in (fg.recipes.bp, lambda network: fg.recipes.dfa(network, mask=False)):
        method = recipe(network(jnp.tanh))
        start = method.initial_state(jax.random.key(0), params, state, batch)
        run = jax.jit(lambda key, m=method, s=start: m.estimate(key, s, params, state, batch)[0].grads)
        assert distance(run(jax.random.key(1)), run(jax.random.key(2))) == 0
