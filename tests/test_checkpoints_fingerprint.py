"""A fingerprint tells objectives of other data or another loss apart, and nothing else."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from checkpointed import data, net
from torch import Tensor, nn
from torch.nn import functional as F

from curvdiag import Objective
from curvdiag.checkpoints.fingerprint import fingerprint, pieces


@dataclass
class Held:
    share: float
    tensor: Tensor


def of(criterion: Callable[..., Tensor] = F.cross_entropy, *, model: nn.Module | None = None, **options: Any) -> str:
    return fingerprint(Objective(net() if model is None else model, criterion, options.pop("data", data()), **options))


def test_weights_do_not_count_nor_in_which_object_the_data_are() -> None:
    assert of() == of(model=net(5)) == of(data=tuple(tensor.clone() for tensor in data())) == of(data=[data()])
    assert len(of()) == 16


def test_everything_that_changes_the_numbers_counts() -> None:
    inputs, targets = data()
    weighted = [nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, share])) for share in (3.0, 4.0)]
    found = [
        of(),
        of(data=(inputs + 1e-6, targets)),
        of(data=(inputs, targets.flip(0))),
        of(data=(inputs[:20], targets[:20])),
        of(params="0.*"),
        of(params="3.*"),
        of(nn.CrossEntropyLoss()),
        of(nn.CrossEntropyLoss(ignore_index=1)),
        *map(of, weighted),
        of(functools.partial(F.cross_entropy, label_smoothing=0.1)),
        of(functools.partial(F.cross_entropy, label_smoothing=0.2)),
    ]
    assert len(set(found)) == len(found)


def joined(value: Any) -> list[bytes]:
    return [bytes(piece) for piece in pieces(value)]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (torch.tensor([1.5, 2.0], dtype=torch.bfloat16), torch.tensor([1.5, 2.5], dtype=torch.bfloat16)),
        (torch.tensor(1), torch.tensor(2)),
        (torch.tensor([True]), torch.tensor([False])),
        (torch.zeros(0, 3), torch.zeros(3, 0)),
        (torch.eye(3).to_sparse(), (2 * torch.eye(3)).to_sparse()),
        (torch.tensor([1j]).conj(), torch.tensor([1j])),
        ({"a": 1}, {"b": 1}),
        ([[1], 2], [[1, 2]]),
        (Held(0.5, torch.ones(1)), Held(0.6, torch.ones(1))),
        (Held(0.5, torch.ones(1)), Held(0.5, torch.zeros(1))),
        (F.relu, F.gelu),
        (None, False),
    ],
)
def test_values_of_every_kind_are_told_apart(one: Any, other: Any) -> None:
    assert joined(one) == joined(one)
    assert joined(one) != joined(other)
