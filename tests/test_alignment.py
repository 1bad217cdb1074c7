"""Angle, bias and variance of estimates: every quantity against its definition by complete enumeration, in double precision."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toynets import all_signs, along, gradient, hadamard, mixer, once, problem

import forwardgrad as fg
from forwardgrad.diagnostics import alignment
from forwardgrad.diagnostics.observer import measure
from forwardgrad.engine import Estimator

pytestmark = pytest.mark.float64

# a distribution of three points in two dimensions, two layers of one weight each, and a gradient that is not its mean
POINTS = np.array([[1.0, 0.5], [-0.3, 2.0], [0.7, -0.2]])
TRUE = np.array([0.4, 0.9])


def layers(x):
    return {"b": x[..., :1], "a": x[..., 1:]}  # names out of order


@jax.jit
def of(samples, true=TRUE):
    """Against one reference; layers in the order of their names: a, b, both."""
    reference = {"true": layers(jnp.asarray(true))}
    return alignment.found(alignment.moments(layers, samples, reference), reference, len(samples))["true"]


def test_means_over_all_samples_of_eight_are_the_true_bias_and_variance_and_the_variance_of_the_bias_itself():
    every = POINTS[np.array(list(itertools.product(range(3), repeat=8)))]  # [6561, 8, 2]
    reference = {"true": layers(jnp.asarray(TRUE))}

    @jax.jit
    @jax.vmap
    def each(samples):
        sums = alignment.moments(layers, samples, reference)
        return alignment.found(sums, reference, 8)["true"], alignment.variance_of_bias(sums, "true", 8)

    found, terms = jax.tree.map(np.asarray, each(every))
    off, spread = POINTS - TRUE, POINTS - POINTS.mean(0)
    for i, own in enumerate(([1], [0], [0, 1])):  # in the order of the names, and both
        bias, cov = off[:, own].mean(0), spread[:, own].T @ spread[:, own] / 3
        parts = 4 * bias @ cov @ bias / 8, 2 * np.trace(cov @ cov) / (8 * 7)
        for measured, true in (
            (found.B[:, i].mean(), bias @ bias),
            (found.V[:, i].mean(), np.trace(cov)),
            (found.estimates[:, i].mean(), (POINTS[:, own] ** 2).sum(1).mean()),
            (found.B[:, i].var(), sum(parts)),
            (terms[0][:, i].mean(), parts[0]),
            (terms[1][:, i].mean(), parts[1]),
        ):
            assert measured == pytest.approx(true, rel=1e-10)
        expected = np.sqrt(np.maximum(terms[0][:, i], 0) + terms[1][:, i])
        np.testing.assert_allclose(found.B_se[:, i], expected, rtol=1e-12)


@pytest.mark.parametrize(
    ("square", "bias", "error"), [(0.12, 0.12**0.5, 0.22**0.5 - 0.12**0.5), (-0.05, 0.0, 0.1**0.5)]
)
def test_the_errors_of_a_bias_and_of_its_square(square, bias, error):
    """|g| = 2, B_se = 0.4: relative to |g|² the square has an error of 0.1, and the bias what the root makes of it, upwards."""
    one = alignment.Found(*(jnp.array([x, x]) for x in (8.0, 4 * square, 0.4, 0.5, 2.0, 4.0, 1.0, 9.0)))
    row, everything = alignment.rows(["only"], one, 8)
    assert {k: v for k, v in row.items() if k != "layer"} == {k: v for k, v in everything.items() if k != "layer"}
    for key, value in (
        ("bias_squared", square),
        ("bias_squared_se", 0.1),
        ("bias", bias),
        ("bias_se", error),
        ("variance", 2.0),
        ("variance_share", 8 / 9),
        ("degrees", 0.0),
    ):
        assert row[key] == pytest.approx(value, rel=1e-12, abs=1e-12), key


def test_groups_are_added_to_what_all_draws_give_at_once():
    samples = np.random.default_rng(0).normal(size=(12, 2)) + 1
    found, mean = of(samples), samples.mean(0)
    np.testing.assert_allclose(found.V[2], samples.var(0, ddof=1).sum(), rtol=1e-12)
    pairs = [(samples[i] - TRUE) @ (samples[j] - TRUE) for i, j in itertools.permutations(range(12), 2)]
    np.testing.assert_allclose(found.B[2], np.mean(pairs), rtol=1e-12)
    cosines = samples @ TRUE / np.linalg.norm(samples, axis=1) / np.linalg.norm(TRUE)
    np.testing.assert_allclose(found.cosine[2], cosines.mean(), rtol=1e-12)
    row = alignment.rows(["b", "a"], found, 12)[2]
    assert row["layer"] == "all layers"
    cosine = mean @ TRUE / np.linalg.norm(mean) / np.linalg.norm(TRUE)
    assert row["cosine_of_mean"] == pytest.approx(float(cosine), rel=1e-12)
    assert row["degrees"] == pytest.approx(math.degrees(math.acos(float(cosine))), rel=1e-12)


def test_rows_are_in_the_order_asked_for():
    first, second, _ = alignment.rows(["b", "a"], of(POINTS[np.array([0, 1, 2, 0] * 2)]), 8)
    assert (first["layer"], second["layer"]) == ("b", "a")
    assert first["gradient_norm"] == pytest.approx(0.4)
    assert second["gradient_norm"] == pytest.approx(0.9)


def test_without_a_gradient_or_an_estimate():
    row, other, _ = alignment.rows(["b", "a"], of(np.zeros((8, 2)), np.array([0.0, 1.0])), 8)
    assert (row["degrees"], row["cosine"], row["variance"], row["variance_share"]) == (None,) * 4  # no gradient
    assert (other["degrees"], other["cosine"], other["bias"], other["variance"]) == (90.0, 0.0, 1.0, 0.0)


def rows_of(method, case, keys, target):
    """Rows against the exact gradient of a target, by layer."""
    state = method.initial_state(jax.random.key(2), *case)
    found = jax.jit(lambda: measure(method, {"exact": Estimator(method.network, target)}, state, *case, keys))()
    names = list(alignment.weights(method.network, case[0]))
    return {row["layer"]: row for row in alignment.rows(names, found["exact"], len(keys))}


def test_the_exact_gradient_is_exact():
    method = fg.recipes.lg_bp(mixer(1))
    rows = rows_of(method, problem(1), jax.random.split(jax.random.key(0), 8), method.target)
    assert list(rows) == ["b0/chan", "b0/grp", "b0/tok", "all layers"]
    for row in rows.values():
        assert row["cosine"] == pytest.approx(1, abs=1e-14)
        assert (row["variance"], row["bias"]) == (0, pytest.approx(0, abs=1e-14))
        assert row["degrees"] < 1e-5


def enumerated(build, network, case, table, target):
    """Rows over all rows of a table of directions, as they are measured over keys."""
    reference = {"exact": alignment.weights(network, gradient(target, len(network.blocks)))}
    estimate = lambda row: alignment.weights(network, once(build(along(row)), *case).grads)
    table = jnp.asarray(table)
    found = jax.jit(lambda: alignment.found(alignment.moments(estimate, table, reference), reference, len(table)))()
    return {
        row["layer"]: row
        for row in alignment.rows(list(alignment.weights(network, case[0])), found["exact"], len(table))
    }


def test_local_activity_perturbation_points_along_the_local_gradient():
    build = lambda guess: fg.recipes.lg_fg_a(mixer(1), guess=guess)
    for row in enumerated(build, mixer(1), problem(1), hadamard(128), "local").values():
        assert row["cosine_of_mean"] == pytest.approx(1, abs=1e-12)
        assert row["degrees"] < 1e-4
        # without chance |m - g|² is zero, and what the noise of a sample would make of it is taken off
        assert row["bias"] == 0
        assert row["bias_squared"] == pytest.approx(-row["variance"] / 128, rel=1e-9)


@pytest.mark.parametrize("draws", [1, 2])
def test_weight_perturbation_has_the_variance_of_its_docstring(draws):
    """Over all sign vectors: (D - 1)|∇|² / K in all; V counts K' - 1 of the K' rows."""
    x = jax.random.normal(jax.random.key(1), (3, 2))
    block = fg.Block(
        "b",
        lambda p, s, h, train: (jnp.tanh(h @ p["w"]), s),
        fg.Readout(
            lambda p, h: fg.Named(h, ("batch", "class")),
            lambda out, batch: fg.Named((out.value**2).sum(1), ("batch",)),
        ),
        lambda key: ({"w": jax.random.normal(key, (2, 2))}, ()),
    )
    network = fg.Network((block,))
    case = (*network.init(jax.random.key(0)), {"inputs": x, "labels": jnp.zeros(3, int)})
    table = all_signs(4 * draws).reshape(-1, draws, 4)
    reference = {"exact": alignment.weights(network, once(fg.recipes.bp(network), *case).grads)}

    def estimate(row):
        guess = fg.given({"b#w": row.reshape(draws, 2, 2)})
        return alignment.weights(network, once(fg.recipes.fg_w(network, guess=guess, draws=draws), *case).grads)

    sums = jax.jit(lambda: alignment.moments(estimate, jnp.asarray(table), reference))()
    row, whole = alignment.rows(["b/w"], alignment.found(sums, reference, len(table))["exact"], len(table))
    assert row["variance"] * (len(table) - 1) / len(table) == pytest.approx((4 - 1) / draws, rel=1e-12)
    assert whole["variance"] == row["variance"]
    assert row["bias"] == 0
    # E|ĝ|² = V + |∇|²: what the variance is a share of
    assert row["variance_share"] * (len(table) - 1) / len(table) == pytest.approx(
        3 / draws / (3 / draws + 1), rel=1e-12
    )


def test_complete_orthogonal_sets_are_exact_whatever_the_key():
    method = fg.recipes.fg_w(mixer(1), guess=fg.orthogonal(), draws=28)  # weights
    rows = rows_of(method, problem(1), jax.random.split(jax.random.key(0), 8), method.target)
    assert max(row["variance"] for row in rows.values()) < 1e-20
    assert min(row["cosine"] for row in rows.values()) > 1 - 1e-12
