"""diagnose.png: a row of panels per method; angle, bias and variance over epochs, one line per layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from forwardgrad.training.pictures import picture

NOTHING = 1e-6  # relative: below this it is rounding
OWN = "own"  # reference: the method's own target


def draw(path: Path, rows: list[dict[str, Any]], title: str) -> None:
    """Small multiples that share their axes down a column, so that methods can be compared.

    Args:
      path: of the PNG.
      rows: as `diagnose.json` holds them.
      title: above all panels.
    """
    methods = list(dict.fromkeys(row["method"] for row in rows))
    layers = list(dict.fromkeys(row["layer"] for row in rows))
    if not methods:
        return
    columns = [("degrees", OWN), ("bias", OWN), ("variance", OWN)]
    if any(not row["own_target"] for row in rows):
        columns.insert(1, ("degrees", "global"))
    with picture(path, len(methods), len(columns), title) as panels:
        for j, (quantity, reference) in enumerate(columns):
            for i, method in enumerate(methods):
                wanted = lambda r, reference=reference: (
                    r["own_target"] if reference == OWN else r["reference"] == reference
                )
                mine = [r for r in rows if r["method"] == method and wanted(r)]
                _lines(panels[i][j], mine, layers, quantity)
            _share(panels[:, j], quantity)
        for i, method in enumerate(methods):
            own = next(r["reference"] for r in rows if r["method"] == method and r["own_target"])
            panels[i][0].set_ylabel(f"{method}\n\n{_title('degrees', own)}")
            for j, (quantity, reference) in enumerate(columns[1:], 1):
                panels[i][j].set_ylabel(_title(quantity, own if reference == OWN else reference))
        panels[0][-1].legend(
            *_key(layers, panels[0][-1]),
            title="layer",
            loc="upper left",
            bbox_to_anchor=(1.02, 1.02),
            frameon=False,
            fontsize="x-small" if len(layers) > 12 else "small",
        )


def _title(quantity: str, reference: str) -> str:
    loss = "final loss" if reference == "global" else f"{reference} loss"
    return {
        "degrees": f"angle to the gradient of the\n{loss} (degrees)",
        "bias": "bias (relative)",
        "variance": "variance (relative)",
    }[quantity]


def _colour(layer: int, layers: int) -> Any:
    """From the first layer, dark, to the last."""
    import matplotlib

    return matplotlib.colormaps["viridis"](0.92 * layer / max(layers - 1, 1))


def _key(layers: list[str], axes: Any) -> tuple[list[Any], list[str]]:
    lines = [axes.plot([], [], "o-", color=_colour(k, len(layers)), markersize=3)[0] for k in range(len(layers))]
    return lines, layers


def _lines(axes: Any, rows: list[dict[str, Any]], layers: list[str], quantity: str) -> None:
    for k, layer in enumerate(layers):
        points = [(r["epoch"], r[quantity], r) for r in rows if r["layer"] == layer and r[quantity] is not None]
        if quantity != "degrees":
            points = [point for point in points if point[1] > NOTHING]
        if not points:
            continue
        x, y, of = zip(*points, strict=True)
        colour = _colour(k, len(layers))
        axes.plot(x, y, "o-", color=colour, markersize=3 if len(x) < 30 else 0, linewidth=1.2)
        if quantity == "bias":
            axes.fill_between(x, y, [v + r["bias_se"] for v, r in zip(y, of, strict=True)], color=colour, alpha=0.15)
    known = [r[quantity] for r in rows if r[quantity] is not None]
    if quantity != "degrees" and max(known, default=0.0) <= NOTHING:
        said = f"no {quantity}" if known else "no gradient to compare with"
        axes.text(0.5, 0.5, said, transform=axes.transAxes, ha="center", color="grey")


def _share(panels: Any, quantity: str) -> None:
    """One range for all methods."""
    drawn = [axes for axes in panels if axes.lines]
    low, high = (f(x for axes in drawn for x in axes.get_xlim()) if drawn else k for f, k in ((min, 0), (max, 1)))
    values = [y for axes in drawn for line in axes.lines for y in line.get_ydata()]
    for axes in panels:
        axes.set(xlim=(low, high), xlabel="epoch")
        axes.grid(alpha=0.25, linewidth=0.5)
        axes.xaxis.get_major_locator().set_params(integer=True)
        if quantity == "degrees":
            axes.set_ylim(0, max(95, *values) if values else 95)
            axes.set_yticks(range(0, 181 if values and max(values) > 100 else 91, 30))
        elif values:
            axes.set(yscale="log", ylim=(min(values) / 1.5, max(values) * 1.5))
