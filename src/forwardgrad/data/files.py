"""Where data sets lie on disk, and reading files that must be exactly what they claim to be.

A checksum is written `"sha256:<hexadecimal digits>"` or `"md5:<hexadecimal digits>"`.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

from forwardgrad.errors import InputError

VARIABLE = "FORWARDGRAD_DATA"


def cache_directory() -> Path:
    """The folder for data where the user names none: `$XDG_CACHE_HOME/forwardgrad`, or `~/.cache/forwardgrad`."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path("~/.cache").expanduser()) / "forwardgrad"


def data_directory(given: str | Path | None = None) -> Path:
    """The folder that holds the data sets. It is looked at only once a data set needs a file from it.

    Args:
      given: the user's explicit choice, which wins over `$FORWARDGRAD_DATA`, which wins over the user's cache folder.

    Returns:
      The folder, which need not exist.
    """
    chosen = given or os.environ.get(VARIABLE)
    return Path(chosen).expanduser() if chosen else cache_directory()


def check_directory(data_dir: Path) -> None:
    """Refuse a data directory that is not there, unless it is the cache folder, which is ours to make.

    Raises:
      InputError: naming the folder.
    """
    if os.path.exists(data_dir) and not os.path.isdir(data_dir):
        raise InputError(f"the data directory {data_dir} is a file: give a folder with --data-dir or ${VARIABLE}.")
    if not os.path.exists(data_dir) and data_dir != cache_directory():
        raise InputError(
            f"the data directory {data_dir} does not exist: create it, or give another with --data-dir or ${VARIABLE}."
        )


def make_folder(folder: Path, remedy: str = f"give a writable data directory with --data-dir or ${VARIABLE}") -> None:
    """Create a folder to write into, with its parents, before anything is computed or fetched for it.

    Raises:
      InputError: where it cannot be created or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        writable = os.access(folder, os.W_OK | os.X_OK)
        reason = "permission denied"
    except OSError as error:
        writable, reason = False, error.strerror or str(error)
    if not writable:
        raise InputError(f"cannot write to {folder} ({reason}): {remedy}.")


def absent(folder: Path, names: Iterable[str], url: str) -> InputError:
    """The error for files that are not there and may not be fetched, to be raised by the caller.

    Args:
      folder: where they were expected.
      names: their names.
      url: where they are published.
    """
    return InputError(
        f"no {', '.join(names)} in {folder}: put the files there (published at {url}), "
        f"name the folder that has them with --data-dir or ${VARIABLE}, or run without --offline."
    )


def read_verified(path: Path, checksum: str, url: str) -> bytes:
    """The contents of a file, whose checksum matches. The file is read once: what was checked is what is returned.

    Args:
      path: the file.
      checksum: of the canonical file.
      url: where the canonical file is published, for the error message.

    Raises:
      InputError: where the file cannot be read, or is another.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read {path} ({error.strerror or error}): make it a readable file.") from None
    check_content(content, checksum, path, url)
    return content


def check_content(content: bytes, checksum: str, what: str | Path, url: str) -> None:
    """Refuse bytes that are not those of the canonical file.

    Raises:
      InputError: naming the file and what to do with it.
    """
    algorithm, _, expected = checksum.partition(":")
    if hashlib.new(algorithm, content, usedforsecurity=False).hexdigest() != expected:
        raise InputError(
            f"{what} is not the canonical file (its {algorithm.upper()} differs): "
            f"delete it and let it download again, or get it from {url}."
        )
