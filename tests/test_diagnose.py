"""`forwardgrad diagnose`: complete rows, files, going on, refusals; the error curves that records keep."""

import json
import os

import pytest

from forwardgrad.cli.main import dispatch
from forwardgrad.diagnostics.alignment import ALL
from forwardgrad.reproductions import curves

TINY = ["--model", "mlp", "--hidden", "8", "8", "--batch-size", "256", "--epochs", "1", "--lr", "0.01", "--quiet"]
KEYS = {
    *("method", "layer", "epoch", "step", "reference", "own_target", "draws", "examples", "gradient_norm", "estimate_norm"),
    *("degrees", "cosine", "cosine_of_mean", "bias", "bias_se", "bias_squared", "bias_squared_se", "variance"),
    "variance_share",
}  # fmt: skip


def line(out, *more):
    methods = ["--methods", "bp,lg-fg-a", "--draws-for-moments", "8", "--out", str(out)]
    return dispatch(["diagnose", "digits", *TINY, *methods, *more])


@pytest.mark.quick_compile
def test_rows_are_complete_and_a_repeated_command_goes_on(tmp_path, capsys):
    out = tmp_path / "out"
    assert line(out) == 0
    shown = capsys.readouterr().out
    assert "layer1/linear" in shown
    assert "lg-fg-a" in shown
    assert (out / "diagnose.png").stat().st_size > 10_000
    found = json.loads((out / "diagnose.json").read_text())
    rows, totals = found["rows"], found["totals"]
    expected = [("bp", "global", True), ("lg-fg-a", "local", True), ("lg-fg-a", "global", False)]
    assert [(r["method"], r["epoch"], r["reference"], r["own_target"], r["layer"]) for r in rows] == [
        (method, epoch, reference, own, f"layer{i}/linear")
        for name in ("bp", "lg-fg-a")
        for epoch in (0, 1)
        for method, reference, own in expected
        if method == name
        for i in (0, 1)
    ]
    assert all(set(row) == KEYS for row in rows)
    assert {r["layer"] for r in totals} == {ALL}
    for row in (r for r in rows if r["method"] == "bp"):
        assert row["cosine"] == pytest.approx(1, abs=1e-5)
        assert (row["bias"], row["variance"]) == (pytest.approx(0, abs=1e-5), pytest.approx(0, abs=1e-9))
    assert all(r["variance"] > 1e-3 for r in rows if r["method"] == "lg-fg-a" and r["own_target"])
    mine = [r["degrees"] for r in rows if (r["method"], r["epoch"], r["reference"]) == ("lg-fg-a", 1, "local")]
    (whole,) = [r for r in totals if (r["method"], r["epoch"], r["reference"]) == ("lg-fg-a", 1, "local")]
    assert whole["mean_degrees"] == pytest.approx(sum(mine) / 2)
    (result,) = [r for r in found["runs"] if r["method"] == "lg-fg-a"]
    assert whole["held_out_error"] == pytest.approx(result["test_error"])

    # the last measurement and what ends the run are lost: it goes on from the checkpoint, and measures the same
    run = out / "lg-fg-a-seed0"
    (run / "result.json").unlink()
    measured = json.loads((run / "alignment.json").read_text())
    measured["rows"] = [row for row in measured["rows"] if row["epoch"] == 0]
    (run / "alignment.json").write_text(json.dumps(measured))
    assert line(out) == 0
    again = json.loads((out / "diagnose.json").read_text())
    assert (again["rows"], again["totals"]) == (rows, totals)

    capsys.readouterr()
    assert line(out, "--draws-for-moments", "12") == 2
    assert (
        "measured otherwise: draws (8 there, 12 here); use the same flags, or another --out" in capsys.readouterr().err
    )
    (run / "alignment.json").write_text(json.dumps(measured))
    assert line(out) == 2
    assert "was not measured after epoch 1" in capsys.readouterr().err
    assert line(out, "--at", "0") == 0
    assert {r["epoch"] for r in json.loads((out / "diagnose.json").read_text())["rows"]} == {0}


def test_a_method_that_the_network_cannot_serve_is_refused_before_another_trains(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(os.path.dirname(__file__))
    methods = ["--methods", "fg-a,lg-fg-a", "--out", str(tmp_path / "out")]
    assert dispatch(["diagnose", "--model", "test_cli:bare_network", *methods]) == 2
    assert "use a method with a global loss" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def metrics(path, epochs):
    path.mkdir(parents=True)
    text = ""
    for i in range(1, epochs + 1):
        text += json.dumps({"step": 2 * i - 1, "epoch": i - 0.5, "loss": 1.0, "error": 1.0}) + "\n"
        ends = {"epoch_loss": 2.0 / i, "epoch_error": 90.0 / i, "test_error": 91.0 / i}
        text += json.dumps({"step": 2 * i, "epoch": float(i), "loss": 1.0, "error": 1.0, **ends}) + "\n"
    (path / "metrics.jsonl").write_text(text)
    return path


def test_a_curve_has_every_epoch_or_two_hundred_of_them(tmp_path):
    assert curves.of(tmp_path) is None
    assert curves.of(metrics(tmp_path / "short", 3)) == {
        "epoch": [1, 2, 3],
        "train_loss": [2.0, 1.0, 0.66667],
        "train_error": [90.0, 45.0, 30.0],
        "test_error": [91.0, 45.5, 30.33333],
    }
    long = curves.of(metrics(tmp_path / "long", 1000))
    assert long is not None
    assert {len(values) for values in long.values()} == {200}
    assert (long["epoch"][0], long["epoch"][-1]) == (1, 1000)
    assert long["test_error"] == [round(91 / epoch, 5) for epoch in long["epoch"]]


def test_curves_are_drawn_of_the_records_that_have_any(tmp_path):
    record = lambda column, row, curve: {"cell": {"column": column, "row": row}, **curve}
    curve = {"curve": curves.of(metrics(tmp_path / "run", 3))}
    records = [record(column, row, curve) for column in ("mlp", "cnn") for row in ("bp", "fdfa")]
    path = tmp_path / "figure.png"
    assert not curves.draw(path, "nothing", ("train_loss",), [record("mlp", "bp", {})])
    assert not path.exists()
    assert curves.draw(path, "Figure 3", ("train_loss", "test_accuracy"), [*records, record("mlp", "dfa", {})])
    assert path.read_bytes().startswith(b"\x89PNG")
