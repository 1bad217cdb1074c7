"""Models. A module's public dataclass with a method `network(shape, classes) -> Network` is found by the module's name."""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
from collections.abc import Callable
from typing import Any, Protocol

from forwardgrad.errors import InputError, unknown
from forwardgrad.network import Network


class Model(Protocol):
    """A model's configuration: a frozen dataclass whose fields are flags of the command line."""

    def network(self, shape: tuple[int, ...], classes: int) -> Network: ...


def _found() -> dict[str, type[Any]]:
    out = {}
    for info in pkgutil.iter_modules(__path__):
        module = importlib.import_module(f"{__name__}.{info.name}")
        for value in vars(module).values():
            local = isinstance(value, type) and value.__module__ == module.__name__
            if local and dataclasses.is_dataclass(value) and hasattr(value, "network"):
                out[info.name] = value
    return out


def names() -> list[str]:
    """The names of all models of the package, sorted."""
    return sorted(_found())


def name_of(model: Any) -> str:
    """The name that `find` turns into the configuration's class."""
    if isinstance(model, External):
        return model.path
    for name, kind in _found().items():
        if type(model) is kind:
            return name
    return f"{type(model).__module__}:{type(model).__qualname__}"


def find(name: str) -> Callable[..., Model]:
    """The configuration class of a model: a name of this folder, or `package.module:object` from outside.

    An outside object is a dataclass with a method `network(shape, classes)`, or a function `(shape, classes) -> Network`.

    Raises:
      InputError: there is no such model; it cannot be imported; it is neither of the two.
    """
    if ":" not in name:
        known = _found()
        if name not in known:
            raise unknown("model", name, known, "A model of your own: package.module:object.")
        return known[name]
    module, _, attribute = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        raise InputError(
            f"model {name!r} cannot be imported ({error}): give package.module:object, importable from here."
        ) from error
    if dataclasses.is_dataclass(found) and hasattr(found, "network"):
        return found  # pyright: ignore[reportReturnType]
    if callable(found):
        return lambda: External(name)
    raise InputError(
        f"model {name!r} is neither a dataclass with a method network(shape, classes) nor a function: make it one of them."
    )


@dataclasses.dataclass(frozen=True)
class External:
    """A function `(shape, classes) -> Network` from outside the package."""

    path: str

    def network(self, shape: tuple[int, ...], classes: int) -> Network:
        """What the function returns.

        Raises:
          InputError: it is not a `Network`.
        """
        module, _, attribute = self.path.partition(":")
        network = getattr(importlib.import_module(module), attribute)(shape, classes)
        if not isinstance(network, Network):
            raise InputError(f"model {self.path!r} returned {type(network).__name__}: return a forwardgrad.Network.")
        return network
