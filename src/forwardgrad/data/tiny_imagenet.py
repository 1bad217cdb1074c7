"""Tiny ImageNet 200, from the folders of its archive, unpacked as `<data directory>/tiny_imagenet/tiny-imagenet-200`.

    train/<class>/images/*.JPEG      500 of each of 200 classes, named by WordNet: n01443537, ...
    val/images/*.JPEG                50 of each, in no order
    val/val_annotations.txt          a line each: file name, class, and a box that is not used, separated by tabs
    words.txt                        class and its names, where it is there

The images of the archive's own test set have no labels: its validation images are the test set here. Classes are numbered in the order of their
names. The 110,000 files have no published checksums; reading them takes half a minute or so.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from forwardgrad.data.files import VARIABLE, check_directory
from forwardgrad.data.spec import Arrays, DataSet
from forwardgrad.errors import InputError

URL = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
FOLDER = "tiny_imagenet/tiny-imagenet-200"
SHAPE = (64, 64, 3)
MEAN = (0.4802, 0.4481, 0.3975)
STD = (0.2770, 0.2691, 0.2821)
AGAIN = f"unpack {URL} again, all of it"


def load(data_dir: Path, *, offline: bool = False) -> Arrays:
    """100000 training and 10000 test images. Nothing is downloaded. Raises `InputError` where the folders are not whole."""
    check_directory(data_dir)
    folder = data_dir / FOLDER
    if not folder.is_dir():
        raise InputError(
            f"no {folder.name} in {folder.parent}: unpack {URL} there, or name the folder that has {FOLDER} with --data-dir or ${VARIABLE}."
        )
    return read(folder)


def read(folder: Path, classes: int = 200, shape: tuple[int, int, int] = SHAPE) -> Arrays:
    """The data set of a folder, its training images in a fixed random order (the folders hold them sorted by class).

    Args:
      folder: with `train` and `val` in it.
      classes: how many there must be.
      shape: of the images; grey ones become coloured.

    Raises:
      InputError: another number of classes, a class without images, a line or a file that cannot be read, an image of another size.
    """
    train = folder / "train"
    names = sorted(entry.name for entry in train.iterdir() if entry.is_dir()) if train.is_dir() else []
    if len(names) != classes:
        raise InputError(f"{train} has folders of {len(names)} classes, not of {classes}: {AGAIN}.")
    number = {name: i for i, name in enumerate(names)}
    found = [(path, number[name]) for name in names for path in _images_of(train / name / "images")]
    order = np.random.default_rng(0).permutation(len(found))
    train_images, train_labels = _arrays([found[i] for i in order], shape)
    test_images, test_labels = _arrays(_annotated(folder / "val", number), shape)
    return Arrays(
        train_images=train_images,
        train_labels=train_labels,
        test_images=test_images,
        test_labels=test_labels,
        classes=classes,
        mean=MEAN,
        std=STD,
        class_names=_words(folder / "words.txt", names),
    )


def _images_of(folder: Path) -> list[Path]:
    found = sorted(folder.glob("*.JPEG"))
    if not found:
        raise InputError(f"no *.JPEG in {folder}: {AGAIN}.")
    return found


def _annotated(folder: Path, number: dict[str, int]) -> list[tuple[Path, int]]:
    """Files and labels of `val_annotations.txt`."""
    file = folder / "val_annotations.txt"
    out = []
    for i, line in enumerate(_lines(file), 1):
        name, _, rest = line.partition("\t")
        label = number.get(rest.partition("\t")[0].strip())
        if label is None:
            raise InputError(f"line {i} of {file} does not name an image and one of the classes: {AGAIN}.")
        out.append((folder / "images" / name, label))
    if not out:
        raise InputError(f"{file} is empty: {AGAIN}.")
    return out


def _lines(file: Path) -> list[str]:
    try:
        return [line for line in file.read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {file} ({getattr(error, 'strerror', None) or error}): {AGAIN}.") from None


def _words(file: Path, names: Sequence[str]) -> tuple[str, ...]:
    words = dict(line.split("\t", 1) for line in _lines(file) if "\t" in line) if file.exists() else {}
    return tuple(words.get(name, name) for name in names)


def _arrays(files: Sequence[tuple[Path, int]], shape: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray]:
    images = np.empty((len(files), *shape), np.uint8)

    def fill(i: int) -> None:
        images[i] = _decoded(files[i][0], shape)

    with ThreadPoolExecutor(os.cpu_count()) as threads:
        list(threads.map(fill, range(len(files))))  # raises what one of them raised
    return images, np.array([label for _, label in files], np.int32)


def _decoded(path: Path, shape: tuple[int, int, int]) -> np.ndarray:
    from PIL import Image

    try:
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("RGB"))
    except (OSError, ValueError) as error:
        raise InputError(
            f"cannot read the image {path} ({getattr(error, 'strerror', None) or error}): {AGAIN}."
        ) from None
    if pixels.shape != shape:
        raise InputError(
            f"{path} has {pixels.shape[0]} x {pixels.shape[1]} pixels, not {shape[0]} x {shape[1]}: {AGAIN}."
        )
    return pixels


dataset = DataSet(
    name="tiny-imagenet",
    load=load,
    shape=SHAPE,
    classes=200,
    about="110000 colour photographs of 64x64 pixels, of two hundred kinds of things",
    cite="""@techreport{le2015tiny,
  author = {Le, Ya and Yang, Xuan},
  title = {Tiny ImageNet Visual Recognition Challenge},
  institution = {Stanford University, CS 231N},
  year = {2015},
}""",
)
