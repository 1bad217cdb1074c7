"""Bacho & Chu, "Low-Variance Forward Gradients using Direct Feedback Alignment and Momentum", 2023. Test errors: 100 less the printed accuracy.

The paper prints means over 10 seeds and no train errors. "L layers" are L - 1 hidden layers and the output. Cells of `bp`, `dfa`, `dkp` and `fdfa`
have the BatchNorm of the released code, with which they were made; `fg-w`, `fg-a` and `lg-fg-a` have none: the released code of `fg-w` cannot run
it, the others were not released, and perturbations per example are biased with it. `lg-fg-a` has no cell in two layers, where there is nothing
local. Directions are Gaussian. All columns of Table 2 start from the preset of MNIST.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from forwardgrad.reproductions.cells import Cell, Printed, Table

METHODS = ("bp", "fg-w", "fg-a", "lg-fg-a", "dfa", "dkp", "fdfa")
WITH_BATCH_NORM = ("bp", "dfa", "dkp", "fdfa")

FC = {"bacho-mnist-fc": 800, "bacho-fashion-mnist-fc": 800, "bacho-cifar10-fc": 1000}
"""preset and units of a hidden layer"""

# accuracies in the order of METHODS, by number of layers and in the order of FC; four layers are Table 1
TABLE_B6 = {
    2: ("98.25 85.87 93.39 - 98.04 98.12 98.21", "89.37 77.72 84.73 - 88.67 89.09 89.27", "56.20 30.47 47.39 - 54.80 55.41 55.74"),
    3: ("98.39 82.36 90.86 91.64 98.18 98.28 98.30", "90.01 73.94 82.21 82.41 89.19 89.63 89.82", "56.66 27.52 43.39 43.08 54.20 55.15 55.70"),
    4: ("98.46 80.03 83.40 86.89 98.15 98.27 98.32", "89.99 71.72 77.62 77.98 89.15 89.48 89.56", "56.92 25.17 35.53 34.56 53.61 54.35 54.97"),
}  # fmt: skip
TABLE_2 = {
    "mnist": "99.32 87.63 96.63 95.42 98.80 99.08 99.16",
    "fashion-mnist": "92.10 74.93 82.71 79.96 89.69 90.39 91.54",
    "cifar10": "68.11 33.10 42.51 37.74 58.14 60.30 66.96",
}
TABLE_3 = {
    "bacho-cifar100-alexnet": "60.43 3.43 15.84 15.27 35.75 49.15 57.27",
    "bacho-tiny-imagenet-alexnet": "40.55 0.70 3.52 2.90 17.47 25.36 36.47",
}


def cells(
    table: str, column: str, preset: str, accuracies: str, source: str, norms: tuple[Any, Any], **settings: Any
) -> list[Cell]:
    """One column. `norms`: the value of the model's `batch_norm` with and without it."""
    out = []
    for method, accuracy in zip(METHODS, accuracies.split(), strict=True):
        if accuracy == "-":
            continue
        own = {"method": method, "guess": "gaussian", "batch_norm": norms[method not in WITH_BATCH_NORM], **settings}
        printed = Printed(round(100 - float(accuracy), 2), None, source)
        out.append(Cell("bacho2023", table, column, method, preset, own, printed))
    return out


def fully_connected(table: str, layers: int, source: str) -> list[Cell]:
    """The three columns of one depth."""
    out = []
    for (preset, units), accuracies in zip(FC.items(), TABLE_B6[layers], strict=True):
        column = preset if table == "table1" else f"{preset}-{layers}-layers"
        out += cells(table, column, preset, accuracies, source, (True, False), hidden=(units,) * (layers - 1))
    return out


def table2() -> list[Cell]:
    out = []
    for dataset, accuracies in TABLE_2.items():
        out += cells("table2", dataset, "bacho-mnist-cnn", accuracies, "Table 2", (True, False), dataset=dataset)
    return out


def table3() -> list[Cell]:
    out = []
    for preset, accuracies in TABLE_3.items():
        for cell in cells("table3", preset, preset, accuracies, "Table 3", ("all", "none")):
            heads = {"local_heads": True} if cell.row == "lg-fg-a" else {}
            out.append(dataclasses.replace(cell, settings={**cell.settings, **heads}))
    return out


def figure3() -> list[Cell]:
    """Two-layer cells of Table B.6 and cells of Table 2, on CIFAR-10, over epochs. A figure prints no number: the tables' cells have them."""
    out = []
    for column, known in (("fc", fully_connected("figure3", 2, "")), ("cnn", table2())):
        for cell in known:
            if cell.experiment.dataset == "cifar10" and cell.row != "lg-fg-a":
                out.append(dataclasses.replace(cell, table="figure3", column=column, printed=None))
    return out


tables = {
    "table1": Table("Table 1: fully connected networks of four layers", tuple(fully_connected("table1", 4, "Table 1"))),
    "table2": Table("Table 2: a small convolutional network", tuple(table2())),
    "table3": Table("Table 3: AlexNet", tuple(table3())),
    "tableB6": Table(
        "Table B.6: fully connected networks of different depths",
        tuple(cell for layers in TABLE_B6 for cell in fully_connected("tableB6", layers, "Table B.6")),
    ),
    "figure3": Table(
        "Figure 3: convergence on CIFAR-10, a fully connected network of two layers and a small convolutional one",
        tuple(figure3()),
        curves=("train_loss", "test_accuracy"),
    ),
    "figure4": Table(
        "Figure 4: variance of FDFA against the feedback's learning rate", measured_by="bacho2023_figure4"
    ),
    "figure5": Table("Figure 5: variance of FG-W and FG-A against neurons and inputs", measured_by="bacho2023_figure5"),
    "figure6": Table("Figure 6: training loss after one epoch against variance", measured_by="bacho2023_figure6"),
    "figure7": Table("Figure 7: angle to the gradient over epochs", measured_by="bacho2023_figure7"),
}
