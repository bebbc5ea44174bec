"""Algorithms whose arithmetic the modes of their caller do not reach."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import ExitStack
from typing import ParamSpec, TypeVar

import torch

Given = ParamSpec("Given")
Answer = TypeVar("Answer")


def outside_modes(algorithm: Callable[Given, Answer]) -> Callable[Given, Answer]:
    """``algorithm`` with autocast and inference mode off, whatever its caller is in.

    Autocast would round the vectors of the algorithm itself to half precision, and tensors made in inference mode could
    be neither updated nor differentiated later. Products of an objective's operators leave both modes by themselves.
    """

    @functools.wraps(algorithm)
    def run(*args: Given.args, **kwargs: Given.kwargs) -> Answer:
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode(False))
            for kind in _kinds():
                if torch.is_autocast_enabled(kind):
                    stack.enter_context(torch.autocast(kind, enabled=False))
            return algorithm(*args, **kwargs)

    return run


@functools.cache
def _kinds() -> tuple[str, ...]:
    """The device types of this machine that have an autocast."""
    found = torch.accelerator.current_accelerator()
    kinds = ["cpu"] if found is None else ["cpu", found.type]
    return tuple(kind for kind in kinds if torch.amp.is_autocast_available(kind))
