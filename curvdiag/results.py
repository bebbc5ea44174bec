"""What every result has in common: it becomes a dictionary, and it draws itself."""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch

from curvdiag.errors import ArgumentError

if TYPE_CHECKING:
    from matplotlib.axes import Axes


class Result:
    """Base of the frozen dataclasses that carry results.

    A subclass names in ``figure`` the function of :mod:`curvdiag.plotting` that draws it, where there is one.
    """

    figure: ClassVar[str] = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain Python numbers, lists and strings, ready for JSON, keyed by field."""
        return {f.name: _plain(getattr(self, f.name)) for f in fields(self)}  # type: ignore[arg-type]

    def plot(self, ax: Axes | None = None, **options: Any) -> Axes:
        """Draw the result with the function of :mod:`curvdiag.plotting` that belongs to it.

        Raises:
            ArgumentError: It has no figure.
        """
        if not self.figure:
            raise ArgumentError(
                f"a {type(self).__name__} has no figure of its own: print it, or draw what it is part of"
            )
        from curvdiag import plotting

        return getattr(plotting, self.figure)(self, ax=ax, **options)


def _plain(value: Any) -> Any:
    if isinstance(value, Result):
        return value.to_dict()
    if isinstance(value, torch.Tensor):
        return value.tolist()
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value
