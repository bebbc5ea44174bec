"""Further objectives on several ranks: language models, other types of number, BatchNorm in train mode, odd losses."""

import copy

import torch
from data_parallel import integers, normal, seeded, vectors_for
from nets import Drop, Residual, mlp
from rank_failures import fate
from tiny_transformers import gpt2, tokens
from torch import nn

from curvdiag import EmpiricalFisher, GaussNewton, Hessian, NoiseCovariance, Objective, gradient_moments

SEQUENCES = (5, 3)
"""How many sequences each of two ranks holds; each pads its own as far as it needs."""


def padded_batches():
    """Sequences of several lengths, in batches of one rank each; the last ones of the second are all padding."""
    long, short = tokens(SEQUENCES[0], 9, seed=1), tokens(SEQUENCES[1], 6, seed=2)
    return [long, short]


def language_model(rank, world, group, **options):
    model, batches = gpt2(layers=1).double().eval(), padded_batches()
    return Objective.from_huggingface(model, batches if world == 1 else [batches[rank]], group=group, **options)


def points(rank, world, dtype=torch.float64):
    """Ten samples in three batches, of which the second of two ranks has the last."""
    x, y = normal(10, 4, seed=1).to(dtype), integers(3, 10, seed=2)
    batches = [(x[:4], y[:4]), (x[4:7], y[4:7]), (x[7:], y[7:])]
    return batches if world == 1 else [batches[:2], batches[2:]][rank]


def language(rank, world, group):
    """Products with the matrices of a language model, and its value."""
    found = {}
    for name, options in (("plain", {}), ("smoothed", {"label_smoothing": 0.1})):
        objective = language_model(rank, world, group, **options)
        found[name] = torch.tensor([objective.value(), objective.total_weight, objective.size]).double()
        for make in (Hessian, GaussNewton, NoiseCovariance, EmpiricalFisher):
            operator = make(objective)
            found[name, make.__name__] = operator @ vectors_for(operator, 1)
        found[name, "norms"] = gradient_moments(objective).norms
    return found


def types(rank, world, group):
    """In double precision from weights in single, and the rest of what an operator can be told."""
    model = seeded(mlp)
    objective = Objective(model, nn.CrossEntropyLoss(), batches=points(rank, world, torch.float32), group=group)
    wide, shared = Hessian(objective, dtype=torch.float64), Hessian(objective, share=True)
    moments = gradient_moments(objective, dtype=torch.float64)
    return {
        "double": wide @ vectors_for(wide),
        "double noise": NoiseCovariance(objective, graphs=wide) @ vectors_for(wide),
        "double moments": torch.stack([moments.mean, moments.diagonal]),
        "shared": (shared @ vectors_for(shared)).double(),
    }


def coarse(rank, world, group):
    """Products in bfloat16, and the error that is noted of them."""
    objective = Objective(seeded(mlp), nn.CrossEntropyLoss(), batches=points(rank, world, torch.float32), group=group)
    full, rough = Hessian(objective), Hessian(objective, precision="bfloat16")
    vector = vectors_for(full, 1)
    return full @ vector, rough @ vector, rough.precision_error


def in_train_mode(rank, world, group):
    """BatchNorm over each batch, which is the same on one rank as on two."""
    found = {}
    for name, make, shape in (("drop", Drop, (4,)), ("residual", Residual, (1, 4, 4))):
        model = seeded(make).double()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        batches = [(normal(len(y), *shape, seed=i), y) for i, (_, y) in enumerate(points(0, 1))]
        own = batches if world == 1 else [batches[:2], batches[2:]][rank]
        objective = Objective(model, nn.CrossEntropyLoss(), batches=own, mode="train", group=group)
        for kind in (Hessian, GaussNewton):
            operator = kind(objective)
            found[name, kind.__name__] = operator @ vectors_for(operator)
        found[name, "gradient"] = objective.gradient()
    return found


def places_mean(model, batch):
    """A mean over all places that are not padding: one number, which says nothing of how much the batch counts."""
    x, mask = batch
    return (model(x).square().mean(2) * mask).sum() / mask.sum()


def odd_losses(rank, world, group):
    """What is said of losses that are told apart on one rank and not on the other."""
    model = seeded(mlp).double()
    x = normal(6, 5, 4, seed=3)
    mask = (torch.arange(5) < torch.tensor([5, 5, 5, 2, 2, 2])[:, None]).double()
    batches = [(x[:3], mask[:3]), (x[3:], mask[3:])]
    own = batches if world == 1 else [batches[rank]]
    lengths = [(x[:3], mask[:3]), (x[3:, :2], mask[3:, :2])]
    shorter = lengths if world == 1 else [lengths[rank]]

    def by_sample(model, batch):
        losses = model(batch[0]).square().mean((1, 2))
        return losses if rank == 0 else losses.mean()

    found = {
        "alike": fate(lambda: Objective.from_loss(model, places_mean, batches=own, group=group)),
        "lengths": fate(lambda: Objective.from_loss(model, places_mean, batches=shorter, group=group)),
    }
    weighted = Objective.from_loss(model, places_mean, batches=own, weight=lambda batch: batch[1].sum(), group=group)
    found["weighted"] = Hessian(weighted) @ vectors_for(Hessian(weighted))
    if world > 1:
        mixed = Objective.from_loss(model, by_sample, batches=own, group=group)
    else:
        mixed = Objective.from_loss(model, lambda model, batch: model(batch[0]).square().mean(), batches=own)
    found["mixed"] = Hessian(mixed) @ vectors_for(Hessian(mixed))
    found["refused"] = mixed.per_sample, fate(lambda: NoiseCovariance(mixed))
    return found


def compiled(rank, world, group):
    objective = Objective(seeded(mlp).double(), nn.CrossEntropyLoss(), batches=points(rank, world), group=group)
    hessian = Hessian(objective, compile=True)
    return {
        "hessian": hessian @ vectors_for(hessian),
        "noise": NoiseCovariance(objective, graphs=hessian) @ vectors_for(hessian),
        "copy": Hessian(copy.copy(objective)) @ vectors_for(hessian),
    }
