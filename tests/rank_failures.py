"""Calls on several ranks, of which one fails; what each of them is told."""

import torch
from nets import mlp
from torch import nn

from curvdiag import (
    EmpiricalFisher,
    Fisher,
    GaussNewton,
    Hessian,
    NoiseCovariance,
    Objective,
    cwgd,
    gradient_diversity,
    gradient_moments,
    noise_scale,
    top_eigenpairs,
    trace,
)
from curvdiag.noise.sample_products import sample_products
from curvdiag.noise.signed_sums import signed_sums

LEFT = [0]
"""Passes of the model that are still well; not its own, since a measurement leaves the model as it was."""


class Fragile(nn.Module):
    """A net that can be told to fail, or to give NaN."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = mlp().double()
        self.error, self.nan = None, False

    def forward(self, x):
        if self.error is not None:
            LEFT[0] -= 1
            if LEFT[0] < 0:
                raise self.error
        return self.net(x) * (float("nan") if self.nan else 1.0)


def data(rank, count=4):
    generator = torch.Generator().manual_seed(rank)
    x = torch.randn(count, 4, generator=generator, dtype=torch.float64)
    return x, torch.randint(3, (count,), generator=generator)


def fate(call):
    try:
        call()
    except Exception as error:
        return type(error).__name__, str(error)
    return "nothing", ""


def objective_of(model, rank, group="world"):
    return Objective(model, nn.CrossEntropyLoss(), data(rank), group=group)


def one_vector(objective):
    return torch.linspace(-1, 1, objective.parameters.size, dtype=torch.float64)


def calls_of(objective):
    """By name what ranks do together; the graphs are built anew, so that a model that fails later is noticed."""
    vector, rows = one_vector(objective), one_vector(objective)[None]
    hessian, noise = Hessian(objective, memory=0), NoiseCovariance(objective, memory=0)
    gauss_newton, fisher = GaussNewton(objective, memory=0), Fisher(objective, memory=0, method="monte-carlo")
    blocks = hessian.blocks()
    parts = {name: torch.ones(1, size, dtype=torch.float64) for name, size in blocks.sizes.items()}
    moments = gradient_moments(objective)
    return {
        "objective": lambda: Objective(objective.model, nn.CrossEntropyLoss(), objective.batches, group="world"),
        "objective from a loss": lambda: Objective.from_loss(
            objective.model,
            lambda model, batch: model(batch[0]).square().mean(1),
            batches=objective.batches,
            group="world",
        ),
        "value": objective.value,
        "gradient": objective.gradient,
        "hessian": lambda: Hessian(objective),
        "differences": lambda: Hessian(objective, method="finite-difference"),
        "gauss-newton": lambda: GaussNewton(objective),
        "fisher": lambda: Fisher(objective),
        "empirical fisher": lambda: EmpiricalFisher(objective),
        "noise covariance": lambda: NoiseCovariance(objective),
        "coarse hessian": lambda: Hessian(objective, precision="bfloat16"),
        "hessian product": lambda: hessian @ vector,
        "gauss-newton product": lambda: gauss_newton @ vector,
        "fisher product": lambda: fisher @ vector,
        "noise product": lambda: noise @ vector,
        "noise rows": lambda: noise.apply(rows),
        "blocks": lambda: blocks.apply(parts),
        "dense": lambda: hessian.block("net.0.bias").dense(),
        "unreached": lambda: Hessian(objective, memory=0).unreached,
        "moments": lambda: gradient_moments(objective),
        "products": lambda: sample_products(objective, moments=moments),
        "diversity": lambda: gradient_diversity(objective),
        "noise scale": lambda: noise_scale(objective, curvature=True, starts=3),
        "signed sums": lambda: signed_sums(Hessian(objective, memory=0), 3, 0),
        "full cwgd": lambda: cwgd(objective, starts=3, steps=2, max_steps=2, memory=0),
        "diagonal cwgd": lambda: cwgd(objective, "diagonal", probes=4, moments=moments, memory=0),
        "eigenpairs": lambda: top_eigenpairs(hessian, 2),
        "trace": lambda: trace(hessian, probes=3),
        "plan": lambda: objective.plan(steps=3, probes=1),
    }
