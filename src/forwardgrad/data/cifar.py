"""The layout that CIFAR-10 and CIFAR-100 share: an archive of pickled batches."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from forwardgrad.data.download import extract, fetch
from forwardgrad.data.files import absent, check_directory, read_verified
from forwardgrad.data.pickles import unpickle
from forwardgrad.data.spec import Arrays
from forwardgrad.errors import InputError

URL = "https://www.cs.toronto.edu/~kriz/"
CITE = """@techreport{krizhevsky2009learning,
  author = {Krizhevsky, Alex},
  title = {Learning Multiple Layers of Features from Tiny Images},
  institution = {University of Toronto},
  year = {2009},
}"""


@dataclasses.dataclass(frozen=True)
class Release:
    """Names and checksums of a published version, and the names inside its files.

    Attributes:
      folder: of the files, below the data directory; the archive is looked for in its parent.
      archive: name of the archive.
      archive_checksum: of the archive.
      train: checksum of each training file, by its name, in order.
      test: the same for the test.
      meta: the same for the one file of class names.
      labels_key: of the labels, in the training and test files.
      names_key: of the class names, in the `meta` file.
      classes: number of classes.
    """

    folder: str
    archive: str
    archive_checksum: str
    train: Mapping[str, str]
    test: Mapping[str, str]
    meta: Mapping[str, str]
    labels_key: bytes
    names_key: bytes
    classes: int

    @property
    def files(self) -> dict[str, str]:
        """Checksum of every file, by its name."""
        return {**self.train, **self.test, **self.meta}


def load(
    data_dir: Path,
    release: Release,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    *,
    offline: bool,
    url: str = URL,
) -> Arrays:
    """Read a release from the data directory, or first fetch and unpack its archive.

    Args:
      data_dir: the data directory. Nothing is written to it where no file is missing.
      release: what to read.
      mean: per channel, of images scaled to [0, 1].
      std: per channel, of images scaled to [0, 1].
      offline: never fetch; an archive that is already there is unpacked all the same.
      url: the folder on the network, with a slash at its end.

    Raises:
      InputError: naming the file and the remedy.
    """
    check_directory(data_dir)
    source = url + release.archive
    folder = data_dir / release.folder
    missing = {name: checksum for name, checksum in release.files.items() if not os.path.exists(folder / name)}
    if missing:
        archive = folder.parent / release.archive
        found = os.path.exists(archive)
        if not found and offline:
            raise absent(folder, missing, source)
        if not found:
            fetch(source, archive, release.archive_checksum)
        extract(archive, release.archive_checksum, folder, missing, source)
        if not found:
            archive.unlink(missing_ok=True)

    train_images, train_labels = _read(folder, release.train, release, source)
    test_images, test_labels = _read(folder, release.test, release, source)
    (meta,) = _dictionaries(folder, release.meta, source)
    names = _entry(meta, release.names_key, folder / next(iter(release.meta)), source)
    return Arrays(
        train_images=train_images,
        train_labels=train_labels,
        test_images=test_images,
        test_labels=test_labels,
        classes=release.classes,
        mean=mean,
        std=std,
        class_names=tuple(name.decode() for name in names),
    )


def _read(folder: Path, files: Mapping[str, str], release: Release, url: str) -> tuple[np.ndarray, np.ndarray]:
    images, labels = [], []
    for name, batch in zip(files, _dictionaries(folder, files, url), strict=True):
        x = _entry(batch, b"data", folder / name, url)
        y = np.asarray(_entry(batch, release.labels_key, folder / name, url))
        if not (_are_images(x) and _are_labels(y, len(x), release.classes)):
            raise InputError(
                f"{folder / name} does not hold 32x32 colour images with labels below {release.classes}: "
                f"delete it and get the canonical file from {url}."
            )
        images.append(np.ascontiguousarray(x.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)))
        labels.append(y.astype(np.int32))
    return np.concatenate(images), np.concatenate(labels)


def _are_images(x: Any) -> bool:
    return isinstance(x, np.ndarray) and x.dtype == np.uint8 and x.ndim == 2 and x.shape[1] == 3 * 32 * 32


def _are_labels(y: np.ndarray, n: int, classes: int) -> bool:
    return y.dtype.kind in "iu" and y.shape == (n,) and bool(np.all((y >= 0) & (y < classes)))


def _dictionaries(folder: Path, files: Mapping[str, str], url: str) -> Iterable[dict[bytes, Any]]:
    for name, checksum in files.items():
        yield unpickle(read_verified(folder / name, checksum, url), folder / name, url)


def _entry(loaded: dict[bytes, Any], key: bytes, path: Path, url: str) -> Any:
    if key not in loaded:
        raise InputError(f"{path} has no {key.decode()!r}: delete it and get the canonical file from {url}.")
    return loaded[key]
