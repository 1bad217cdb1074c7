"""`forwardgrad list` and `forwardgrad cite`."""

import json
import re
import subprocess
import sys

import pytest

from forwardgrad import cite, data, guesses, models, presets, recipes
from forwardgrad.cli import main as cli
from forwardgrad.errors import InputError
from forwardgrad.presets.experiment import GUESSES

KINDS = {
    "methods": recipes.names,
    "presets": presets.names,
    "models": models.names,
    "datasets": data.names,
    "guesses": guesses.found,
}


def listed(capsys, kind):
    assert cli.dispatch(["list", kind, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("kind", KINDS)
def test_json_is_a_list_of_everything_with_a_name_and_a_line(capsys, kind):
    rows = listed(capsys, kind)
    assert sorted(row["name"] for row in rows) == sorted(KINDS[kind]())
    assert all(row["about"] and "\n" not in row["about"] for row in rows)


@pytest.mark.parametrize("kind", KINDS)
def test_the_table_shows_every_name(capsys, kind):
    assert cli.dispatch(["list", kind]) == 0
    lines = capsys.readouterr().out.splitlines()
    starts = {line.split()[0] for line in lines if line[:1].strip()}
    assert set(KINDS[kind]()) <= starts


def test_methods_carry_the_keys_of_their_papers(capsys):
    rows = {row["name"]: row for row in listed(capsys, "methods")}
    assert rows["fg-a"]["cite"] == ["ren2023", "lecun1988"]


def test_data_sets_carry_shape_and_classes(capsys):
    (cifar,) = [row for row in listed(capsys, "datasets") if row["name"] == "cifar10"]
    assert (cifar["shape"], cifar["classes"]) == ([32, 32, 3], 10)


def test_guesses_that_are_flags_come_first(capsys):
    rows = listed(capsys, "guesses")
    assert {row["name"] for row in rows if row["flag"]} == set(GUESSES)
    assert [row["flag"] for row in rows] == sorted((row["flag"] for row in rows), reverse=True)
    library = {"given", "masked", "local_gradient", "ntk", "direct_feedback", "learned_feedback"}
    assert library <= {row["name"] for row in rows}


def test_markup_in_a_line_is_shown_as_it_is(capsys, monkeypatch):
    monkeypatch.setattr(presets, "about", lambda name: "[red] and [batch, class]")
    assert cli.dispatch(["list", "presets"]) == 0
    assert "[red] and [batch, class]" in capsys.readouterr().out


@pytest.mark.parametrize("method", recipes.names())
def test_every_method_has_well_formed_entries(capsys, method):
    assert cli.dispatch(["cite", method]) == 0
    out = capsys.readouterr().out
    assert re.findall(r"^@\w+\{(\w+),$", out, re.MULTILINE) == list(recipes.find(method).cite)


def test_entries_are_complete():
    used = {key for name in recipes.names() for key in recipes.find(name).cite}
    assert used <= set(cite.ENTRIES)
    assert list(cite.ENTRIES) == sorted(cite.ENTRIES)
    for key, entry in cite.ENTRIES.items():
        assert entry.startswith("@")
        assert f"{{{key}," in entry.splitlines()[0]
        assert entry.count("{") == entry.count("}")
        fields = re.findall(r"^  (\w+) = \{.*\},$", entry, re.MULTILINE)
        assert {"author", "title", "year"} <= set(fields)
        assert {"journal", "booktitle"} & set(fields)
        assert len(fields) == len(entry.splitlines()) - 2


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["list"], "list needs to know what to list: one of methods, presets, models, datasets, guesses."),
        (["list", "method"], "unknown list 'method': did you mean 'methods'"),
        (["list", "methods", "--jsn"], "unknown flag '--jsn': did you mean '--json'"),
        (["list", "methods", "models"], "models. `forwardgrad list --help` lists the flags."),
        (["cite"], "cite needs a method: one of bp, "),
        (["cite", "lgfga"], "unknown method 'lgfga': did you mean 'lg-fg-a'"),
        (["cite", "bp", "np"], "np. `forwardgrad cite --help` lists the flags."),
    ],
    ids=" ".join,
)
def test_a_wrong_word_is_one_sentence_with_the_remedy(capsys, words, sentence):
    assert cli.dispatch(words) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1
    assert sentence in err


def test_bibtex_of_an_unknown_method():
    with pytest.raises(InputError, match="did you mean 'fdfa'"):
        cite.bibtex("ffdfa")


def test_bibtex_needs_jax_alone():
    code = (
        "import sys; from forwardgrad.cite import bibtex; bibtex('fdfa');"
        "sys.exit(bool({'flax', 'optax', 'tyro', 'rich', 'orbax', 'sklearn', 'matplotlib'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
