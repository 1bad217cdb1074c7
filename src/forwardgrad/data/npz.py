"""A user's own arrays, under the name `npz:FILE`."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from forwardgrad.data.spec import Arrays, DataSet
from forwardgrad.errors import InputError

PREFIX = "npz:"
_KEYS = ("x_train", "y_train", "x_test", "y_test")


def from_file(path: str | Path) -> DataSet:
    """The data set in a file written by `numpy.savez` with the keys `x_train`, `y_train`, `x_test`, `y_test`.

    Images are `[N, H, W]` or `[N, H, W, C]`. uint8 stays uint8; floats become float32. Both are standardised
    by the mean and the standard deviation of each channel of the training images. Labels are integers `[N]`, from 0.

    Args:
      path: the file. It is read here, because it alone knows its shape and its classes.

    Returns:
      A data set whose `load` ignores the data directory.

    Raises:
      InputError: naming the file, what is wrong with it, and what it should be.

    Example:
      >>> import pathlib, tempfile
      >>> file = pathlib.Path(tempfile.mkdtemp()) / "mine.npz"
      >>> images, labels = np.zeros((4, 8, 8), np.uint8), np.array([0, 1, 0, 1])
      >>> np.savez(file, x_train=images, y_train=labels, x_test=images, y_test=labels)
      >>> dataset = from_file(file)
      >>> dataset.shape, dataset.classes
      ((8, 8, 1), 2)
    """
    path = Path(path).expanduser()
    arrays = _check(_read(path), path)

    def load(data_dir: Path, *, offline: bool = False) -> Arrays:
        return arrays

    height, width, channels = arrays.train_images.shape[1:]
    return DataSet(f"{PREFIX}{path}", load, (height, width, channels), arrays.classes, f"the arrays in {path}")


def _read(path: Path) -> dict[str, np.ndarray]:
    if not os.path.isfile(path):
        raise InputError(f"there is no file {path}: after {PREFIX} comes the path of a file written by numpy.savez.")
    remedy = f"write {', '.join(_KEYS)} with numpy.savez"
    try:
        with path.open("rb") as opened:
            file = np.load(opened, allow_pickle=False)
            if not isinstance(file, np.lib.npyio.NpzFile):
                raise InputError(f"{path} holds a single array: {remedy}.")
            missing = [key for key in _KEYS if key not in file]
            if missing:
                raise InputError(f"{path} has no {', '.join(missing)}: {remedy}.")
            stored = {key: file[key] for key in _KEYS}
    except InputError:
        raise
    except Exception as error:  # a broken file can raise anything
        if "Object arrays" in str(error):
            raise InputError(f"{path} holds Python objects: save arrays of numbers instead.") from None
        raise InputError(f"{path} cannot be read as an npz file: {remedy}.") from None
    if not all(isinstance(array, np.ndarray) for array in stored.values()):
        raise InputError(f"{path} is a zip file of something other than arrays: {remedy}.")
    return stored


def _check(stored: dict[str, np.ndarray], path: Path) -> Arrays:
    train_images, test_images = (_images(stored[key], key, path) for key in ("x_train", "x_test"))
    for x, y in (("x_train", "y_train"), ("x_test", "y_test")):
        _check_labels(stored[y], y, len(stored[x]), x, path)
    if test_images.shape[1:] != train_images.shape[1:] or test_images.dtype != train_images.dtype:
        raise InputError(
            f"{path}: x_test {test_images.dtype}{list(test_images.shape)} and x_train {train_images.dtype}"
            f"{list(train_images.shape)} differ in kind: save images of one size and one type."
        )
    classes = 1 + int(max(stored["y_train"].max(), stored["y_test"].max()))
    if not 2 <= classes <= len(train_images):
        raise InputError(
            f"{path}: labels up to {classes - 1} on {len(train_images)} training images: "
            "number the classes 0, 1, 2, ... and use two or more of them."
        )
    scale = 255.0 if train_images.dtype == np.uint8 else 1.0
    mean, std = _moments(train_images, scale)
    return Arrays(
        train_images=train_images,
        train_labels=stored["y_train"].astype(np.int32),
        test_images=test_images,
        test_labels=stored["y_test"].astype(np.int32),
        classes=classes,
        mean=mean,
        std=std,
        scale=scale,
    )


def _images(x: np.ndarray, key: str, path: Path) -> np.ndarray:
    if x.ndim not in (3, 4) or not x.size:
        raise InputError(
            f"{path}: {key} has shape {list(x.shape)}: save images as [N, H, W] or [N, H, W, C], not empty."
        )
    if x.dtype != np.uint8 and x.dtype.kind != "f":
        raise InputError(f"{path}: {key} is {x.dtype}: save images as uint8 (0 to 255) or as floats.")
    if x.dtype != np.uint8:
        with np.errstate(over="ignore"):
            x = x.astype(np.float32, copy=False)
        if not np.isfinite(x).all():
            raise InputError(f"{path}: {key} holds values that are not finite in float32: remove or replace them.")
    return x if x.ndim == 4 else x[..., None]


def _check_labels(y: np.ndarray, key: str, n: int, images: str, path: Path) -> None:
    if y.dtype.kind not in "iu" or y.ndim != 1:
        raise InputError(f"{path}: {key} is {y.dtype}{list(y.shape)}: save labels as integers [N], counted from 0.")
    if len(y) != n:
        raise InputError(f"{path}: {len(y)} labels in {key} for {n} images in {images}: save one label per image.")
    if y.min() < 0:
        raise InputError(f"{path}: {key} holds the negative label {y.min()}: save labels as integers counted from 0.")


def _moments(images: np.ndarray, scale: float) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation per channel, in float64 but a few images at a time. A constant channel has deviation 1."""
    parts = np.array_split(images, -(-len(images) // 1024))
    count = images[..., 0].size
    mean = np.sum([np.sum(part / scale, (0, 1, 2), np.float64) for part in parts], 0) / count
    std = np.sqrt(np.sum([np.sum((part / scale - mean) ** 2, (0, 1, 2), np.float64) for part in parts], 0) / count)
    std = np.where(std <= 1e-6 * np.abs(mean), 1.0, std)
    return tuple(mean.tolist()), tuple(std.tolist())
