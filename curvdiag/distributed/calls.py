"""Calls that all ranks of an objective make together, and leave together."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

from curvdiag.distributed.ranks import ALONE, Ranks

Given = ParamSpec("Given")
Answer = TypeVar("Answer")


def collectively(function: Callable[Given, Answer]) -> Callable[Given, Answer]:
    """``function`` of an objective, or of its operator, which ends with an error on all ranks if it does on one.

    The ranks are those of the first argument that is an objective, or belongs to one.
    """
    name = function.__qualname__.removesuffix(".__init__")

    @functools.wraps(function)
    def together(*args: Given.args, **kwargs: Given.kwargs) -> Answer:
        ranks = _ranks_in((*args, *kwargs.values()))
        if ranks.alone:
            return function(*args, **kwargs)
        with ranks.together(name):
            return function(*args, **kwargs)

    return together


def _ranks_in(arguments: tuple[Any, ...]) -> Ranks:
    for one in arguments:
        for place in ("objective", None, "space"):  # the last is made when it is asked for
            owner = one if place is None else getattr(one, place, None)
            found = getattr(owner, "holders", None) or getattr(owner, "ranks", None)  # of sharded weights more ranks
            if isinstance(found, Ranks):
                return found
    return ALONE
