"""Not a paper: what `lg-fg-a-plus` adds to `lg-fg-a`, one thing after another, beside the backpropagation that it estimates. Signs as directions.

The rows between the two leave something of `lg-fg-a-plus` out: `hidden` has neither predictor nor a tangent for token mixing alone, `predictor`
perturbs every tap in one tangent, `token` has no predictor. On MNIST, where an image is one patch and the network one block, there is no token
mixing.
"""

from __future__ import annotations

from typing import Any

from forwardgrad.reproductions.cells import Cell, Table

PLUS = {"method": "lg-fg-a-plus"}
ROWS: dict[str, dict[str, Any]] = {
    "lg-fg-a": {"method": "lg-fg-a"},
    "hidden": PLUS | {"predictor": "none", "token_by": "together"},
    "predictor": PLUS | {"perturbed": "all", "token_by": "together"},
    "token": PLUS | {"predictor": "none"},
    "lg-fg-a-plus": PLUS,
    "lg-fg-a-plus-2-draws": PLUS | {"draws": 2},
    "lg-fg-a-plus-4-draws": PLUS | {"draws": 4},
    "lg-bp": {"method": "lg-bp"},
    "bp": {"method": "bp"},
}


def cells(table: str, presets: tuple[str, ...], rows: tuple[str, ...], **settings: Any) -> tuple[Cell, ...]:
    """Every row of every preset; nothing is printed anywhere."""
    return tuple(
        Cell("beyond", table, preset, row, preset, {**ROWS[row], **settings}) for preset in presets for row in rows
    )


MNIST = tuple(row for row in ROWS if row != "token")

tables = {
    "mnist": Table("MNIST, learning rate 0.05", cells("mnist", ("mnist-s-1-1", "mnist-m-1-16"), MNIST, lr=0.05)),
    "mnist-lr-0.01": Table(
        "MNIST, the paper's learning rate", cells("mnist-lr-0.01", ("mnist-s-1-1", "mnist-m-1-16"), MNIST)
    ),
    "cifar10": Table("CIFAR-10, the paper's learning rate", cells("cifar10", ("cifar10-m-8-16",), tuple(ROWS))),
    "cifar10-lr-0.02": Table(
        "CIFAR-10, learning rate 0.02", cells("cifar10-lr-0.02", ("cifar10-m-8-16",), tuple(ROWS), lr=0.02)
    ),
}
