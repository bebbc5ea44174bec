"""What is measured of gradient noise, on one rank or on several."""

import torch
from data_parallel import Wire

from curvdiag import (
    Hessian,
    NoiseCovariance,
    cwgd,
    gradient_diversity,
    gradient_moments,
    noise_scale,
    per_sample_gradients,
)
from curvdiag.errors import ArgumentError
from curvdiag.noise.sample_products import sample_products
from curvdiag.noise.signed_sums import signed_sums

CASES = ("mlp", "transformer", "ignoring", "padded", "conv")


def estimate(one):
    return torch.tensor([one.value, one.standard_error, one.samples])


def noise(objective):
    """By name numbers, tensors or words."""
    hessian = Hessian(objective)
    moments = gradient_moments(objective)
    products = sample_products(objective, moments=moments)
    scale = noise_scale(objective, curvature=True, starts=3, seed=5, hessian=hessian)
    full = cwgd(objective, starts=3, steps=4, max_steps=8, seed=2, hessian=hessian, delta=0.1)
    diagonal = cwgd(objective, "diagonal", probes=12, seed=3, hessian=hessian, moments=moments, negative="floor")
    found = {
        "mean": moments.mean,
        "diagonal": moments.diagonal,
        "trace": torch.tensor(moments.trace),
        "norms": moments.norms,
        "samples": moments.samples,
        "ways": moments.ways,
        "squares": torch.from_numpy(products.squares),
        "dots": torch.from_numpy(products.dots),
        "diversity": estimate(gradient_diversity(objective, moments=moments)),
        "own diversity": estimate(gradient_diversity(objective)),
        "b_simple": estimate(scale.b_simple),
        "b_noise": estimate(scale.b_noise),
        "gradient curvature": torch.tensor(scale.gradient_curvature),
        "notes": [note[:25] for note in scale.notes],
        "signed sums": signed_sums(hessian, 4, 7),
        "later signed sums": signed_sums(hessian, 2, 7, first=2),
        "full": estimate(full.value),
        "full steps": (full.steps, full.matvecs, full.converged),
        "diagonal form": estimate(diagonal.value),
        "diagonal counts": (diagonal.on_floor, diagonal.negative, diagonal.probes),
    }
    for layer, block in moments.blocks.items():
        found |= {f"{layer} norms": block.norms, f"{layer} moments": torch.tensor([block.mean_norm, block.trace])}
    return found


def rows(objective):
    return torch.cat(list(per_sample_gradients(objective, chunk=2)))


def refusal(objective):
    try:
        NoiseCovariance(objective).gram()
    except ArgumentError as error:
        return str(error)
    return None


def reductions(objective):
    """Sizes of the all-reduces of one call each, without rounds of status."""
    found, hessian = {}, Hessian(objective)
    moments = gradient_moments(objective)
    calls = {
        "moments": lambda: gradient_moments(objective),
        "products": lambda: sample_products(objective, moments=moments),
        "signed sums": lambda: signed_sums(hessian, 4, 7),
    }
    for name, call in calls.items():
        with Wire() as wire:
            call()
        found[name] = [numbers for operation, numbers in wire.calls if operation == "allreduce_" and numbers != 6]
    return found
