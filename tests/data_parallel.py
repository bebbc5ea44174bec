"""Objectives over samples that lie on one rank or on several, and what is measured of them.

Everything here is made alike on every rank; a rank only holds fewer of the samples. What BatchNorm has seen differs.
"""

import contextlib
import warnings

import torch
from nets import Residual, Transformer, mlp
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from curvdiag import EmpiricalFisher, Fisher, GaussNewton, Hessian, NoiseCovariance, Objective

SHARES = {1: [11], 2: [7, 4], 3: [5, 2, 4]}
"""How many of the eleven samples each rank of so many holds."""

CUTS = {11: [4, 3, 4], 7: [3, 4], 4: [4], 5: [2, 3], 2: [1, 1]}
"""The batches in which so many samples come."""

IGNORED = 2


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def integers(most, *shape, seed=0):
    return torch.randint(most, shape, generator=torch.Generator().manual_seed(seed))


def held(tensors, rank, world):
    """A rank's samples of tensors with eleven each, as batches."""
    first = sum(SHARES[world][:rank])
    count = SHARES[world][rank]
    own = [tensor[first : first + count] for tensor in tensors]
    return list(zip(*(tensor.split(CUTS[count]) for tensor in own), strict=True))


def seeded(make):
    torch.manual_seed(0)
    return make()


def padded(model, batch):
    """A mean over the places of each sample that are not padding."""
    inputs, targets, mask = batch
    return ((model(inputs) - targets).square().mean(2) * mask).sum(1) / mask.sum(1)


def mean_error(model, batch):
    return (model(batch[0]) - batch[1]).square().mean()


def entropy(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def cases(dtype):
    """By name: model, tensors of all samples, a function that makes the objective of (model, batches, group)."""
    weight = torch.tensor([0.5, 2.0, 1.0, 0.0, 1.5, 3.0, 0.25], dtype=dtype)
    labels = integers(3, 11, seed=1)
    tokens, following = integers(7, 11, 5, seed=2), integers(7, 11, 5, seed=3)
    following[:, 4] = torch.where(torch.arange(11) % 3 == 0, IGNORED, following[:, 4])
    following[7:9] = IGNORED  # all that the second of three ranks holds, as far as it counts at all
    following[5:7] = IGNORED
    mask = (torch.arange(6) < integers(5, 11, 1, seed=4) + 1).to(dtype)
    images, points = normal(11, 1, 5, 5, seed=5).to(dtype), normal(11, 4, seed=6).to(dtype)
    numbers, sequences = normal(11, 3, seed=7).to(dtype), normal(11, 6, 4, seed=8).to(dtype)

    def criterion(which):
        return lambda model, batches, group: Objective(model, which, batches=batches, group=group)

    def loss(which, **options):
        return lambda model, batches, group: Objective.from_loss(model, which, batches=batches, group=group, **options)

    def frozen_norm(model, batches, group):
        return Objective(model, nn.CrossEntropyLoss(), batches=batches, group=group, params=["conv*", "head.*"])

    smoothed = nn.CrossEntropyLoss(weight=weight, ignore_index=IGNORED, label_smoothing=0.1)
    ignoring = nn.CrossEntropyLoss(ignore_index=IGNORED)
    found = {
        "mlp": (mlp, (points, labels), criterion(nn.CrossEntropyLoss())),
        "regression": (mlp, (points, numbers), criterion(nn.MSELoss())),
        "conv": (Residual, (images, labels), frozen_norm),
        "transformer": (Transformer, (tokens, following), criterion(smoothed)),
        "ignoring": (Transformer, (tokens, following), criterion(ignoring)),
        "padded": (
            mlp,
            (sequences, normal(11, 6, 3, seed=9).to(dtype), mask),
            loss(padded, weight=lambda b: b[2].sum(1)),
        ),
        "mean": (mlp, (points, numbers), loss(mean_error)),
        "mean entropy": (Residual, (images, labels), loss(entropy)),
    }
    return {name: (seeded(make).to(dtype), *rest) for name, (make, *rest) in found.items()}


def objective_of(case, rank=0, world=1, group=None):
    """The objective of a case; ranks after the first have seen other images in training."""
    model, tensors, make = case
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if "running" in name:
                buffer.copy_(1 + 0.5 * normal(*buffer.shape, seed=len(name)).abs() + rank)
    return make(model, held(tensors, rank, world), group)


def vectors_for(operator, count=3):
    return normal(operator.size, count, seed=10).to(operator.dtype)


def operators_of(objective, fisher=True, smooth=False):
    """By name, each made when it is asked for."""
    found = {
        "hessian": lambda: Hessian(objective),
        "rebuilt": lambda: Hessian(objective, memory=0),
        "gauss-newton": lambda: GaussNewton(objective),
    }
    if objective.per_sample:
        population = {"batch_size": 4, "replacement": False, "population": 50}
        found |= {
            "micro-batches": lambda: Hessian(objective, micro_batch=2),
            "batched": lambda: Hessian(objective, batched=True),
            "empirical": lambda: EmpiricalFisher(objective),
            "noise": lambda: NoiseCovariance(objective),
            "noise rebuilt": lambda: NoiseCovariance(objective, memory=0, micro_batch=2),
            "noise of batches": lambda: NoiseCovariance(objective, 4),
            "noise of drawn batches": lambda: NoiseCovariance(objective, **population),
            "shared noise": lambda: NoiseCovariance(objective, graphs=Hessian(objective)),
            "shared gauss-newton": lambda: GaussNewton(objective, graphs=Hessian(objective)),
        }
    if fisher:
        found |= {
            "fisher": lambda: Fisher(objective),
            "drawn fisher": lambda: Fisher(objective, method="monte-carlo", draws=2, seed=3),
        }
    if smooth:
        found["differences"] = lambda: Hessian(objective, method="finite-difference")
    return found


MAIN = ("mlp", "conv", "transformer")
FISHER = ("mlp", "regression", "conv", "ignoring")
SMOOTH = ("mlp", "regression", "transformer")


def products(objective, name):
    """By name of an operator its products with three vectors, and those of its blocks."""
    found = {"value": torch.tensor(objective.value(), dtype=torch.float64), "gradient": objective.gradient()}
    for kind, make in operators_of(objective, name in FISHER, name in SMOOTH).items():
        operator = make()
        found[kind] = operator @ vectors_for(operator)
        first = objective.parameters.names[0]
        block = operator.block(first)
        found[f"{kind} block"] = block @ vectors_for(block)
        blocks = operator.blocks({"first": first, "others": list(objective.parameters.names[1:])})
        rows = {layer: vectors_for(one, 2).T.contiguous() for layer, one in blocks.operators.items()}
        found |= {f"{kind} of {layer}": one for layer, one in blocks.apply(rows).items()}
        found[f"{kind} unreached"] = operator.unreached
    return found


class Wire(TorchDispatchMode):
    """Notes what goes to the process groups: operation, numbers."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "c10d":
            flat = torch.utils._pytree.tree_leaves(args[0])
            numbers = sum(one.numel() for one in flat if isinstance(one, torch.Tensor))
            self.calls.append((function._opname, numbers))
        return function(*args, **(kwargs or {}))


def traffic_of(objective, name):
    """By name of an operator what one product with a vector, and one of all its blocks, puts on the wire."""
    found, ranks = {}, objective.ranks
    for kind, make in operators_of(objective, name in FISHER, name in SMOOTH).items():
        operator = make()
        row = vectors_for(operator, 1).T.contiguous()
        blocks = operator.blocks({"one": objective.parameters.names[0], "all": "*"})
        rows = {layer: vectors_for(one, 1).T.contiguous() for layer, one in blocks.operators.items()}
        for what, multiplied, given in (("product", operator, row), ("blocks", blocks, rows)):
            before = ranks.traffic.reductions, ranks.traffic.bytes
            with Wire() as wire:
                multiplied.apply(given)
            counted = ranks.traffic.reductions - before[0], ranks.traffic.bytes - before[1]
            size = sum(map(torch.numel, rows.values())) if what == "blocks" else operator.size
            found[f"{kind} {what}"] = wire.calls, counted, size, row.element_size()
    return found


@contextlib.contextmanager
def silent():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
