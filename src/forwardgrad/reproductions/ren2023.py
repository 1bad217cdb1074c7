"""Ren, Kornblith, Liao, Hinton, "Scaling Forward Gradient With Local Losses", ICLR 2023. Errors in percent, as printed.

Random directions are Gaussian here, as in the paper. ImageNet has no preset and is left out, and so is contrastive learning. The tables disagree
where they show the same run: backpropagation on CIFAR-10 has 33.62 in Tables 3 and 6, and 32.89 in Table 5; each cell has its own table's number.
Figures 6, 7 and 9 print none.
"""

from __future__ import annotations

from typing import Any

from forwardgrad.reproductions.cells import Cell, Printed, Table
from forwardgrad.reproductions.figures import bars, lines

METHODS = ("bp", "l-bp", "lg-bp", "fa", "l-fa", "lg-fa", "dfa", "fg-w", "fg-a", "lg-fg-w", "lg-fg-a")

CIFAR = "cifar10-m-8-16"

# test / train error, in the order of METHODS
TABLE_3 = {
    "mnist-s-1-1": """2.66/0.00 2.38/0.00 2.43/0.00 2.82/0.00 3.21/0.00 3.11/0.00 3.31/0.00 9.25/8.93 3.24/1.53 9.25/8.93 3.24/1.53""",
    "mnist-m-1-16": """2.41/0.00 2.16/0.00 2.81/0.00 2.90/0.00 2.90/0.00 2.50/0.00 3.17/0.00 8.56/8.64 3.76/1.75 5.66/4.59 2.55/0.00""",
    CIFAR: """33.62/0.00 30.75/0.00 33.84/0.05 39.94/28.44 39.74/28.98 39.73/32.32 38.80/33.69 55.95/54.28 59.72/41.29 52.70/51.71
        30.68/19.39""",
}
# bp, lg-bp, lg-fg-a, and the last without the derivative of normalisation ("NG")
TABLE_5 = {
    "bn": "30.38/0.00 33.41/5.41 32.84/23.09 33.48/20.80",
    "ln": "30.55/0.00 33.17/7.09 29.03/17.63 29.33/19.26",
    "local": "32.89/0.00 33.84/0.05 30.68/19.39 30.44/17.12",
}
# bp, lg-bp, lg-fg-a
TABLE_6 = {
    "begin": "31.43/0.00 34.73/1.45 34.89/31.11",
    "before": "32.50/0.00 34.15/0.05 33.88/27.94",
    "after": "30.38/0.00 29.83/0.44 29.35/23.19",
    "both": "33.62/0.00 33.84/0.05 30.68/19.39",
}
FIGURE_6 = ("global", "block", "block+patch", "patch+group", "block+patch+group")
FIGURE_9 = (1, 2, 4, 8, 16, 32, 64)
DRAWS = (1, 2, 4)


def cell(table: str, column: str, row: str, preset: str, errors: Printed | None = None, **settings: Any) -> Cell:
    """With Gaussian directions. A method whose name is not the row's is among the settings."""
    return Cell("ren2023", table, column, row, preset, {"method": row, "guess": "gaussian", **settings}, errors)


def printed(text: str, source: str) -> list[Printed]:
    """`test/train test/train ...`."""
    return [Printed(float(test), float(train), source) for test, train in (pair.split("/") for pair in text.split())]


def table3() -> list[Cell]:
    return [
        cell("table3", preset, method, preset, errors)
        for preset, text in TABLE_3.items()
        for method, errors in zip(METHODS, printed(text, "Table 3"), strict=True)
    ]


def table5() -> list[Cell]:
    """BatchNorm couples examples: no microbatches. It and layer normalisation mix what `lg-fg-a` takes to be apart: biased, as in the paper, as is
    every credit that skips a normalisation. In evaluation ours has running statistics; the released code, batch statistics there too."""
    out = []
    for norm, text in TABLE_5.items():
        own: dict[str, Any] = {"norm": norm} | ({"microbatch": 0} if norm == "bn" else {})
        biased = {"method": "lg-fg-a", "allow_bias": norm != "local"}
        more: dict[str, dict[str, Any]] = {
            "lg-fg-a": biased,
            "lg-fg-a-ng": biased | {"norm_gradient": False, "allow_bias": True},
        }
        for row, errors in zip(("bp", "lg-bp", "lg-fg-a", "lg-fg-a-ng"), printed(text, "Table 5"), strict=True):
            out.append(cell("table5", norm, row, CIFAR, errors, **own, **more.get(row, {})))
    return out


def table6() -> list[Cell]:
    return [
        cell("table6", place, method, CIFAR, errors, norm_place=place)
        for place, text in TABLE_6.items()
        for method, errors in zip(("bp", "lg-bp", "lg-fg-a"), printed(text, "Table 6"), strict=True)
    ]


def figure6() -> list[Cell]:
    """The same network, M/8/16, under every bar, so that the bars differ by the losses alone. (The paper does not say it; "without groups" in the
    released code is a network of one group. Figure 9 has that.) The bar "patch + group" is biased: see `recipes.lg_fg_a`."""
    own = lambda losses: {"method": "lg-fg-a", "losses": losses, "allow_bias": losses == "patch+group"}
    return [cell("figure6", CIFAR, row, CIFAR, **own(row)) for row in FIGURE_6]


def figure9() -> list[Cell]:
    return [
        cell("figure9", f"groups-{groups}", method, CIFAR, groups=groups)
        for groups in FIGURE_9
        for method in ("bp", "lg-bp", "lg-fg-a")
    ]


def figure7() -> list[Cell]:
    """The runs of Figure 9, over epochs."""
    return [
        cell("figure7", method, f"groups-{groups}", CIFAR, groups=groups, method=method)
        for method in ("bp", "lg-bp", "lg-fg-a")
        for groups in FIGURE_9
    ]


def tangents() -> list[Cell]:
    """Several directions a step, averaged: the paper draws one, and says nothing about more."""
    return [
        cell("tangents", preset, f"draws-{draws}", preset, method="lg-fg-a", draws=draws)
        for preset in ("mnist-m-1-16", CIFAR)
        for draws in DRAWS
    ]


tables = {
    "table3": Table("Table 3: supervised learning for image classification", tuple(table3())),
    "table5": Table("Table 5: normalisation schemes (ng: no gradient of normalisation)", tuple(table5())),
    "table6": Table("Table 6: place of layer normalisation", tuple(table6())),
    "figure5": Table("Figure 5: cost of the replicated loss, naive and fused", measured_by="ren2023_figure5"),
    "figure6": Table("Figure 6: where local losses are added", tuple(figure6()), bars),
    "figure7": Table("Figure 7: number of groups, over epochs", tuple(figure7()), curves=("train_error", "test_error")),
    "figure8": Table("Figure 8: variances, measured and predicted", measured_by="ren2023_figure8"),
    "figure9": Table("Figure 9: number of groups", tuple(figure9()), lines),
    "tangents": Table("Several directions per step (not in the paper)", tuple(tangents())),
}
