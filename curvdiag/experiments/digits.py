"""The digits that scikit-learn carries, small nets for them, and a trained one ready to be measured."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from curvdiag.errors import CurvdiagError
from curvdiag.objective import Objective

EPOCHS, BATCH, LR, SEED = 30, 32, 0.1, 0


def digits() -> tuple[Tensor, Tensor]:
    """1,797 handwritten digits as images ``[N, 1, 8, 8]`` of mean 0 and variance 1, and their classes.

    Raises:
        CurvdiagError: scikit-learn, which carries them, is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise CurvdiagError("the digits come with scikit-learn: pip install 'curvdiag[digits]'") from error
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1)
    return (images - images.mean()) / images.std(), torch.tensor(data.target)


def small_conv_net(width: int = 12) -> nn.Module:
    """Two convolutions with BatchNorm and a linear layer: 3,022 parameters at width 12."""
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Conv2d(width, 2 * width, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(2 * width),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(2 * width, 10),
    )


def small_mlp(width: int = 20) -> nn.Sequential:
    """64-20-20-10, ReLU, no bias: 1,880 parameters, of which the middle matrix, ``"3.weight"``, has 400."""
    return nn.Sequential(
        nn.Flatten(),
        *(nn.Linear(64, width, bias=False), nn.ReLU()),
        *(nn.Linear(width, width, bias=False), nn.ReLU()),
        nn.Linear(width, 10, bias=False),
    )


def objective() -> Objective:
    """Cross-entropy of the small MLP on all digits, after 30 epochs of plain SGD with cosine decay; seconds.

    The same weights each time: ``curvdiag scaling curvdiag.experiments.digits:objective --block 3.weight``.
    """
    images, classes = digits()
    criterion = nn.CrossEntropyLoss()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model = small_mlp()
    order = torch.Generator().manual_seed(SEED)
    optimizer = torch.optim.SGD(model.parameters(), LR)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS)
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(classes), generator=order).split(BATCH):
            optimizer.zero_grad()
            criterion(model(images[rows]), classes[rows]).backward()
            optimizer.step()
        schedule.step()
    return Objective(model, criterion, (images, classes))
