"""The digits that scikit-learn carries, and a small convolutional net with BatchNorm for them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from curvdiag.errors import CurvdiagError


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
    """Two convolutions with BatchNorm and a linear layer: 3,130 parameters at width 12."""
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
