"""Ren, Kornblith, Liao, Hinton, "Scaling Forward Gradient With Local Losses", ICLR 2023. Errors in percent, as printed.

Random directions are Gaussian here, as in the paper. ImageNet has no preset and is left out.
"""

from __future__ import annotations

from forwardgrad.reproductions.cells import Cell, Printed, Table

METHODS = ("bp", "l-bp", "lg-bp", "fa", "l-fa", "lg-fa", "dfa", "fg-w", "fg-a", "lg-fg-w", "lg-fg-a")

# test / train error, one row per method
TABLE_3 = {
    "mnist-s-1-1": """2.66/0.00 2.38/0.00 2.43/0.00 2.82/0.00 3.21/0.00 3.11/0.00 3.31/0.00 9.25/8.93 3.24/1.53 9.25/8.93 3.24/1.53""",
    "mnist-m-1-16": """2.41/0.00 2.16/0.00 2.81/0.00 2.90/0.00 2.90/0.00 2.50/0.00 3.17/0.00 8.56/8.64 3.76/1.75 5.66/4.59 2.55/0.00""",
    "cifar10-m-8-16": """33.62/0.00 30.75/0.00 33.84/0.05 39.94/28.44 39.74/28.98 39.73/32.32 38.80/33.69 55.95/54.28 59.72/41.29
        52.70/51.71 30.68/19.39""",
}


def printed(text: str, source: str) -> list[Printed]:
    """`test/train test/train ...`."""
    return [Printed(float(test), float(train), source) for test, train in (pair.split("/") for pair in text.split())]


def table3() -> Table:
    cells = [
        Cell("ren2023", "table3", preset, method, preset, {"method": method, "guess": "gaussian"}, errors)
        for preset, text in TABLE_3.items()
        for method, errors in zip(METHODS, printed(text, "Table 3"), strict=True)
    ]
    return Table("Table 3: supervised learning for image classification", tuple(cells))


tables = {"table3": table3()}
