"""Fetching published files: verified before they appear under their name, and never left there half written."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import io
import os
import secrets
import tarfile
import urllib.request
import zlib
from collections.abc import Generator, Iterator, Mapping
from pathlib import Path
from typing import IO

from forwardgrad.data.files import check_content, make_folder, read_verified
from forwardgrad.errors import InputError

_CHUNK = 1 << 18  # bytes
_TIMEOUT = 30.0  # seconds without an answer


def fetch(url: str, target: Path, checksum: str) -> None:
    """Download one file, with a progress bar on a terminal.

    Args:
      url: of the file.
      target: where it shall lie; its folder is created. The file appears there whole and verified, or not at all.
      checksum: of the canonical file, as in `forwardgrad.data.files`.

    Raises:
      InputError: where there is no network, the folder cannot be written, or something else arrives.
    """
    algorithm, _, expected = checksum.partition(":")
    digest = hashlib.new(algorithm, usedforsecurity=False)
    make_folder(target.parent)
    try:
        with _appearing(target) as file:
            with (
                urllib.request.urlopen(url, timeout=_TIMEOUT) as response,
                contextlib.closing(_progress(response, target.name)) as chunks,
            ):
                for chunk in chunks:
                    digest.update(chunk)
                    file.write(chunk)
            if digest.hexdigest() != expected:
                raise InputError(
                    f"what {url} sent is not the canonical file (its {algorithm.upper()} differs): "
                    f"try again later, or put the canonical file at {target} by hand."
                )
    except (OSError, http.client.HTTPException) as error:
        raise InputError(
            f"cannot download {url} ({error}): check the network and the free space, "
            f"or put the file at {target} by hand."
        ) from None


def extract(archive: Path, checksum: str, folder: Path, members: Mapping[str, str], url: str) -> None:
    """Take some files, and no others, out of a tar archive.

    Each is written under the name it was asked for by, whatever else the archive says.

    Args:
      archive: a gzip'ed tar file, which holds the members in a folder called as `folder` is.
      checksum: of the archive.
      folder: where the members go; created.
      members: checksum of each file, by its name.
      url: where the canonical archive is published, for the error message.

    Raises:
      InputError: where the archive or a member is not the canonical one, or the folder cannot be written.
    """
    content = read_verified(archive, checksum, url)
    make_folder(folder)
    try:
        with tarfile.open(fileobj=io.BytesIO(content), mode="r:gz") as tar:
            for name, expected in members.items():
                source = tar.extractfile(f"{folder.name}/{name}")
                member = source.read() if source else b""
                check_content(member, expected, f"{name} in {archive}", url)
                with _appearing(folder / name) as file:
                    file.write(member)
    except (tarfile.TarError, zlib.error, KeyError, EOFError, OSError) as error:
        raise InputError(
            f"cannot extract {archive} ({error}): check the free space, or delete it and get it from {url}."
        ) from None


@contextlib.contextmanager
def _appearing(target: Path) -> Iterator[IO[bytes]]:
    """A file that takes its name when the block ends well, and vanishes when it does not."""
    partial = target.with_name(f".{target.name}.{secrets.token_hex(4)}.part")
    try:
        with partial.open("xb") as file:
            yield file
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)


def _progress(response: http.client.HTTPResponse, name: str) -> Generator[bytes, None, None]:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    length = response.headers.get("Content-Length")
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(name, total=int(length) if length else None)
        while chunk := response.read(_CHUNK):
            yield chunk
            progress.advance(task, len(chunk))
