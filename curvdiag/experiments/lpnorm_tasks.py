"""What the optimizers of the ``lpnorm`` experiment learn: digits, and a part of CIFAR-10, both with small conv nets."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from curvdiag.experiments.datasets import cifar10, data_folder
from curvdiag.experiments.digits import digits, small_conv_net

DIGITS_SPLIT = 1797
"""Seed of the choice of the digits' test images: one for all runs, whatever their own seeds."""


@dataclass(frozen=True)
class Task:
    """Data, net and effort.

    Attributes:
        name: ``"digits"`` or ``"cifar10"``.
        title: For figures.
        samples: Gives the images and classes to learn from and to test on.
        net: Gives a fresh net, from the global random state.
        train_size: Images that one run learns from; the rest of those to learn from validate it.
        epochs, batch_size: Of a run.
        points: Settings of learning rate and weight decay that every method tries.
        tuning_seeds: Runs of each of them.
        seeds: Runs of the best one.
        second_seeds: Runs of the second best, which show how much hangs on the choice.
        measure_every: Epochs between two measurements of the anisotropy.
        test_every: Epochs between two tests of a final run; it divides the epochs.
        probe: Training images that the curvature is measured on.
        lanczos: Steps of each of its two probes.
    """

    name: str
    title: str
    samples: Callable[[], Samples]
    net: Callable[[], nn.Module]
    train_size: int
    epochs: int
    batch_size: int
    points: int
    tuning_seeds: int
    seeds: int
    second_seeds: int
    measure_every: int
    test_every: int
    probe: int
    lanczos: int

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.train_size // self.batch_size)

    @property
    def sizes(self) -> dict[str, int]:
        """What is a number, by name."""
        return {name: value for name, value in vars(self).items() if isinstance(value, int)}


@dataclass(frozen=True)
class Samples:
    """Images ``[N, C, H, W]`` of mean 0 and variance 1 with their classes ``[N]``, and those of the test."""

    images: Tensor
    classes: Tensor
    test_images: Tensor
    test_classes: Tensor

    def split(self, train_size: int, seed: int) -> tuple[Tensor, Tensor]:
        """Rows to train on and rows to validate on, out of those that are not for the test."""
        order = torch.randperm(len(self.classes), generator=torch.Generator().manual_seed(seed))
        return order[:train_size], order[train_size:]


@functools.lru_cache(1)
def digit_samples() -> Samples:
    """797 of the 1,797 digits to learn from, 1,000 to test."""
    images, classes = digits()
    order = torch.randperm(len(classes), generator=torch.Generator().manual_seed(DIGITS_SPLIT))
    test, rest = order[:1000], order[1000:]
    return Samples(images[rest], classes[rest], images[test], classes[test])


@functools.lru_cache(1)
def cifar_samples() -> Samples:
    """The first 5,000 training and the first 5,000 test images, normalised by the mean and deviation of the former."""
    images, classes = (part[:5000] for part in cifar10())
    test_images, test_classes = (part[:5000] for part in cifar10(train=False))
    scaled = images.float() / 255
    mean, deviation = scaled.mean((0, 2, 3), keepdim=True), scaled.std((0, 2, 3), keepdim=True)
    return Samples((scaled - mean) / deviation, classes, (test_images.float() / 255 - mean) / deviation, test_classes)


def cifar_conv_net() -> nn.Module:
    """Three convolutions with BatchNorm, and a linear layer: 24,346 parameters."""
    layers: list[nn.Module] = []
    for inputs, outputs in ((3, 16), (16, 32), (32, 64)):
        convolution = nn.Conv2d(inputs, outputs, 3, stride=2, padding=1, bias=False)
        layers += [convolution, nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


DIGITS = Task(
    name="digits",
    title="digits, 3,022 parameters",
    samples=digit_samples,
    net=small_conv_net,
    train_size=512,
    epochs=24,
    batch_size=32,
    points=12,
    tuning_seeds=2,
    seeds=10,
    second_seeds=5,
    measure_every=3,
    test_every=1,
    probe=64,
    lanczos=20,
)
CIFAR10 = Task(
    name="cifar10",
    title="CIFAR-10 subset, 24,346 parameters",
    samples=cifar_samples,
    net=cifar_conv_net,
    train_size=2048,
    epochs=15,
    batch_size=64,
    points=10,
    tuning_seeds=1,
    seeds=8,
    second_seeds=4,
    measure_every=3,
    test_every=3,
    probe=64,
    lanczos=20,
)


def has_cifar10() -> bool:
    """Whether ``CURVDIAG_DATA`` names a folder with CIFAR-10 in it."""
    folder = data_folder()
    return folder is not None and (folder / "cifar-10-batches-py").is_dir()
