"""The pictures of Figure 8, from the rows of `figure8.json`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from forwardgrad.reproductions.against_theory import ERRORS
from forwardgrad.reproductions.ren2023_table1 import ESTIMATES
from forwardgrad.training.pictures import picture

LABELS = {name: estimate.label for name, estimate in ESTIMATES.items()} | {"backpropagation": "backpropagation"}
AXES = {"batch size": "batch size N (p = q = 4)", "fan-in": "fan-in p (N = q = 4)", "fan-out": "fan-out q (N = p = 4)"}

Rows = list[dict[str, Any]]


def draw(path: Path, rows: Rows) -> None:
    """A panel per sweep, a curve per estimator: marks for what was measured, lines for the theory."""
    title = "Variance of a gradient estimate: marks measured, lines theory"
    sweeps = list(dict.fromkeys(row["sweep"] for row in rows))
    with picture(path, 1, len(sweeps), title) as panels:
        for axes, sweep in zip(panels[0], sweeps, strict=True):
            here = [row for row in rows if row["sweep"] == sweep]
            curves = {label: [row for row in here if row["estimator"] == name] for name, label in LABELS.items()}
            _panel(axes, sweep, curves)
        panels[0][0].set_ylabel("variance, average over weights")
        panels[0][0].legend(fontsize=8, frameon=False)


def draw_terms(path: Path, rows: Rows) -> None:
    """Lemma 1's terms, a line of panels per estimator. Zero has no place on a logarithmic axis and is put in words; nor has what was
    measured below zero."""
    sweeps = list(dict.fromkeys(row["sweep"] for row in rows))
    with picture(path, len(ESTIMATES), len(sweeps), "Lemma 1, term by term: marks measured, lines theory") as panels:
        for line, name in zip(panels, ESTIMATES, strict=True):
            for axes, sweep in zip(line, sweeps, strict=True):
                here = [row for row in rows if row["sweep"] == sweep and row["estimator"] == name]
                each = {z: [{"value": row["value"], **row["terms"][z]} for row in here] for z in ("Z1", "Z2", "Z3")}
                _panel(axes, sweep, {z: [point for point in points if point["theory"]] for z, points in each.items()})
                off = [
                    abs(p["measured"]) / p["standard_error"]
                    for p in each["Z3"]
                    if not p["theory"] and p["standard_error"]
                ]
                if not ESTIMATES[name].shared and off:
                    note = f"Z3 = 0: measured within {max(off):.1f} standard errors"
                    axes.set_title(note, fontsize=9, color="C2")
            line[0].set_ylabel(LABELS[name])
        panels[0][0].legend(fontsize=8, frameon=False)


def _panel(axes: Any, sweep: str, curves: dict[str, Rows]) -> None:
    axes.set(xscale="log", yscale="log", xlabel=AXES[sweep])
    for i, (label, points) in enumerate(curves.items()):
        x = [point["value"] for point in points]
        measured, error = ([point[k] for point in points] for k in ("measured", "standard_error"))
        axes.plot(x, [point["theory"] for point in points], color=f"C{i}", linewidth=1)
        style = {"fmt": "os^Dv"[i], "markersize": 4.5, "markerfacecolor": "none", "linestyle": "none"}
        bars = [ERRORS * e for e in error]
        axes.errorbar(x, measured, bars, color=f"C{i}", elinewidth=0.8, label=label, **style)
    known = [point["theory"] for points in curves.values() for point in points]
    if known:  # an error bar may reach below zero
        axes.set_ylim(min(known) / 2, max(known) * 2)
