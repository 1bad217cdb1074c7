"""Training: what a run writes, that interruptions change no bit, schedules, divergence, held-out images."""

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
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import forwardgrad as fg
from forwardgrad import data, presets
from forwardgrad.errors import Diverged, Interrupted
from forwardgrad.models.cnn import CNN
from forwardgrad.training import loop, metrics, progress
from forwardgrad.training.checkpoint import Checkpoints
from forwardgrad.training.learner import Learner
from forwardgrad.training.optimisers import optimiser, schedule

SMALL = dataclasses.replace(
    presets.find("digits"),
    model=dataclasses.replace(presets.find("digits").model, blocks=1, channels=16, groups=2, zero_classifier=False),
    epochs=2,
    batch_size=128,
)
FLAGS = [
    "--blocks",
    "1",
    "--channels",
    "16",
    "--groups",
    "2",
    "--no-zero-classifier",
    "--epochs",
    "2",
    "--batch-size",
    "128",
]


def final_arrays(directory):
    checkpoints = Checkpoints(directory)
    stored = checkpoints.read()
    checkpoints.close()
    return {name: np.asarray(x) for name, x in stored.items()}


def same(one, other):
    assert one.keys() == other.keys()
    return [name for name in one if not np.array_equal(one[name], other[name])]


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    directory = tmp_path_factory.mktemp("run") / "whole"
    result = loop.train(SMALL, directory, preset="digits", checkpoint_every=5, quiet=True)
    return directory, result


def test_a_run_directory_holds_what_the_readme_says(finished):
    directory, result = finished
    names = {path.name for path in directory.iterdir()}
    assert {"config.json", "metrics.jsonl", "result.json", "curves.png", "tensorboard", "checkpoints"} == names
    assert result == json.loads((directory / "result.json").read_text())
    keys = "method preset dataset seed epochs steps test_error train_error wall_seconds version"
    assert set(keys.split()) <= result.keys()
    assert result["steps"] == 2 * 11
    lines = metrics.read(directory / "metrics.jsonl")
    assert [line["step"] for line in lines if "test_error" in line] == [11, 22]
    assert lines[-1]["test_error"] == result["test_error"]
    assert (directory / "curves.png").stat().st_size > 10_000
    assert any((directory / "tensorboard").iterdir())
    assert sorted(p.name for p in (directory / "checkpoints").iterdir()) == ["20", "22"]


def test_load_run_predicts_what_the_run_reported(finished):
    directory, result = finished
    run = fg.load_run(directory)
    arrays = data.find("digits").load(data.data_directory())
    wrong = np.asarray(run.predict(arrays.test_images)).argmax(1) != arrays.test_labels
    assert 100 * wrong.mean() == pytest.approx(result["test_error"])
    assert run.experiment == SMALL
    assert run.step == 22
    with pytest.raises(fg.InputError, match=re.escape("predict takes [batch, 8, 8, 1]")):
        run.predict(arrays.test_images[0])


def test_a_run_killed_by_sigkill_resumes_to_the_same_bits(finished, tmp_path):
    directory = tmp_path / "killed"
    program = [sys.executable, "-c", "from forwardgrad.cli.main import main; main()", "train", "digits", *FLAGS]
    program += ["--run-dir", str(directory), "--checkpoint-every", "5", "--quiet"]
    process = subprocess.Popen(program)
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        lines = metrics.read(directory / "metrics.jsonl")
        if lines and lines[-1]["step"] >= 7:
            process.send_signal(signal.SIGKILL)
            break
        time.sleep(0.005)
    assert process.wait(timeout=120) == -signal.SIGKILL
    assert not (directory / "result.json").exists()
    result = loop.train(SMALL, directory, preset="digits", resume=True, checkpoint_every=5, quiet=True)
    assert same(final_arrays(directory), final_arrays(finished[0])) == []
    assert {**result, "wall_seconds": 0} == {**finished[1], "wall_seconds": 0}
    steps = [line["step"] for line in metrics.read(directory / "metrics.jsonl")]
    assert steps == sorted(set(steps))


@pytest.mark.quick_compile
def test_running_statistics_are_resumed_to_the_same_bits_and_used_in_evaluation(tmp_path):
    """BatchNorm's, of a convolutional network."""
    experiment = dataclasses.replace(
        SMALL,
        model=CNN(channels=(2, 2), kernel=3, units=4),
        method="dfa",
        mask=False,
        optimizer="adam",
        epochs=1,
        train_images=512,
    )
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    arrays = loop.load_arrays(experiment, None, True)
    learner = Learner(experiment, arrays)
    result = loop.train(experiment, whole, checkpoint_every=2, quiet=True, learner=learner)
    shutil.copytree(whole, parted)
    (parted / "result.json").unlink()
    shutil.rmtree(parted / "checkpoints" / "4")
    loop.train(experiment, parted, checkpoint_every=2, quiet=True, learner=learner, resume=True)
    one, other = final_arrays(whole), final_arrays(parted)
    assert same(one, other) == []
    statistics = {name: x for name, x in one.items() if name.startswith("model_state/")}
    assert len(statistics) == 3 * 2
    assert all((x != (1.0 if name.endswith("var") else 0.0)).all() for name, x in statistics.items())
    predicted = np.asarray(fg.load_run(parted).predict(arrays.test_images)).argmax(1)
    assert 100 * (predicted != arrays.test_labels).mean() == pytest.approx(result["test_error"])


def test_a_checkpoint_crosses_executors_and_microbatches(finished, tmp_path):
    """The last steps as a whole and by microbatches, where the first were streamed: the same run up to rounding."""
    directory = tmp_path / "run"
    shutil.copytree(finished[0], directory)
    (directory / "result.json").unlink()
    shutil.rmtree(directory / "checkpoints" / "22")
    loop.train(dataclasses.replace(SMALL, executor="whole", microbatch=32), directory, quiet=True, resume=True)
    one, other = final_arrays(directory), final_arrays(finished[0])
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_allclose(one[name], other[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "at", [3, -11, 22, -22], ids=["on the way", "observed", "in the last step", "when the end is observed"]
)
def test_a_signal_saves_and_leaves_and_the_run_goes_on(finished, tmp_path, at, monkeypatch):
    directory, steps, signum = tmp_path / "run", Learner.run, signal.SIGINT  # tests/test_cli.py sends SIGTERM

    def run(self, state, count):
        state, log = steps(self, state, count)
        if int(state.step) == at:
            os.kill(os.getpid(), signum)
        return state, log

    def observe(state):
        if int(state.step) == -at:
            os.kill(os.getpid(), signum)

    monkeypatch.setattr(Learner, "run", run)
    monkeypatch.setattr(loop, "_next_count", lambda *_: 1)
    before = signal.getsignal(signum)
    with pytest.raises(Interrupted, match=f"go on with the same flags and --run-dir {directory} --resume") as caught:
        loop.train(SMALL, directory, preset="digits", quiet=True, observe=observe)
    assert caught.value.signum == signum
    assert signal.getsignal(signum) == before
    assert fg.load_run(directory).step == abs(at)
    monkeypatch.undo()
    loop.train(SMALL, directory, preset="digits", resume=True, quiet=True)
    assert same(final_arrays(directory), final_arrays(finished[0])) == []


def test_learned_feedback_is_in_the_checkpoint(tmp_path):
    experiment = dataclasses.replace(SMALL, method="fdfa", epochs=1)
    loop.train(experiment, tmp_path / "run", quiet=True)
    stored = final_arrays(tmp_path / "run")
    matrices = [name for name in stored if name.startswith("method_state") and stored[name].ndim > 1]
    assert matrices
    assert all(stored[name].any() for name in matrices)


def test_batches_noise_and_parameters_depend_on_the_seed_alone(finished, tmp_path):
    loop.train(SMALL, tmp_path / "again", preset="digits", checkpoint_every=3, quiet=True)
    assert same(final_arrays(tmp_path / "again"), final_arrays(finished[0])) == []
    loop.train(dataclasses.replace(SMALL, seed=1), tmp_path / "other", preset="digits", quiet=True)
    assert same(final_arrays(tmp_path / "other"), final_arrays(finished[0])) != []


def test_held_out_images_are_the_last_of_the_training_set_and_the_test_set_stays_unseen(tmp_path):
    experiment = dataclasses.replace(SMALL, validation=300, epochs=1)
    arrays = loop.load_arrays(experiment, None, True)
    whole = data.find("digits").load(data.data_directory())
    np.testing.assert_array_equal(arrays.test_images, whole.train_images[-300:])
    result = loop.train(experiment, tmp_path / "run", quiet=True)
    assert result["test_error"] is None
    assert 0 <= result["validation_error"] <= 100
    assert "validation_error" in metrics.read(tmp_path / "run" / "metrics.jsonl")[-1]


def test_divergence_names_the_step_and_the_remedy(tmp_path):
    experiment = dataclasses.replace(SMALL, method="fg-w", lr=1e6, epochs=3)
    with pytest.raises(Diverged, match=r"diverged at step \d+ of 33 .* smaller learning rate"):
        loop.train(experiment, tmp_path / "run", quiet=True)
    assert not (tmp_path / "run" / "result.json").exists()


def test_a_directory_is_never_overwritten(finished, tmp_path):
    with pytest.raises(fg.InputError, match="continue it with --resume"):
        loop.train(SMALL, finished[0], preset="digits", quiet=True)
    with pytest.raises(fg.InputError, match=r"another configuration: lr \(0.03 there, 0.5 here\)"):
        loop.train(dataclasses.replace(SMALL, lr=0.5), finished[0], preset="digits", resume=True, quiet=True)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(fg.InputError, match="holds no run: choose another directory"):
        loop.train(SMALL, tmp_path, preset="digits", quiet=True)


def test_damaged_runs_are_refused_with_the_remedy(finished, tmp_path):
    directory = tmp_path / "run"
    shutil.copytree(finished[0], directory)
    for file in (directory / "checkpoints" / "22").rglob("*"):
        if file.is_file():
            file.write_bytes(b"garbage")
    with pytest.raises(fg.InputError, match="remove it to use the one before"):
        fg.load_run(directory)
    with pytest.raises(fg.InputError, match="remove the damaged checkpoint"):
        loop.train(SMALL, directory, preset="digits", resume=True, quiet=True)
    shutil.rmtree(directory / "checkpoints")
    with pytest.raises(fg.InputError, match="has no checkpoint yet"):
        fg.load_run(directory)
    config = json.loads((directory / "config.json").read_text())
    config["experiment"]["model"]["depth"] = 3
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(fg.InputError, match="holds a run of another version"):
        fg.load_run(directory)
    (directory / "config.json").write_text("{")
    with pytest.raises(fg.InputError, match="is damaged"):
        fg.load_run(directory)
    with pytest.raises(fg.InputError, match="give the directory that `forwardgrad train` wrote"):
        fg.load_run(tmp_path / "nowhere")


def test_evaluation_counts_every_image_once(finished):
    arrays = data.find("digits").load(data.data_directory())
    learner = Learner(dataclasses.replace(SMALL, batch_size=100), arrays)  # 360 and 1437 are no multiples
    run = fg.load_run(finished[0])
    for split, images, labels in (
        ("train", arrays.train_images, arrays.train_labels),
        ("test", arrays.test_images, arrays.test_labels),
    ):
        wrong = np.asarray(run.predict(images)).argmax(1) != labels
        assert learner.error(run, split) == pytest.approx(100 * wrong.mean())


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("linear", lambda t: 0.1 * (1 - t)),
        ("cosine", lambda t: 0.05 * (1 + np.cos(np.pi * t))),
        ("step", lambda t: 0.1 * (0.1 ** ((t >= 0.5) + (t >= 0.8)))),
        ("exponential", lambda t: 0.1 * 0.9 ** (100 * t // 10)),
        ("constant", lambda t: 0.1),
    ],
)
def test_schedules(name, expected):
    rate = schedule(dataclasses.replace(SMALL, schedule=name, lr=0.1, epochs=10, decay=0.9), steps_per_epoch=10)
    for step in (0, 1, 49, 50, 79, 80, 99):
        assert float(rate(step)) == pytest.approx(expected(step / 100), abs=1e-6)
    warm = schedule(dataclasses.replace(SMALL, schedule=name, lr=0.1, epochs=12, warmup_epochs=2), steps_per_epoch=10)
    assert [float(warm(s)) for s in (0, 10, 20)] == pytest.approx([0.0, 0.05, expected(0.0)], abs=1e-6)


def test_weight_decay_is_coupled_leaves_biases_out_and_follows_the_classifier_factor():
    experiment = dataclasses.replace(
        SMALL, lr=0.1, momentum=0.5, weight_decay=0.01, classifier_lr=0.1, schedule="constant"
    )
    network = experiment.model.network((8, 8, 1), 10)
    params, _ = network.init(jax.random.key(0))
    grads = jax.tree.map(jnp.ones_like, params)
    transform = optimiser(experiment, network, 10)
    state, velocity, moved = transform.init(params), jax.tree.map(jnp.zeros_like, params), params
    factor = lambda path: 0.1 if "classifier" in str(path) else 1.0
    decay = lambda path: 0.0 if "bias" in str(path) else 0.01
    for _ in range(3):
        before = moved
        both = {name: transform.update(name, grads[name], state[name], moved[name]) for name in moved}
        moved, state = ({name: new[i] for name, new in both.items()} for i in (0, 1))
        updates = jax.tree.map(jnp.subtract, moved, before)
        velocity = jax.tree_util.tree_map_with_path(
            lambda p, v, w: 0.5 * v + factor(p) + decay(p) * w, velocity, before
        )
        expected = jax.tree.map(lambda v: -0.1 * v, velocity)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), updates, expected)


@pytest.mark.parametrize(
    "changes", [{"flip": True}, {"crop": 1}, {"optimizer": "adam", "lr": 1e-3}, {"guess": "gaussian", "draws": 2}]
)
def test_every_setting_changes_the_run(finished, tmp_path, changes):
    loop.train(dataclasses.replace(SMALL, **changes), tmp_path / "run", quiet=True)
    one, other = final_arrays(tmp_path / "run"), final_arrays(finished[0])
    assert all(
        not np.array_equal(one[name], other[name])
        for name in one
        if name.startswith("params") and name.endswith("kernel")
    )


def test_one_compilation_serves_every_length_of_dispatch():
    learner = Learner(SMALL, data.find("digits").load(data.data_directory()))
    state = learner.init()
    for count in (1, 3, 7):
        state, log = learner.run(state, count)
        assert len(log.loss) == count
    assert learner._dispatch._cache_size() == 1


def test_the_rate_that_lines_show_is_over_all_steps_since_the_last_line(monkeypatch, capsys):
    clock = iter([0.0, 2.0, 3.0, 12.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    learner = SimpleNamespace(total_steps=200, experiment=SimpleNamespace(epochs=2))
    line = lambda step, **more: {"epoch": step / 100, "loss": 1.0, "error": 50.0, **more}
    with progress.Progress(learner, quiet=False) as shown:
        shown.update(0, {})
        shown.update(1, line(1))
        shown.update(65, line(65))  # too soon for a line
        shown.update(101, line(101, test_error=3.0))
    lines = capsys.readouterr().err.splitlines()
    assert [x.rpartition(", ")[2] for x in lines] == ["0.5 steps/s", "10.0 steps/s"]
    assert "test error 3.00 %" in lines[1]
