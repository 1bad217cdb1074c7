"""Reading the pickles that some data sets are published as, without running what a pickle may ask for.

Two walls: the caller verifies the checksum first, and then only arrays of numbers and plain containers can be built.
"""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np

from forwardgrad.errors import InputError

# What a pickled array calls. Old pickles name it under `numpy.core`, new ones under `numpy._core`.
_reconstruct: Any = np.empty(0).__reduce__()[0]


def _dtype(code: str | bytes, align: int = 0, copy: int = 0) -> np.dtype:
    """`np.dtype` as old pickles call it, with 0 and 1 for the flags, of numbers alone."""
    dtype = np.dtype(code.decode() if isinstance(code, bytes) else code, align=bool(align), copy=bool(copy))
    if dtype.kind not in "biuf":
        raise pickle.UnpicklingError(f"an array of {dtype} is not allowed")
    return dtype


_ALLOWED = {
    ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): _dtype,
}


class _Restricted(pickle.Unpickler):
    def find_class(self, module_name: str, global_name: str, /) -> Any:
        try:
            return _ALLOWED[module_name, global_name]
        except KeyError:
            raise pickle.UnpicklingError(f"{module_name}.{global_name} is not allowed") from None


def unpickle(content: bytes, path: Path, url: str) -> dict[bytes, Any]:
    """The dictionary in a pickle of arrays, lists, strings and numbers.

    Args:
      content: of the file; its checksum is already known to match.
      path: where it came from, for the error message.
      url: where the canonical file is published, for the error message.

    Returns:
      Strings written by Python 2, keys among them, are `bytes`.

    Raises:
      InputError: where the pickle is broken, is no dictionary, or asks for anything else; that is then not carried out.
    """
    try:
        loaded = _Restricted(io.BytesIO(content), encoding="bytes").load()
    except Exception as error:  # a broken pickle can raise anything
        raise InputError(f"{path} cannot be read ({error}): delete it and get the canonical file from {url}.") from None
    if not isinstance(loaded, dict):
        raise InputError(f"{path} holds no dictionary: delete it and get the canonical file from {url}.")
    return loaded
