"""What the documents say is what happens: their code runs, their commands and flags exist, their tables are complete, their links lead somewhere."""

import doctest
import importlib
import itertools
import json
import pkgutil
import re
import shlex
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import forwardgrad as fg
from forwardgrad import data, guesses, models, presets, recipes, reproductions, rules
from forwardgrad.cli import main as cli
from forwardgrad.reproductions.cells import verdict

ROOT = Path(__file__).parents[1]
DOCUMENTS = (
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "RESULTS.md",
    *sorted(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md")),
)


def text(document):
    return (ROOT / document).read_text()


def blocks(document, language):
    return re.findall(rf"^```{language}\n(.*?)^```$", text(document), re.DOTALL | re.MULTILINE)


def commands(document):
    """The `forwardgrad ...` lines of the shell blocks, as words after `forwardgrad`."""
    lines = [line for block in blocks(document, "sh") for line in block.splitlines()]
    return [shlex.split(line)[1:] for line in lines if line.startswith("forwardgrad ")]


def table(document, header):
    """First column of the table whose first heading is `header`."""
    rows = re.search(rf"^\| {header} \|.*?(?=\n\n)", text(document), re.DOTALL | re.MULTILINE)
    return re.findall(r"^\| (`[^|]*?`) \|", rows[0], re.MULTILINE)


def command(*words, cwd):
    call = [sys.executable, "-c", "from forwardgrad.cli.main import main; main()", *words]
    return subprocess.run(call, cwd=cwd, capture_output=True, text=True, timeout=240)


@pytest.fixture(scope="module")
def where_it_ran(tmp_path_factory):
    """A folder in which README's first command has run, for one epoch."""
    folder = tmp_path_factory.mktemp("readme")
    (first, *_) = commands("README.md")
    done = command(*first, "--epochs", "1", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert re.search(r"test error \d+\.\d\d %", done.stdout)
    return folder


@pytest.mark.quick_compile
def test_readme_first_command_draws_the_picture_it_names(where_it_ran):
    (picture,) = re.findall(r"draws `(\S+)`", text("README.md"))
    assert (where_it_ran / picture).read_bytes().startswith(b"\x89PNG")


@pytest.mark.quick_compile
@pytest.mark.parametrize("number", range(len(blocks("README.md", "python"))))
def test_readme_python(number, where_it_ran, monkeypatch):
    monkeypatch.chdir(where_it_ran)
    exec(compile(blocks("README.md", "python")[number], f"README.md block {number}", "exec"), {"__name__": "readme"})


@pytest.mark.quick_compile
@pytest.mark.parametrize(
    "path",
    [path for path in sorted((ROOT / "docs").glob("*.md")) if blocks(path, "python")],
    ids=lambda path: path.name,
)
def test_docs_python(path):
    for block in blocks(path, "python"):
        exec(compile(block, path.name, "exec"), {"__name__": "docs"})


def test_readme_shows_the_idea_by_line_40():
    assert text("README.md").splitlines().index("## The idea") < 30


EVERY_COMMAND = dict.fromkeys(tuple(words) for document in DOCUMENTS for words in commands(document))


@pytest.mark.parametrize("words", EVERY_COMMAND, ids=" ".join)
def test_commands_of_documents_exist_with_their_flags(words, capsys):
    name, *rest = words
    preset = [word for word in rest[:1] if word in presets.names()]
    model = [part for i, word in enumerate(rest) if word == "--model" for part in rest[i : i + 2]]
    with pytest.raises(SystemExit, match=r"^(0|None)?$"):
        cli.dispatch([name, *preset, *model, "--help"])
    shown = capsys.readouterr().out
    flags = [word for word in rest if word.startswith("--") and word != "--model"]
    assert all(re.search(rf"(?<![\w-]){flag}(?![\w-])", shown) for flag in flags)
    for flag, known in (("--method", recipes.names()), ("--dataset", data.names()), ("--model", models.names())):
        assert all(value in known for word, value in itertools.pairwise(rest) if word == flag)


def test_readme_names_every_command_method_data_set_and_kind_of_list():
    used = {words[0] for words in commands("README.md")}
    assert used == set(cli.commands())
    assert table("README.md", "method") == [f"`{name}`" for name in recipes.names()]
    listed = " ".join(table("README.md", "data set"))
    assert {f"`{name}`" for name in data.names()} - {"`digits`"} == set(re.findall(r"`\S+`", listed))


def test_readme_test_command_is_the_one_of_ci():
    assert "python -m pytest" in blocks("README.md", "sh")[1].splitlines()
    assert (ROOT / ".ci/run").read_text().rstrip().endswith("python -m pytest")


@pytest.mark.parametrize("document", DOCUMENTS)
def test_relative_links_lead_to_files(document):
    links = re.findall(r"\]\(([^)]+)\)", text(document))
    here = (ROOT / document).parent
    missing = [link for link in links if "://" not in link and not (here / link.partition("#")[0]).exists()]
    assert links or document in ("docs/continuous_time.md", "docs/diagnose.md", "docs/performance.md")
    assert not missing


def modules():
    found = [m.name for m in pkgutil.walk_packages(fg.__path__, "forwardgrad.")]
    return ["forwardgrad", *found]


@pytest.mark.parametrize("name", modules())
def test_docstring_examples(name):
    module = importlib.import_module(name)
    failed, _ = doctest.testmod(module, extraglobs={"fg": fg})
    assert failed == 0


# --- the skeletons of CONTRIBUTING ---------------------------------------------------------------------------------------------------------------


def skeletons():
    """`{path: code}` of the blocks that begin with the path of their file."""
    found = (re.match(r"# (\S+\.py)\n(.*)", block, re.DOTALL) for block in blocks("CONTRIBUTING.md", "python"))
    out = {}
    for match in found:
        out.setdefault(match[1], match[2])
    return out


def place(folder, tmp_path, monkeypatch):
    """Put a skeleton where the package `folder` looks for modules, in a temporary folder beside the real one."""
    (path,) = [path for path in skeletons() if path.startswith(f"src/forwardgrad/{folder}/")]
    (tmp_path / Path(path).name).write_text(skeletons()[path])
    package = importlib.import_module(f"forwardgrad.{folder}")
    monkeypatch.setattr(package, "__path__", [*package.__path__, str(tmp_path)])
    monkeypatch.delitem(sys.modules, f"forwardgrad.{folder}.{Path(path).stem}", raising=False)
    importlib.invalidate_caches()


def add(module, path, monkeypatch):
    """Run a skeleton as if it stood at the end of a module, and add what it defines."""
    before, after = vars(module), dict(vars(module))
    exec(compile(skeletons()[path], path, "exec"), after)
    for name in after.keys() - before.keys() - {"__builtins__"}:
        monkeypatch.setattr(module, name, after[name], raising=False)


def estimate(network, method, key=0):
    """An estimate on a small batch of digits."""
    digits = data.find("digits").load(data.data_directory())
    batch = {"inputs": digits.normalise(digits.train_images[:8]), "labels": jnp.asarray(digits.train_labels[:8])}
    params, model_state = network.init(jax.random.key(1))
    state = method.init(jax.random.key(2), params, model_state, batch)
    return jax.jit(method.estimate)(jax.random.key(key), state, params, model_state, batch)[0]


def test_contributing_shows_one_skeleton_of_each_kind():
    folders = [path.removeprefix("src/forwardgrad/").partition("/")[0] for path in skeletons()]
    assert folders == ["guesses", "models", "data", "presets", "reproductions", "recipes", "rules.py"]


def test_contributing_guess(tmp_path, monkeypatch):
    place("guesses", tmp_path, monkeypatch)
    loss = lambda w: (w * jnp.arange(1.0, 5.0)).sum()
    guess = guesses.found()["uniform"]()
    _, grads = jax.jit(fg.value_and_grad(loss, guess=guess, draws=4096))(jnp.ones(4), key=jax.random.key(0))
    true = np.arange(1.0, 5.0)
    variance = 4 * (true**2).sum() / 4096  # of an entry: at most (D - 1/5)|∇|² / K
    np.testing.assert_allclose(grads, true, atol=5 * variance**0.5)


def test_contributing_model(tmp_path, monkeypatch):
    place("models", tmp_path, monkeypatch)
    assert "tiny" in models.names()
    network = models.find("tiny")(units=16).network((8, 8, 1), 10)
    for name in ("lg-fg-a", "lg-fg-w"):
        grads = estimate(network, recipes.find(name)(network)).grads
        assert jax.tree.all(jax.tree.map(lambda g: jnp.isfinite(g).all(), grads))


def test_contributing_data_set(tmp_path, monkeypatch):
    place("data", tmp_path, monkeypatch)
    dataset = data.find("bars")
    arrays = dataset.load(tmp_path)
    assert arrays.train_images.shape == (800, *dataset.shape)
    assert arrays.test_labels.max() + 1 == dataset.classes
    normal = arrays.normalise(arrays.train_images)
    assert abs(float(normal.mean())) < 1e-2
    assert abs(float(normal.std()) - 1) < 1e-2


def test_contributing_preset(tmp_path, monkeypatch):
    place("presets", tmp_path, monkeypatch)
    assert "digits-mlp" in presets.names()
    experiment = presets.find("digits-mlp")
    experiment.check()
    assert presets.about("digits-mlp").startswith("scikit-learn's handwritten digits")
    network = experiment.model.network((8, 8, 1), 10)
    estimate(network, experiment.estimator(network))


def test_contributing_table(tmp_path, monkeypatch):
    place("reproductions", tmp_path, monkeypatch)
    cells = reproductions.find("readme:methods:digits")
    assert [cell.experiment.method for cell in cells] == ["bp", "lg-bp", "lg-fg-a"]
    assert verdict(cells[0].printed.test + 1, cells[0].printed) == "in range"  # 360 images say little


def test_contributing_method(tmp_path, monkeypatch):
    place("recipes", tmp_path, monkeypatch)
    assert recipes.names()[-1] == "lg-fg-a-project"
    network = models.find("mlp")(hidden=(16, 16)).network((8, 8, 1), 10)
    project, plain = (estimate(network, recipes.find(name)(network)) for name in ("lg-fg-a-project", "lg-fg-a"))
    for layer in ("layer0", "layer1"):  # D times shorter, as its docstring says
        for short, long in zip(*(jax.tree.leaves(e.grads[layer]["layers"]) for e in (project, plain)), strict=True):
            np.testing.assert_allclose(16 * short, long, rtol=1e-4, atol=1e-6)


def test_contributing_rule(monkeypatch):
    add(rules, "src/forwardgrad/rules.py", monkeypatch)
    loss = lambda w, x: x @ w
    x = jnp.array([[0.5, 0.0], [0.0, 8.0]])
    u = fg.given(jnp.array([1.0, 1.0]))
    vg = fg.value_and_grad(loss, guess=u, partition=("batch",), rule=rules.clipped)  # pyright: ignore
    _, grads = vg(jnp.ones(2), x, key=jax.random.key(0))
    np.testing.assert_allclose(grads, (0.5 + 1.0) / 2 * np.ones(2), rtol=1e-6)


COLUMNS = {
    "s": "seconds_per_step",
    "/ forward": "ratio_to_forward",
    "/ `bp`": "ratio_to_bp",
    "temporary MiB": "temp_mib",
    "held MiB": "held_mib",
    "peak MiB": "peak_mib",
    "GFLOP": "gflop",
    "by hand": "gflop_by_hand",
    "compile s": "compile_seconds",
}


@pytest.mark.parametrize(
    ("begins", "record"),
    [
        ("## Methods", "methods"),
        ("## Feedback", "feedback"),
        ("## Groups, batch, draws", "sizes"),
        ("--draws 4", "draws"),
        ("## Less noise", "plus"),
    ],
)
def test_tables_of_costs_are_those_of_the_records(begins, record):
    lines = text("docs/performance.md").partition(begins)[2].splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("| "))
    header, _, *rows = itertools.takewhile(lambda line: line.startswith("|"), lines[first:])
    cells = lambda line: [cell.strip() for cell in line.strip("|").split("|")]
    assert {*cells(header)} <= {
        *COLUMNS,
        "network",
        "method",
        "groups",
        "batch",
        "/ `lg-fg-a`",
        "microbatch",
        "executor",
    }
    stored = json.loads(text(f"results/bench/{record}.json"))
    assert len(rows) == len(stored)
    for shown, one in zip((dict(zip(cells(header), cells(row), strict=True)) for row in rows), stored, strict=True):
        assert shown["method"] == f"`{one['method']}`"
        for key in {"groups", "batch", "microbatch", "executor"} & shown.keys():
            assert shown[key] == str(one[key])
        if one["method"] == "lg-fg-a":
            beside = one["seconds_per_step"]
        if "/ `lg-fg-a`" in shown:
            assert shown["/ `lg-fg-a`"] == f"{one['seconds_per_step'] / beside:.2f}"
        for column, key in COLUMNS.items():
            if column in shown:
                digits = len(shown[column].partition(".")[2])
                assert shown[column] == ("-" if one[key] is None else f"{one[key]:.{digits}f}"), (one["method"], column)


def test_the_table_of_the_fused_loss_is_that_of_the_record():
    stored = {(row["form"], row["groups"]): row for row in json.loads(text("results/ren2023/figure5.json"))}
    shown = re.findall(r"^\| (fused|naive) \| (\d+) \|(.*)\|$", text("docs/performance.md"), re.MULTILINE)
    assert len(shown) == 8
    for form, groups, values in shown:
        one = stored[form, int(groups)]
        costs = [(1e3 * one[f"{mode}_seconds"], one[f"{mode}_temp_mib"]) for mode in ("gradient", "derivative")]
        assert values.split("|") == [text for time, mib in costs for text in (f" {time:.1f} ", f" {mib:.2f} ")]
