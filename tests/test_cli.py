"""The command line: every flag exists, every refusal is one sentence with its remedy and exit code 2, exit codes."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

import forwardgrad as fg
from forwardgrad import presets, recipes
from forwardgrad.cli.main import dispatch
from forwardgrad.training import metrics

QUICK = ["--blocks", "1", "--channels", "16", "--groups", "2", "--batch-size", "256", "--quiet"]


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    directory = tmp_path_factory.mktemp("cli") / "run"
    assert dispatch(["train", *QUICK, "--epochs", "2", "--run-dir", str(directory)]) == 0
    return directory


REFUSALS = {
    "trian": "did you mean 'train'",
    "train digit": "did you mean 'digits'",
    "train --epoch 3": "did you mean '--epochs'",
    "train --epochs many": "invalid literal",
    "train --epochs 0": "--epochs must be at least 1",
    "train --lr 0": "--lr must be positive",
    "train --weight-decay -1": "--weight-decay must not be negative",
    "train --seed -1": "--seed must be at least 0",
    "train --guess cauchy": "'rademacher', 'gaussian', 'orthogonal'",
    "train --method lgfga": "did you mean 'lg-fg-a'",
    "train --dataset cifar": "did you mean 'cifar10'",
    "train --dataset npz:nowhere.npz": "nowhere.npz",
    "train --model mpl": "did you mean 'mlp'",
    "train --model": "forwardgrad list models",
    "train --models mlp": "did you mean '--model'",
    "train --method dfa --feedback-lr 0.1": "it is no option of dfa; dkp, fdfa, fg-a-fdfa have it; leave it out",
    "train --method fdfa --alpha 0.1": "it needs --feedback-rule average; leave it out",
    "train --method fdfa --feedback-rule average --alpha 2": "at most 1, not 2",
    "train --method fdfa --feedback-rank 11": "to 512 units has a rank of 10 at most, not 11: give it a smaller one (--feedback-rank)",
    "train --method bp --alpha 0.1": "no option of bp; fdfa, fg-a-fdfa have it",
    "compare --method bp --out x": "give them to --methods",
    "bench --out DIR --microbatch 4": "give them to --microbatches",
    "train --momentum 0.5 --optimizer adam": "needs --optimizer sgd",
    "compare --methods bp,lg-bp --no-mask --out x": "no option of bp and is no option of lg-bp",
    "reproduce ren2023:table3:mnist-s-1-1:bp --draws 2": "no option of bp",
    "train --model cnn --method bp --kernel 20": "convolution 1 of 2, each 20 x 20: set a smaller --kernel.",
    "train --model mlp --groups 3": "forwardgrad train --help",
    "train --groups 7": "set --groups to a divisor",
    "train --patches 3": "set --patches to a common divisor",
    "train --batch-size 5000": "choose a batch size from 1 to 1437",
    "train --microbatch 5": "set --microbatch to a divisor",
    "train --microbatch -4": "--microbatch must be at least 0",
    "train --seed 18446744073709551616": "--seed must be at most 4294967295",
    "train --model :foo": "give package.module:object, importable from here",
    "train --model .foo:bar": "give package.module:object, importable from here",
    "train --validation 2000": "choose a number from 1 to 1436",
    "train --resume": "add --run-dir DIR",
    "train --checkpoint-every -1": "--checkpoint-every must be at least 0",
    "train --norm bn": "train without BatchNorm (--no-batch-norm, --batch-norm none or --norm local, whichever the model has)",
    "train --norm bn --losses global": "or accept the bias with allow_bias=True (--allow-bias)",
    "train --norm ln": "leave 'patch' out of the partition",
    "train digits more": "Unrecognized options",
    "train mnist-s-1-1 --data-dir nowhere --offline": "nowhere",
    "train --microbatch most": "auto",
    "train --executor fast": "'auto', 'whole', 'streamed'",
    "train --executor streamed --method bp": "use the whole executor (--executor whole)",
    "bench --out DIR --methods bp,bp": "names no method, or one twice",
    "bench": "add --out DIR",
    "bench --out DIR --methods bp --microbatches -4": "--microbatch must be at least 0, not -4",
    "bench --out DIR --model mlp --methods bp,lg-fg-a-plus --microbatches 0": "--perturbed all",
    "bench --out DIR --epochs 3": "--epochs would change nothing: `forwardgrad bench` does not use it",
    "bench --out DIR --model mlp --batch-norm --methods bp --microbatches 8": "this model has state",
    "bench --out /dev/null/x --methods bp": "choose another --out",
    "reproduce ren2023:figure5 --results /dev/null": "choose other --results",
    "bench --out DIR --repeats 0": "--repeats must be at least 1",
    "bench --out DIR --model mlp --over-groups 4": "leave --over-groups out",
    "bench --out DIR --over-blocks 0": "set --blocks",
    "bench --out DIR --over-batch 0": "--batch-size must be at least 1",
    "evaluate": "missing",
    "evaluate nowhere": "give the directory that `forwardgrad train` wrote",
    "compare --methods bp": "add --out DIR",
    "compare --methods bp,bp --out x": "give different names",
    "compare --methods bp,xp --out x": "did you mean",
    "diagnose --methods bp": "add --out DIR",
    "diagnose --methods bp,xp --out x": "did you mean",
    "diagnose --epochs 0 --out x": "--epochs must be at least 1",
    "diagnose --epochs 2 --at 0 3 --out x": "give numbers from 0 to 2",
    "diagnose --draws-for-moments 10 --out x": "must be a multiple of 4, at least 8",
    "diagnose --examples -1 --out x": "--examples must be at least 0",
    "diagnose --examples 1438 --out x": "set --examples to at most that",
    "compare --methods bp,lg-fg-a-plus --model mlp --out x": "--perturbed all",
    "compare --methods bp,fg-a --model mlp --hidden 8 8 --batch-norm --out x": "train without BatchNorm",
    "compare --seeds 0 --out x": "--seeds must be at least 1",
    "train --train-images 1500": "set --train-images from 1 to 1437, or to 0 for all",
    "train --train-images 31": "set --train-images to at least that",
    "train --losses patch": "'block+patch+group', 'block+patch'",
    "reproduce": "needs a table, a column or a cell: bacho2023:table1",
    "reproduce ren2023": "begin with one of ren2023:table3",
    "reproduce ren2022:table3": "did you mean 'ren2023'",
    "reproduce ren2023:tabel3": "did you mean 'table3'",
    "reproduce ren2023:table3:mnist-s-1-2": "did you mean 'mnist-s-1-1'",
    "reproduce ren2023:table3:mnist-s-1-1:lgfga": "did you mean 'lg-fg-a'",
    "reproduce ren2023:table3:mnist-s-1-1:bp:0": "is no PAPER:TABLE[:COLUMN[:METHOD]]",
    "reproduce ren2023:figure8:mnist-s-1-1": "is measured as a whole",
    "reproduce ren2023:figure8 --units 3": "forwardgrad reproduce --help",
    "reproduce bacho2023:figure4 --unit 3": "did you mean '--units'",
    "reproduce bacho2023:figure4 --samples 1": "--samples must be at least 2, not 1",
    "reproduce bacho2023:figure5 --data-dir nowhere --offline": "nowhere",
    "reproduce bacho2023:figure6 --draws 10": "--draws must be a multiple of 4, at least 8",
    "reproduce bacho2023:figure7 --epochs 0": "--epochs must be at least 1",
    "reproduce ren2023:table3:mnist-s-1-1:bp --method l-bp": "leave --method out",
    "reproduce ren2023:table3:mnist-s-1-1:bp --model mlp": "leave --model out",
    "reproduce ren2023:table3:mnist-s-1-1:bp --validation 5": "leave --validation out",
    "reproduce ren2023:table3:mnist-s-1-1:bp --epoch 5": "did you mean '--epochs'",
    "reproduce ren2023:table3:mnist-s-1-1:bp --data-dir nowhere --offline --quiet --results /dev/null": "choose other --results",
}


@pytest.mark.quick_compile
@pytest.mark.parametrize("line", REFUSALS)
def test_bad_input_is_one_sentence_with_the_remedy_and_exit_code_2(line, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert dispatch(line.split()) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert REFUSALS[line] in err
    assert err.startswith("forwardgrad: ")
    assert err.count("\n") == 1
    assert "Traceback" not in err
    assert not list(tmp_path.iterdir())  # nothing is left behind


def bare_network(shape, classes):
    """A model whose first block has no readout."""
    first, last = presets.find("digits").model.network(shape, classes).blocks[:2]
    return fg.Network((first._replace(readout=None), last))


def test_a_method_that_needs_readouts_is_refused_on_a_model_without(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(os.path.dirname(__file__))
    code = dispatch(
        ["train", "--model", "test_cli:bare_network", "--method", "lg-fg-a", "--run-dir", str(tmp_path / "run")]
    )
    assert code == 2
    assert "use a method with a global loss, such as bp, fg-a or fg-w" in capsys.readouterr().err


@pytest.mark.quick_compile
def test_a_taken_directory_is_refused(finished, capsys):
    assert dispatch(["train", *QUICK, "--epochs", "2", "--run-dir", str(finished)]) == 2
    assert "continue it with --resume, or choose another --run-dir" in capsys.readouterr().err
    assert dispatch(["train", *QUICK, "--epochs", "3", "--run-dir", str(finished), "--resume"]) == 2
    assert "epochs (2 there, 3 here)" in capsys.readouterr().err


def test_a_directory_that_another_run_has_is_refused_before_the_first_method_trains(finished, tmp_path, capsys):
    shutil.copytree(finished, tmp_path / "fg-a-seed0")
    assert dispatch(["compare", *QUICK, "--methods", "bp,fg-a", "--epochs", "1", "--out", str(tmp_path)]) == 2
    assert "holds a run of another configuration" in capsys.readouterr().err
    assert not (tmp_path / "bp-seed0").exists()


def test_evaluate_repeats_what_the_run_reported(finished, capsys):
    result = json.loads((finished / "result.json").read_text())
    assert dispatch(["evaluate", str(finished), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["test_error"] == pytest.approx(result["test_error"])
    assert found["train_error"] == pytest.approx(result["train_error"])
    assert found["step"] == found["steps"] == result["steps"]
    assert dispatch(["evaluate", str(finished)]) == 0
    assert re.search(r"test error \d+\.\d\d %, train error \d+\.\d\d %", capsys.readouterr().out)


@pytest.mark.quick_compile
def test_divergence_is_exit_code_3(tmp_path, capsys):
    code = dispatch(
        ["train", *QUICK, "--method", "fg-w", "--lr", "1e6", "--epochs", "5", "--run-dir", str(tmp_path / "run")]
    )
    assert code == 3
    assert re.search(r"diverged at step \d+ of 25 .*smaller learning rate than --lr 1000000.0", capsys.readouterr().err)


@pytest.mark.quick_compile
def test_a_signal_ends_with_its_exit_code_and_a_checkpoint(tmp_path):
    directory = tmp_path / "run"
    program = [
        sys.executable,
        "-c",
        "from forwardgrad.cli.main import main; main()",
        "train",
        *QUICK,
        "--epochs",
        "10000",
    ]
    process = subprocess.Popen([*program, "--run-dir", str(directory)], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline and not metrics.read(directory / "metrics.jsonl"):
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM
    assert f"--run-dir {directory} --resume (train)" in err
    assert fg.load_run(directory).step > 0


@pytest.mark.quick_compile
def test_compare_writes_a_table_and_a_picture_and_keeps_finished_runs(tmp_path, capsys):
    line = [
        "compare",
        "digits",
        *QUICK,
        "--epochs",
        "1",
        "--methods",
        "bp,lg-fg-a",
        "--seeds",
        "2",
        "--out",
        str(tmp_path / "out"),
    ]
    assert dispatch(line) == 0
    found = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert [row["method"] for row in found["table"]] == ["bp", "lg-fg-a"]
    assert {(r["method"], r["seed"]) for r in found["runs"]} == {("bp", 0), ("bp", 1), ("lg-fg-a", 0), ("lg-fg-a", 1)}
    for row in found["table"]:
        errors = [r["test_error"] for r in found["runs"] if r["method"] == row["method"]]
        assert row["test_error_mean"] == pytest.approx(np.mean(errors))
        assert row["test_error_sd"] == pytest.approx(np.std(errors, ddof=1))
    assert (tmp_path / "out" / "compare.png").stat().st_size > 10_000
    capsys.readouterr()
    assert dispatch(line) == 0
    again = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert again == found  # wall times too: nothing ran again


@pytest.mark.quick_compile
def test_seeds_of_a_comparison_share_compiled_code_and_nothing_else(finished, tmp_path):
    line = [
        "compare",
        "digits",
        *QUICK,
        "--epochs",
        "2",
        "--methods",
        "lg-fg-a",
        "--seeds",
        "2",
        "--out",
        str(tmp_path / "out"),
    ]
    assert dispatch(line) == 0
    alone = tmp_path / "alone"
    assert dispatch(["train", *QUICK, "--epochs", "2", "--seed", "1", "--run-dir", str(alone)]) == 0
    for one, other in ((finished, tmp_path / "out" / "lg-fg-a-seed0"), (alone, tmp_path / "out" / "lg-fg-a-seed1")):
        np.testing.assert_array_equal(_flat(one), _flat(other))


def _flat(directory):
    import jax

    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(fg.load_run(directory).params)])


def test_every_field_of_a_preset_and_its_model_is_a_flag(capsys):
    with pytest.raises(SystemExit) as stop:
        dispatch(["train", "mnist-m-1-16", "--help"])
    assert stop.value.code in (0, None)
    text = capsys.readouterr().out
    experiment = presets.find("mnist-m-1-16")
    for field in (*dataclasses.fields(experiment), *dataclasses.fields(experiment.model)):
        if field.name != "model":
            assert f"--{field.name.replace('_', '-')}" in text


def test_help_lists_every_command(capsys):
    assert dispatch([]) == 0
    text = capsys.readouterr().out
    for command in ("train", "evaluate", "compare", "list", "cite"):
        assert re.search(rf"^  {command} ", text, re.MULTILINE)
    assert dispatch(["--version"]) == 0


@pytest.mark.quick_compile
@pytest.mark.parametrize("method", recipes.names())
def test_every_method_trains_from_the_command_line(method, tmp_path):
    directory = tmp_path / "run"
    line = [
        "train",
        "--model",
        "mlp",
        "--hidden",
        "8",
        "--batch-size",
        "256",
        "--epochs",
        "1",
        "--lr",
        "0.001",
        "--quiet",
    ]
    line += ["--perturbed", "all"] if method == "lg-fg-a-plus" else []  # of this network no tap is hidden
    assert dispatch([*line, "--method", method, "--run-dir", str(directory)]) == 0
    assert json.loads((directory / "result.json").read_text())["method"] == method


@pytest.mark.parametrize("preset", presets.names())
def test_presets_resolve_and_survive_json(preset):
    experiment = presets.find(preset)
    assert presets.Experiment.from_json(json.loads(json.dumps(experiment.to_json()))) == experiment
    assert presets.about(preset)


def test_the_users_own_arrays_train(tmp_path):
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 96)
    images = rng.integers(0, 60, (96, 4, 4)).astype(np.uint8)
    images[np.arange(96), labels] += 180  # class k: row k is bright (a pattern: brightness alone is normalised away)
    file = tmp_path / "mine.npz"
    np.savez(file, x_train=images[:64], y_train=labels[:64], x_test=images[64:], y_test=labels[64:])
    line = ["train", "--dataset", f"npz:{file}", *QUICK, "--batch-size", "16", "--epochs", "15", "--method", "bp"]
    line += ["--patches", "1", "--lr", "0.1", "--run-dir", str(tmp_path / "run")]
    assert dispatch(line) == 0
    assert json.loads((tmp_path / "run" / "result.json").read_text())["test_error"] < 20


@pytest.mark.skipif(not os.environ.get("FORWARDGRAD_DATA"), reason="FORWARDGRAD_DATA is not set")
@pytest.mark.parametrize(("method", "worst"), [("bp", 12.0), ("lg-fg-a", 25.0)])
def test_real_mnist_trains(method, worst, tmp_path):
    line = ["train", "mnist-s-1-1", "--method", method, "--epochs", "1", "--quiet", "--run-dir", str(tmp_path / "run")]
    assert dispatch(line) == 0
    # one epoch, whose learning rate falls to zero within it; a classifier that guesses has 90
    assert json.loads((tmp_path / "run" / "result.json").read_text())["test_error"] < worst
