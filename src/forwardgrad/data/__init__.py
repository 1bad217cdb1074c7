"""Data sets. Every module of this folder that defines a `dataset` is found by the name that this gives itself."""

from __future__ import annotations

import importlib
import pkgutil

from forwardgrad.data import npz
from forwardgrad.data.files import data_directory as data_directory
from forwardgrad.data.spec import Arrays as Arrays
from forwardgrad.data.spec import DataSet as DataSet
from forwardgrad.errors import unknown


def names() -> list[str]:
    """The names of all data sets of the package, sorted."""
    return sorted(_found())


def find(name: str) -> DataSet:
    """The data set of a name.

    Args:
      name: one of `names()`, or `npz:FILE` for a file of the user's own arrays (see `forwardgrad.data.npz.from_file`).

    Returns:
      Its description; nothing is read yet, except from `npz:FILE`.

    Raises:
      InputError: for an unknown name, with the nearest ones; for a file that cannot be used.

    Example:
      >>> arrays = find("digits").load(data_directory())
      >>> arrays.train_images.shape
      (1437, 8, 8, 1)
    """
    if name.startswith(npz.PREFIX):
        return npz.from_file(name.removeprefix(npz.PREFIX))
    known = _found()
    if name not in known:
        raise unknown("data set", name, known, hint=f"Your own arrays: {npz.PREFIX}FILE.")
    return known[name]


def _found() -> dict[str, DataSet]:
    modules = [importlib.import_module(f"{__name__}.{module.name}") for module in pkgutil.iter_modules(__path__)]
    datasets = [module.dataset for module in modules if hasattr(module, "dataset")]
    return {dataset.name: dataset for dataset in datasets}
