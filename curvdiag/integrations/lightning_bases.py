"""The base class that a Trainer wants its callbacks to have, of whichever Lightning is in use."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TypeVar

from curvdiag.errors import MissingExtraError
from curvdiag.extras import require

PACKAGES = ("lightning.pytorch", "pytorch_lightning")
T = TypeVar("T", bound=type)

_made: dict[tuple[type, ...], type] = {}


def with_bases(cls: T) -> T:
    """``cls`` with the ``Callback`` of the package that was imported, or of both; its ``given_as`` is ``cls``.

    Where none was imported yet, of all that are installed.

    Raises:
        MissingExtraError: None is installed.
    """
    if any(base.__name__ == "Callback" for base in cls.__mro__):
        return cls
    packages = [sys.modules[name] for name in PACKAGES if sys.modules.get(name) is not None] or _installed()
    bases = (cls, *(package.Callback for package in packages))
    if bases not in _made:
        body = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__, "given_as": cls}
        _made[bases] = type(cls.__name__, bases, body)
    return _made[bases]  # type: ignore[return-value]


def remade(cls: type) -> object:
    """An instance without a state, for pickle: classes made here have no place of their own in a module."""
    return object.__new__(with_bases(cls))


def _installed() -> list[ModuleType]:
    found = []
    for name in PACKAGES:
        try:
            found.append(require(name, extra="lightning"))
        except MissingExtraError as error:
            missing = error
    if not found:
        raise missing
    return found
