"""Figures 3 to 7 of Bacho & Chu (2023): what they compare with, exactly; noise on an estimate; every figure in miniature, on digits."""

import dataclasses
import inspect
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toynets import along, distance, gauss

import forwardgrad as fg
from forwardgrad import reproductions
from forwardgrad.cli.main import dispatch
from forwardgrad.diagnostics import over_training
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

    noisy = fg.wrappers.with_noise(exact, 1.0)
    estimate = lambda method, key: method.estimate(key, (), params, state, batch)[0].grads
    less = lambda method, key: jax.tree.map(jnp.subtract, estimate(method, key), estimate(exact, key))
    whole = jax.jit(lambda sigma, key: less(dataclasses.replace(noisy, sigma=sigma), key))
    noise = lambda sigma, key=3: whole(sigma, jax.random.key(key))

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
    pieces = fg.wrappers.with_noise(dataclasses.replace(exact, microbatch=2), 1.0)
    assert distance(jax.jit(lambda: less(pieces, jax.random.key(3)))(), one) < 1e-12
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


def test_what_figure_6_makes_of_its_points():
    keys = ("method", "sigma", "variance", "train_loss", "output")
    point = lambda *values, output="readout": dict(zip(keys, (*values, output), strict=True))
    noisy = [point("bp", 1.0, 1.0, 0.5), point("bp", 10.0, 100.0, 2.0)]
    found = [point("bp", 0.0, 0.0, 0.1), *noisy, point("fg-w", 0.0, 10.0, 1.0), point("fdfa", 0.0, 1e-3, 0.6)]
    # half way between 1 and 100 on the logarithmic axis, and below all of them
    assert bacho2023_figure6.off_the_line(found) == pytest.approx({"fg-w": 1.0 / 1.25, "fdfa": 0.6 / 0.5})
    assert bacho2023_figure6.ranks(found[:3]) == pytest.approx(1.0)
    # what is off the line counts, but for the point that has another layer's variance too
    whole = point("fg-w", 0.0, 200.0, 40.0, output="layer")
    assert bacho2023_figure6.conclude([*found[:4], whole])["passes"]
    assert f"{bacho2023_figure6.WHOLE} x 20.00" in bacho2023_figure6.conclude([*found[:4], whole])["said"]
    assert not bacho2023_figure6.conclude([*found[:4], point("fg-a", 0.0, 200.0, 40.0)])["passes"]
    assert bacho2023_figure6.ranks([*noisy, point("fdfa", 0.0, 1e-3, 3.0)]) == pytest.approx(-0.5)


def command(figure, tmp_path, *flags):
    return dispatch(["reproduce", f"bacho2023:{figure}", "--results", str(tmp_path / "results"), *flags])


@pytest.mark.quick_compile
def test_figure_4_in_miniature(tmp_path, on_digits, capsys):
    assert command("figure4", tmp_path, "--units", "4", "--examples", "2") == 0
    said = capsys.readouterr()
    rows = json.loads((tmp_path / "results/bacho2023/figure4.json").read_text())
    assert "given the previous B" in said.out
    assert len(said.err.strip().splitlines()) == len(rows) == sum(map(len, bacho2023_figure4.ALPHAS.values()))
    assert {row["updates"] for row in rows if row["kind"] == "given the previous B"} == {1}
    assert abs(bacho2023_figure4.slope(rows, "given the previous B") - 2) < 0.05
    assert abs(bacho2023_figure4.slope(rows, "at rest") - 1) < 0.2
    assert (tmp_path / "results/bacho2023/figure4.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.quick_compile
def test_figure_5_in_miniature(tmp_path, on_digits, monkeypatch):
    monkeypatch.setattr(bacho2023_figure5, "LABELS", {"fg-a": "FG-A"})
    said = []
    summary = bacho2023_figure5.run(tmp_path, images=3, samples=400, sweeps={"neurons": (16, 64)}, say=said.append)
    rows = files(tmp_path, summary)
    assert summary["passes"]
    assert [(row["neurons"], row["inputs"], row["method"]) for row in rows] == [(n, 64, "fg-a") for n in (16, 64)]
    assert len(said) == 2
    assert all(0 < row["standard_error"] < row["theory"] for row in rows)


@pytest.mark.quick_compile
def test_figure_6_in_miniature(tmp_path, on_digits, monkeypatch):
    """Trained and measured: backpropagation with noise, and fdfa."""
    point = bacho2023_figure6.point
    exact = {
        "method": "bp",
        "output": "readout",
        "sigma": 0.0,
        "train_loss": 1.0,
        "variance": 0.0,
        "variance_share": 0.0,
    }
    some = lambda one, arrays, sigma, draws: point(one, arrays, sigma, draws) if sigma or one.method != "bp" else exact
    monkeypatch.setattr(bacho2023_figure6, "point", some)
    monkeypatch.setattr(bacho2023_figure6, "METHODS", (("fdfa", "readout"),))
    summary = bacho2023_figure6.run(
        tmp_path, units=8, train_images=256, draws=8, sigmas=(0.0, 0.1), say=lambda line: None
    )
    _, noisy, fdfa = files(tmp_path, summary)
    assert [(row["method"], row["sigma"]) for row in (noisy, fdfa)] == [("bp", 0.1), ("fdfa", 0.0)]
    assert noisy["measured_after"] == [1, 2, 3, 4]
    assert 0.8 < noisy["variance_share"] <= 1
    assert noisy["variance"] > 1 > fdfa["variance"] > 0
    assert set(summary["off_the_line"]) == {"fdfa"}
    assert all(1 < row["train_loss"] < 3 for row in (noisy, fdfa))


@pytest.mark.parametrize(("fdfa", "code"), [(65.0, 0), (65.1, 1)])
def test_figure_7_is_what_diagnose_measures(tmp_path, on_digits, monkeypatch, capsys, fdfa, code):
    """`test_diagnose.py` has the measurement itself; here are its arguments, and the check after five epochs."""
    asked = {}

    def measured(*args, **named):
        asked.update(inspect.signature(diagnose).bind(*args, **named).arguments)
        row = lambda method, epoch, degrees: {"method": method, "epoch": epoch, "own_target": True, "degrees": degrees}
        angles = {"dfa": 80.0, "dkp": 70.0, "fdfa": fdfa}
        found = [row(method, epoch, angle + 5 - epoch) for method, angle in angles.items() for epoch in range(7)]
        rows = [{**one, "layer": f"layer{i}/linear"} for one in found for i in range(2)]
        return {"rows": rows, "totals": [{**one, "mean_degrees": one["degrees"]} for one in found]}

    diagnose = over_training.diagnose
    monkeypatch.setattr(over_training, "diagnose", measured)
    flags = [
        "--epochs",
        "6",
        "--hidden",
        "8",
        "8",
        "--train-images",
        "256",
        "--runs",
        str(tmp_path / "runs"),
        "--quiet",
    ]
    assert command("figure7", tmp_path, *flags) == code
    assert f"dfa 80.0, dkp 70.0, fdfa {fdfa}" in capsys.readouterr().out
    assert (tmp_path / "results/bacho2023/figure7.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "results/bacho2023/figure7.json").exists()
    one, how = asked["experiment"], asked["how"]
    assert (one.epochs, one.model.hidden, one.model.batch_norm, len(asked["arrays"].train_images)) == (
        6,
        (8, 8),
        True,
        256,
    )
    assert (asked["methods"], how.epochs, how.draws, how.examples) == (("dfa", "dkp", "fdfa"), (*range(7),), 8, 64)
    assert asked["out"] == tmp_path / "runs/bacho2023/figure7-6-epochs-hidden-8x8-train-images-256"
