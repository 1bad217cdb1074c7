"""Figures 3 to 7 of Bacho & Chu (2023): what they compare with, exactly; noise on an estimate; every figure in miniature, on digits."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toynets import along, distance, gauss

import forwardgrad as fg
from forwardgrad import reproductions
from forwardgrad.cli.main import dispatch
from forwardgrad.models.mlp import MLP
from forwardgrad.presets.bacho_mnist_fc import preset
from forwardgrad.reproductions import (
    bacho2023_figure4,
    bacho2023_figure5,
    bacho2023_figure6,
    bacho2023_figure7,
)

DOUBLE = lambda tree: jax.tree.map(
    lambda x: x.astype(jnp.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree
)


def test_figure_3_shows_runs_of_the_tables():
    known = [cell.experiment for table in ("tableB6", "table2") for cell in reproductions.find(f"bacho2023:{table}")]
    cells = reproductions.find("bacho2023:figure3")
    assert [(cell.column, cell.row) for cell in cells] == [
        (column, method) for column in ("fc", "cnn") for method in ("bp", "fg-w", "fg-a", "dfa", "dkp", "fdfa")
    ]
    assert all(cell.experiment in known and cell.experiment.dataset == "cifar10" for cell in cells)


# theories that measurements stand beside, over all directions


@pytest.mark.float64
def test_the_variance_of_figure_4():
    """T, of which the others are multiples: two examples that share what they teach the feedback."""
    images = np.random.default_rng(0).normal(size=(2, 1, 3, 1))
    known = bacho2023_figure4.problem(2, images, np.array([0, 2]), jnp.asarray)
    known = dataclasses.replace(known, params=DOUBLE(known.params), model_state=DOUBLE(known.model_state))
    rows, probability = gauss(4)
    exact = known.gradient()

    def squared(row, alpha):
        own = dataclasses.replace(known, guess=along(row))
        return own.sample(jax.random.key(0), alpha, 1, exact)

    each = jax.jit(jax.vmap(jax.vmap(squared, (0, None)), (None, 0)))(jnp.asarray(rows), jnp.array([1.0, 0.1]))
    found = each @ jnp.asarray(probability)
    assert known.total() > 0
    assert distance(found / known.total(), jnp.array([1.0, 0.01])) < 1e-12


@pytest.mark.float64
@pytest.mark.parametrize("name", ["fg-w", "fg-a"])
def test_the_variances_of_figure_5(name):
    image = jnp.asarray(np.random.default_rng(1).normal(size=(1, 1, 2, 1)))
    known = bacho2023_figure5.problem(2, 1, image, np.array([3]))
    known = known._replace(params=DOUBLE(known.params), model_state=DOUBLE(known.model_state))
    exact = bacho2023_figure5.truth(known)
    rows, probability = gauss(4 if name == "fg-w" else 2)
    params, model_state, batch = jax.tree.map(lambda x: x[0], known[1:])

    def squared(row):
        method = bacho2023_figure5.estimator(name, known.network, along(row))
        state = method.initial_state(jax.random.key(0), params, model_state, batch)
        found = method.estimate(jax.random.key(0), state, params, model_state, batch)[0].grads
        return ((bacho2023_figure4.kernel(found) - exact.gradient[0]) ** 2).mean()

    found = jax.jit(jax.vmap(squared))(jnp.asarray(rows)) @ jnp.asarray(probability)
    assert float(found) == pytest.approx(float(exact.variance[name][0]), rel=1e-12)


# noise


@pytest.mark.float64
def test_noise_is_added_to_layers_once_and_in_proportion():
    network = MLP(hidden=(16, 16)).network((4, 4, 1), 3)
    params, state = DOUBLE(network.init(jax.random.key(0)))
    batch = {"inputs": jax.random.normal(jax.random.key(1), (4, 4, 4, 1), jnp.float64), "labels": jnp.arange(4) % 3}
    exact = fg.recipes.bp(network)

    def noise(sigma, key=3, method=exact):
        method = fg.wrappers.with_noise(method, sigma)
        estimate = lambda one: one.estimate(jax.random.key(key), (), params, state, batch)[0].grads
        return jax.jit(lambda: jax.tree.map(jnp.subtract, estimate(method), estimate(exact)))()

    one = noise(1.0)
    assert all(
        distance(block["readout"], jax.tree.map(jnp.zeros_like, block["readout"])) == 0 for block in one.values()
    )
    each = np.concatenate([np.ravel(x) for block in one.values() for x in jax.tree.leaves(block["layers"])])
    size = len(each)
    assert size == 16 * 17 + 16 * 17
    assert abs(each.mean()) < 4 / size**0.5
    assert abs(each.var() - 1) < 4 * (2 / size) ** 0.5
    first, second = each.reshape(2, -1)
    assert abs(first @ second) < 4 * (size / 2) ** 0.5  # blocks of one shape draw their own
    assert distance(noise(2.0), jax.tree.map(lambda x: 2 * x, one)) < 1e-12
    assert distance(noise(0.0), jax.tree.map(jnp.zeros_like, one)) < 1e-15
    assert distance(noise(1.0, method=dataclasses.replace(exact, microbatch=2)), one) < 1e-12
    assert distance(noise(1.0, key=4), one) > 0.1
    with pytest.raises(fg.InputError, match="at least 0, not -1"):
        fg.wrappers.with_noise(exact, -1)


# in miniature


@pytest.fixture
def on_digits(monkeypatch):
    for module in (bacho2023_figure4, bacho2023_figure5, bacho2023_figure6, bacho2023_figure7):
        monkeypatch.setattr(module, "preset", dataclasses.replace(preset, dataset="digits"))


def files(out, summary):
    assert (out / summary["files"][1]).read_bytes().startswith(b"\x89PNG")
    return json.loads((out / summary["files"][0]).read_text())


def command(figure, tmp_path, *flags):
    return dispatch(["reproduce", f"bacho2023:{figure}", "--results", str(tmp_path / "results"), *flags])


@pytest.mark.quick_compile
def test_figure_4_in_miniature(tmp_path, on_digits, capsys):
    assert command("figure4", tmp_path, "--units", "8", "--examples", "4") == 0
    said = capsys.readouterr()
    rows = json.loads((tmp_path / "results/bacho2023/figure4.json").read_text())
    assert "given the previous B" in said.out
    assert len(said.err.strip().splitlines()) == len(rows) == sum(map(len, bacho2023_figure4.ALPHAS.values()))
    assert {row["updates"] for row in rows if row["kind"] == "given the previous B"} == {1}
    assert abs(bacho2023_figure4.slope(rows, "given the previous B") - 2) < 0.05
    assert abs(bacho2023_figure4.slope(rows, "at rest") - 1) < 0.2
    assert (tmp_path / "results/bacho2023/figure4.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.quick_compile
def test_figure_5_in_miniature(tmp_path, on_digits):
    said = []
    summary = bacho2023_figure5.run(tmp_path, images=3, samples=400, sweeps={"neurons": (4, 16)}, say=said.append)
    rows = files(tmp_path, summary)
    assert summary["passes"]
    assert [(row["neurons"], row["inputs"], row["method"]) for row in rows] == [
        (neurons, 64, method) for neurons in (4, 16) for method in ("fg-w", "fg-a")
    ]
    assert len(said) == 2
    assert all(0 < row["standard_error"] < row["theory"] for row in rows)


@pytest.mark.quick_compile
def test_figure_6_in_miniature(tmp_path, on_digits, monkeypatch):
    monkeypatch.setattr(bacho2023_figure6, "METHODS", ("fdfa",))
    summary = bacho2023_figure6.run(
        tmp_path, units=8, train_images=256, draws=8, sigmas=(0.0, 0.1), say=lambda line: None
    )
    none, noisy, fdfa = files(tmp_path, summary)
    assert [row["method"] for row in (none, noisy, fdfa)] == ["bp", "bp", "fdfa"]
    assert none["variance"] == none["variance_share"] == 0
    assert noisy["measured_after"] == [1, 2, 3, 4]
    assert 0.8 < noisy["variance_share"] <= 1
    assert noisy["variance"] > 1 > fdfa["variance"] > 0
    assert set(summary["off_the_line"]) == {"fdfa"}
    assert all(1 < row["train_loss"] < 3 for row in (none, noisy, fdfa))


@pytest.mark.quick_compile
def test_figure_7_in_miniature(tmp_path, on_digits, monkeypatch, capsys):
    """What is finished is kept."""
    monkeypatch.setattr(bacho2023_figure7, "METHODS", ("dfa", "fdfa"))
    flags = ["--epochs", "1", "--hidden", "8", "8", "--train-images", "256", "--runs", str(tmp_path / "runs")]
    code = command("figure7", tmp_path, *flags)
    said = capsys.readouterr()
    assert "epoch 1" in said.err
    found = json.loads((tmp_path / "results/bacho2023/figure7.json").read_text())
    degrees = {row["method"]: row["mean_degrees"] for row in found["totals"] if row["epoch"] == 1}
    assert f"dfa {degrees['dfa']:.1f}, fdfa {degrees['fdfa']:.1f}" in said.out
    assert code == (0 if degrees["fdfa"] <= degrees["dfa"] - 15 else 1)
    assert [row["layer"] for row in found["rows"] if row["method"] == "dfa"] == 2 * [f"layer{i}/linear" for i in (0, 1)]
    assert (tmp_path / "results/bacho2023/figure7.png").read_bytes().startswith(b"\x89PNG")
    assert command("figure7", tmp_path, *flags) == code
    assert "epoch 1" not in capsys.readouterr().err
