"""The objective is what the criterion returns on all samples at once, however they are cut into batches."""

from __future__ import annotations

import contextlib
import functools
import warnings

import pytest
import torch
from nets import cut, make, tokens
from oracles import criterion_loss, dense_gradient, dense_hessian, relative, true_value
from torch import nn
from torch.nn import functional as F

from curvdiag.errors import CurvdiagError, LossError
from curvdiag.objective import Objective
from curvdiag.operators import Hessian

SIZES = (4, 5, 1)


def classes(ignore: bool = False) -> torch.Tensor:
    labels = torch.tensor([0, 1, 2, 2, 1, 0, 0, 2, 1, 1])
    if ignore:  # Ragged over the batches, with one sample of a batch of one kept.
        labels[[0, 3, 5, 6, 7]] = -100
    return labels


def reals(kind: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    noise = torch.randn(10, 3, generator=generator, dtype=torch.float64)
    return {"real": noise, "soft": noise.softmax(1), "binary": (noise > 0).double()}[kind]


CLASS_WEIGHTS = torch.tensor([0.2, 1.0, 3.0], dtype=torch.float64)
POS_WEIGHT = torch.tensor([0.5, 2.0, 4.0], dtype=torch.float64)


class Focal(nn.CrossEntropyLoss):
    """Inherits ``reduction`` and does not look at it."""

    def forward(self, outputs, targets):
        losses = F.cross_entropy(outputs, targets, reduction="none")
        return ((1 - torch.exp(-losses)) ** 2 * losses).mean()


def only_mean(outputs, targets, reduction="mean"):
    if reduction != "mean":
        raise ValueError("no other reduction")
    return F.cross_entropy(outputs, targets)


CRITERIA = {
    "plain": (nn.CrossEntropyLoss(), classes()),
    "class weights": (nn.CrossEntropyLoss(weight=CLASS_WEIGHTS), classes()),
    "ignore_index": (nn.CrossEntropyLoss(), classes(ignore=True)),
    "own ignore_index": (nn.CrossEntropyLoss(ignore_index=2), classes()),
    "label smoothing": (nn.CrossEntropyLoss(label_smoothing=0.2), classes()),
    "weights and ignore_index": (nn.CrossEntropyLoss(weight=CLASS_WEIGHTS, ignore_index=1), classes()),
    "all three": (nn.CrossEntropyLoss(CLASS_WEIGHTS, label_smoothing=0.1), classes(ignore=True)),
    "soft targets": (nn.CrossEntropyLoss(), reals("soft")),
    "soft targets, weights": (nn.CrossEntropyLoss(CLASS_WEIGHTS, label_smoothing=0.1), reals("soft")),
    "binary": (nn.BCEWithLogitsLoss(), reals("binary")),
    "binary, pos_weight": (
        nn.BCEWithLogitsLoss(weight=CLASS_WEIGHTS, pos_weight=POS_WEIGHT),
        reals("binary"),
    ),
    "squares": (nn.MSELoss(), reals("real")),
    "smooth L1": (nn.SmoothL1Loss(beta=0.5), reals("real")),
    "Huber": (nn.HuberLoss(delta=0.7), reals("real")),
    "multi-label": (nn.MultiLabelSoftMarginLoss(weight=CLASS_WEIGHTS), reals("binary")),
    "functional": (F.cross_entropy, classes(ignore=True)),
    "functional squares": (F.mse_loss, reals("real")),
    "functional binary": (F.binary_cross_entropy_with_logits, reals("binary")),
    "partial": (functools.partial(F.cross_entropy, label_smoothing=0.1), classes(ignore=True)),
    "partial weights": (functools.partial(F.cross_entropy, weight=CLASS_WEIGHTS), classes()),
    "partial mean": (functools.partial(F.cross_entropy, reduction="mean"), classes()),
    "lambda, mean": (lambda o, t: (o - t).pow(4).mean(), reals("real")),
    "lambda, [B]": (lambda o, t: (o - t).pow(4).mean(1), reals("real")),
    "lambda, [B, T]": (lambda o, t: (o - t).pow(4), reals("real")),
    "lambda, [B * T]": (lambda o, t: (o - t).pow(4).flatten(), reals("real")),
    "lambda around a module": (lambda o, t: nn.CrossEntropyLoss()(o, t), classes()),
    "a subclass with a forward of its own": (Focal(), classes()),
    "a function that knows only its mean": (only_mean, classes()),
}


@pytest.mark.parametrize("case", CRITERIA)
def test_batches_give_the_criterion_of_all_samples(case):
    criterion, targets = CRITERIA[case]
    model, (inputs, _) = make("mlp-tanh")
    means = {"lambda, [B]", "lambda, [B, T]", "lambda, [B * T]"}
    whole = (lambda o, t: criterion(o, t).mean()) if case in means else criterion
    loss = criterion_loss(whole, (inputs, targets))
    truth = dense_hessian(model, loss)
    for data in [(inputs, targets), cut((inputs, targets), SIZES)]:
        objective = Objective(model, criterion, data)
        assert objective.value() == pytest.approx(true_value(model, loss), rel=1e-12)
        assert relative(objective.gradient(), dense_gradient(model, loss)) < 1e-10
        assert relative(Hessian(objective).dense(), truth) < 1e-10


@pytest.mark.parametrize("case", ["all three", "binary, pos_weight", "partial", "lambda, [B, T]"])
@pytest.mark.parametrize("micro_batch", [1, 3])
def test_micro_batches_keep_the_weighting(case, micro_batch):
    criterion, targets = CRITERIA[case]
    model, (inputs, _) = make("mlp-tanh")
    whole = (lambda o, t: criterion(o, t).mean()) if case.startswith("lambda") else criterion
    truth = dense_hessian(model, criterion_loss(whole, (inputs, targets)))
    objective = Objective(model, criterion, cut((inputs, targets), SIZES))
    for memory in (None, 0):
        op = Hessian(objective, micro_batch=micro_batch, memory=memory)
        assert relative(op.dense(), truth) < 1e-10


@pytest.mark.parametrize("micro_batch", [None, 1, 3])
@pytest.mark.parametrize("functional", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_language_model_tokens_are_averaged_over_all_batches(micro_batch, functional, weighted):
    model, _ = make("transformer-tied")
    with torch.random.fork_rng():
        torch.manual_seed(5)
        inputs, targets = tokens()
    for sample, length in enumerate([5, 4, 1, 2, 0, 3, 5, 5, 1, 2]):  # One sequence is all padding.
        targets[sample, length:] = -1
    weight = torch.linspace(0.5, 2, 7, dtype=torch.float64) if weighted else None
    criterion = (
        functools.partial(F.cross_entropy, weight=weight, ignore_index=-1)
        if functional
        else nn.CrossEntropyLoss(weight=weight, ignore_index=-1)
    )
    loss = criterion_loss(criterion, (inputs, targets))
    objective = Objective(model, criterion, cut((inputs, targets), SIZES))
    assert objective.value() == pytest.approx(true_value(model, loss), rel=1e-12)
    truth = dense_hessian(model, loss)
    for memory in (None, 0):
        assert relative(Hessian(objective, micro_batch=micro_batch, memory=memory).dense(), truth) < 1e-10


class Ending(nn.Module):
    """Adds a last step to a net, for losses that want probabilities or their logarithms."""

    def __init__(self, net: nn.Module, last: nn.Module) -> None:
        super().__init__()
        self.net, self.last = net, last

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.net(x))


@pytest.mark.parametrize(
    ("criterion", "last", "targets"),
    [
        (nn.KLDivLoss(reduction="batchmean"), nn.LogSoftmax(1), reals("soft")),
        (functools.partial(F.kl_div, reduction="batchmean"), nn.LogSoftmax(1), reals("soft")),
        (nn.NLLLoss(weight=CLASS_WEIGHTS), nn.LogSoftmax(1), classes(ignore=True)),
        (nn.BCELoss(), nn.Sigmoid(), reals("binary")),
        (nn.PoissonNLLLoss(), nn.Identity(), reals("binary")),
    ],
    ids=["KLDiv", "functional KLDiv", "NLL", "BCE", "Poisson"],
)
def test_losses_of_probabilities(criterion, last, targets):
    net, (inputs, _) = make("mlp-tanh")
    model = Ending(net, last)
    loss = criterion_loss(criterion, (inputs, targets))
    objective = Objective(model, criterion, cut((inputs, targets), SIZES))
    assert objective.value() == pytest.approx(true_value(model, loss), rel=1e-12)
    assert relative(Hessian(objective).dense(), dense_hessian(model, loss)) < 1e-10


@pytest.mark.parametrize(
    "criterion",
    [
        lambda o, t: F.cross_entropy(o, t, reduction="none")[:3],
        lambda o, t: F.cross_entropy(o, t, reduction="none")[:, None].T,
        lambda o, t: o.sum(0),
        lambda o, t: "a string",
        lambda o, t: (o.argmax(1) == t).long(),
        lambda o, t: None,
    ],
    ids=["too few", "first dimension 1", "one for each class", "a string", "integers", "nothing"],
)
def test_a_loss_of_the_wrong_shape_or_kind_is_an_error(criterion):
    model, batch = make("mlp-tanh")
    with pytest.raises(LossError):
        Hessian(Objective(model, criterion, batch))


def test_weights_of_single_samples_inside_the_criterion_are_right_or_refused():
    model, _ = make("mlp-tanh")
    with torch.random.fork_rng():
        torch.manual_seed(6)
        batch = torch.randn(64, 4).double(), torch.rand(64, 3).double()
        criterion = nn.BCEWithLogitsLoss(weight=torch.rand(64, 1).double())
    truth = dense_hessian(model, criterion_loss(criterion, batch))
    assert relative(Hessian(Objective(model, criterion, batch)).dense(), truth) < 1e-10
    for micro_batch in (1, 8):
        with contextlib.suppress(CurvdiagError):
            op = Hessian(Objective(model, criterion, batch), micro_batch=micro_batch)
            assert relative(op.dense(), truth) < 1e-10


@pytest.mark.parametrize(
    "criterion",
    [
        nn.CrossEntropyLoss(reduction="sum"),
        functools.partial(F.cross_entropy, reduction="sum"),
        lambda o, t: F.cross_entropy(o, t, reduction="sum"),
        lambda o, t: nn.MSELoss(reduction="sum")(o, F.one_hot(t, 3).double()),
    ],
    ids=["module", "partial", "lambda", "lambda around a module"],
)
def test_a_sum_over_samples_is_refused_with_the_remedy(criterion):
    model, batch = make("mlp-tanh")
    for data in (batch, cut(batch, SIZES)):
        with pytest.raises(LossError, match=r"(?s)sum.*mean|mean.*sum"):
            Hessian(Objective(model, criterion, data))


def test_a_sum_of_one_sample_and_equal_samples_does_not_confuse():
    model, (inputs, targets) = make("mlp-tanh")
    same = (inputs[:1].expand(4, -1).clone(), targets[:1].expand(4).clone())
    truth = dense_hessian(model, criterion_loss(F.cross_entropy, same))
    assert relative(Hessian(Objective(model, lambda o, t: F.cross_entropy(o, t), same)).dense(), truth) < 1e-10


@pytest.mark.parametrize("ignored", [range(4), range(4, 9)], ids=["first batch", "second batch"])
def test_a_batch_of_nothing_but_padding_counts_nothing(ignored):
    model, (inputs, targets) = make("mlp-tanh")
    targets[list(ignored)] = -100
    truth = dense_hessian(model, criterion_loss(F.cross_entropy, (inputs, targets)))
    op = Hessian(Objective(model, nn.CrossEntropyLoss(), cut((inputs, targets), SIZES)))
    assert relative(op.dense(), truth) < 1e-10


def test_all_targets_ignored_is_an_error_not_a_number():
    model, (inputs, targets) = make("mlp-tanh")
    with pytest.raises(CurvdiagError):
        Hessian(Objective(model, nn.CrossEntropyLoss(), (inputs, torch.full_like(targets, -100))))


def test_padding_inside_a_function_that_gives_only_a_mean_is_not_silently_miscounted():
    """The usual loss of a language model, flattened: its mean over a batch is one over the tokens kept."""
    model, (inputs, targets) = make("transformer-tied")
    for sample, length in enumerate([5, 4, 1, 2, 3, 3, 5, 5, 1, 2]):
        targets[sample, length:] = -1

    def criterion(outputs, labels):
        return F.cross_entropy(outputs.transpose(1, 2).flatten(0, 1), labels.flatten(), ignore_index=-1)

    truth = dense_hessian(model, criterion_loss(criterion, (inputs, targets)))
    assert relative(Hessian(Objective(model, criterion, (inputs, targets))).dense(), truth) < 1e-10
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            dense = Hessian(Objective(model, criterion, cut((inputs, targets), SIZES))).dense()
        except CurvdiagError:
            return
    assert caught or relative(dense, truth) < 1e-10
