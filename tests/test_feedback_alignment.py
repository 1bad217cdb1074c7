"""Feedback alignment by replay, released variants, normalisation without its gradient: against backpropagation and computations by hand."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest
from toynets import distance, norm, once, setting, two_steps

import forwardgrad as fg
from forwardgrad.guesses.layer_readout import layer_readout
from forwardgrad.models import heads
from forwardgrad.models.localmixer import LocalMixer, patchify
from forwardgrad.models.mlp import MLP
from forwardgrad.network import leaf_paths, with_leaves
from forwardgrad.presets.experiment import Experiment

pytestmark = pytest.mark.float64

R = fg.recipes
MIXER = LocalMixer(blocks=2, patches=2, channels=8, groups=2)
MODELS = {norm: dataclasses.replace(MIXER, norm=norm) for norm in ("local", "ln", "bn", "none")}
MODELS |= {
    "mlp": MLP(hidden=(5, 4)),
    "mlp, batch norm": MLP(hidden=(5, 4), batch_norm=True),
    "mlp, taps after": MLP(hidden=(5, 4), batch_norm=True, activation="tanh", taps="after"),
}


def off(tree, by=0.3):
    """Parameters at which nothing is zero or one by accident: biases, gains, a classifier that starts at zero."""
    return jax.tree.map(lambda x: x + by * jax.random.normal(jax.random.key(x.size), x.shape, x.dtype), tree)


@functools.cache
def case(model):
    with jax.ensure_compile_time_eval():
        network, params, state, batch = setting(MODELS[model])
        return network, off(params), state, batch


def with_feedback(state, leaves):
    """The estimator's state with other feedback weights, by path."""
    put = lambda own: {"predictor": {path: leaves[path] for path in own["predictor"]}}
    return tuple({scope: put(own) for scope, own in part.items()} for part in state)


def start(method, params, model_state, batch, key=2):
    return jax.jit(method.initial_state)(jax.random.key(key), params, model_state, batch)


def estimate(method, state, params, model_state, batch):
    """The estimate; feedback weights stay what they are."""
    found, after, _ = jax.jit(method.estimate)(jax.random.key(3), state, params, model_state, batch)
    assert distance(after, state) == 0
    return found


@pytest.mark.parametrize(
    ("model", "method"), [("ln", "l-fa"), ("bn", "fa"), ("mlp, batch norm", "lg-fa"), ("mlp, taps after", "fa")]
)
def test_replay_of_the_forward_weights_is_backpropagation(model, method):
    network, *rest = case(model)
    made = dataclasses.replace(R.find(method)(network), executor="whole")
    state = start(made, *rest)
    found = estimate(made, with_feedback(state, leaf_paths(rest[0])), *rest)
    exact = dataclasses.replace(R.find(method.replace("fa", "bp"))(network), executor="whole")
    assert distance(found, jax.jit(lambda: once(exact, *rest))()) < 1e-12


def ln(h):
    return (h - h.mean(-1, keepdims=True)) / jnp.sqrt(h.var(-1, keepdims=True) + 1e-5)


def through(forward, feedback):
    """The value of one with the derivative of the other."""
    return jax.lax.stop_gradient(forward - feedback) + feedback


def linear(spec, h, q, w):
    """By hand: x W + b, differentiated as x B + b. `q` holds B and b, `w` holds W; the derivative by B is that of W by feedback alignment."""
    return through(jnp.einsum(spec, h, w["kernel"]), jnp.einsum(spec, h, q["kernel"])) + q["bias"]


def ce(logits, labels):
    return -jax.nn.log_softmax(logits)[jnp.arange(len(labels)), labels].mean()


def mixer_by_hand(q, w, batch, target, released=False):
    """The target's loss on LocalMixer with two blocks, local normalisation before and after every linear layer."""
    x, n, p, g = patchify(batch["inputs"], 2), 6, 4, 2

    def channels(h, q, w, residual):
        z = ln(linear("npf,fgd->npgd", ln(h), q["channel"], w["channel"]).reshape(n, p, -1)).reshape(n, p, g, -1)
        z = linear("npgc,gcd->npgd", ln(jax.nn.relu(z)), q["grouped"], w["grouped"])
        return jax.nn.relu(ln(z) + residual)

    def head(mean, q, w):
        logits = mean @ q["kernel"] + q["bias"] if released else linear("nc,ck->nk", mean, q, w)
        return ce(logits, batch["labels"])

    local = lambda h, name: head(ln(h).mean(1).reshape(n, -1), q[name]["readout"], w[name]["readout"])
    stop = lambda h: jax.lax.stop_gradient(h) if target == "lg-fa" else h
    h0 = channels(x, q["block0"]["layers"], w["block0"]["layers"], 0.0)
    q1, w1, h = q["block1"]["layers"], w["block1"]["layers"], stop(h0)
    z = linear("npc,pq->ncq", ln(h.reshape(n, p, -1)), {**q1["token"], "bias": q1["token"]["bias"][:, 0]}, w1["token"])
    h1 = channels(jax.nn.relu(ln(jnp.swapaxes(z, 1, 2))), q1, w1, h)
    pooled, end = ln(h1.reshape(n, p, -1).mean(1)), "classifier"
    final = lambda mean: ce(linear("nc,ck->nk", mean, q[end]["readout"], w[end]["readout"]), batch["labels"])
    if target == "fa":
        return final(pooled)
    return local(h0, "block0") + local(h1, "block1") + final(jax.lax.stop_gradient(pooled))


def layers(grads):
    return {block: own["layers"] for block, own in grads.items()}


@pytest.mark.parametrize(("method", "released"), [("fa", False), ("l-fa", False), ("lg-fa", True)])
def test_on_localmixer_by_hand(method, released):
    """Feedback weights of their own; the Jacobians of normalisation and ReLU at the true activations, which the forward weights give."""
    network, params, model_state, batch = case("local")
    made = R.find(method)(network, released=released)
    state = start(made, params, model_state, batch)
    found = estimate(made, state, params, model_state, batch)
    drawn = {k: v for part in state for own in part.values() for k, v in own["predictor"].items()}
    drawn = {path: leaf for path, leaf in drawn.items() if path.endswith("kernel")}
    assert all(distance(leaf, leaf_paths(params)[path]) > 1e-3 for path, leaf in drawn.items())
    by_hand = lambda q: mixer_by_hand(q, params, batch, method, released)
    expected = jax.jit(jax.grad(by_hand))(with_leaves(params, drawn))
    if released:
        assert distance(layers(found.grads), layers(expected)) < 1e-12
        assert distance(found.grads["classifier"], expected["classifier"]) < 1e-12
    else:
        assert distance(found.grads, expected) < 1e-12
        assert abs(float(found.loss - by_hand(with_leaves(params, drawn)))) < 1e-12


def test_on_an_mlp_by_hand():
    """The textbook recursion; gains of a BatchNorm are the network's own, and its Jacobian couples examples."""
    network, params, model_state, batch = case("mlp, batch norm")
    made = R.fa(network)
    state = start(made, params, model_state, batch)
    found = estimate(made, state, params, model_state, batch).grads
    back = state[0]["global"]["predictor"]
    assert set(back) == {"layer0/layers/linear/kernel", "layer1/layers/linear/kernel", "layer1/readout/kernel"}

    def after(z, own):  # BatchNorm and ReLU
        y = (z - z.mean(0)) / jnp.sqrt(z.var(0) + 1e-5)
        return jax.nn.relu(y * own["norm"]["scale"] + own["norm"]["bias"])

    first, second = (params[name]["layers"] for name in ("layer0", "layer1"))
    x = batch["inputs"].reshape(6, -1)
    h0, back0 = jax.vjp(after, x @ first["linear"]["kernel"] + first["linear"]["bias"], first)
    h1, back1 = jax.vjp(after, h0 @ second["linear"]["kernel"] + second["linear"]["bias"], second)
    logits = h1 @ params["layer1"]["readout"]["kernel"] + params["layer1"]["readout"]["bias"]
    e = (jax.nn.softmax(logits) - jax.nn.one_hot(batch["labels"], 3)) / 6
    delta1, own1 = back1(e @ back["layer1/readout/kernel"].T)
    delta0, own0 = back0(delta1 @ back["layer1/layers/linear/kernel"].T)
    for name, h, delta, own in (("layer0", x, delta0, own0), ("layer1", h0, delta1, own1)):
        expected = {"linear": {"kernel": h.T @ delta, "bias": delta.sum(0)}, "norm": own["norm"]}
        assert distance(found[name]["layers"], expected) < 1e-12
    assert distance(found["layer1"]["readout"], {"kernel": h1.T @ e, "bias": e.sum(0)}) < 1e-12


def test_it_streams_where_it_is_greedy_and_works_in_microbatches():
    network, params, model_state, batch = case("mlp")
    assert R.lg_fa(network).streams(params, model_state, batch), "by itself"
    made = R.l_fa(network)
    few = dataclasses.replace(made, microbatch=2)
    few.check(params, model_state, batch)
    state = start(made, params, model_state, batch)
    pieces, whole = (estimate(m, state, params, model_state, batch) for m in (few, made))
    assert distance(pieces, whole) < 1e-13


def test_feedback_weights_are_drawn_as_weights_are():
    model = LocalMixer(blocks=1, patches=2, channels=128, groups=2, init_cap=0.1, zero_classifier=True)
    network, params, model_state, batch = setting(model)
    made = R.fa(network)
    state = start(made, params, model_state, batch)
    back = state[0]["global"]["predictor"]
    for path, deviation in {
        "block0/layers/channel/kernel": 0.1,  # capped
        "block0/layers/grouped/kernel": 0.1,
        "classifier/readout/kernel": 1 / 128**0.5,  # which starts at zero
    }.items():
        kernel = back[path]
        assert abs(float(kernel.std()) / deviation - 1) < 4 / (2 * kernel.size) ** 0.5
        assert kernel.shape == leaf_paths(params)[path].shape
    assert not any("block0/readout" in path for path in back), (
        "a head whose loss is not in the target feeds nothing back"
    )
    assert not any("bias" in path for path in back), "biases of two axes, which start the same for every key"
    assert distance(start(made, params, model_state, batch, key=3), state) > 0.1


def test_a_gain_of_two_axes_stays_the_network_s():
    """B = W where B is drawn: what remains, a gain per patch and channel, must be the network's own."""

    def apply(p, s, h, train):
        z = fg.tap(h @ p["kernel"], "z/linear", "batch patch channel", passive=True)
        return jax.nn.relu(fg.tap(norm(z, (1, 2)) * p["gain"], "z", "batch patch channel")), s

    @jax.jit
    def init(key):
        return {"kernel": jax.random.normal(key, (4, 4)), "gain": jnp.ones((2, 4))}, ()

    classifier = heads.linear(8, 3, jax.nn.initializers.lecun_normal())
    last = fg.Block("c", lambda p, s, h, train: (h.reshape(len(h), -1), s), classifier)
    network = fg.Network((fg.Block("a", apply, init=init), fg.Block("b", apply, init=init), last))
    params, state = network.init(jax.random.key(0))
    for name in "ab":
        params[name]["layers"]["gain"] = 1 + jax.random.uniform(jax.random.key(1), (2, 4))
    rest = params, state, {"inputs": jax.random.normal(jax.random.key(2), (5, 2, 4)), "labels": jnp.arange(5) % 3}
    made = R.fa(network)
    given = start(made, *rest)
    assert set(given[0]["global"]["predictor"]) == {"a/layers/kernel", "b/layers/kernel", "c/readout/kernel"}
    found = estimate(made, with_feedback(given, leaf_paths(params)), *rest)
    assert distance(found, once(R.bp(network), *rest)) < 1e-12


def test_the_released_direct_feedback_by_hand():
    """Every layer by a loss of its own: cross-entropy of the mean over patches (over channels after token mixing) under a fixed readout."""
    network, params, model_state, batch = case("local")
    made = R.dfa(network, released=True)
    state = made.init(jax.random.key(2), params, model_state, batch)
    found = estimate(made, state, params, model_state, batch).grads
    back = state[0]["global"]["predictor"]
    shapes = {name: b.value.shape for name, b in back.items()}
    assert shapes == {
        "block0/channel": (2, 4, 3),
        "block0/grouped": (2, 4, 3),
        "block1/token": (4, 3),
        "block1/channel": (2, 4, 3),
        "block1/grouped": (2, 4, 3),
    }

    def own(q):
        """Sum of all layers' losses, each cut off from the layer below."""
        stop, n, p, g = jax.lax.stop_gradient, 6, 4, 2
        loss = lambda mean, site: ce(mean.reshape(n, -1) @ back[site].value.reshape(-1, 3), batch["labels"])

        def channels(h, q, residual, block):
            z = jnp.einsum("npf,fgd->npgd", ln(stop(h)), q["channel"]["kernel"]) + q["channel"]["bias"]
            h = jax.nn.relu(ln(z.reshape(n, p, -1)).reshape(n, p, g, -1))
            z = jnp.einsum("npgc,gcd->npgd", ln(stop(h)), q["grouped"]["kernel"]) + q["grouped"]["bias"]
            out = jax.nn.relu(ln(z) + residual)
            return out, loss(h.mean(1), f"{block}/channel") + loss(out.mean(1), f"{block}/grouped")

        h, total = channels(patchify(batch["inputs"], 2), q["block0"], 0.0, "block0")
        h = stop(h)
        z = jnp.einsum("npc,pq->nqc", ln(h.reshape(n, p, -1)), q["block1"]["token"]["kernel"])
        x = jax.nn.relu(ln(z + q["block1"]["token"]["bias"]))
        return total + loss(x.mean(2), "block1/token") + channels(x, q["block1"], h, "block1")[1]

    expected = jax.jit(jax.grad(own))({name: params[name]["layers"] for name in ("block0", "block1")})
    assert distance({name: found[name]["layers"] for name in expected}, expected) < 1e-12
    for b in back.values():
        assert 0.01 < float(jnp.abs(b.value).max()) < 0.4, "standard deviation 0.1"


def test_credit_without_the_gradient_of_the_normalisation_by_hand():
    """As many orthogonal directions as a cell has units give the exact gradient at the taps; the linear layers then get it as it is."""
    network, params, model_state, batch = case("local")
    made = R.lg_fg_a(network, guess=fg.orthogonal(), draws=48, norm_gradient=False)
    found = jax.jit(lambda: once(made, params, model_state, batch).grads)()
    n, p, g = 6, 4, 2

    def run(eps):
        """Sum of the local losses, the inputs of the linear layers."""

        def channels(h, q, residual, eps):
            first = ln(h)
            z = jnp.einsum("npf,fgd->npgd", first, q["channel"]["kernel"]) + q["channel"]["bias"]
            h = ln(jax.nn.relu(ln(z.reshape(n, p, -1)).reshape(n, p, g, -1) + eps["channel"]))
            z = jnp.einsum("npgc,gcd->npgd", h, q["grouped"]["kernel"]) + q["grouped"]["bias"]
            return jax.nn.relu(ln(z) + residual + eps["grouped"]), {"channel": first, "grouped": h}

        def loss(h, name):
            q = params[name]["readout"]
            return ce(ln(h).mean(1).reshape(n, -1) @ q["kernel"] + q["bias"], batch["labels"])

        q0, q1 = params["block0"]["layers"], params["block1"]["layers"]
        h0, inputs0 = channels(patchify(batch["inputs"], 2), q0, 0.0, eps["block0"])
        h = jax.lax.stop_gradient(h0)
        token = ln(h.reshape(n, p, -1))
        z = jnp.einsum("npc,pq->nqc", token, q1["token"]["kernel"]) + q1["token"]["bias"]
        h1, inputs1 = channels(jax.nn.relu(ln(z) + eps["block1"]["token"]), q1, h, eps["block1"])
        return loss(h0, "block0") + loss(h1, "block1"), {"block0": inputs0, "block1": {**inputs1, "token": token}}

    unit = {"channel": jnp.zeros((n, p, g, 4)), "grouped": jnp.zeros((n, p, g, 4))}
    credits, inputs = jax.jit(jax.grad(run, has_aux=True))(
        {"block0": unit, "block1": {**unit, "token": jnp.zeros((n, p, 8))}}
    )
    for name, spec in {"channel": "npf,npgd->fgd", "grouped": "npgc,npgd->gcd", "token": "npc,nqc->pq"}.items():
        for block in ("block0", "block1")[name == "token" :]:
            expected = jnp.einsum(spec, inputs[block][name], credits[block][name])
            assert distance(found[block]["layers"][name]["kernel"], expected) < 1e-12
    exact = jax.jit(lambda: once(R.lg_bp(network), params, model_state, batch).grads)()
    assert distance(layers(found), layers(exact)) > 1e-2, "biased"
    assert distance(found["block1"]["readout"], exact["block1"]["readout"]) < 1e-12


def test_without_normalisation_there_is_nothing_to_skip():
    network, *rest = case("none")
    whole = lambda **options: once(R.lg_fg_a(network, mask=True, **options), *rest).grads
    assert distance(jax.jit(lambda: whole(norm_gradient=False))(), jax.jit(whole)()) < 1e-12


@pytest.mark.parametrize("target", [fg.local(), fg.global_loss()], ids=["local", "global"])
def test_credit_is_handed_on_by_either_executor(target):
    network, *rest = case("mlp")
    insertion = fg.activations(credit_at=lambda name: f"{name}/linear")
    made = fg.estimator(
        network, target=target, guess=fg.rademacher(), insertion=insertion, partition=("batch",), name="here"
    )
    whole = two_steps(dataclasses.replace(made, executor="whole"), *rest)
    assert distance(two_steps(dataclasses.replace(made, executor="streamed"), *rest), whole) < 1e-12


def test_passive_taps_are_displaced_where_they_are_named_and_only_there():
    names = {f"block0/{name}": name for name in ("channel", "channel/linear")}
    chosen = lambda only: fg.activations(only).taps.select(names, True, {"block0/channel/linear"})
    for only in (None, "*", "block0/*", "channel*", lambda name: True):
        assert chosen(only) == ["block0/channel"]
    for only in ("channel/linear", ("block0/channel/linear",)):
        assert chosen(only) == ["block0/channel/linear"]
    assert chosen(("channel", "channel/linear")) == list(names)

    def loss(w, x):
        z = jax.vmap(jax.jit(lambda x: fg.tap(w @ x, "sum", "unit", passive=True)), axis_name="batch")(x)
        return (fg.tap(jnp.tanh(z), "hidden", "batch unit") ** 2).sum(1)

    w, x = jnp.ones((2, 3)), jnp.ones((4, 3)) / 7
    assert fg.taps.trace(loss, w, x).passive == ["sum"]
    u = {"hidden": jnp.ones((4, 2))}
    grads = fg.value_and_grad(loss, guess=fg.given(u), insertion="activations")(w, x, key=jax.random.key(0))[1]
    z, slope = jnp.tanh(3 / 7), 1 - jnp.tanh(3 / 7) ** 2
    assert distance(grads, jnp.full((2, 3), 4 * z * slope / 7)) < 1e-12  # a displacement of both units: <2 z, u> = 4 z
    by_name = fg.activations(only="sum")
    grads = fg.value_and_grad(loss, guess=fg.given({"sum": u["hidden"]}), insertion=by_name)(
        w, x, key=jax.random.key(0)
    )[1]
    assert distance(grads, jnp.full((2, 3), 4 * z * slope / 7)) < 1e-12


def test_one_option_for_all_released_variants():
    network = MIXER.network((4, 4, 1), 3)
    target = lambda **options: Experiment(model=MIXER, **options).estimator(network).target.name
    assert (target(method="fa"), target(method="fa", variant="released")) == ("global", "local, not cut")
    rule = lambda **options: Experiment(model=MIXER, method="fg-a", **options).estimator(network).parts[0].rule.name
    assert (rule(), rule(variant="released")) == ("unbiased", "unnormalised")
    assert layer_readout().name == Experiment(model=MIXER, method="dfa", variant="released").estimator(network).parts[0].predictor.name  # fmt: skip
    with pytest.raises(fg.InputError, match="did you mean 'released'"):
        Experiment(model=MIXER, variant="relaesed").check()  # pyright: ignore[reportArgumentType]
