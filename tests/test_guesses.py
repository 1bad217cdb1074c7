"""Random directions: their moments, their keys, orthogonal sets, masks, given directions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toynets import CELLS, FIXED, N, distance, gradient, mixer, once, problem

import forwardgrad as fg
from forwardgrad.guesses.base import Site, View
from forwardgrad.guesses.random import random_words

pytestmark = pytest.mark.float64


def view(sites, draws=1, partition=("batch",), index=None, batch=N):
    """All that a random guess looks at."""
    index = jnp.arange(batch) if index is None else index
    nothing = dict.fromkeys(set(View._fields) - {"sites", "batch", "partition", "draws"})
    return View(sites=sites, batch={"index": index}, partition=partition, draws=draws, **nothing)


def site(name="z", axes=("batch", "unit"), shape=(N, 5), block=0, kind="tap"):
    return Site(axes, shape, axes, shape, jnp.float64, kind, block, name)


def propose(guess, sites, key=0, **options):
    return guess.propose(jax.random.key(key), (), view(sites, **options))


def check_mean(samples, expected):
    """Within five standard errors of their mean, entry by entry (fixed keys: this passes always or never)."""
    error = samples.std(0) / len(samples) ** 0.5
    assert float((jnp.abs(samples.mean(0) - expected) / jnp.maximum(error, 1e-12)).max()) < 5


@pytest.mark.parametrize(("guess", "fourth"), [(fg.gaussian(), 3.0), (fg.rademacher(), 1.0)], ids=["gaussian", "signs"])
def test_moments(guess, fourth):
    """E[u] = 0, E[u uᵀ] = I over units, examples, sites and blocks jointly, E[u⁴] of the distribution."""
    sites = {"a": site("a"), "b": site("b", ("unit",), (4,)), "c": site("a", block=1)}
    found = jax.jit(lambda: propose(guess, sites, draws=4000))()
    u = jnp.concatenate([found[name].value.reshape(4000, -1) for name in sites], 1)
    assert u.shape == (4000, 2 * 5 * N + 4)
    check_mean(u, 0.0)
    check_mean(u[:, :, None] * u[:, None], jnp.eye(u.shape[1]))
    check_mean(u**4, fourth)
    if fourth == 1:
        assert set(np.unique(u)) == {-1.0, 1.0}


@pytest.mark.parametrize("size", [1, 31, 32, 36, 100])
def test_signs_of_any_length(size):
    (found,) = fg.rademacher().propose(jax.random.key(0), (), view({"z": site(shape=(N, size))})).values()
    assert found.value.shape == (1, N, size)
    assert found.value.dtype == jnp.float64
    assert set(np.unique(found.value)) <= {-1.0, 1.0}
    assert size < 31 or all(len(np.unique(row)) == 2 for row in found.value[0])
    for one in range(0, size - 32, 32):
        assert not jnp.array_equal(found.value[..., :4], found.value[..., one + 32 : one + 36])


def test_words_are_of_the_example_and_differ_everywhere():
    index = jnp.array([7, 0, 3])
    words = random_words(jax.random.key(0), index, 5)
    assert jnp.array_equal(words[1:], random_words(jax.random.key(0), index[1:], 5))
    many = random_words(jax.random.key(0), jnp.arange(100), 33)
    assert len(np.unique(many)) == many.size, "no counter twice"
    bits = (np.asarray(many)[..., None] >> np.arange(32)) & 1
    assert np.abs(bits.mean((0, 1)) - 0.5).max() < 5 * 0.5 / many.size**0.5


@pytest.mark.parametrize("guess", [fg.gaussian(), fg.rademacher(), fg.orthogonal()], ids=lambda g: g.name)
def test_noise_belongs_to_the_global_example_and_the_site(guess):
    one = lambda **options: propose(guess, {"z": site(shape=(len(options["index"]), 5))}, draws=2, **options)["z"].value
    whole = one(index=jnp.array([7, 3, 11]))
    assert distance(one(index=jnp.array([11, 7])), whole[:, jnp.array([2, 0])]) < 1e-13
    other = jnp.abs(one(index=jnp.array([7, 3, 11]), key=1) - whole)
    assert float(other.max() if guess.name == "rademacher" else other.min()) > 0
    assert distance(one(index=jnp.array([7, 3, 11])), whole) == 0
    others = [{"z": site(block=1)}, {"z": site(name="y")}, {"z": site(kind="weight")}]
    for other in others:
        assert distance(propose(guess, other, draws=2, index=jnp.array([7, 3, 11]))["z"].value, whole) > 0.1


@pytest.mark.parametrize("draws", [1, 3, 7, 14, 17])
def test_orthogonal_sets(draws):
    """Within a cell of D = 7 units: |u|² = D, orthogonal within a set, new sets after D; all cells and sets differ."""
    sites = {
        "a": site("a", ("batch", "patch", "unit"), (N, 2, 3)),
        "b": site("b", ("patch", "batch", "unit"), (2, N, 4)),
    }
    found = propose(fg.orthogonal(), sites, draws=draws, partition=CELLS)
    for name, own in sites.items():
        assert set(found[name].axes) == {"draw", *own.axes}
    u = jnp.concatenate([found[name].to(("draw", "batch", "patch", "unit")) for name in sites], -1)
    gram = jnp.einsum("kbpd,lbpd->bpkl", u, u)
    for first in range(0, draws, 7):
        block = gram[..., first : first + 7, first : first + 7]
        assert distance(block, jnp.broadcast_to(7 * jnp.eye(block.shape[-1]), block.shape)) < 1e-12
    assert float(jnp.abs(u[:, 0, 0] - u[:, 1, 0]).max()) > 0.1
    if draws > 7:
        assert float(jnp.abs(u[0] - u[7]).max()) > 0.1


def test_orthogonal_sets_in_half_precision_are_rounded_ones():
    short = {"z": site()._replace(dtype=jnp.bfloat16)}
    found = propose(fg.orthogonal(), short, draws=3)["z"].value
    assert found.dtype == jnp.bfloat16
    gram = jnp.einsum("kbu,lbu->bkl", *[found.astype(jnp.float32)] * 2)
    assert distance(gram, jnp.broadcast_to(5 * jnp.eye(3), gram.shape)) < 0.1


def test_orthogonal_directions_are_uniform():
    """E[u uᵀ] = I, and no coordinate is favoured: E[u_i⁴] = 3 D / (D + 2) on the sphere of radius √D."""
    guess = lambda key: fg.orthogonal().propose(key, (), view({"z": site(shape=(1, 4))}, draws=2, batch=1))["z"].value
    u = jax.jit(jax.vmap(guess))(jax.random.split(jax.random.key(0), 4000))[:, :, 0]
    for draw in (0, 1):
        check_mean(u[:, draw], 0.0)
        check_mean(u[:, draw, :, None] * u[:, draw, None], jnp.eye(4))
        check_mean(u[:, draw] ** 4, 3 * 4 / 6)


@pytest.mark.parametrize(
    ("target", "partition", "insertion", "units"),
    [
        (fg.local(), CELLS, fg.activations(only=["tok", "chan"]), 8),
        (fg.local(), CELLS, fg.activations(only="grp"), 2),
        (fg.local(), ("group",), fg.weights(), 28),
        (fg.global_loss(), CELLS[:1], fg.activations(), 48),
    ],
)
def test_as_many_orthogonal_draws_as_units_of_a_cell_are_exact(target, partition, insertion, units):
    def estimate(draws):
        network = mixer(blocks)
        method = fg.estimator(network, target=target, guess=fg.rademacher(), insertion=insertion, partition=partition)
        method = fg.wrappers.with_orthogonal_draws(method, draws)
        return jax.jit(lambda: once(method, *problem(blocks)).grads)()

    blocks = 2 if target.name == "global" else 1
    true = gradient(target.name, blocks)
    assert distance(estimate(units), true) < 1e-12
    assert distance(estimate(units - 1), true) > 1e-4


def test_a_mask_leaves_out_the_units_that_are_off():
    """Also where the noise is shared: then each patch has its own mask of one displacement."""
    insertion = fg.activations(shared="patch")

    @jax.jit
    def proposed():
        seen = {}

        def spy(key, state, view):
            found, plain = fg.masked(FIXED).propose(key, state, view), FIXED.propose(key, state, view)
            seen.update({name: (u, plain[name], view.taps[name]) for name, u in found.items()})
            return found

        once(
            fg.estimator(mixer(1), target=fg.local(), guess=fg.Guess(spy), insertion=insertion, partition=CELLS),
            *problem(1),
        )
        return seen

    for masked, plain, z in proposed().values():
        on = (z.value > 0).astype(float)
        assert float(on.mean()) > 0
        assert distance(masked.to(z.axes), plain.to(z.axes) * on) == 0


def test_a_masked_guess_says_what_it_masks_by():
    assert fg.masked(fg.gaussian()).mask(jnp.array([-1.0, 0.0, 2.0])).tolist() == [0, 0, 1]
    assert fg.masked(fg.gaussian(), lambda z: z * 0).mask(jnp.ones(1)).tolist() == [0]
    assert fg.gaussian().mask is None


@pytest.mark.parametrize("spelling", ["array", "Named", "Named reordered", "draws", "full name"])
def test_given_directions(spelling):
    u = jnp.asarray(np.random.default_rng(1).normal(size=(N, 2, 8)))
    u = u[..., :4]
    table = {
        "array": {"chan": u},
        "Named": {"chan": fg.Named(u, ("batch", "patch", "unit"))},
        "Named reordered": {"chan": fg.Named(u.transpose(2, 0, 1), ("unit", "batch", "patch"))},
        "draws": {"chan": u[None]},
        "full name": {"b0": {"chan": u}},
    }[spelling]
    run = lambda guess: fg.estimator(
        mixer(1), target=fg.local(), guess=guess, insertion=fg.activations(only="chan"), partition=CELLS
    )
    by_hand = fg.Guess(lambda key, state, view: {"b0/chan": fg.Named(u, ("batch", "patch", "unit"))})
    found = jax.jit(lambda: [once(run(guess), *problem(1)).grads for guess in (fg.given(table), by_hand)])()
    assert distance(*found) < 1e-14


def test_given_directions_of_every_block():
    """Local losses ask block by block; what is another block's is no mistake."""
    u = {f"b{i}": {"chan": jnp.full((N, 2, 4), 1.0 + i)} for i in range(2)}
    run = lambda network, table: (
        once(
            fg.estimator(
                network,
                target=fg.local(),
                guess=fg.given(table),
                insertion=fg.activations(only="chan"),
                partition=CELLS,
            ),
            *problem(len(network.blocks)),
        ).grads
    )
    both, alone = run(mixer(2), u), run(mixer(1), {"b0": u["b0"]})
    assert distance(both["b0"], alone["b0"]) < 1e-14
    with pytest.raises(fg.InputError, match=r"\['b0/chann'\], which are not displaced"):
        run(mixer(2), {**u, "b0": {**u["b0"], "chann": 1.0}})
    with pytest.raises(fg.InputError, match=r"\['b0#chan'\], which are not displaced"):
        run(mixer(2), {**u, "b0#chan": 1.0})


def quadratic(w):
    return 0.5 * w @ jnp.array([[3.0, 1.0], [1.0, 2.0]]) @ w + jnp.array([0.3, -0.7]) @ w


def along_one(probe, draws, guess):
    """The estimate at one point."""
    found = fg.value_and_grad(quadratic, guess=guess, insertion="weights", probe=probe, draws=draws)
    return found(jnp.array([0.4, -1.1]), key=jax.random.key(0))[1]


def test_a_difference_along_antithetic_directions_is_exact_for_a_quadratic():
    u = jnp.array([0.8, -0.5])
    exact = along_one(fg.jvp, 1, fg.given(u))
    far = fg.finite_difference(0.5)
    assert distance(along_one(far, 2, fg.antithetic(fg.given(u))), exact) < 1e-14
    curved = 0.5 * 0.5 * (u @ jax.hessian(quadratic)(u) @ u)  # ε/2 uᵀ H u
    assert distance(along_one(far, 1, fg.given(u)), exact + curved * u) < 1e-14


@pytest.mark.parametrize("draws", [2, 6])
def test_of_an_exact_derivative_an_antithetic_pair_is_one_draw(draws):
    one = along_one(fg.jvp, draws // 2, fg.gaussian())
    assert distance(along_one(fg.jvp, draws, fg.antithetic(fg.gaussian())), one) < 1e-14


def test_antithetic_draws_keep_a_mask_and_the_moments():
    method = fg.wrappers.with_antithetic_draws(fg.recipes.np_(mixer(1), mask=True, epsilon=1e-4), 2)
    (part,) = method.parts
    assert part.draws == 2
    assert part.guess.mask is not None
    assert part.guess.isotropic
    u = propose(fg.antithetic(fg.rademacher()), {"z": site()}, draws=4)["z"].value
    assert u.shape == (4, N, 5)
    assert distance(u[2:], -u[:2]) == 0
    assert distance(u[0], u[1]) > 0
