"""Small nets on scikit-learn's digits, at initialisation, trained, and at checkpoints on the way."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from curvdiag.experiments.digits import digits, small_mlp

BATCH, LR = 32, 0.1


@dataclass(frozen=True)
class Training:
    """A net, and how it is trained: plain SGD, with momentum where that is not zero."""

    make: Callable[[], nn.Module]
    lr: float = LR
    momentum: float = 0.0
    batch: int = BATCH


def mlp(activation: type[nn.Module], *widths: int) -> nn.Module:
    """With biases, and no activation at the end."""
    layers = [part for pair in itertools.pairwise(widths) for part in (nn.Linear(*pair), activation())]
    return nn.Sequential(nn.Flatten(), *layers[:-1])


TRAININGS: dict[str, Training] = {
    "digits MLP": Training(lambda: small_mlp(20)),
    "digits MLP with biases": Training(lambda: mlp(nn.ReLU, 64, 24, 16, 10), batch=64),
    "digits tanh MLP, momentum": Training(lambda: mlp(nn.Tanh, 64, 20, 10), lr=0.05, momentum=0.9, batch=64),
}


def trained(width: int, steps: int, seed: int = 0) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    """An MLP 64-width-width-10 without biases after so many steps of plain SGD, in evaluation mode, and all digits."""
    model, data = next(checkpoints(Training(lambda: small_mlp(width)), first=steps, every=1, count=1, seed=seed))
    return model, data


def checkpoints(
    training: Training, *, first: int, every: int, count: int, seed: int = 0
) -> Iterator[tuple[nn.Module, tuple[Tensor, Tensor]]]:
    """The same model at ``count`` points of its training, ``every`` steps apart from step ``first`` on."""
    images, classes = digits()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = training.make()
    order = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(model.parameters(), training.lr, momentum=training.momentum)
    for index in range(count):
        model.train()
        for _ in range(every if index else first):
            rows = torch.randint(len(classes), (training.batch,), generator=order)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images[rows]), classes[rows]).backward()
            optimizer.step()
        yield model.eval(), (images, classes)
