"""Forward passes of sharded weights: every rank takes part in each of them, whether or not it wants one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from curvdiag.distributed.fsdp import settle
from curvdiag.distributed.ranks import Ranks
from curvdiag.errors import LossError

PLACE = "forward pass"


@contextmanager
def in_step(model: nn.Module, ranks: Ranks, spare: Callable[[], object]) -> Iterator[None]:
    """As many forward passes of ``model`` in the body on all ranks as on the one that makes most.

    Before each pass the ranks meet. One that has finished repeats its last pass for as long as another has not.

    Args:
        spare: Makes a pass, for a rank whose body made none.

    Raises:
        DistributedError: Another rank failed.
        LossError: ``spare`` makes none.
    """
    last: list[tuple[Any, Any]] = []
    unfinished, repeating = False, False

    def before(module: nn.Module, args: Any, kwargs: Any) -> None:
        nonlocal unfinished
        if repeating:
            return
        if unfinished:  # the last pass ended in an exception, which somebody has caught
            settle(model)
        ranks.gather(True, PLACE)
        last[:] = [(args, kwargs)]
        unfinished = True

    def after(module: nn.Module, args: Any, output: Any) -> None:
        nonlocal unfinished
        unfinished = False

    handles = [
        model.register_forward_pre_hook(before, prepend=True, with_kwargs=True),
        model.register_forward_hook(after),
    ]
    try:
        yield
        if not last:
            spare()
        if not last:
            raise LossError("the loss does not call the model that it is given, by which ranks keep in step")
        repeating = True
        while any(ranks.gather(False, PLACE)):
            args, kwargs = last[0]
            model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
