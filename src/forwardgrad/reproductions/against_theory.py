"""When a measured number bears out a predicted one, and the exponent of a power law: shared by figures that show measurement beside theory."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

ERRORS = 3  # standard errors: the length of error bars, and what a point may be off
SHARE = 0.95  # of the points must be within that many standard errors


def agrees(point: dict[str, Any]) -> bool:
    """Whether `measured` is within `ERRORS` times `standard_error` of `theory`, up to the rounding of single precision."""
    return abs(point["measured"] - point["theory"]) <= ERRORS * point["standard_error"] + 1e-6 * point["theory"]


def exponent(points: Iterable[dict[str, Any]], of: str) -> float:
    """p in `measured` ∝ `of`ᵖ: slope of the logarithms, by linear regression."""
    x, y = np.log([[point[of], point["measured"]] for point in points]).T
    return float(np.polyfit(x, y, 1)[0])
