"""The networks of Bacho & Chu (2023): sizes, layers by hand, initial weights, BatchNorm's statistics, what BatchNorm forbids and what not."""

from __future__ import annotations

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_conformance import kinds
from toynets import distance

import forwardgrad as fg
from forwardgrad import models, presets
from forwardgrad.models.alexnet import AlexNet
from forwardgrad.models.cnn import CNN
from forwardgrad.models.convolutions import convolve
from forwardgrad.models.layers import Window, max_pool
from forwardgrad.models.localmixer import LocalMixer
from forwardgrad.models.mlp import MLP
from forwardgrad.training.learner import Learner

pytestmark = pytest.mark.float64

CLASSES, N = 3, 4
TINY = {  # every model of the package, and the shape of an image that it can take
    "mlp": (MLP(hidden=(4, 4, 4), batch_norm=True, taps="after", init="torch"), (2, 2, 1)),
    "cnn": (CNN(channels=(2, 2), kernel=3, units=3), (6, 6, 1)),
    "alexnet": (AlexNet(channels=(2, 2, 2, 2, 2), units=(3, 3)), (15, 15, 1)),
    "localmixer": (LocalMixer(blocks=2, patches=2, channels=4, groups=2), (4, 4, 1)),
}


def setting(model, shape, n=N):
    network = model.network(shape, CLASSES)
    params, state = jax.tree.map(lambda x: x.astype(jnp.float64), network.init(jax.random.key(0)))
    inputs = jax.random.normal(jax.random.key(1), (n, *shape), jnp.float64)
    return network, params, state, {"inputs": inputs, "labels": jnp.arange(n) % CLASSES}


def moved(params):
    """A little off, so that biases and gains are not at zero and one."""
    return jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(x.size), x.shape, x.dtype), params)


def sizes(model, shape, classes=10):
    network = model.network(shape, classes)
    params, state = jax.eval_shape(network.init, jax.random.key(0))
    return sum(int(np.prod(x.shape)) for x in jax.tree.leaves(params)), network, params, state


@pytest.mark.parametrize(
    ("shape", "units", "expected"),
    [
        ((28, 28, 1), 800, (636_010, 1_276_810, 1_917_610, 2_558_410)),
        ((32, 32, 3), 1000, (3_083_010, 4_084_010, 5_085_010, 6_086_010)),
    ],
)
def test_parameter_counts_of_table_b5(shape, units, expected):
    for layers, count in enumerate(expected, 1):
        assert sizes(MLP(hidden=(units,) * layers, local_heads=False), shape)[0] == count
    # what the published code adds, and what lg-fg-a does: heads below the last hidden layer
    assert sizes(MLP(hidden=(units,) * 2, local_heads=False, batch_norm=True), shape)[0] == expected[1] + 2 * 2 * units
    assert sizes(MLP(hidden=(units,) * 3), shape)[0] == expected[2] + 2 * (units + 1) * 10


OUTPUTS = {  # models whose output may be a layer, without their heads
    name: (dataclasses.replace(TINY[name][0], local_heads=False), TINY[name][1]) for name in ("mlp", "cnn", "alexnet")
}


@pytest.mark.parametrize("name", OUTPUTS)
def test_an_output_layer_is_the_readout_and_can_be_displaced(name):
    model, shape = OUTPUTS[name]
    network, params, state, batch = setting(model, shape)
    params = moved(params)
    other = dataclasses.replace(model, output="layer").network(shape, CLASSES)
    last = network.blocks[-1].name

    def split(tree):
        """Parameters of the one network as those of the other."""
        output = {"layers": {"linear": tree[last]["readout"]}, "readout": ()}
        return {**tree, last: {**tree[last], "readout": ()}, "output": output}

    drawn, empty = jax.eval_shape(other.init, jax.random.key(0))
    assert jax.tree.map(jnp.shape, split(params)) == jax.tree.map(jnp.shape, drawn)
    state_of_other = {**state, "output": empty["output"]}
    exact = jax.jit(lambda: fg.recipes.bp(network).estimate(jax.random.key(0), (), params, state, batch)[0])()
    same = jax.jit(
        lambda: fg.recipes.bp(other).estimate(jax.random.key(0), (), split(params), state_of_other, batch)[0]
    )()
    assert float(jnp.abs(exact.loss - same.loss)) < 1e-13
    assert distance(split(exact.grads), same.grads) < 1e-13

    def sites(build):
        method = build(other)
        return jax.jit(method.initial_state)(jax.random.key(0), split(params), state_of_other, batch), method

    found = {}
    for build in (fg.recipes.fg_w, fg.recipes.fg_a):
        method_state, method = sites(build)
        estimate = jax.jit(method.estimate)(jax.random.key(1), method_state, split(params), state_of_other, batch)[0]
        found[method.name] = distance(estimate.grads["output"], same.grads["output"])
    assert min(found.values()) > 1e-3, "an estimate, not the exact gradient"


def test_parameter_counts_of_convolutional_networks():
    # 15C5-40C5-P2-128-10: what it flattens is 4000 long on 28 pixels, 5760 on 32; as written, 640
    dense = lambda inputs: inputs * 128 + 128 + 129 * 10
    maps = lambda colours: (25 * colours + 1) * 15 + (25 * 15 + 1) * 40
    plain = CNN(batch_norm=False, local_heads=False)
    assert sizes(plain, (28, 28, 1))[0] == maps(1) + dense(4000)
    assert sizes(plain, (32, 32, 3))[0] == maps(3) + dense(5760)
    assert sizes(dataclasses.replace(plain, pool_all=True), (28, 28, 1))[0] == maps(1) + dense(640)
    # torchvision's AlexNet has 61,100,840 with 1000 classes
    alexnet = AlexNet(batch_norm="none", local_heads=False)
    assert sizes(alexnet, (224, 224, 3), 1000)[0] == 61_100_840
    assert sizes(dataclasses.replace(alexnet, resize=224), (32, 32, 3), 1000)[0] == 61_100_840
    normed = 2 * (64 + 192 + 384 + 256 + 256)
    convolutions, everything = (dataclasses.replace(alexnet, batch_norm=b) for b in ("convolutions", "all"))
    assert sizes(convolutions, (224, 224, 3), 1000)[0] == 61_100_840 + normed
    assert sizes(everything, (224, 224, 3), 1000)[0] == 61_100_840 + normed + 4 * 4096
    assert sizes(alexnet, (64, 64, 3))[0] == sizes(alexnet, (32, 32, 3))[0]


@pytest.mark.parametrize(
    ("model", "shape", "maps"),
    [
        (CNN(), (28, 28, 1), [(24, 24, 15), (20, 20, 40), (128,)]),
        (AlexNet(resize=224), (32, 32, 3), [(27, 27, 64), (13, 13, 192), (13, 13, 384), (13, 13, 256), (6, 6, 256), (4096,), (4096,)]),
        (AlexNet(), (64, 64, 3), [(15, 15, 64), (7, 7, 192), (7, 7, 384), (7, 7, 256), (3, 3, 256), (4096,), (4096,)]),
    ],
)  # fmt: skip
def test_feedback_has_one_matrix_entry_per_class_and_unit(model, shape, maps):
    """Taps stand where the published hook does, after the ReLU and, in AlexNet, after the pooling; no weight is shared over places."""
    _, network, params, state = sizes(model, shape, 100)
    method = fg.recipes.dfa(network, mask=False)
    batch = {
        "inputs": jax.ShapeDtypeStruct((2, *shape), jnp.float32),
        "labels": jax.ShapeDtypeStruct((2,), jnp.int32),
    }
    feedback = jax.eval_shape(method.initial_state, jax.random.key(0), params, state, batch)
    matrices = [b.shape[1:] for b in jax.tree.leaves(feedback)]
    assert sorted(matrices) == sorted(maps)
    if model == AlexNet(resize=224):
        assert sum(100 * np.prod(m) for m in maps) == 20_467_200  # the published size, 20.5 million


@pytest.mark.parametrize(("init", "bound"), [("kaiming-uniform", 6**0.5), ("torch", 1.0)])
def test_initial_weights_are_uniform_within_their_bound(init, bound):
    with jax.enable_x64(False):
        for model, shape, fans in (
            (MLP(hidden=(40, 40), init=init), (6, 6, 1), (36, 40)),
            (CNN(channels=(20, 30), kernel=3, units=40, init=init), (8, 8, 2), (18, 180, 120)),
        ):
            params, _ = model.network(shape, 40).init(jax.random.key(0))
            assert len(params) == len(fans)
            for block, fan in zip(params.values(), fans, strict=True):
                for values in (block["layers"]["linear"], block["readout"]):
                    fan_in = fan if values is block["layers"]["linear"] else len(values["kernel"])
                    within = bound / fan_in**0.5
                    kernel, bias = np.abs(values["kernel"]), np.abs(values["bias"])
                    assert 0.97 * within < kernel.max() <= within * (1 + 1e-6)
                    assert kernel.mean() == pytest.approx(within / 2, rel=0.15)
                    assert (0.7 * within < bias.max() <= within) if init == "torch" else not bias.any()


def max_pool_by_definition(h, window, stride):
    return jax.lax.reduce_window(h, -jnp.inf, jax.lax.max, (1, window, window, 1), (1, stride, stride, 1), "VALID")


@pytest.mark.parametrize(("side", "window", "stride"), [(7, 2, 2), (8, 3, 2)])
def test_max_pool_and_both_derivatives(side, window, stride):
    h, v = jax.random.normal(jax.random.key(0), (2, 2, side, side + 1, 3), jnp.float64)
    ours = functools.partial(max_pool, window=Window(window, stride))
    theirs = functools.partial(max_pool_by_definition, window=window, stride=stride)
    for one, other in zip(jax.jvp(ours, (h,), (v,)), jax.jvp(theirs, (h,), (v,)), strict=True):
        np.testing.assert_array_equal(one, other)
    ct = jax.random.normal(jax.random.key(1), ours(h).shape, jnp.float64)
    np.testing.assert_array_equal(jax.vjp(ours, h)[1](ct)[0], jax.vjp(theirs, h)[1](ct)[0])


def convolution(x, kernel, stride=1, padding=0):
    dimensions = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), [(padding, padding)] * 2, dimension_numbers=dimensions
    )


@pytest.mark.parametrize(
    ("side", "size", "stride", "padding"),
    [
        (7, 3, 1, 1),
        (11, 3, 3, 0),
        (12, 5, 4, 2),
    ],  # the last two leave pixels out
)
def test_convolve_and_its_derivatives(side, size, stride, padding):
    """Of both factors, in both modes, and with either or both of them, or the error, batched."""
    x, dx = jax.random.normal(jax.random.key(0), (2, 2, side, side - 1, 3), jnp.float64)
    w, dw = jax.random.normal(jax.random.key(1), (2, size, size, 3, 4), jnp.float64)

    @functools.partial(jax.jit, static_argnums=0)
    def derivatives(convolve, x, dx, w, dw):
        f = lambda x, w: convolve(x, w, stride, padding)
        (y, dy), back = jax.jvp(f, (x, w), (dx, dw)), jax.vjp(f, x, w)[1]
        xs, ws = jnp.stack([x, dx]), jnp.stack([w, dw])
        batched = [jax.vmap(f, axes)(a, b) for a, b, axes in ((xs, w, (0, None)), (x, ws, (None, 0)), (xs, ws, (0, 0)))]
        return y, dy, back(y), batched, jax.vmap(back)(jnp.stack([y, dy]))

    assert distance(derivatives(convolve, x, dx, w, dw), derivatives(convolution, x, dx, w, dw)) < 1e-12


def normed(z, layer, state, train):
    """BatchNorm with gain and bias; and its statistics after a step, 0.9 old + 0.1 of the batch, whose variance is the biased one."""
    if "norm" not in layer:
        return z, state
    places = tuple(range(z.ndim - 1))
    mean, var = (z.mean(places), z.var(places)) if train else (state["norm"]["mean"], state["norm"]["var"])
    new = {name: 0.9 * state["norm"][name] + 0.1 * value for name, value in (("mean", mean), ("var", var))}
    out = (z - mean) / (var + 1e-5) ** 0.5 * layer["norm"]["scale"] + layer["norm"]["bias"]
    return out, {"norm": new} if train else state


def by_hand(model, params, state, h, train):
    """Logits and new statistics, written out with XLA's convolution and pooling."""
    kernels = {"cnn": {}, "alexnet": {"conv0": (1, 2), "conv1": (1, 2)}}[model]
    other = {"cnn": (1, 0), "alexnet": (1, 1)}[model]
    pools = {"cnn": {"conv0": (2, 2), "conv1": (2, 2)}, "alexnet": dict.fromkeys(("conv0", "conv1", "conv4"), (3, 2))}[
        model
    ]
    new = {}
    for name, block in params.items():
        linear = block["layers"]["linear"]
        flat = lambda h, kernel: h.reshape(len(h), -1) @ kernel
        layer = (
            (lambda h, w, name=name: convolution(h, w, *kernels.get(name, other))) if name.startswith("conv") else flat
        )
        z = layer(h, linear["kernel"])
        z, new[name] = normed(z + linear["bias"], block["layers"], state[name], train)
        h = jnp.maximum(z, 0)
        h = max_pool_by_definition(h, *pools[name]) if name in pools else h
    return h @ params[name]["readout"]["kernel"] + params[name]["readout"]["bias"], new  # fmt: skip


CONVOLUTIONAL = {
    "cnn": (dataclasses.replace(TINY["cnn"][0], pool_all=True), (10, 10, 1)),
    "alexnet": (dataclasses.replace(TINY["alexnet"][0], batch_norm="all"), (16, 15, 2)),
}


@pytest.mark.parametrize("name", CONVOLUTIONAL)
def test_convolutional_networks_and_their_statistics_by_hand(name):
    """Two steps forwards as in training, then evaluation with what the statistics have become."""
    network, params, state, batch = setting(*CONVOLUTIONAL[name])
    params = moved(params)

    def through(state, h):
        new = {}
        for block in network.blocks:
            h, new[block.name] = block.apply(params[block.name]["layers"], state[block.name], h, True)
        return block.readout.outputs(params[block.name]["readout"], h).value, new

    def written_out(state, h):
        return by_hand(name, params, state, h, True)

    @functools.partial(jax.jit, static_argnums=0)
    def outputs(steps, state, h):
        one, state = steps(state, h)
        two, state = steps(state, 2 * h)
        return one, two, state

    h = batch["inputs"]
    found, expected = outputs(through, state, h), outputs(written_out, state, h)
    assert distance(found, expected) < 1e-12
    evaluated = jax.jit(network.predict)(params, found[2], h).value
    np.testing.assert_allclose(evaluated, by_hand(name, params, expected[2], h, False)[0], atol=1e-12)


def test_running_statistics_of_a_fully_connected_network_by_hand():
    """From mean 0 and variance 1; the second layer's are of what the first gives with the batch's own statistics."""
    network, params, state, batch = setting(*TINY["mlp"], n=6)
    params = moved(params)
    expected, weights = jax.tree.map(np.asarray, (state, params))
    assert not any(s["norm"]["mean"].any() for s in expected.values())
    step = jax.jit(lambda state, batch: fg.recipes.bp(network).estimate(jax.random.key(0), (), params, state, batch)[2])
    for i in range(3):
        h = np.asarray(batch["inputs"]).reshape(6, -1) * (i + 1)
        state = step(state, {**batch, "inputs": batch["inputs"] * (i + 1)})
        for name, block in weights.items():
            linear = block["layers"]["linear"]
            z, expected[name] = normed(h @ linear["kernel"] + linear["bias"], block["layers"], expected[name], True)
            h = np.maximum(z, 0)
    assert distance(state, expected) < 1e-12


def test_forward_gradients_are_exact_on_a_convolutional_network():
    """As many orthogonal directions as units: maps of 4 x 4 and 2 x 2, 2 units."""
    model = CNN(channels=(1, 1), kernel=3, units=2, batch_norm=False)
    network, params, state, batch = setting(model, (6, 6, 1), n=2)
    given = jax.random.key(0), (), params, state, batch
    true = jax.jit(fg.recipes.bp(network).estimate)(*given)[0].grads
    method = fg.recipes.fg_a(network, guess=fg.orthogonal(), draws=16 + 4 + 2)
    given = jax.random.key(0), method.init(jax.random.key(1), params, state, batch), params, state, batch
    assert distance(jax.jit(method.estimate)(*given)[0].grads, true) < 1e-12


def test_every_model_is_here():
    assert set(TINY) == set(models.names())


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("method", ["fa", "fg-w", "lg-fg-a"])
def test_every_model_keeps_the_promises_of_the_methods(name, method):
    """Traced in single precision: gradients like the parameters, states as they were."""
    model, shape = TINY[name]
    with jax.enable_x64(False):
        network = model.network(shape, CLASSES)
        recipe = dataclasses.replace(fg.recipes.find(method)(network), allow_bias=True)

        def step(key):
            params, state = network.init(key)
            batch = {"inputs": jnp.ones((N, *shape)), "labels": jnp.zeros(N, jnp.int32)}
            guess = recipe.initial_state(key, params, state, batch)
            found, new_guess, new_state = recipe.estimate(key, guess, params, state, batch)
            return (found.grads, new_guess, new_state), (params, guess, state)

        found, given = jax.eval_shape(step, jax.random.key(0))
    assert kinds(found) == kinds(given)


def test_batch_norm_is_refused_where_examples_are_kept_apart_and_nowhere_else():
    network, params, state, batch = setting(*TINY["cnn"])
    init = lambda method, **options: fg.recipes.find(method)(network, **options).init(jax.random.key(0), params, state, batch)  # fmt: skip
    with pytest.raises(fg.InputError, match=r"^fg-a would be biased at 'conv0/output'.*'batch'.*--allow-bias"):
        init("fg-a")
    init("fa")
    init("dfa", mask=False)
    init("fdfa", mask=False)


def test_an_allowed_bias_is_reported():
    with jax.enable_x64(False):
        images = np.random.default_rng(0).integers(0, 256, (8, 6, 6, 1), np.uint8)
        labels = np.arange(8, dtype=np.int32) % CLASSES
        arrays = fg.data.Arrays(images, labels, images, labels, CLASSES, (0.5,), (0.5,))
        experiment = dataclasses.replace(
            presets.find("bacho-mnist-cnn"), model=TINY["cnn"][0], method="fg-a", batch_size=4, allow_bias=True
        )
        learner = Learner(experiment, arrays)
        learner.init()
    assert learner.bias["conv0/output"] > 1e-2


@pytest.mark.parametrize("model", [TINY["mlp"][0], TINY["cnn"][0]], ids=["mlp", "cnn"])
def test_local_heads_are_left_out_where_none_is_wanted(model):
    shape = (6, 6, 1)
    bare = dataclasses.replace(model, local_heads=False).network(shape, CLASSES)
    assert [block.readout is not None for block in bare.blocks] == [False] * (len(bare.blocks) - 1) + [True]
    whole = model.network(shape, CLASSES)
    with pytest.raises(fg.InputError, match="give the model local readouts"):
        fg.recipes.lg_bp(bare).target.scopes(bare)
    params, state = bare.init(jax.random.key(0))
    both = whole.init(jax.random.key(0))
    x = jnp.ones((2, *shape))
    np.testing.assert_array_equal(bare.predict(params, state, x).value, whole.predict(*both, x).value)


@pytest.mark.parametrize(
    ("model", "shape", "remedy"),
    [
        (CNN(), (28,), "use --model mlp"),
        (CNN(units=0), (28, 28, 1), "--channels 15 40 --kernel 5 --units 128"),
        (CNN(), (8, 8, 1), "set a smaller --kernel, or give --channels fewer numbers"),
        (AlexNet(), (28,), "use --model mlp"),
        (AlexNet(units=(0, 1)), (32, 32, 3), "--units 4096 4096"),
        (AlexNet(), (14, 32, 3), "scale them up with --resize 32"),
        (MLP(init="zeros"), (8,), "unknown init 'zeros'"),
    ],
)
def test_impossible_sizes_are_refused_with_the_remedy(model, shape, remedy):
    with pytest.raises(fg.InputError, match=re.escape(remedy)):
        model.network(shape, 10)


@pytest.mark.parametrize("name", [name for name in presets.names() if name.startswith("bacho")])
def test_the_presets_are_the_published_protocol(name):
    preset = presets.find(name)
    preset.check()
    assert (preset.optimizer, preset.lr, preset.schedule, preset.decay) == ("adam", 1e-4, "exponential", 0.95)
    assert (preset.batch_size, preset.epochs, preset.pixels, preset.weight_decay) == (64, 100, "symmetric", 0)
    assert (preset.flip, preset.crop, preset.mask) == (False, 0, False)
    assert (preset.model.init, preset.model.output) == ("torch", "readout")
    widths = {"bacho-mnist-fc": (800,) * 4, "bacho-fashion-mnist-fc": (800,), "bacho-cifar10-fc": (1000,)}
    assert getattr(preset.model, "hidden", None) == widths.get(name)
    assert preset.model.batch_norm == ("all" if isinstance(preset.model, AlexNet) else True)
    assert getattr(preset.model, "resize", None) == {"bacho-cifar100-alexnet": 224, "bacho-cifar10-alexnet": 0}.get(
        name, 224 if isinstance(preset.model, AlexNet) else None
    )
    about = fg.data.find(preset.dataset)
    params, _ = jax.eval_shape(preset.model.network(about.shape, about.classes).init, jax.random.key(0))
    assert (
        len(params)
        == {"MLP": len(getattr(preset.model, "hidden", ())), "CNN": 3, "AlexNet": 7}[type(preset.model).__name__]
    )
