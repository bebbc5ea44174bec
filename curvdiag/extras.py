"""Packages that only a part of curvdiag needs: imported when that part is used, and named where they are missing."""

from __future__ import annotations

import importlib
from types import ModuleType

from curvdiag.errors import MissingExtraError


def require(module: str, extra: str) -> ModuleType:
    """Import an optional package.

    Args:
        module: What to import, dots and all.
        extra: The extra of curvdiag that installs it.

    Raises:
        MissingExtraError: It is not installed. An error inside an installed package is passed on as it is.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if module != missing and not module.startswith(f"{missing}."):
            raise
        raise MissingExtraError(
            f"{missing} is not installed; it comes with an extra of curvdiag: pip install 'curvdiag[{extra}]'",
            name=missing,
        ) from error
