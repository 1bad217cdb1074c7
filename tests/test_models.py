"""Models: sizes of the paper's Table 2, shapes, normalisation, what each placement keeps apart, and every refusal."""

from __future__ import annotations

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import forwardgrad as fg
from forwardgrad import checks, models
from forwardgrad.bias import bias
from forwardgrad.models.localmixer import LocalMixer, patchify
from forwardgrad.models.mlp import MLP
from forwardgrad.network import complete
from forwardgrad.normalise import normalise
from forwardgrad.whole import Step

pytestmark = pytest.mark.float64

TINY = LocalMixer(blocks=2, patches=2, channels=8, groups=2)
SHAPE = (4, 4, 2)


def count(tree) -> int:
    return sum(int(np.prod(x.shape)) for x in jax.tree.leaves(tree))


def setting(model, shape=SHAPE, classes=3, n=4):
    network = model.network(shape, classes)
    params, state = jax.tree.map(lambda x: x.astype(jnp.float64), network.init(jax.random.key(0)))
    batch = {
        "inputs": jax.random.normal(jax.random.key(1), (n, *shape), jnp.float64),
        "labels": jnp.arange(n) % classes,
    }
    return network, params, state, batch


@pytest.mark.parametrize(
    ("model", "shape", "expected"),
    [
        (LocalMixer(1, 1, 256, 1), (28, 28, 1), 271_892),
        (LocalMixer(1, 1, 512, 16), (28, 28, 1), 429_076),
        (LocalMixer(4, 8, 512, 16), (32, 32, 3), 918_770),
        (LocalMixer(4, 8, 2048, 64), (32, 32, 3), 13_074_674),
    ],
)
def test_parameter_counts_of_table_2(model, shape, expected):
    params, _ = jax.eval_shape(model.network(shape, 10).init, jax.random.key(0))
    assert count(params) == expected


def test_parameter_counts_of_the_imagenet_model():
    # Table 2's 17.3M are the backbone and four contrastive projectors of 128; supervised heads make it 26.6M
    params, _ = jax.eval_shape(LocalMixer(4, 32, 2048, 64).network((224, 224, 3), 1000).init, jax.random.key(0))
    backbone = count({name: block["layers"] for name, block in params.items()})
    assert backbone == 16_311_296
    assert backbone + 4 * (2048 * 128 + 128) == 17_360_384
    assert count(params) == 26_556_296


def test_patches_are_ordered_by_row_and_column_and_features_by_height_width_colour():
    images = jnp.arange(4 * 4 * 2).reshape(1, 4, 4, 2)
    patches = patchify(images, 2)
    for row in range(2):
        for column in range(2):
            patch = images[0, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
            np.testing.assert_array_equal(patches[0, 2 * row + column], patch.reshape(-1))


def by_hand(params, x, groups):
    """The paper's appendix 13 on [N, P, F] patches, written out."""
    ln = lambda h: (h - h.mean(-1, keepdims=True)) / jnp.sqrt(h.var(-1, keepdims=True) + 1e-5)
    n, p, _ = x.shape

    def channels(h, q, residual):
        kernel = q["channel"]["kernel"].reshape(h.shape[-1], -1)
        h = jax.nn.relu(ln(ln(h) @ kernel + q["channel"]["bias"].reshape(-1))).reshape(n, p, groups, -1)
        z = ln(jnp.einsum("npgc,gcd->npgd", ln(h), q["grouped"]["kernel"]) + q["grouped"]["bias"])
        return jax.nn.relu(z + residual)

    h = channels(x, params["block0"]["layers"], 0.0)
    for name in sorted(k for k in params if k.startswith("block") and k != "block0"):
        q = params[name]["layers"]
        z = jnp.swapaxes(ln(h.reshape(n, p, -1)), 1, 2) @ q["token"]["kernel"] + q["token"]["bias"][:, 0]
        h = channels(jax.nn.relu(ln(jnp.swapaxes(z, 1, 2))), q, h)
    pooled = ln(h.reshape(n, p, -1).mean(1))
    return pooled @ params["classifier"]["readout"]["kernel"] + params["classifier"]["readout"]["bias"]


def test_localmixer_is_the_papers_architecture():
    network, params, state, batch = setting(dataclasses.replace(TINY, blocks=3))
    params = jax.tree.map(
        lambda x: x + 0.1 * jax.random.normal(jax.random.key(x.size), x.shape, x.dtype), params
    )  # biases too
    np.testing.assert_allclose(
        network.predict(params, state, batch["inputs"]).value,
        by_hand(params, patchify(batch["inputs"], 2), 2),
        atol=1e-12,
    )


@pytest.mark.parametrize("norm", ["local", "ln", "bn", "none"])
@pytest.mark.parametrize("place", ["both", "before", "after", "begin"])
def test_every_normalisation_and_place_trains_and_predicts(norm, place):
    network, params, state, batch = setting(dataclasses.replace(TINY, norm=norm, norm_place=place))
    estimate, _, new_state = fg.recipes.bp(network).estimate(jax.random.key(0), (), params, state, batch)
    assert all(bool(jnp.isfinite(g).all()) for g in jax.tree.leaves(estimate.grads))
    assert network.predict(params, new_state, batch["inputs"]).value.shape == (4, 3)
    changed = jax.tree.map(lambda a, b: bool((a != b).any()), new_state, state)
    assert any(jax.tree.leaves(changed)) == (norm == "bn")


def test_the_places_are_different_networks():
    outputs = []
    for place in ("both", "before", "after", "begin"):
        network, params, state, batch = setting(dataclasses.replace(TINY, norm_place=place))
        outputs.append(np.asarray(network.predict(params, state, batch["inputs"]).value))
    assert all(np.abs(a - b).max() > 1e-3 for i, a in enumerate(outputs) for b in outputs[:i])


@pytest.mark.parametrize(("norm", "apart"), [("local", True), ("none", True), ("ln", False), ("bn", False)])
def test_which_normalisations_keep_the_cells_of_lg_fg_a_apart(norm, apart):
    network, params, state, batch = setting(dataclasses.replace(TINY, norm=norm))
    leaks = checks.separable(fg.recipes.lg_fg_a(network), params, state, batch, shrink=False)
    assert (not leaks) == apart
    if norm == "ln":
        assert {leak.axis for leak in leaks} == {"patch", "group"}
    if norm == "bn":
        assert {leak.axis for leak in leaks} == {"batch"}


# without normalisation, and with one of each unit by itself, the place changes nothing
PLACES = [(norm, place) for norm in ("local", "ln") for place in ("both", "before", "after", "begin")]


@pytest.mark.parametrize(("norm", "place"), [*PLACES, ("bn", "both"), ("none", "both")])
def test_weights_name_their_group_only_where_groups_stay_apart(norm, place):
    model = dataclasses.replace(TINY, norm=norm, norm_place=place)
    network, params, state, batch = setting(model)
    assert max(bias(fg.recipes.lg_fg_w(network), params, state, batch, shrink=False).values()) < 1e-10
    released = dataclasses.replace(model, weights_by_group=True).network(SHAPE, 3)
    sizes = bias(fg.recipes.lg_fg_w(released), params, state, batch, shrink=False)
    named = any("group" in axes for block in network.blocks[:-1] for axes in block.weights.values())
    everywhere = all(
        "group" in block.weights["channel/kernel"] and "group" in block.weights["grouped/kernel"]
        for block in network.blocks[:-1]
    )
    assert named or norm == "ln"
    assert (max(sizes.values()) < 1e-10) == everywhere


@pytest.mark.parametrize("norm", ["local", "ln", "bn"])
def test_the_measured_bias_is_that_of_enumerated_estimates(norm):
    network, params, state, batch = setting(LocalMixer(1, 2, 6, 2, norm=norm), shape=(4, 4, 1), n=2)
    method = dataclasses.replace(fg.recipes.lg_fg_a(network), allow_bias=True)
    given = (method, params, state, batch)
    params, state, batch = checks.generic(params, state, batch, shrink=False)  # where checks look
    sites = ("block0/channel", "block0/grouped")
    units = 2 * 4 * 6  # examples, patches, channels of each site
    directions = jnp.eye(2 * units) * 1.0

    def credit(row):
        arrays = {name: row[i * units : (i + 1) * units].reshape(2, 4, 2, 3) for i, name in enumerate(sites)}
        step = Step(network, method.target, params, state, complete(batch))
        part = dataclasses.replace(method.parts[0], guess=fg.given(arrays))
        return {
            name: c.value for name, c in step.run_part(part, jax.random.key(0), {"block0": {"guess": ()}})[0].items()
        }

    # a basis has sum of u uᵀ = I: the sum of its credits is the expectation
    expected = jax.tree.map(lambda x: x.sum(0), jax.jit(jax.vmap(credit))(directions))
    step = Step(network, method.target, params, state, complete(batch))
    loss = lambda eps: step.displaced({k: fg.Named(v, step.taps[k].axes) for k, v in eps.items()}).terms[0].loss
    true = jax.grad(loss)(jax.tree.map(jnp.zeros_like, expected))
    for name, found in bias(*given).items():
        by_hand = jnp.linalg.norm((expected[name] - true[name]).ravel()) / jnp.linalg.norm(true[name].ravel())
        assert found == pytest.approx(float(by_hand), abs=1e-10)
        assert (found > 1e-3) == (norm != "local" and name == "block0/channel")


@pytest.mark.parametrize("method", ["lg-fg-a", "fg-a"])
def test_the_relu_mask_is_exact_at_every_tap(method):
    network, params, state, batch = setting(TINY)
    assert checks.mask_is_exact(fg.recipes.find(method)(network, mask=True), params, state, batch, shrink=False)


def test_batch_norm_of_an_mlp_uses_running_statistics_in_evaluation():
    network, params, state, batch = setting(MLP(hidden=(5,), batch_norm=True))
    one, two = batch["inputs"][:1], batch["inputs"]
    alone = network.predict(params, state, one).value
    np.testing.assert_allclose(alone, network.predict(params, state, two).value[:1], atol=1e-12)


@pytest.mark.parametrize(("init", "deviation"), [("kaiming", 2 / 32**0.5), ("lecun", 1 / 32**0.5), ("constant", 0.1)])
def test_initial_standard_deviation_and_its_cap(init, deviation):
    for cap in (None, 0.15):
        model = LocalMixer(1, 1, 512, 1, init=init, init_cap=cap)
        params, _ = model.network((4, 4, 2), 3).init(jax.random.key(3))
        kernel = np.asarray(params["block0"]["layers"]["channel"]["kernel"])  # [32, 512]
        expected = deviation if cap is None else min(deviation, cap)
        assert abs(kernel.std() / expected - 1) < 4 / (2 * kernel.size) ** 0.5


def test_released_options():
    _, params, _, _ = setting(dataclasses.replace(TINY, zero_classifier=True))
    assert not params["classifier"]["readout"]["kernel"].any()
    once, params, state, batch = setting(TINY)
    twice = dataclasses.replace(TINY, bias_twice=True).network(SHAPE, 3)
    doubled = jax.tree_util.tree_map_with_path(
        lambda path, x: 2 * x if "bias" in str(path) and ("channel" in str(path) or "token" in str(path)) else x,
        shifted := jax.tree.map(lambda x: x + 0.3, params),
    )
    np.testing.assert_allclose(
        twice.predict(shifted, state, batch["inputs"]).value,
        once.predict(doubled, state, batch["inputs"]).value,
        atol=1e-12,
    )


def test_normalise_divides_by_the_standard_deviation_of_the_paper():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 7)))
    np.testing.assert_allclose(
        normalise(x), (x - x.mean(1, keepdims=True)) / jnp.sqrt(x.var(1, keepdims=True) + 1e-5), atol=1e-12
    )


@pytest.mark.parametrize(
    ("model", "shape", "remedy"),
    [
        (LocalMixer(channels=10, groups=3), (8, 8, 1), "set --groups to a divisor"),
        (LocalMixer(patches=3, groups=1), (8, 8, 1), "set --patches to a common divisor"),
        (LocalMixer(groups=0), (8, 8, 1), "set --groups"),
        (LocalMixer(), (8,), "use --model mlp"),
        (MLP(hidden=()), (8,), "--hidden 256 256"),
    ],
)
def test_impossible_shapes_are_refused_with_the_remedy(model, shape, remedy):
    with pytest.raises(fg.InputError, match=re.escape(remedy)):
        model.network(shape, 10)


def outside(shape, classes):
    """A model from outside the package."""
    return MLP(hidden=(4,)).network(shape, classes)


def not_a_network(shape, classes):
    return 3


def test_models_by_name_and_from_outside():
    assert models.find("localmixer") is LocalMixer
    assert {"localmixer", "mlp"} <= set(models.names())
    assert models.name_of(models.find("mlp")()) == "mlp"
    external = models.find("test_models:outside")()
    assert len(external.network(SHAPE, 3).blocks) == 1
    with pytest.raises(fg.InputError, match="did you mean 'mlp'"):
        models.find("mpl")
    with pytest.raises(fg.InputError, match="importable from here"):
        models.find("no_such_package:model")
    with pytest.raises(fg.InputError, match="make it one of them"):
        models.find("test_models:SHAPE")
    with pytest.raises(fg.InputError, match=r"return a forwardgrad\.Network"):
        models.find("test_models:not_a_network")().network((), None)
