"""A mean over what? Losses whose batches do not count alike are weighted right, or refused with what to give."""

from __future__ import annotations

import math
from collections import defaultdict

import pytest
import torch
from nets import make
from oracles import relative
from torch import nn
from torch.nn import functional as F

from curvdiag import Hessian, Objective
from curvdiag.errors import LossError, SecondDerivativeError


def tokens_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(12, 6), nn.Tanh(), nn.Linear(6, 5)).double()


def tokens(samples: int, padded: int) -> tuple[torch.Tensor, torch.Tensor]:
    targets = torch.randint(5, (samples, 7))
    targets[: samples // 2, 7 - padded :] = -100
    return torch.randint(12, (samples, 7)), targets


def token_mean(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return F.cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten())


@pytest.mark.parametrize("order", [(0, 4), (4, 0)])
def test_padding_in_any_batch_is_noticed(order: tuple[int, int]) -> None:
    """The first batch may be the one without."""
    model = tokens_model()
    batches = [tokens(6, padded) for padded in order]
    with pytest.raises(LossError, match="weight="):
        Objective.from_loss(model, token_mean, batches)
    weighted = Objective.from_loss(model, token_mean, batches, weight=lambda b: int((b[1] != -100).sum()))
    inputs, targets = (torch.cat(parts) for parts in zip(*batches, strict=True))
    assert weighted.value() == pytest.approx(float(token_mean(model, (inputs, targets))))
    one = Hessian(Objective.from_loss(model, token_mean, batch=(inputs, targets))).dense()
    assert relative(Hessian(weighted).dense(), one) < 1e-10


def test_padding_alike_within_each_batch_is_noticed_between_them() -> None:
    model = tokens_model()
    batches = [tokens(6, 0), tokens(6, 0)]
    batches[1][1][:, 3:] = -100
    with pytest.raises(LossError, match="weight="):
        Objective.from_loss(model, token_mean, batches)
    shorter = [batches[0], (batches[1][0][:, :3], batches[1][1][:, :3])]
    with pytest.raises(LossError, match="weight="):
        Objective.from_loss(model, token_mean, shorter)
    with pytest.raises(LossError, match="weight="):
        Objective(model, lambda o, t: F.cross_entropy(o.flatten(0, 1), t.flatten()), shorter)


def test_images_of_several_sizes_with_one_label_each_are_no_false_alarm() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    batches = [(torch.randn(4, 1, n, n), torch.randint(3, (4,))) for n in (6, 8)]
    objective = Objective(model, lambda o, t: F.cross_entropy(o, t), batches)
    truth = sum(float(F.cross_entropy(model(x), y)) for x, y in batches) / 2
    assert objective.value() == pytest.approx(truth, rel=1e-5)


class Focal(nn.CrossEntropyLoss):
    """Ignores ``reduction`` and divides by all targets, ignored or not."""

    def forward(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        losses = F.cross_entropy(outputs, targets, ignore_index=self.ignore_index, reduction="none")
        losses = (1 - (-losses).exp()) ** 2 * losses
        return losses if self.reduction == "none" else losses.mean()


def test_ignored_labels_in_a_later_batch_are_noticed() -> None:
    model, (inputs, targets) = make("mlp-tanh")
    second = targets.clone()
    second[: len(second) // 2] = 1
    batches = [(inputs, torch.where(targets == 1, 0, targets)), (inputs, second)]
    objective = Objective(model, Focal(ignore_index=1), batches)
    truth = sum(float(Focal(ignore_index=1)(model(x), y)) for x, y in batches) / 2
    assert objective.value() == pytest.approx(truth)


class Mixing(nn.Module):
    """Samples of a batch see each other, in eval mode too."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3).double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x - x.mean(0))


def test_coupled_samples_keep_the_weight_of_their_labels() -> None:
    torch.manual_seed(0)
    model, criterion = Mixing(), nn.CrossEntropyLoss(ignore_index=2)
    batches = [(torch.randn(8, 4).double(), torch.tensor([0, 1, 0, 1, 0, 1, 0, 1])),
               (torch.randn(8, 4).double(), torch.tensor([0, 2, 2, 2, 2, 2, 2, 2]))]  # fmt: skip
    objective = Objective(model, criterion, batches)
    assert not objective.per_sample
    truth = (8 * criterion(model(batches[0][0]), batches[0][1]) + criterion(model(batches[1][0]), batches[1][1])) / 9
    assert objective.value() == pytest.approx(float(truth))


def test_a_loss_near_zero_is_no_false_alarm() -> None:
    """Policy gradients with normalised advantages: the mean is a difference of large halves."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3)).double()

    def loss(model: nn.Module, batch: tuple[torch.Tensor, ...]) -> torch.Tensor:
        states, actions, advantages = batch
        return -(model(states).log_softmax(-1).gather(1, actions[:, None]).squeeze(1).exp() * advantages).mean()

    batches = []
    for _ in range(2):
        advantages = torch.randn(8).double()
        nn.init.zeros_(model[0].weight), nn.init.zeros_(model[0].bias)
        batches.append((torch.randn(8, 4).double(), torch.randint(3, (8,)), advantages - advantages.mean()))
    objective = Objective.from_loss(model, loss, batches)
    assert math.isfinite(objective.value())


def test_a_contrastive_loss_is_no_sum() -> None:
    """At equal embeddings of four samples, ``2 log 2 = log 4``: a coincidence of halves."""
    model = nn.Linear(4, 3)
    nn.init.zeros_(model.weight), nn.init.zeros_(model.bias)

    def contrastive(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        z = model(batch)
        return F.cross_entropy(z @ z.T, torch.arange(len(z)))

    objective = Objective.from_loss(model, contrastive, batch=torch.randn(4, 4))
    assert objective.value() == pytest.approx(math.log(4))


def test_batches_may_be_of_any_mapping_type() -> None:
    model, (inputs, targets) = make("mlp-tanh")
    batch = defaultdict(list, {"x": inputs, "y": targets})
    objective = Objective.from_loss(
        model, lambda m, b: F.cross_entropy(m(b["x"]), b["y"], reduction="none"), batches=[batch, batch]
    )
    assert objective.value() == pytest.approx(float(F.cross_entropy(model(inputs), targets)))
    assert isinstance(objective.batches[0], defaultdict)


def test_finite_differences_are_measured_where_it_matters() -> None:
    """A large embedding makes a step that suits a random vector far too large for the few weights after it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(2000, 32), nn.Flatten(), nn.Linear(4 * 32, 16), nn.Tanh(), nn.Linear(16, 3))
    batch = torch.randint(2000, (64, 4)), torch.randint(3, (64,))
    objective = Objective(model, F.cross_entropy, batch)
    exact = Hessian(objective, dtype=torch.float64)
    vector = torch.zeros(exact.size, dtype=torch.float64)
    part = exact.parameters.slices[-2]
    vector[part] = torch.randn(part.stop - part.start, dtype=torch.float64)
    try:
        differences = Hessian(objective, method="finite-difference")
        block = differences.block("4.*")
    except SecondDerivativeError:
        return  # refused is right, too
    product = differences @ vector.float()
    assert relative(product.double(), exact @ vector) < 0.05
    truth = exact.block("4.*").dense()
    assert relative(block.dense().double(), truth) < 0.05
