"""diagnose.png: a row of panels per method; angle, bias and variance over epochs, one line per layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from forwardgrad.training.pictures import picture

NOTHING = 1e-6  # relative: below this it is rounding
OWN = "own"  # reference: the method's own target


def draw(path: Path, rows: list[dict[str, Any]], title: str) -> bool:
    """Small multiples that share their axes down a column, so that methods can be compared.

    Args:
      path: of the PNG.
      rows: as `diagnose.json` holds them.
      title: above all panels.

    Returns:
      Whether there was something to draw.
    """
    methods = list(dict.fromkeys(row["method"] for row in rows))
    layers = list(dict.fromkeys(row["layer"] for row in rows))
    if not methods:
        return False
    columns = [("degrees", OWN), ("bias", OWN), ("variance", OWN)]
    if any(not row["own_target"] for row in rows):
        columns.append(("degrees", "global"))
    with picture(path, len(methods), len(columns), title) as panels:
        for j, (quantity, reference) in enumerate(columns):
            for i, method in enumerate(methods):
                mine = [r for r in rows if r["method"] == method and r["own_target"] == (reference == OWN)]
                if not mine:  # its own target is the final loss: the first column says it all
                    panels[i][j].set_axis_off()
                    continue
                _lines(panels[i][j], mine, layers, quantity)
                panels[i][j].set(xlabel="epoch", ylabel=_title(quantity, mine[0]["reference"]))
            _share([axes for axes in panels[:, j] if axes.axison], quantity)
        for i, method in enumerate(methods):
            panels[i][0].set_title(method, loc="left", fontweight="bold")
        panels[0][-1].legend(
            *_key(layers, panels[0][-1]),
            title="layer",
            loc="upper left",
            bbox_to_anchor=(1.02, 1.02),
            frameon=False,
            fontsize="x-small" if len(layers) > 12 else "small",
        )
    return True


def draw_angles(path: Path, rows: list[dict[str, Any]], title: str) -> None:
    """Angles alone, a panel per method side by side: as Figure 7 of Bacho & Chu (2023) shows them.

    Args:
      path, rows, title: as for `draw`; of the rows those against a method's own target.
    """
    methods = list(dict.fromkeys(row["method"] for row in rows))
    layers = list(dict.fromkeys(row["layer"] for row in rows))
    with picture(path, 1, len(methods), title) as panels:
        for axes, method in zip(panels[0], methods, strict=True):
            _lines(axes, [r for r in rows if r["method"] == method and r["own_target"]], layers, "degrees")
            axes.set(xlabel="epoch")
            axes.set_title(method, loc="left", fontweight="bold")
        _share(list(panels[0]), "degrees")
        panels[0][0].set_ylabel("angle to the gradient (degrees)")
        panels[0][-1].legend(
            *_key(layers, panels[0][-1]), title="layer", loc="upper left", bbox_to_anchor=(1.02, 1.02), frameon=False
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
    known = [r[quantity] for r in rows if r[quantity] is not None]
    if quantity == "variance" and max(known, default=0.0) <= NOTHING:
        said = "no variance" if known else "no gradient to compare with"
        axes.text(0.5, 0.5, said, transform=axes.transAxes, ha="center", color="grey")
        return
    for k, layer in enumerate(layers):
        own = [r for r in rows if r["layer"] == layer and r[quantity] is not None]
        own = [r for r in own if quantity != "variance" or r[quantity] > NOTHING]
        x, y = [r["epoch"] for r in own], [r[quantity] for r in own]
        style = {"color": _colour(k, len(layers)), "markersize": 3 if len(x) < 30 else 0, "linewidth": 1.2}
        if x:
            axes.plot(x, y, "o-", **style)
        if quantity == "bias":  # as far as the bias may be one standard error larger
            upper = [r["bias"] + r["bias_se"] for r in own]
            axes.fill_between(x, y, upper, color=style["color"], alpha=min(0.15, 0.6 / len(layers)), lw=0)


def _share(panels: list[Any], quantity: str) -> None:
    """One range for all methods."""
    drawn = [axes for axes in panels if axes.lines]
    values = [y for axes in drawn for line in axes.lines for y in line.get_ydata()]
    epochs = [limit for axes in drawn for limit in axes.get_xlim()]
    for axes in panels if values else []:
        axes.set_xlim(min(epochs), max(epochs))
        axes.grid(alpha=0.25, linewidth=0.5)
        axes.xaxis.get_major_locator().set_params(integer=True)
        if quantity == "degrees":
            top = max(95, max(values) + 3)
            axes.set(yticks=range(0, int(top) + 1, 30), ylim=(-2, top))
        elif quantity == "bias":
            axes.set_yscale("symlog", linthresh=0.1)
            axes.set_ylim(-0.01, max(0.2, 1.5 * max(values)))
        else:
            axes.set(yscale="log", ylim=(min(values) / 1.5, max(values) * 1.5))
