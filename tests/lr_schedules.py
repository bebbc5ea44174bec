"""Small runs in which learning-rate schedules are stepped, and measurements that are told beforehand."""

from __future__ import annotations

import math

import torch
from nets import make
from torch import nn
from torch.nn import functional as F

from curvdiag import CurvatureMonitor, Objective
from curvdiag.schedules.following import Following
from curvdiag.schedules.measured_lr import FactorLR, WrappedLR


def sgd(*rates, tensor=False, **options):
    """SGD with one parameter group for each rate."""
    rates = [torch.tensor(rate) if tensor else rate for rate in rates or (0.5,)]
    groups = [{"params": [nn.Parameter(torch.zeros(2))], "lr": rate} for rate in rates]
    return torch.optim.SGD(groups, lr=0.1, **options)


def rates_of(optimizer):
    return [float(group["lr"]) for group in optimizer.param_groups]


def walk(optimizer, schedule, steps, metrics=None):
    """The rates of the first group that each of the steps is made with."""
    seen = []
    for step in range(steps):
        seen.append(rates_of(optimizer)[0])
        optimizer.step()
        schedule.step(*([] if metrics is None else [metrics[step]]))
    return seen


def told(*answers):
    """A function that gives these answers one after the other, raising those that are exceptions, and then None."""
    left = list(answers)

    def tell():
        answer = left.pop(0) if left else None
        if isinstance(answer, Exception):
            raise answer
        return answer

    return tell


def cosine(t, horizon, peak=0.5, floor=0.0):
    return floor + (peak - floor) * (1 + math.cos(math.pi * t / horizon)) / 2


class Training:
    """A tiny training run with a monitor on it: mini-batches in a fixed order."""

    def __init__(
        self, optimizer=lambda p: torch.optim.SGD(p, lr=0.2, momentum=0.9), dtype=torch.float64, signal=False, **options
    ):
        self.model, (inputs, targets) = make("mlp-tanh", samples=24, dtype=dtype)
        if signal:  # else the classes are random, and the gradient is not to be told from its noise
            targets = inputs[:, :3].argmax(1)
        self.inputs, self.targets = inputs, targets
        self.optimizer = optimizer(self.model.parameters())
        objective = Objective(self.model, F.cross_entropy, (inputs, targets))
        self.monitor = CurvatureMonitor(objective, **{"every": 5, "steps": 6, "probes": 2, "strict": True, **options})
        self.monitor.attach(self.optimizer)
        self.step_number = 0

    def loss(self):
        return F.cross_entropy(self.model(self.inputs), self.targets)

    def step(self, batch=8):
        start = self.step_number * batch % len(self.inputs)
        self.step_number += 1
        self.optimizer.zero_grad()
        loss = F.cross_entropy(self.model(self.inputs[start : start + batch]), self.targets[start : start + batch])
        loss.backward()
        self.optimizer.step()
        return float(loss.detach())


# The simplest schedules that the bases allow

KEYS = {"x": "curv/hessian/lambda_max"}


def following(source=None, **options):
    options = {"needs": ["lambda_max"], "owner": "Told", "name": "told", **options}
    return Following(told() if source is None else source, KEYS, **options)


class Told(FactorLR):
    """The initial rates times what was measured, or else times a polynomial in the epoch."""

    remembered = ("x",)

    def __init__(self, optimizer, source=None, last_epoch=-1, **options):
        self.x = None
        super().__init__(optimizer, following(source, **options), last_epoch)

    def take(self, numbers):
        if numbers["x"] < 0:
            return "x is negative"
        self.x = numbers["x"]
        return ""

    def factors(self):
        return [1 / (1 + self.last_epoch) ** 2 if self.x is None else self.x] * len(self.base_lrs)


class Scaled(WrappedLR):
    """The wrapped schedule's rates times a number: a half loses no bits."""

    def __init__(self, scheduler, share=0.5, source=None, **options):
        self.share = share
        super().__init__(scheduler, following(source, **options))

    def take(self, numbers):
        self.share = numbers["x"]
        return ""

    def change(self, rates):
        return [self.share * rate for rate in rates]
