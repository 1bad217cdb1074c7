"""Flags of the commands that run experiments: every field of a preset and of its model, by tyro."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

import tyro

from forwardgrad import models, presets, recipes
from forwardgrad.errors import InputError, unknown
from forwardgrad.presets import Experiment
from forwardgrad.presets.experiment import OPTIONS

E = TypeVar("E")
R = TypeVar("R")


@dataclasses.dataclass(frozen=True)
class Places:
    """Where data come from."""

    data_dir: Path | None = None
    """folder of the data sets; by default $FORWARDGRAD_DATA, then the user's cache"""
    offline: bool = False
    """never download"""


@dataclasses.dataclass(frozen=True)
class _Command(Generic[E, R]):
    experiment: E
    options: R


def parse(
    command: str, argv: list[str], options: Any, about: str, *, unused: Sequence[str] = ()
) -> tuple[str, Experiment[Any], Any]:
    """`[PRESET] [--model NAME] [flags]`.

    Args:
      command: its name, for the usage line.
      argv: what follows it.
      options: a dataclass instance: the command's own flags with their defaults.
      about: for --help.
      unused: fields of the experiment that the command does nothing with.

    Returns:
      The preset's name, the experiment, the options.

    Raises:
      InputError: an unknown preset, model, method or flag, a value that does not parse, or one that would change nothing.
    """
    argv = list(argv)
    name = argv.pop(0) if argv and not argv[0].startswith("-") else "digits"
    experiment, found = flags(command, argv, presets.find(name), options, about, "[PRESET]")
    methods = [experiment.method]
    if hasattr(found, "methods"):
        methods = method_names(found.methods)
    for one, several in (("method", "methods"), ("microbatch", "microbatches")):
        if hasattr(found, several) and any(re.fullmatch(f"--{one}(=.*)?", word) for word in argv):
            raise InputError(
                f"`forwardgrad {command}` takes several {several}: give them to --{several}, not to --{one}."
            )
    for field in unused:
        if _flags_of(field) & _words(argv):
            raise InputError(
                f"--{field.replace('_', '-')} would change nothing: `forwardgrad {command}` does not use it; leave it out."
            )
    refuse_idle(argv, [dataclasses.replace(experiment, method=method) for method in methods])
    return name, experiment, found


def flags(
    command: str, argv: list[str], experiment: Experiment[Any], options: Any, about: str, usage: str
) -> tuple[Experiment[Any], Any]:
    """`[--model NAME] [flags]`: an experiment and options with the values of the flags in place of their own.

    Args:
      command, argv, options, about: as for `parse`.
      experiment: holds the defaults.
      usage: what stands between the command and its flags, for the usage line.

    Raises:
      InputError: an unknown model or flag, or a value that does not parse.
    """
    argv = list(argv)
    model = _take(argv, "--model")
    if model is not None and model != models.name_of(experiment.model):
        try:
            experiment = dataclasses.replace(experiment, model=models.find(model)())
        except TypeError as error:
            raise InputError(
                f"model {model!r} has fields without a default ({error}): give each one a default."
            ) from error
    kind = _Command[Experiment[type(experiment.model)], type(options)]  # pyright: ignore[reportInvalidTypeArguments]
    more = " --model NAME takes another model (its fields are flags too), by name or as package.module:object."
    found = tyro_cli(
        command,
        argv,
        kind,
        prog=f"forwardgrad {command} {usage}",
        description=about + more,
        default=_Command(experiment, options),
    )
    return found.experiment, found.options


def refuse_idle(argv: list[str], runs: list[Experiment[Any]]) -> None:
    """Refuse flags that have an effect on none of the runs: who sets one expects it to matter.

    Raises:
      InputError: which flag, why, and where it would have one.
    """
    words = _words(argv)
    for field in (f.name for f in dataclasses.fields(Experiment)):
        given = _flags_of(field) & words
        reasons = [run.idle(field) for run in runs] if given else []
        if given and all(reasons):
            takers = [m for m in recipes.names() if OPTIONS.get(field) in recipes.find(m).options]
            foreign = any(OPTIONS.get(field) not in recipes.find(run.method).options for run in runs)
            remedy = f"; {', '.join(takers)} have it" if takers and foreign else ""
            why = " and ".join(dict.fromkeys(reasons))
            raise InputError(f"{min(given)} would change nothing: it {why}{remedy}; leave it out.")


def _words(argv: list[str]) -> set[str]:
    return {word.partition("=")[0].replace("_", "-") for word in argv if word.startswith("--")}


def _flags_of(field: str) -> set[str]:
    name = field.replace("_", "-")
    return {f"--{name}", f"--no-{name}"}


def method_names(text: str) -> list[str]:
    """The methods of `--methods a,b,c`.

    Raises:
      InputError: none, one twice, or one that does not exist.
    """
    names = [recipes.find(name.strip()).name for name in text.split(",") if name.strip()]
    if not names or len(set(names)) != len(names):
        raise InputError(
            f"--methods {text!r} names no method, or one twice: give different names with commas between them."
        )
    return names


def tyro_cli(
    command: str, argv: list[str], kind: Any, prog: str = "", description: str | None = None, default: Any = None
) -> Any:
    """`tyro.cli`, whose complaints become one sentence.

    Raises:
      InputError: an unknown flag, a missing argument, a value that does not parse.
    """
    flags = {"--help", *_flags(kind if default is None else default)}
    flags |= {"--model"} if hasattr(default, "experiment") else set()  # `flags` has taken it
    for word in argv:
        flag = word.partition("=")[0].replace("_", "-")
        if word.startswith("--") and flag not in flags:
            raise unknown("flag", flag, flags, f"`forwardgrad {command} --help` lists them.")
    shown, complaint = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(shown), contextlib.redirect_stderr(complaint):
            return tyro.cli(
                kind,
                args=argv,
                prog=prog or f"forwardgrad {command}",
                description=description,
                config=(tyro.conf.OmitArgPrefixes,),
                **({} if default is None else {"default": default}),
            )
    except SystemExit as stop:
        print(shown.getvalue(), end="")
        if stop.code in (0, None):
            raise
        raise InputError(f"{_sentence(complaint.getvalue())} `forwardgrad {command} --help` lists the flags.") from None


def count(number: int, noun: str) -> str:
    """`1 epoch`, `2 epochs`."""
    return f"{number} {noun}{'s' * (number != 1)}"


def _take(argv: list[str], flag: str) -> str | None:
    """Remove `flag VALUE` or `flag=VALUE` from the arguments, and return the value."""
    for i, word in enumerate(argv):
        if word.startswith(flag + "="):
            return argv.pop(i).partition("=")[2]
        if word == flag:
            if i + 1 == len(argv):
                raise InputError(f"{flag} needs a value: see `forwardgrad list models`.")
            del argv[i]
            return argv.pop(i)
    return None


def _flags(value: Any) -> set[str]:
    """The flags that tyro makes of a dataclass or an instance of one, nested ones without prefix."""
    out: set[str] = set()
    for field in dataclasses.fields(value):
        inner = getattr(value, field.name, None)
        if "Positional" in str(field.type):
            continue
        if dataclasses.is_dataclass(inner):
            out |= _flags(inner)
        else:
            name = field.name.replace("_", "-")
            out |= _flags_of(field.name) if field.type in ("bool", bool) else {f"--{name}"}
    return out


def _sentence(message: str) -> str:
    """tyro's boxed complaint as one line."""
    lines = [
        re.sub(r"[│╭╮╰╯─|]+|-{5,}", " ", re.sub(r"\x1b\[[0-9;]*m", "", line)).strip() for line in message.splitlines()
    ]
    words = re.sub(r"\s+", " ", " ".join(line for line in lines if line and not line.startswith("For full helptext")))
    words = re.split(r" Argument helptext:| Full helptext:| forwardgrad \w+ --help", words)[0].strip()
    words = re.sub(r"^(Parsing error|Value error|Invalid choice|Required options|Unrecognized options)\s*", "", words)
    words = re.sub(r" \(required\)", "", re.sub(r"^Missing from [^:]*:", "missing:", words))
    return words if words.endswith((".", "?")) else f"{words}."
