"""Of which data and which loss an objective is, in a few digits: a scan goes on only with those it began with."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from curvdiag.data import tensors_of
from curvdiag.objective import Objective


def fingerprint(objective: Objective) -> str:
    """The first 16 digits of a SHA-256 of the batches, the loss and the names of the parameters; weights do not count.

    On several ranks it is that of the batches of all of them. Of a function its name counts, of a module its class,
    settings and tensors, of another object its class and the numbers and words that it holds.
    """
    loss = objective.loss()
    made_of = [type(loss), *(getattr(loss, name, None) for name in ("criterion", "loss", "weight"))]
    digest = hashlib.sha256()
    for piece in pieces([objective.parameters.names, made_of, *map(tensors_of, objective.batches)]):
        digest.update(len(piece).to_bytes(8, "big"))
        digest.update(piece)
    if not objective.ranks.alone:
        digest = hashlib.sha256("".join(objective.ranks.gather(digest.hexdigest())).encode())
    return digest.hexdigest()[:16]


def pieces(value: Any) -> Iterator[bytes | memoryview]:
    """What a value is made of, in order."""
    if isinstance(value, Tensor):
        dense = value.detach().to_dense() if value.layout != torch.strided else value.detach()
        yield f"{dense.dtype} {list(dense.shape)}".encode()
        yield dense.resolve_conj().resolve_neg().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
    elif isinstance(value, bool | int | float | complex | str | bytes | None):
        yield repr(value).encode()
    elif isinstance(value, Mapping):
        for key, part in value.items():
            yield repr(key).encode()
            yield from pieces(part)
    elif isinstance(value, list | tuple):
        yield f"{len(value)} parts".encode()
        for part in value:
            yield from pieces(part)
    elif isinstance(value, functools.partial):
        yield from pieces([value.func, value.args, value.keywords])
    elif hasattr(value, "__qualname__"):
        yield value.__qualname__.encode()
    else:
        yield from pieces(type(value))
        held = getattr(value, "__dict__", {})
        plain = {key: part for key, part in held.items() if isinstance(part, bool | int | float | str | Tensor)}
        yield from pieces({key: part for key, part in sorted(plain.items()) if key != "training"})
        if isinstance(value, nn.Module):
            yield from pieces(value.state_dict())
