"""The IDX format of MNIST and of the data sets that took its place: a big-endian header, then bytes.

The header is a magic number, `2048 + rank` for bytes, and the length of each axis, all of 32 bits.
"""

from __future__ import annotations

import gzip
import math
import os
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np

from forwardgrad.data.download import fetch
from forwardgrad.data.files import absent, check_directory, read_verified
from forwardgrad.errors import InputError


class IdxFile(NamedTuple):
    """A published file: its name without `.gz`, its checksum as it is published, packed, and its checksum unpacked."""

    name: str
    packed: str
    unpacked: str


class IdxFiles(NamedTuple):
    """The four files of a data set."""

    train_images: IdxFile
    train_labels: IdxFile
    test_images: IdxFile
    test_labels: IdxFile


def load(
    folder: Path, files: IdxFiles, url: str, *, offline: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The four arrays of a data set, from a folder that holds its files, packed or unpacked, or else from the network.

    Args:
      folder: `<data directory>/<data set>`. Nothing is written to it where no file is missing.
      files: names and checksums.
      url: the folder on the network, with a slash at its end.
      offline: never look there.

    Returns:
      Training images uint8 `[N, H, W, 1]`, their labels int32 `[N]`, and the same for the test.

    Raises:
      InputError: naming the file and the remedy.
    """
    check_directory(folder.parent)
    missing = [file for file in files if not any(map(os.path.exists, _places(folder, file)))]
    if missing and offline:
        raise absent(folder, [f"{file.name}.gz" for file in missing], url)
    for file in missing:
        fetch(f"{url}{file.name}.gz", folder / f"{file.name}.gz", file.packed)
    arrays = []
    for images, labels in (files[:2], files[2:]):
        x, y = read(folder, images, url), read(folder, labels, url)
        if x.ndim != 3 or y.shape != x.shape[:1]:
            raise InputError(
                f"{images.name} {x.shape} and {labels.name} {y.shape} in {folder} do not belong together: "
                "images must be [N, H, W] and labels [N]."
            )
        arrays += [x[..., None], y.astype(np.int32)]
    return tuple(arrays)


def read(folder: Path, file: IdxFile, url: str) -> np.ndarray:
    """The array in one file, packed or unpacked, whose checksum must match.

    Raises:
      InputError: where the file is another, or broken.
    """
    packed, unpacked = _places(folder, file)
    if not os.path.exists(packed):
        return parse(read_verified(unpacked, file.unpacked, url), unpacked)
    content = read_verified(packed, file.packed, url)
    try:
        return parse(gzip.decompress(content), packed)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(f"{packed} is not a whole gzip file ({error}): delete it and get it again.") from None


def parse(content: bytes, path: Path) -> np.ndarray:
    """The uint8 array that `content` describes. Strict: of bytes alone, and neither too short nor too long.

    Args:
      content: of the unpacked file.
      path: where it came from, for the error message.

    Raises:
      InputError: where it is not an IDX file of bytes.
    """
    rank = content[3] if content[:3] == b"\0\0\x08" and len(content) > 3 else 0
    header = 4 + 4 * rank
    if not rank or len(content) < header:
        raise InputError(f"{path} is not an IDX file of bytes: delete it and get it again.")
    shape = tuple(int(n) for n in np.frombuffer(content, ">u4", count=rank, offset=4))
    if len(content) != header + math.prod(shape):
        raise InputError(
            f"{path} has {len(content) - header} bytes of data, and its header {list(shape)} asks for another number: "
            "delete it and get it again."
        )
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)


def _places(folder: Path, file: IdxFile) -> tuple[Path, Path]:
    return folder / f"{file.name}.gz", folder / file.name
