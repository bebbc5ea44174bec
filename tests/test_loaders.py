"""Reading a loader disturbs neither random states, nor an epoch under way, nor what was read before."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from nets import make, vectors
from oracles import criterion_loss, dense_hessian, relative
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, TensorDataset

from curvdiag.errors import DataError
from curvdiag.objective import Objective
from curvdiag.operators import Hessian


class Noisy(Dataset):
    """An augmenting dataset, drawing from all three global generators."""

    def __len__(self):
        return 12

    def __getitem__(self, index):
        return torch.randn(4).double() + random.random() + np.random.rand(), index % 3  # noqa: NPY002


def rng_states():
    return torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # noqa: NPY002


def assert_rng_untouched(before):
    after = rng_states()
    assert torch.equal(before[0], after[0])
    assert before[1] == after[1]
    assert (before[2] == after[2]).all()


@pytest.mark.parametrize("own_generator", [False, True])
@pytest.mark.parametrize("dataset", [TensorDataset(*vectors(12)), Noisy()], ids=["shuffled", "augmented"])
def test_a_random_loader_is_read_once_and_its_random_states_are_left_alone(dataset, own_generator):
    model, _ = make("mlp-tanh")
    model = model.float() if isinstance(dataset, TensorDataset) else model
    generator = torch.Generator().manual_seed(4) if own_generator else None
    loader = DataLoader(dataset, batch_size=5, shuffle=True, generator=generator)
    before, own = rng_states(), generator.get_state() if generator else None
    objective = Objective(model, F.cross_entropy, loader)
    op, second = Hessian(objective, memory=0), Hessian(objective)
    v = torch.ones(op.size, dtype=op.dtype)
    first = op @ v
    assert torch.equal(first, op @ v)
    assert relative(second @ v, first) < 1e-5
    assert objective.value() == objective.value()
    assert_rng_untouched(before)
    if generator:
        assert torch.equal(own, generator.get_state())


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_in_the_middle_of_an_epoch_gives_the_epoch_it_would_have_given(workers):
    """A loader with persistent workers has one iterator only; refusing it is right, too."""
    model, batch = make("mlp-tanh", samples=12)
    persistent = {"num_workers": workers, "persistent_workers": True} if workers else {}

    def epoch(disturb):
        generator = torch.Generator().manual_seed(2)
        seen = []
        loader = DataLoader(TensorDataset(*batch), batch_size=2, shuffle=True, generator=generator, **persistent)
        for step, (x, _) in enumerate(loader):
            seen.append(x.clone())
            if step == 2 and disturb:
                try:
                    Objective(model, F.cross_entropy, loader)
                except DataError:
                    assert workers
        return seen

    quiet, disturbed = epoch(False), epoch(True)
    assert len(quiet) == len(disturbed) == 6
    assert all(torch.equal(a, b) for a, b in zip(quiet, disturbed, strict=True))


def test_batches_changed_after_construction_of_a_reused_buffer():
    """Some loaders hand out one buffer again and again; what was read must stay what it was."""
    model, (x, y) = make("mlp-tanh")
    truth = dense_hessian(model, criterion_loss(F.cross_entropy, (x, y)))

    class Reusing:
        def __iter__(self):
            inputs, targets = torch.empty(5, 4).double(), torch.empty(5, dtype=torch.long)
            for part in range(2):
                inputs.copy_(x[5 * part : 5 * part + 5])
                targets.copy_(y[5 * part : 5 * part + 5])
                yield inputs, targets

    assert relative(Hessian(Objective(model, F.cross_entropy, Reusing())).dense(), truth) < 1e-10
