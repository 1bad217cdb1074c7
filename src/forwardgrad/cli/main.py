"""The `forwardgrad` command: one module of this folder per command, found by import."""

from __future__ import annotations

import importlib
import os
import pkgutil
import signal
import sys

from forwardgrad.errors import Diverged, InputError, Interrupted, unknown


def commands() -> dict[str, str]:
    """`{command: first line of its docstring}`."""
    package = importlib.import_module("forwardgrad.cli")
    found = (m.name for m in pkgutil.iter_modules(package.__path__) if m.name not in ("main", "options"))
    out = {}
    for name in found:
        doc = importlib.import_module(f"forwardgrad.cli.{name}").__doc__ or ""
        out[name] = doc.strip().splitlines()[0]
    return out


def main(argv: list[str] | None = None) -> None:
    """Run one command and exit: 0; 2 for bad input, with one sentence; 3 for divergence; 128 + signal after an interruption."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    sys.path.insert(0, os.getcwd())  # as `python -m` does, for --model my_module:my_model
    sys.exit(dispatch(sys.argv[1:] if argv is None else argv))


def dispatch(argv: list[str]) -> int:
    """Run one command and return its exit code."""
    if not argv or argv[0] in ("-h", "--help", "help"):
        width = max(map(len, commands()))
        print("usage: forwardgrad COMMAND [...]\n\nTrain neural networks without backpropagating through them.\n")
        print("\n".join(f"  {name:{width}}  {about}" for name, about in commands().items()))
        print("\nforwardgrad COMMAND --help tells a command's flags.")
        return 0
    if argv[0] in ("-V", "--version"):
        from importlib import metadata

        print(metadata.version("forwardgrad"))
        return 0
    try:
        if argv[0] not in {
            m.name for m in pkgutil.iter_modules(importlib.import_module("forwardgrad.cli").__path__)
        } - {"main", "options"}:
            raise unknown("command", argv[0], commands())
        return importlib.import_module(f"forwardgrad.cli.{argv[0]}").run(argv[1:])
    except InputError as error:
        print(f"forwardgrad: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("forwardgrad: interrupted.", file=sys.stderr)
        return 128 + signal.SIGINT
    except Diverged as error:
        print(f"forwardgrad: {error}", file=sys.stderr)
        return 3
    except Interrupted as error:
        print(f"forwardgrad: {error}", file=sys.stderr)
        return 128 + error.signum
    except BrokenPipeError:  # the reader of our output has gone: nothing is left to say
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
