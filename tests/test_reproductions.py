"""Published cells: their names, experiments, ranges and records; a run from beginning to end; what RESULTS.md is made of."""

import dataclasses
import functools
import json
import math
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from toynets import distance, estimates, gradient, hadamard, mean, mixer, problem, setting

import forwardgrad as fg
from forwardgrad import presets, reproductions
from forwardgrad.bias import bias
from forwardgrad.cli.main import dispatch
from forwardgrad.models.localmixer import LocalMixer
from forwardgrad.presets import Experiment
from forwardgrad.recipes.ren2023 import LOSSES
from forwardgrad.reproductions import figures, records, report
from forwardgrad.reproductions.cells import Cell, Printed, Table, expected, verdict

ROOT = Path(__file__).parents[1]
TABLES = [(paper, name) for paper, tables in reproductions.papers().items() for name in tables]


# cells


def test_a_shorter_name_means_every_cell_that_begins_with_it():
    assert len(reproductions.find("ren2023:table3")) == 3 * 11
    column = reproductions.find("ren2023:table3:mnist-m-1-16")
    assert [cell.row for cell in column][:3] == ["bp", "l-bp", "lg-bp"]
    (cell,) = reproductions.find("ren2023:table3:mnist-m-1-16:lg-fg-a")
    assert (cell.experiment.method, cell.experiment.guess, cell.experiment.epochs) == ("lg-fg-a", "gaussian", 1000)
    assert cell.printed == Printed(2.55, 0.0, "Table 3")
    assert cell.experiment.model.groups == 16


@pytest.mark.parametrize(("paper", "table"), TABLES, ids=lambda x: x)
def test_every_cell_is_an_experiment(paper, table):
    cells = reproductions.find(f"{paper}:{table}")
    assert len({cell.name for cell in cells}) == len(cells)
    for cell in cells:
        start = presets.find(cell.preset)
        assert set(cell.settings) <= {f.name for x in (start, start.model) for f in dataclasses.fields(x)}
        cell.experiment.check()


@pytest.mark.parametrize(
    ("test", "error", "said"),
    [
        # binomial standard error at 50 % on 10,000 images: 0.5
        (50.0, 48.49, "better"),
        (50.0, 48.51, "in range"),
        (50.0, 51.49, "in range"),
        (50.0, 51.51, "worse"),
        (0.0, 0.29, "in range"),
        (0.0, 0.31, "worse"),
        (2.55, None, "diverged"),
    ],
)
def test_verdicts(test, error, said):
    assert verdict(error, Printed(test, 0.0, "")) == said


def test_ranges():
    assert expected(Printed(50.0, 0.0, "")) == (48.5, 51.5)
    low, high = expected(Printed(2.55, 0.0, ""))
    assert high - 2.55 == pytest.approx(2.55 - low)
    assert high - 2.55 == pytest.approx(300 * math.sqrt(0.0255 * 0.9745 / 1e4))
    assert verdict(3.0, None) is None
    assert expected(Printed(50.0, 0.0, "", spread=1.2)) == pytest.approx((46.1, 53.9))  # 3 x 1.3


def test_cells_of_bacho_and_chu():
    """Their numbers, and what differs from method to method."""
    tables = ("table1", "table2", "table3", "tableB6")
    cell = {c.name.removeprefix("bacho2023:"): c for t in tables for c in reproductions.find(f"bacho2023:{t}")}
    printed = {
        "table1:bacho-mnist-fc:fg-a": (16.60, 1.33),
        "table1:bacho-cifar10-fc:lg-fg-a": (65.44, 0.34),
        "tableB6:bacho-fashion-mnist-fc-2-layers:fdfa": (10.73, 0.07),
        "tableB6:bacho-mnist-fc-3-layers:dkp": (1.72, 0.06),
        "table2:cifar10:lg-fg-a": (62.26, 2.41),
        "table3:bacho-tiny-imagenet-alexnet:bp": (59.45, 0.31),
    }
    assert {name: (cell[name].printed.test, cell[name].printed.spread) for name in printed} == printed
    for one in cell.values():
        run, model = one.experiment, one.experiment.model
        assert (run.guess, run.lr, run.epochs) == ("gaussian", 1e-4, 100)
        assert model.output == ("layer" if one.row == "fg-w" else "readout")
        if one.table != "table3":
            assert model.batch_norm == (one.row in ("bp", "dfa", "dkp", "fdfa"))
    norms = {c.row: c.experiment.model.batch_norm for c in cell.values() if c.table == "table3"}
    assert norms == dict.fromkeys(("bp", "dfa", "dkp", "fdfa"), "all") | {
        "fg-w": "convolutions",
        "fg-a": "none",
        "lg-fg-a": "none",
    }
    units = {c.column: c.experiment.model.hidden for c in cell.values() if c.table in ("table1", "tableB6")}
    assert units["bacho-mnist-fc"] == units["bacho-fashion-mnist-fc-4-layers"] == (800, 800, 800)
    assert units["bacho-cifar10-fc-2-layers"] == (1000,)
    of_table = {c.row: c.experiment.model for c in cell.values() if c.column == "bacho-cifar100-alexnet"}
    for one in reproductions.find("bacho2023:alexnet"):
        known = of_table[one.row]
        assert (one.experiment.dataset, one.printed) == ("cifar10", None)
        assert (one.experiment.model.batch_norm, one.experiment.model.output) == (known.batch_norm, known.output)


# runs

SMALL = {"blocks": 1, "channels": 16, "groups": 2, "batch_size": 256, "epochs": 2}


def toy(column, printed, **settings):
    return Cell("toy", "figure", column, "bp", "digits", {"method": "bp", **SMALL, **settings}, printed)


TOY = (
    toy("good-1", Printed(99.0, 99.0, "nowhere")),
    toy("bad-2", Printed(0.0, 0.0, "nowhere")),
    toy("ill-3", Printed(99.0, 99.0, "nowhere"), lr=1e30),
    toy("odd-4", Printed(99.0, 99.0, "nowhere"), method="bbp"),
    toy("new-5", Printed(99.0, 99.0, "nowhere"), unheard_of=1),
)


def cell(name, *more):
    return dispatch(["reproduce", f"toy:figure:{name}", "--quiet", *more])


@pytest.mark.quick_compile
def test_a_run_and_its_record(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(reproductions, "papers", lambda: {"toy": {"figure": Table("A figure", TOY, figures.lines)}})
    monkeypatch.chdir(tmp_path)
    for name, remedy in (("odd-4", "did you mean"), ("new-5", "use a newer one")):
        assert cell(name) == 2
        assert remedy in capsys.readouterr().err
    assert not list(tmp_path.iterdir())

    found = lambda name: json.loads((tmp_path / "results" / "toy" / "figure" / f"{name}.json").read_text())
    assert cell("good-1") == 0
    assert "good-1" in (shown := capsys.readouterr().out)
    assert "results/toy/figure.png" in shown
    assert (tmp_path / "results/toy/figure.png").read_bytes().startswith(b"\x89PNG")
    good = found("good-1-bp-2-epochs-seed0")
    run = json.loads((tmp_path / "runs/reproduce/toy/figure/good-1-bp-2-epochs-seed0/result.json").read_text())
    assert good == good | run
    assert good["verdict"] == "better"
    assert (good["paper_test_error"], good["paper_epochs"], good["shortened"]) == (99.0, 2, False)
    assert good["command"] == "forwardgrad reproduce toy:figure:good-1:bp"
    assert good["cell"] == {"paper": "toy", "table": "figure", "column": "good-1", "row": "bp"}
    assert {"variant", "hardware", "commit", "version"} <= set(good)
    assert (good["curve"]["epoch"], good["curve"]["test_error"][-1]) == (
        [1, 2],
        pytest.approx(good["test_error"], abs=1e-5),
    )

    # the same experiment in another cell is not trained again; worse than the paper is exit code 1
    assert cell("bad-2", "--microbatch", "64") == 1
    bad = found("bad-2-bp-2-epochs-seed0")
    assert bad["verdict"] == "worse"
    assert (bad["wall_seconds"], bad["curve"]) == (good["wall_seconds"], good["curve"])
    # shortened, the verdict is no failure
    assert cell("bad-2", "--epochs", "1", "--train-images", "256") == 0
    assert "shortened: +" in capsys.readouterr().out
    short = found("bad-2-bp-1-epochs-seed0-train-images-256")
    assert (short["steps"], short["shortened"], short["verdict"]) == (1, True, "worse")
    assert short["command"] == "forwardgrad reproduce toy:figure:bad-2:bp --epochs 1 --train-images 256"

    assert cell("ill-3") == 1
    ill = found("ill-3-bp-2-epochs-seed0")
    assert (ill["verdict"], ill["test_error"]) == ("diverged", None)
    assert "smaller learning rate" in ill["diverged"]

    text = report.report(tmp_path / "results")
    rows = [line for line in text.splitlines() if line.startswith("| ") and "forwardgrad" in line]
    assert [row.split(" | ")[0] for row in rows] == ["| good-1", "| bad-2", "| bad-2", "| ill-3"]
    assert "| 1 of 2, first 256 images |" in rows[2]
    assert "stands in for one of the paper's length" in text
    assert "![A figure](results/toy/figure.png)" in text


@pytest.mark.quick_compile
@pytest.mark.skipif(not os.environ.get("FORWARDGRAD_DATA"), reason="FORWARDGRAD_DATA is not set")
def test_a_published_cell_runs_and_is_kept(tmp_path):
    line = ["reproduce", "ren2023:table3:mnist-s-1-1:bp", "--train-images", "256", "--epochs", "1", "--channels", "16"]
    line += ["--quiet", "--runs", str(tmp_path / "runs"), "--results", str(tmp_path / "results")]
    assert dispatch(line) == 0
    (path,) = (tmp_path / "results").rglob("*.json")
    assert path.stem == "mnist-s-1-1-bp-1-epochs-seed0-channels-16-train-images-256"
    first = path.read_text()
    assert json.loads(first)["steps"] == 2
    assert dispatch(line) == 0
    assert path.read_text() == first  # its seconds too: nothing ran again


def test_figures_are_drawn_from_records_alone(tmp_path):
    for paper, name in TABLES:
        table = reproductions.papers()[paper][name]
        if table.draw is not None or table.curves:
            made = [
                records.record(
                    one,
                    dataclasses.replace(one.experiment, seed=seed),
                    {"test_error": 30.0, "train_error": 20.0 + seed, "epochs": 200, "seed": seed, "dataset": "cifar10"},
                    {},
                    {"epoch": [1, 2], "train_loss": [2.0, 1.0], "train_error": [9.0, 8.0], "test_error": [9.0, 8.5]},
                )
                for one in table.cells
                for seed in (0, 1)
            ]
            assert len(records.alike(made, made[0])) == len(made)
            figures.draw(tmp_path / f"{name}.png", table, made)
    drawn = [name for paper, name in TABLES if (t := reproductions.papers()[paper][name]).draw is not None or t.curves]
    assert len(list(tmp_path.glob("*.png"))) == len(drawn) >= 2


def test_means_are_over_the_seeds_of_runs_that_are_alike(tmp_path):
    """Two seeds make a row; another length, another cell, and a seed that diverged do not enter it."""
    kept = {
        "good-1": [(0, 10, 2.0), (1, 10, 4.0), (2, 10, None), (0, 20, 9.0)],
        "bad-2": [(0, 10, 1.0)],
    }
    where = tmp_path / "results/toy/figure"
    where.mkdir(parents=True)
    for column, runs in kept.items():
        for seed, epochs, error in runs:
            one = {
                "cell": {"paper": "toy", "table": "figure", "column": column, "row": "bp"},
                "changed": {"epochs": epochs, "seed": seed},
                **{"seed": seed, "epochs": epochs, "paper_epochs": 100, "variant": "paper", "shortened": True},
                **{"test_error": error, "train_error": error and error / 2, "verdict": "better", "bias": None},
                **{"paper_test_error": 3.0, "paper_train_error": None, "wall_seconds": 1.0, "hardware": "x"},
                "command": f"forwardgrad reproduce toy:figure:{column}:bp --epochs {epochs} --seed {seed}",
            }
            (where / f"{column}-{seed}-{epochs}.json").write_text(json.dumps(one))
    text = report.report(tmp_path / "results")
    means = text.split("Means over seeds")[1].strip().splitlines()[2:]
    assert means[2:] == ["| good-1 | bp | 3.00 / - | 3.00 ± 1.41 / 1.50 ± 0.71 | 10 of 100 | 0, 1 |"]


def test_results_are_those_of_the_records():
    """`python -m forwardgrad.reproductions.report` writes it."""
    assert (ROOT / "RESULTS.md").read_text() == report.report(ROOT / "results")


def test_a_picture_without_records_is_shown_alone(tmp_path):
    for figure in ("figure6", "figure8"):  # of cells, and measured
        (tmp_path / "ren2023").mkdir(exist_ok=True)
        (tmp_path / "ren2023" / f"{figure}.png").touch()
    text = report.report(tmp_path)
    assert text.count("\n### Figure ") == text.count("\n![Figure ") == 2
    assert "Measured" not in text


# settings of the ablations: what each of them changes, and what none of them may

EXACT = {"block+patch+group": "local", "block+patch": "local", "block": "local", "global": "global"}


@functools.cache
def by_losses(losses):
    """Estimates along every row of a Hadamard matrix."""
    return estimates(lambda guess: fg.recipes.lg_fg_a(mixer(2), guess=guess, losses=losses), hadamard(), problem(2))


@pytest.mark.float64
@pytest.mark.parametrize("losses", LOSSES)
def test_where_losses_are_changes_an_estimate_but_only_patch_and_group_its_mean(losses):
    found = by_losses(losses)
    exact = distance(mean(found), gradient(EXACT.get(losses, "global"))) < 1e-10
    assert exact == (losses != "patch+group")
    others = [by_losses(other) for other in LOSSES if other != losses]
    assert all(distance(*(jax.tree.map(lambda x: x[0], tree) for tree in (found, other))) > 1e-3 for other in others)


def test_a_table_without_printed_numbers_has_no_columns_for_them():
    columns, row = report.COLUMNS, tuple(report.COLUMNS)
    heads = lambda *args: report._table(*args).split("\n")[0].strip("| ").split(" | ")
    assert heads(columns, [row], True) == list(columns)
    as_paper = tuple("paper" if name == "variant" else name for name in columns)
    assert heads(columns, [as_paper], False) == [c for c in columns if c not in report.OF_PAPER]
    released = tuple("released" if name == "variant" else name for name in columns)
    assert "variant" in heads(columns, [as_paper, released], False)
    assert report._table(columns, [], False) == ""


def test_a_report_of_nothing_leaves_the_old_one(tmp_path, capsys):
    (tmp_path / "RESULTS.md").write_text("old")
    for words in (["--help"], [str(tmp_path)], ["results", "RESULTS.md", "more"]):
        assert report.main([*words[:1], str(tmp_path / "RESULTS.md"), *words[2:]]) == 2
        assert "give the directory of results" in capsys.readouterr().err
    assert (tmp_path / "RESULTS.md").read_text() == "old"


@pytest.mark.float64
def test_patch_and_group_losses_without_blocks_are_refused_and_their_bias_is_reported():
    model = LocalMixer(blocks=2, patches=2, channels=8, groups=2)
    network, params, state, batch = setting(model, 4)
    method = Experiment(model, losses="patch+group").estimator(network)
    with pytest.raises(fg.InputError, match=r"biased at 'block0/.*accept the bias with allow_bias=True"):
        method.init(jax.random.key(2), params, state, batch)
    measured = bias(method, params, state, batch)
    assert measured["block0/channel"] > 0.1
    assert all(measured[f"block1/{tap}"] < 1e-10 for tap in ("token", "channel", "grouped"))


TINY = LocalMixer(blocks=1, patches=2, channels=8, groups=2)
ABLATIONS = [
    *({"norm": norm} for norm in ("bn", "ln")),
    *({"norm_place": place} for place in ("begin", "before", "after")),
    {"groups": 1},
    {"method": "lg-fg-a", "draws": 2},
]


@functools.cache
def first_gradient(method="lg-bp", **settings):
    """Step 1's, for the channel weights: their number is the same whatever the setting."""
    model = dataclasses.replace(TINY, **{k: v for k, v in settings.items() if hasattr(TINY, k)})
    own = {k: v for k, v in settings.items() if not hasattr(TINY, k)}
    network, params, state, batch = setting(model, 4)
    estimator = Experiment(model, method=method, guess="gaussian", executor="whole", **own).estimator(network)
    step = jax.jit(lambda *a: estimator.estimate(jax.random.key(3), estimator.initial_state(jax.random.key(2), *a), *a))
    return jnp.ravel(step(params, state, batch)[0].grads["block0"]["layers"]["channel"]["kernel"])


@pytest.mark.float64
@pytest.mark.parametrize("settings", ABLATIONS, ids=str)
def test_an_ablation_changes_the_first_gradient(settings):
    default = first_gradient(settings.get("method", "lg-bp"))
    assert jnp.linalg.norm(first_gradient(**settings) - default) > 1e-3 * jnp.linalg.norm(default)
