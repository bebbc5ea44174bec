"""Small nets on scikit-learn's digits, at initialisation, trained, and at checkpoints on the way."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from curvdiag.experiments.digits import digits, small_mlp

BATCH, LR = 32, 0.1


def trained(width: int, steps: int, seed: int = 0) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    """An MLP 64-width-width-10 without biases after so many steps of plain SGD, in evaluation mode, and all digits."""
    model, data = next(checkpoints(width, first=steps, every=1, count=1, seed=seed))
    return model, data


def checkpoints(
    width: int, *, first: int, every: int, count: int, seed: int = 0
) -> Iterator[tuple[nn.Module, tuple[Tensor, Tensor]]]:
    """The same model at ``count`` points of its training, ``every`` steps apart from step ``first`` on."""
    images, classes = digits()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = small_mlp(width)
    order = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(model.parameters(), LR)
    for index in range(count):
        model.train()
        for _ in range(every if index else first):
            rows = torch.randint(len(classes), (BATCH,), generator=order)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images[rows]), classes[rows]).backward()
            optimizer.step()
        yield model.eval(), (images, classes)
