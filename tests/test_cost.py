"""What a step costs: operations by hand, memory, the bench command, the remembered microbatch, precision."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

import forwardgrad as fg
from forwardgrad import data, presets
from forwardgrad.cli import bench
from forwardgrad.cli.main import dispatch
from forwardgrad.diagnostics import cost
from forwardgrad.guesses.random import _quantiles, normals
from forwardgrad.models.localmixer import LocalMixer
from forwardgrad.models.mlp import MLP
from forwardgrad.network import complete, in_precision
from forwardgrad.training import auto, loop
from forwardgrad.whole import Step

pytestmark = pytest.mark.quick_compile

MIXER = LocalMixer(blocks=2, patches=2, channels=16, groups=2)
SMALL = dataclasses.replace(presets.find("digits"), model=MLP(hidden=(16,)), batch_size=32)


def task(**changes):
    return cost.Task(dataclasses.replace(SMALL, **changes), (8, 8, 1), 10)


@pytest.mark.parametrize(("method", "draws", "passes"), [("bp", 1, 3), ("lg-fg-a", 4, 6), ("fg-w", 2, 5)])
def test_operations_by_hand(method, draws, passes):
    examples, patches, channels, group = 32, 4, 16, 8
    first = patches * 16 * channels + patches * channels * group  # 8 x 8 pixels in 2 x 2 patches of 16
    second = patches**2 * channels + patches * channels**2 + patches * channels * group
    classifier = channels * 10
    expected = 2 * passes * examples * (first + second + classifier) / 1e9
    assert cost.gflop_by_hand(task(model=MIXER, method=method, draws=draws)) == pytest.approx(expected, rel=1e-12)


def test_loops_count_as_often_as_they_run():
    jaxpr = jax.make_jaxpr(lambda x: jax.lax.scan(lambda c, _: (c @ c, None), x, None, length=5)[0])(jnp.ones((4, 4)))
    assert cost._products(jaxpr.jaxpr) == 5 * 2 * 4**3


@pytest.mark.parametrize("method", ["bp", "fa"])
def test_xla_counts_at_least_the_products(method):
    """And not many more: what feedback alignment would compute forwards with its feedback weights is left out."""
    big = task(model=MLP(hidden=(512, 512)), method=method)
    by_hand, by_xla = cost.gflop_by_hand(big), cost.gflop_by_xla(big)
    first = 2 * 32 * 64 * 512 / 1e9  # nobody asks for the derivative with respect to the images
    assert by_hand - first < by_xla < 1.2 * by_hand


def test_a_step_that_does_not_fit_is_not_run(monkeypatch):
    sizes = {size: cost.step(task(microbatch=size)).total_mib for size in (0, 8)}
    least = min(sizes, key=sizes.get)
    monkeypatch.setattr(cost, "available_mib", lambda: 1e-3)
    best, tried = cost.fastest(task(), [0, 8], 1)
    assert (best.microbatch, [t.seconds for t in tried]) == (least, [None, None])
    monkeypatch.setattr(cost, "available_mib", lambda: sizes[least] / 0.9 + 1e-3)
    assert cost.fastest(task(), [0, 8], 1)[0].microbatch == least


def test_bench_writes_the_estimate_of_what_does_not_fit(tmp_path, monkeypatch):
    monkeypatch.setattr(cost, "available_mib", lambda: 1e-3)
    line = ["bench", "digits", "--methods", "lg-fg-a", "--model", "mlp", "--hidden", "8"]
    assert dispatch([*line, "--microbatches", "0", "--repeats", "1", "--out", str(tmp_path)]) == 0
    (row,) = json.loads((tmp_path / "bench.json").read_text())
    assert (row["fits"], row["seconds_per_step"], row["ratio_to_bp"], row["peak_mib"]) == (False, None, None, None)
    assert row["temp_mib"] > 0


KEYS = "method blocks groups batch guess seconds_per_step ratio_to_forward ratio_to_bp temp_mib peak_mib gflop compile_seconds"


def test_bench_writes_rows_and_a_picture(tmp_path, capsys):
    line = ["bench", "digits", "--methods", "bp,lg-fg-a", "--model", "mlp", "--hidden", "8", "--batch-size", "16"]
    line += ["--over-batch", "32", "--microbatches", "8", "0", "--repeats", "1", "--no-peak", "--out", str(tmp_path)]
    assert dispatch(line) == 0
    rows = json.loads((tmp_path / "bench.json").read_text())
    assert [(r["method"], r["batch"]) for r in rows] == [(m, b) for b in (16, 32) for m in ("bp", "lg-fg-a")]
    for row in rows:
        assert set(KEYS.split()) | {"microbatch", "executor"} <= row.keys()
        assert row["gflop"] > 0
        assert [t["microbatch"] for t in row["tried"]] == [8, 0]
        assert row["microbatch"] in (8, 0)
        assert row["executor"] == {"lg-fg-a": "streamed", "bp": "whole"}[row["method"]]
    assert [row["ratio_to_bp"] == 1 for row in rows] == [True, False] * 2
    assert (tmp_path / "bench.png").stat().st_size > 10_000
    assert "lg-fg-a" in capsys.readouterr().out


def test_every_sweep_varies_one_size():
    options = bench.Options(over_blocks=(2, 4), over_groups=(1,), over_batch=(64,))
    sizes = [tuple(bench._size(one).values()) for one in bench._sizes(task(model=MIXER), options)]
    assert sizes == [(2, 2, 32), (4, 2, 32), (2, 1, 32), (2, 2, 64)]


def test_the_peak_of_a_process_of_its_own_is_what_xla_counts_or_a_little_more():
    one = task(model=MLP(hidden=(2048, 2048)), method="bp")
    peak = cost.peak_mib(one)
    if peak is None:
        pytest.skip("this system does not tell a process's peak")
    counted = cost.step(one)
    # libraries that multiply matrices take room of their own, up to a copy of the weights
    assert 0.9 * counted.temp_mib < peak - counted.held_mib < 3 * counted.temp_mib


def test_auto_measures_once_and_remembers(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    calls = []

    def fastest(task, sizes, repeats):
        calls.append(sizes)
        return cost.Tried(8, 0.1, cost.Compiled(lambda: None, 1.0, 1.0, 0.0)), []

    monkeypatch.setattr(cost, "fastest", fastest)
    arrays = data.find("digits").load(data.data_directory())
    experiment = dataclasses.replace(SMALL, microbatch="auto")
    assert auto.chosen(experiment, arrays).microbatch == 8
    assert auto.chosen(dataclasses.replace(experiment, seed=3, lr=0.1), arrays).microbatch == 8
    assert calls == [cost.microbatches(task())]
    auto.chosen(dataclasses.replace(experiment, method="bp"), arrays)
    assert len(calls) == 2
    auto.memory().write_text("{")  # damaged: measured again
    auto.chosen(experiment, arrays)
    assert len(calls) == 3
    coupled = dataclasses.replace(experiment, model=MLP(hidden=(4,), batch_norm=True), method="bp")
    assert auto.chosen(coupled, arrays).microbatch == 0
    assert len(calls) == 3
    assert auto.chosen(SMALL, arrays) is SMALL
    monkeypatch.setattr(cost, "fits", lambda compiled: False)
    with pytest.raises(fg.InputError, match="use a smaller --batch-size"):
        auto.chosen(dataclasses.replace(experiment, method="lg-bp"), arrays)


def test_a_run_resumes_with_the_microbatch_that_it_began_with(tmp_path, monkeypatch):
    monkeypatch.setattr(auto, "_measured", lambda task: 8)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "one"))
    experiment = dataclasses.replace(SMALL, microbatch="auto", epochs=1, batch_size=256)
    whole = loop.train(experiment, tmp_path / "run", quiet=True)
    assert json.loads((tmp_path / "run" / "config.json").read_text())["experiment"]["microbatch"] == 8
    monkeypatch.setattr(auto, "_measured", lambda task: 4)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "two"))
    again = loop.train(experiment, tmp_path / "run", quiet=True, resume=True)
    assert {**again, "wall_seconds": 0} == {**whole, "wall_seconds": 0}
    assert json.loads((tmp_path / "run" / "config.json").read_text())["experiment"]["microbatch"] == 8


def test_bfloat16_rounds_activations_and_nothing_else():
    network = MLP(hidden=(64, 64), batch_norm=True).network((8, 8, 1), 10)
    params, state = network.init(jax.random.key(0))
    batch = {"inputs": jax.random.normal(jax.random.key(1), (64, 8, 8, 1)), "labels": jnp.arange(64) % 10}
    exact = jax.jit(fg.recipes.bp(network).estimate)(jax.random.key(0), (), params, state, batch)
    short = jax.jit(fg.recipes.bp(in_precision(network, jnp.bfloat16)).estimate)(
        jax.random.key(0), (), params, state, batch
    )
    shapes = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
    assert shapes(exact) == shapes(short)
    flat = lambda out: jnp.concatenate([x.ravel() for x in jax.tree.leaves(out[0].grads)])
    difference = float(jnp.linalg.norm(flat(exact) - flat(short)) / jnp.linalg.norm(flat(exact)))
    assert 1e-4 < difference < 0.1  # bfloat16 has eight bits
    network = in_precision(MIXER.network((8, 8, 1), 10), jnp.bfloat16)
    params, state = network.init(jax.random.key(0))
    taps = lambda p: Step(network, fg.local(), p, state, complete(batch)).taps
    assert {z.value.dtype for z in jax.eval_shape(taps, params).values()} == {jnp.dtype(jnp.bfloat16)}


@pytest.mark.float64
def test_gaussians_have_unit_variance_over_all_their_values():
    u = _quantiles()
    assert abs(scipy.stats.norm.cdf(u[1] * 0.999989859274874) - 1.5 / 2**16) < 1e-12
    assert abs(u.mean()) < 1e-12
    assert abs((u**2).mean() - 1) < 1e-12
    assert abs((u**4).mean() - 3) < 1e-3
    drawn = normals(jax.random.bits(jax.random.key(0), (3, 4)), jnp.float64)
    assert drawn.shape == (3, 8)
    assert np.isin(np.asarray(drawn).round(12), u.round(12)).all()
