"""Lemma 1 of Ren et al. 2023 exactly, term by term, by enumeration of all batches and directions; and figures 5 and 8 in miniature.

Signs are all sign vectors, Gaussians the nodes -√3, 0, √3, which have a Gaussian's moments up to degree 5 in each coordinate.
"""

import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toynets import all_signs

import forwardgrad as fg
from forwardgrad.cli.main import dispatch
from forwardgrad.reproductions import ren2023_figure5, ren2023_figure8
from forwardgrad.reproductions.ren2023_table1 import ESTIMATES, backpropagation, terms

EXAMPLES, N = 3, 2


def directions(kind, size):
    """All directions [rows, size] and their probabilities."""
    if kind == "signs":
        return all_signs(size), np.full(2**size, 2.0**-size)
    nodes = np.array(list(itertools.product((-(3**0.5), 0.0, 3**0.5), repeat=size)))
    return nodes, np.where(nodes == 0, 2 / 3, 1 / 6).prod(1)


@pytest.mark.float64
@pytest.mark.parametrize("kind", ["gaussian", "signs"])
@pytest.mark.parametrize("name", ESTIMATES)
def test_lemma_1_term_by_term(name, kind):
    """The means of the samples that figure 8 takes, over every batch and every direction, are Z1, Z2 and Z3, and their sum is the variance."""
    estimate, p, q = ESTIMATES[name], 2, 2
    x = jax.random.normal(jax.random.key(0), (EXAMPLES, p))
    known = ren2023_figure8.Problem(jnp.array([[0.3, -1.0], [0.7, 0.4]]), jnp.array([1.0, -0.5]), x, x.sum(1))
    mean, v, s = ren2023_figure8.constants(known)
    shape = ((p, q) if name.startswith("weights") else (q,)) if estimate.shared else (N, estimate.entries(p, q))
    if name == "weights-independent":
        shape = (N, p, q)
    rows, probability = directions(kind, int(np.prod(shape)))

    def sample(row, x, y):
        direction = row.reshape(shape)
        guess = fg.given(direction if name.startswith("weights") else {"z": direction})
        found, exact = ren2023_figure8.shares(known, estimate, guess, jax.random.key(0), x, y)
        return ren2023_figure8.squares(found, exact, jnp.asarray(mean), N)

    chosen = np.array(list(itertools.product(range(EXAMPLES), repeat=N)))
    every = jax.jit(jax.vmap(jax.vmap(sample, (0, None, None)), (None, 0, 0)))
    found = every(jnp.asarray(rows), known.x[chosen], known.y[chosen])  # [batch, row, 4]
    total, *each = jnp.einsum("r,brk->k", probability, found) / len(chosen)
    theory = terms(estimate, N, p, q, v, s, fourth_moment=3.0 if kind == "gaussian" else 1.0)
    assert [float(z) for z in each] == pytest.approx(list(theory), rel=1e-12, abs=1e-15)
    assert float(total) == pytest.approx(theory.total, rel=1e-12)


def test_table_1_is_the_sum_of_the_terms():
    n, p, q, v, s = 8, 3, 5, 0.7, 0.2
    for name, d in (("weights", p * q), ("activations", q)):
        shared, independent = (terms(ESTIMATES[f"{name}-{kind}"], n, p, q, v, s) for kind in ("shared", "independent"))
        assert shared.total == pytest.approx((d + 2) / n * v + (d + 1) * s)
        assert independent.total == pytest.approx((d + 2) / n * v + (d + 1) / n * s)
        assert shared.z1 == independent.z1 == backpropagation(n, v).total


def files(out, summary):
    assert all((out / name).stat().st_size for name in summary["files"])
    assert all((out / name).read_bytes().startswith(b"\x89PNG") for name in summary["files"] if name.endswith("png"))
    return json.loads((out / summary["files"][0]).read_text())


def test_figure_8_in_miniature(tmp_path, monkeypatch, capsys):
    """By its command, with fewer points and samples."""
    summary = {}

    def small(out, say):
        summary.update(run(out, samples=3000, sweeps={"batch size": (2,)}, say=say))
        return summary

    run = ren2023_figure8.run
    monkeypatch.setattr(ren2023_figure8, "run", small)
    assert dispatch(["reproduce", "ren2023:figure8", "--results", str(tmp_path)]) == 0
    said = capsys.readouterr()
    assert "variances and" in said.out
    rows = files(tmp_path / "ren2023", summary)
    assert summary["passes"]
    assert summary["points"] == len(rows) == len(ren2023_figure8.NAMES)
    tested = [term for row in rows for term in row["terms"].values() if term["standard_error"] > 0]
    assert summary["terms_within"] == summary["terms"] == len(tested) == 13
    assert {"sweep", "value", "estimator", "measured", "standard_error", "theory", "terms"} <= set(rows[0])
    assert len(said.err.strip().splitlines()) == 1
    assert all(0 < row["standard_error"] < row["theory"] for row in rows)


@pytest.mark.quick_compile
def test_figure_5_in_miniature(tmp_path, monkeypatch):
    """What would not fit is compiled for its number and not run."""
    monkeypatch.setattr(ren2023_figure5.cost, "available_mib", lambda: 1.0)
    said = []
    summary = ren2023_figure5.run(tmp_path, groups=(1, 64), sizes=(4, 4, 64), repeats=2, say=said.append)
    rows = files(tmp_path, summary)
    naive = rows[-1]
    assert (naive["form"], naive["groups"]) == ("naive", 64)
    assert naive["gradient_temp_mib"] > 0.5
    assert naive["gradient_seconds"] is None
    assert "not run" in said[-1]
    assert set(summary["ratios"]) == {f"{m}_{w}" for m in ("gradient", "derivative") for w in ("seconds", "temp_mib")}
    assert all(row[f"{mode}_seconds"] > 0 for row in rows[:2] for mode in ("gradient", "derivative"))


def test_the_fused_loss_needs_the_same_memory_for_any_number_of_groups():
    """No array of the cells' size, nor what is summed: known without running."""
    compiled = ren2023_figure5.compiled("fused", (32, 16, 512), (1, 64))
    mib = {key: temporary for key, (_, temporary) in compiled.items()}
    for mode in ren2023_figure5.MODES:
        assert abs(mib[64, mode] / mib[1, mode] - 1) < ren2023_figure5.TOLERANCE, mib
