"""How feedback matrices learn: the two optimisers, Kolen-Pollack's rule, Adam on forward gradients, factors, and feedback as a control variate."""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import optax
import pytest
from toynets import all_signs, along, distance, flat, hadamard, mean, once, setting

import forwardgrad as fg
from forwardgrad import descent
from forwardgrad.guesses import matrices
from forwardgrad.guesses.base import Site
from forwardgrad.models.mlp import MLP
from forwardgrad.named import Named, contract
from forwardgrad.network import in_precision

pytestmark = pytest.mark.float64


def normal_like(tree, seed=0):
    """Random values for every leaf, each its own."""
    leaves, structure = jax.tree.flatten(tree)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    return structure.unflatten([jax.random.normal(k, x.shape, x.dtype) for k, x in zip(keys, leaves, strict=True)])


# ------------------------------------------------------------------------------------------------ rules


@pytest.mark.parametrize(
    ("own", "theirs"), [(descent.adam(0.02), optax.adam(0.02)), (descent.sgd(0.3), optax.sgd(0.3))], ids=["adam", "sgd"]
)
def test_the_optimisers_are_those_of_optax(own, theirs):
    """Three steps; and optax's fits where ours does."""
    x = {"a": jnp.arange(3.0), "b": jnp.ones((2, 2))}

    @jax.jit
    def both():
        out = []
        for optimiser in (own, descent.Optimiser(*theirs)):
            y, state = x, optimiser.init(x)
            for seed in range(3):
                steps, state = optimiser.update(normal_like(x, seed), state, y)
                y = jax.tree.map(jnp.add, y, steps)
            out.append(y)
        return out

    assert distance(*both()) < 1e-15


@functools.cache
def mlp(taps="before"):
    """Network, parameters, model state, batch; by hand: pre-activations, outputs of the hidden layers, and the error."""
    with jax.ensure_compile_time_eval():
        case = setting(MLP(hidden=(3, 2), taps=taps), n=2)
        return case, jax.jit(by_hand)(case[1], case[3])


def by_hand(params, batch):
    h, zs, ys = batch["inputs"].reshape(len(batch["labels"]), -1), [], []
    for block in ("layer0", "layer1"):
        layer = params[block]["layers"]["linear"]
        zs.append(h @ layer["kernel"] + layer["bias"])
        h = jax.nn.relu(zs[-1])
        ys.append(h)
    readout = params["layer1"]["readout"]
    e = jax.nn.softmax(h @ readout["kernel"] + readout["bias"]) - jax.nn.one_hot(batch["labels"], 3)
    return zs, ys, e / len(e)


def with_matrices(state, seed=5):
    """The estimator's state with other matrices B, for every site."""
    learned = state[0]["global"]["predictor"]
    return ({"global": {**state[0]["global"], "predictor": learned._replace(matrices=normal_like(learned.matrices, seed))}},)  # fmt: skip


def matrices_of(state):
    return [b.value for b in state[0]["global"]["predictor"].matrices.values()]


def biases(grads):
    """Gradients of the layers' biases: the credits at the pre-activations, summed over examples."""
    return [grads[block]["layers"]["linear"]["bias"] for block in ("layer0", "layer1")]


@pytest.mark.parametrize("taps", ["before", "after"])
def test_kolen_pollack_by_hand(taps):
    """B <- B - lr (eᵀ y + decay B), with the B before in the estimate; the last B and the output weights, moved alike, become equal."""
    (network, params, model_state, batch), (zs, ys, e) = mlp(taps)
    lr, decay = 0.5, 0.1
    method = fg.recipes.dkp(network, rule="sgd", feedback_lr=lr, feedback_decay=decay, mask=taps == "before")
    start = method.initial_state(jax.random.key(0), params, model_state, batch)
    assert all(float(jnp.abs(b).max()) == 0 for b in matrices_of(start)), "learning starts from zero"
    old = with_matrices(start)
    found, new, _ = jax.jit(method.estimate)(jax.random.key(0), old, params, model_state, batch)
    for b, after, y, z, credit in zip(matrices_of(old), matrices_of(new), ys, zs, biases(found.grads), strict=True):
        assert distance(after, b - lr * (e.T @ y + decay * b)) < 1e-14
        assert distance(credit, ((e @ b) * (z > 0)).sum(0)) < 1e-14
    w = params["layer1"]["readout"]["kernel"]
    moved = w - lr * (found.grads["layer1"]["readout"]["kernel"] + decay * w)
    apart = matrices_of(old)[-1].T - w
    assert distance(matrices_of(new)[-1].T - moved, (1 - lr * decay) * apart) < 1e-14


def test_adam_on_forward_gradients():
    """By default B descends by Adam along B - S, S the sample that the average with rate 1 shows; the estimate uses the B before."""
    (network, params, model_state, batch), (zs, _, e) = mlp()
    build = lambda row, **options: fg.recipes.fdfa(network, guess=along(row), **options)
    rows = jnp.asarray(hadamard(16))[jnp.array([3, 6, 9])]
    start = build(rows[0]).initial_state(jax.random.key(0), params, model_state, batch)

    @jax.jit
    def learned():
        out, state = [], with_matrices(start)
        for row in rows:
            found, state, _ = build(row).estimate(jax.random.key(0), state, params, model_state, batch)
            out.append((biases(found.grads), state))
        shown = build(rows[0], rule="average", alpha=1.0)
        blank = shown.initial_state(jax.random.key(0), params, model_state, batch)
        sample = lambda row: build(row, rule="average", alpha=1.0).estimate(jax.random.key(0), blank, params, model_state, batch)[1]  # fmt: skip
        return out, [matrices_of(sample(row)) for row in rows]

    steps, samples = learned()
    b = matrices_of(with_matrices(start))
    adam = optax.adam(1e-4)
    memory = adam.init(b)
    for (credits, state), sample in zip(steps, samples, strict=True):
        assert distance(credits, [((e @ x) * (z > 0)).sum(0) for x, z in zip(b, zs, strict=True)]) < 1e-14
        moves, memory = adam.update([x - s for x, s in zip(b, sample, strict=True)], memory)
        b = optax.apply_updates(b, moves)
        assert distance(matrices_of(state), b) < 1e-14


def test_matrices_have_the_precision_of_parameters():
    """Small steps would be lost in an activation's bfloat16."""
    network = MLP(hidden=(3,)).network((4, 1, 1), 3)
    params, model_state = jax.eval_shape(lambda: jax.tree.map(lambda x: x.astype("float32"), network.init(jax.random.key(0))))  # fmt: skip
    batch = {"inputs": jnp.ones((2, 4, 1, 1), "float32"), "labels": jnp.zeros(2, int)}
    for recipe in (fg.recipes.dkp, fg.recipes.fdfa):
        method = recipe(in_precision(network, jnp.bfloat16))
        state = jax.eval_shape(method.initial_state, jax.random.key(0), params, model_state, batch)
        assert {x.dtype.name for x in jax.tree.leaves(state)} == {"float32", "int32"}


# ------------------------------------------------------------------------------------------------ memory

EXAMPLES, CLASSES, IMAGE = 5, 50, (4, 4, 3)
UNITS = 4 * 4 * 3


def convolutional():
    """One 1 x 1 convolution, a tap, and a readout of the mean over the image, which is small beside B."""

    def apply(p, s, x, train):
        return jax.nn.relu(fg.tap(x @ p, "conv", "batch height width channel")).mean((1, 2)), s

    def loss(out, batch):
        return Named(-jax.nn.log_softmax(out.value)[jnp.arange(EXAMPLES), batch["labels"]], ("batch",))

    readout = fg.Readout(lambda p, h: Named(h @ p, ("batch", "class")), loss)
    params = {"conv": {"layers": jnp.ones((2, 3)), "readout": jnp.ones((3, CLASSES))}}
    batch = {"inputs": jnp.ones((EXAMPLES, 4, 4, 2)), "labels": jnp.zeros(EXAMPLES, int)}
    return fg.Network((fg.Block("conv", apply, readout),)), params, {"conv": ()}, batch


def largest(jaxpr):
    """Elements of the largest array that a program computes."""
    sizes = [0]
    for equation in jaxpr.eqns:
        sizes += [v.aval.size for v in equation.outvars]
        inner = [x for value in equation.params.values() for x in (value if isinstance(value, (tuple, list)) else [value])]  # fmt: skip
        sizes += [largest(getattr(x, "jaxpr", x)) for x in inner if hasattr(getattr(x, "jaxpr", x), "eqns")]
    return max(sizes)


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("recipe", ["dkp", "fdfa", "fg-a-fdfa"])
def test_no_matrix_per_example(recipe, rank):
    """Nothing in a step is as large as [batch, class, units]; with factors, nothing is as large as [class, units]."""
    network, params, model_state, batch = convolutional()
    options = {} if recipe == "dkp" else {"guess": fg.rademacher(), "draws": 2}
    method = fg.recipes.find(recipe)(network, feedback_rank=rank, **options)
    state = method.initial_state(jax.random.key(0), params, model_state, batch)
    (b,) = state[0]["global"]["predictor"].matrices.values()
    if rank:
        assert (b.q.value.shape, b.p.value.shape) == ((CLASSES, rank), (rank, *IMAGE))
    else:
        assert (b.axes, b.value.shape) == (("class", "height", "width", "channel"), (CLASSES, *IMAGE))
    program = jax.make_jaxpr(method.estimate)(jax.random.key(0), state, params, model_state, batch)
    found = largest(program.jaxpr)
    assert found < CLASSES * UNITS if rank else CLASSES * UNITS <= found < EXAMPLES * CLASSES * UNITS


# ------------------------------------------------------------------------------------------------ factors

SIZES = {"draw": 2, "batch": 3, "patch": 2, "group": 2, "class": 4, "unit": 5, "height": 2, "channel": 3, "feature": 3}
FORMS = {
    "a layer": ("batch class", "batch unit", ()),
    "a convolution": ("batch class", "batch height channel", ()),
    "patches shared": ("batch patch group class", "batch patch feature", ()),
    "patches shared, a matrix per group": ("batch patch group class", "batch patch feature", ("group",)),
    "all shared": ("batch patch group class", "batch patch group channel", ()),
}


def form(name, rank):
    """A matrix, an error along the outputs' axes, an activation along the site's, and the axes in which the error is sent."""
    outputs, own, per_cell = FORMS[name]
    array = lambda axes, seed: Named(normal_like(jnp.zeros([SIZES[a] for a in axes]), seed), tuple(axes))
    left, right = array(["draw", *outputs.split()], 1), array(["draw", *own.split()], 2)
    site = Site(own.split(), [SIZES[a] for a in own.split()], (), (), right.value.dtype, "tap", 0, "z")
    view = SimpleNamespace(outputs=Named(left.value[0], left.axes[1:]))
    b = matrices.random(jax.random.key(0), site, view, per_cell, rank, "float64")
    return normal_like(b), left, right


def whole(b):
    return contract((*b.q.axes[:-1], *b.p.axes[1:]), b.q, b.p) if isinstance(b, matrices.Factors) else b


def objective(b, left, right):
    """½|B - S|² with S = Σ left ⊗ right, formed."""
    matrix = whole(b)
    return 0.5 * ((matrix.value - contract(matrix.axes, left, right).value) ** 2).sum()


@pytest.mark.parametrize("rank", [None, 3])
@pytest.mark.parametrize("name", FORMS)
def test_matrices_descend_the_stated_objective(name, rank):
    """Without forming B or S the gradient is that of the objective with both formed; what is sent is e B."""
    b, left, right = form(name, rank)

    @jax.jit
    def run():
        found = jax.tree.map(jnp.subtract, matrices.shrinking(b), matrices.paired(b, left, right))
        sent = matrices.sent(left, b, right.axes), contract(right.axes, left, whole(b))
        return found, jax.grad(objective)(b, left, right), sent

    found, true, sent = run()
    assert distance(found, true) < 1e-12
    assert distance(*sent) < 1e-12


def test_factors_of_full_rank_are_any_matrix():
    b, left, right = form("a convolution", None)
    factors = form("a convolution", SIZES["class"])[0]
    q = Named(jnp.eye(SIZES["class"]), factors.q.axes)
    p = Named(b.value, factors.p.axes)
    assert factors.p.value.shape == p.value.shape
    found = matrices.sent(left, matrices.Factors(q, p), right.axes)
    assert distance(found, matrices.sent(left, b, right.axes)) < 1e-14


def test_factors_start_at_zero_and_learn():
    """With Q = 0 nothing is fed back and P stays for a step; Q moves along J Pᵀ in the mean over directions."""
    (network, params, model_state, batch), _ = mlp()
    alpha, size = 0.5, 16
    build = lambda row, rank: fg.recipes.fdfa(network, guess=along(row), rule="average", alpha=alpha, feedback_rank=rank)  # fmt: skip

    @jax.jit
    def run():
        def after(rank):
            start = build(jnp.ones(size), rank).initial_state(jax.random.key(0), params, model_state, batch)
            step = lambda row: build(row, rank).estimate(jax.random.key(0), start, params, model_state, batch)[1]
            learned = lambda state: state[0]["global"]["predictor"].matrices
            return learned(start), mean(learned(jax.vmap(step)(jnp.asarray(hadamard(size)))))

        return after(2), after(0)[1]

    (start, new), average = run()
    for site, jacobian in average.items():
        assert distance(start[site].q.value, jnp.zeros((3, 2))) == 0
        assert distance(new[site].p, start[site].p) < 1e-15
        assert distance(new[site].q.value, jacobian.value @ start[site].p.value.T) < 1e-14


# ------------------------------------------------------------------------------------------------ a control variate


@pytest.mark.parametrize("mask", [False, True])
def test_feedback_as_a_control_variate(mask):
    """Over all sign vectors: unbiased whatever B is, with the variance (D - 1)|∇ - e B|² of each example's credits; B learns as in fdfa."""
    (network, params, model_state, batch), (zs, _, e) = mlp()
    n, sizes = 2, (3, 2)
    build = lambda name, row: fg.recipes.find(name)(network, guess=along(row), rule="average", alpha=0.3, mask=mask)
    old = with_matrices(build("fg-a-fdfa", jnp.ones(10)).initial_state(jax.random.key(0), params, model_state, batch))

    @jax.jit
    @jax.vmap
    def step(row):
        run = lambda name: build(name, row).estimate(jax.random.key(0), old, params, model_state, batch)[:2]
        (found, new), (_, also) = run("fg-a-fdfa"), run("fdfa")
        return found.grads, new, also

    grads, new, also = step(jnp.asarray(all_signs(n * sum(sizes))))
    true = jax.jit(lambda: once(fg.recipes.bp(network), params, model_state, batch).grads)()
    assert distance(mean(grads), true) < 1e-12
    if mask:  # which fdfa's directions have not
        return
    assert distance(new, also) < 1e-14, "the same tangents, the same B"

    def loss(eps):
        h = batch["inputs"].reshape(n, -1)
        for block, move in zip(("layer0", "layer1"), eps, strict=True):
            layer = params[block]["layers"]["linear"]
            h = jax.nn.relu(h @ layer["kernel"] + layer["bias"] + move)
        readout = params["layer1"]["readout"]
        logits = h @ readout["kernel"] + readout["bias"]
        return -jax.nn.log_softmax(logits)[jnp.arange(n), batch["labels"]].mean()

    deltas = jax.grad(loss)(tuple(jnp.zeros((n, size)) for size in sizes))
    off = sum(((d - e @ b) ** 2).sum() for d, b in zip(deltas, matrices_of(old), strict=True))
    estimates = flat(biases(mean(grads))), jnp.concatenate(biases(grads), 1)
    variance = ((estimates[1] - estimates[0]) ** 2).sum(1).mean()
    assert float(variance) == pytest.approx(float((sum(sizes) - 1) * off), rel=1e-12)
    assert all(float(jnp.abs(z).min()) > 1e-3 for z in zs)
