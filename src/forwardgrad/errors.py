"""The exceptions that a user is meant to see: each message is one clear sentence with the remedy."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """The input cannot be used as it is: one clear sentence and the remedy.

    The command line prints the message without a traceback and exits with code 2. Library users catch it as `ValueError`.
    """


class Diverged(RuntimeError):
    """The loss is not a number any more; the message says at which step, and what to try. Exit code 3."""


class Interrupted(RuntimeError):
    """SIGINT or SIGTERM arrived, and a checkpoint has been written. Exit code 128 + `signum`."""

    def __init__(self, signum: int, message: str):
        super().__init__(message)
        self.signum = signum


FEW = 12  # names that a message lists although it knows near ones


def unknown(kind: str, name: str, known: Iterable[str], hint: str = "") -> InputError:
    """The error for a name that does not exist, with the nearest names that do, and all of them where they are few.

    Args:
      kind: what was looked for, as a noun ("preset", "method").
      name: what the user wrote.
      known: every name that exists.
      hint: an extra remedy, put at the end.

    Returns:
      An `InputError`, to be raised by the caller.
    """
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    remedy = f"did you mean {' or '.join(map(repr, near))}?" if near else ""
    if not near or len(near) < len(known) <= FEW:
        remedy += f"{' Known' if near else 'known'}: {', '.join(known)}."
    return InputError(f"unknown {kind} {name!r}: {remedy}{' ' + hint if hint else ''}")
