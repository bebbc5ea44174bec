"""Reading a DataLoader that a training may be walking, and leaving all that it holds as it was."""

from __future__ import annotations

import copy
import itertools
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset

from curvdiag.errors import DataError
from curvdiag.sandbox import random_states

PARTS = ("dataset", "sampler", "batch_sampler", "collate_fn", "generator")
DEPTH, MOST = 4, 1000
"""How far, and to how many objects, :func:`as_it_was` looks into the parts of a loader."""


def first_batches(loader: DataLoader, count: int, *, seed: int = 0) -> list[Any]:
    """The first batches of a DataLoader that a training may be walking, drawn with ``seed`` where it shuffles.

    It is read by a copy without workers, :func:`as_it_was` afterwards; the same ``seed`` gives the same batches in
    another process. A sampler with an ``epoch`` is read as in its first.

    Raises:
        DataError: Reading would take the batches away from the training, or there are none.
    """
    dataset = getattr(loader, "dataset", None)
    if isinstance(dataset, IterableDataset) and hasattr(dataset, "__next__"):
        raise DataError(
            f"{type(dataset).__name__} is its own iterator, and what is read from it is gone for the training: give "
            "batches of your own"
        )
    samplers: list[Any] = [getattr(loader, "sampler", None), getattr(loader, "batch_sampler", None)]
    epochs = [(one, one.epoch) for one in samplers if isinstance(getattr(one, "epoch", None), int)]
    with as_it_was(loader):
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002 - data sets draw from the global state
        torch.default_generator.manual_seed(seed)  # manual_seed would seed devices that are yet to wake
        for generator in _generators(loader):
            generator.manual_seed(seed)
        try:
            for sampler, _ in epochs:
                sampler.epoch = 0
            found = list(itertools.islice(without_workers(loader), count))
        finally:
            for sampler, epoch in epochs:
                sampler.epoch = epoch
    if not found:
        raise DataError(f"there is no batch in the {type(loader).__name__}")
    return found


def without_workers(loader: DataLoader) -> DataLoader:
    """A copy that reads in this process, so that the workers and the epoch of the training are left alone."""
    twin = copy.copy(loader)
    # DataLoader guards some of these against assignment; on a private copy that has no workers it is safe.
    settings = {"num_workers": 0, "persistent_workers": False, "prefetch_factor": None, "timeout": 0}
    for name, value in {**settings, "pin_memory": False, "_iterator": None}.items():
        object.__setattr__(twin, name, value)
    return twin


@contextmanager
def as_it_was(loader: Any) -> Iterator[None]:
    """Global random states, and of a DataLoader what its dataset, samplers and collator hold, restored.

    Datasets have generators of their own for noise and crops, and count their passes: attributes, and generators within
    them, are given back. What a dataset changes in place, in a list of its own say, stays changed.
    """
    objects, undo = _reached(loader if isinstance(loader, DataLoader) else None), []
    for one in objects:
        state = _state_of(one)
        if state is not None:
            undo.append(state)
        elif hasattr(one, "__dict__"):
            undo.append(_attributes_of(one))
    with ExitStack() as stack, random_states(*_generators(loader)):
        for restore in undo:
            stack.callback(restore)
        yield


def _generators(loader: Any) -> list[torch.Generator]:
    sampler = getattr(loader, "sampler", None)
    inner = getattr(getattr(loader, "batch_sampler", None), "sampler", None)
    found = [getattr(owner, "generator", None) for owner in (loader, sampler, inner)]
    return [g for g in found if isinstance(g, torch.Generator)]


def _reached(loader: DataLoader | None) -> list[Any]:
    """The parts of a loader, and the objects in their attributes."""
    found: dict[int, Any] = {}
    layer = [getattr(loader, name, None) for name in PARTS]
    for _ in range(DEPTH):
        following: list[Any] = []
        for one in layer:
            if id(one) in found or isinstance(one, type | torch.Tensor | torch.nn.Module) or len(found) >= MOST:
                continue
            if isinstance(one, list | tuple | Mapping):  # a long one holds data
                if len(one) <= 32:
                    following += one.values() if isinstance(one, Mapping) else one
            elif hasattr(one, "__dict__") or _state_of(one) is not None:
                found[id(one)] = one
                following += getattr(one, "__dict__", {}).values()
        layer = following
    return list(found.values())


def _state_of(one: Any) -> Callable[[], object] | None:
    """What gives a generator of random numbers its present state back; None for anything else."""
    if isinstance(one, torch.Generator):
        theirs = one.get_state()
        return lambda: one.set_state(theirs)
    if isinstance(one, np.random.Generator):
        bits, kept = one.bit_generator, copy.deepcopy(one.bit_generator.state)
        return lambda: setattr(bits, "state", kept)
    if isinstance(one, np.random.RandomState):
        numpys = one.get_state()
        return lambda: one.set_state(numpys)
    if isinstance(one, random.Random):
        pythons = one.getstate()
        return lambda: one.setstate(pythons)
    return None


def _attributes_of(one: Any) -> Callable[[], None]:
    before = dict(vars(one))

    def restore() -> None:
        now = vars(one)
        for name in [name for name in now if name not in before]:
            del now[name]
        now.update((name, value) for name, value in before.items() if name not in now or now[name] is not value)

    return restore
