"""GD, signGD and LPSGD on two quadratics: is a large p ahead where anisotropy is strong, and p = 2 where it is weak?

Xu and Yang (arXiv:2606.02078) draw trajectories on a strongly and a weakly anisotropic quadratic. Here they are drawn
again at the published rates, from a start of our own since theirs is not known, and beside the published cosine
schedule p follows the measured condition number (AnisotropyP, one a_high for both) and the predicted decrease
(PredictedDecreaseP, with and without smoothing). Then distance and loss from 1,000 random starts, at the published
rates and at each method's best; and the control: eigenvectors turned by 45 degrees, since the l_p norms know the axes.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor

from curvdiag.experiments.geometry_figure import draw
from curvdiag.experiments.geometry_results import (
    ANGLES,
    ANISOTROPY,
    COSINE,
    GD,
    METHODS,
    PREDICTED,
    SIGN,
    UNSMOOTHED,
    Geometry,
    Outcome,
    Path2D,
)
from curvdiag.experiments.toys import TOYS, Toy
from curvdiag.operators import Hessian
from curvdiag.optim import LPSGD
from curvdiag.schedules import AnisotropyP, CosineP, PredictedDecreaseP
from curvdiag.schedules.predicted_decrease import candidates
from curvdiag.spectrum import anisotropy

MINUTES = 1.0
P_MAX = 6.0
"""The paper's choice in five of its seven settings."""
A_HIGH = 1000.0
"""Condition number at which AnisotropyP takes ``P_MAX``: the same for both problems."""
START = (0.0, 0.0)
"""Of the trajectories that are drawn."""
MULTIPLIERS = tuple(2.0**k for k in range(-6, 5))
"""Of the rates, tried for each method when its best is looked for."""
TUNING_SEED = 1_000_003
EPS = 1e-8
EVERY = 5
"""Of the points of a trajectory that are written into the JSON."""
NINE_IN_TEN = (0.5, 0.05, 0.95)

SMOOTHING = {PREDICTED: 0.9, UNSMOOTHED: 0.0}

Rule: TypeAlias = Callable[[int, Tensor], Tensor]
"""``p`` ``[N, 1]`` of a step, from its number and the gradients ``[N, 2]`` of all starts."""


def run(
    *,
    starts: int = 1000,
    steps: Sequence[int] = (30, 100, 300),
    seed: int = 0,
    progress: Callable[[str], object] = lambda text: None,
) -> Geometry:
    """One drawn trajectory for each method and toy, and the outcomes over random starts.

    Args:
        starts: See :meth:`Toy.starts`; as many others serve to find the best rates.
        steps: Numbers of steps after which to look, each a run of its own, since the cosine depends on it; the
            trajectories take the last.
        progress: Called with a line of text for each toy.
    """
    paths, outcomes = {}, {}
    for toy in TOYS:
        progress(f"{toy.name}: trajectories of {steps[-1]} steps")
        paths[toy.name] = {method: descend(toy, method, torch.tensor(START).double(), steps[-1]) for method in METHODS}
        progress(f"{toy.name}: {starts:,} starts")
        outcomes[toy.name] = {
            name: {
                rates: {
                    count: _outcomes(toy.turned(angle), starts, count, seed, tuned=rates == "best") for count in steps
                }
                for rates in ("published", "best")
            }
            for name, angle in ANGLES.items()
        }
    return Geometry(paths, outcomes, starts, tuple(steps), seed)


def descend(toy: Toy, method: str, start: Tensor, steps: int) -> Path2D:
    """One descent by LPSGD itself and the schedule itself; GD is ``p = 2``, signGD ``p = inf``.

    The rate is the published one for GD and signGD, and :meth:`Toy.rate` of the present ``p`` for LPSGD.
    """
    module = toy.module(start)
    objective = toy.objective(module)
    optimizer = LPSGD(module.parameters(), p={GD: 2.0, SIGN: math.inf}.get(method, P_MAX))
    schedule: CosineP | AnisotropyP | PredictedDecreaseP | None = None
    if method == COSINE:
        schedule = CosineP(optimizer, steps)
    elif method == ANISOTROPY:
        condition = lambda: anisotropy(Hessian(objective))  # noqa: E731
        schedule = AnisotropyP(optimizer, condition, measure="condition_number", a_high=A_HIGH, refresh=steps)
    elif method in SMOOTHING:
        schedule = PredictedDecreaseP(optimizer, objective, smoothing=SMOOTHING[method])
    group = optimizer.param_groups[0]
    points, ps = [module.theta.detach().clone()], []
    for _ in range(steps):
        ps.append(float(group["p"]))
        group["lr"] = toy.rate(ps[-1])
        optimizer.zero_grad()
        toy.value(module.theta).backward()
        optimizer.step()
        points.append(module.theta.detach().clone())
        if schedule is not None:
            schedule.step()
    return Path2D(torch.stack(points), tuple(ps))


def descend_many(
    toy: Toy, rule: Rule, starts: Tensor, steps: int, multiplier: float | Tensor = 1.0
) -> tuple[Tensor, Tensor]:
    """Descents from all starts at once, by the same formulas as :func:`descend`.

    Args:
        multiplier: Of the rates; one number, or one for each start, ``[N, 1]``.

    Returns:
        The last points ``[N, 2]``, and at how many steps ``p`` moved by more than a half, ``[N, 1]``.
    """
    theta, before, jumps = starts.clone(), None, torch.zeros(len(starts), 1)
    for step in range(steps):
        gradient = toy.gradient(theta)
        p = rule(step, gradient)
        if before is not None:
            jumps += (p - before).abs() > 0.5
        before = p
        rho = torch.where(p.isinf(), 1.0, (p - 2) / (p - 1))
        rate = multiplier * toy.sign_lr**rho * toy.gd_lr ** (1 - rho)
        theta = theta - rate * gradient / (gradient.abs() + EPS) ** rho
    return theta, jumps


def rule_of(toy: Toy, method: str, steps: int) -> Rule:
    """How a method sets ``p``, for :func:`descend_many`."""
    if method == COSINE:
        turn = math.pi / max(steps - 1, 1)
        return lambda step, gradient: _all(gradient, 2 + (P_MAX - 2) * (1 + math.cos(turn * step)) / 2)
    if method in SMOOTHING:
        return _Predicted(toy.hessian, SMOOTHING[method])
    if method == ANISOTROPY:
        share = math.log(toy.condition_number) / math.log(A_HIGH)
        return lambda step, gradient: _all(gradient, 2 + (P_MAX - 2) * min(share, 1.0))
    fixed = {GD: 2.0, SIGN: math.inf}[method]
    return lambda step, gradient: _all(gradient, fixed)


class _Predicted:
    """PredictedDecreaseP's rule, for many points of one quadratic."""

    def __init__(self, hessian: Tensor, smoothing: float) -> None:
        self.hessian, self.smoothing = hessian, smoothing
        self.p: Tensor | None = None

    def __call__(self, step: int, gradient: Tensor) -> Tensor:
        grid = torch.tensor(candidates(P_MAX), dtype=gradient.dtype)
        decreases = []
        for p in grid:
            d = gradient / (gradient.abs() + EPS) ** ((p - 2) / (p - 1))
            decreases.append((gradient * d).sum(1) ** 2 / (2 * ((d @ self.hessian) * d).sum(1)))
        winner = grid[torch.stack(decreases).nan_to_num(-1.0).argmax(0)].unsqueeze(1)
        self.p = winner if self.p is None else self.smoothing * self.p + (1 - self.smoothing) * winner
        return self.p


def _outcomes(toy: Toy, starts: int, steps: int, seed: int, *, tuned: bool) -> dict[str, Outcome]:
    points, found = toy.starts(starts, seed), {}
    gd: tuple[Tensor, Tensor] | None = None
    for method in METHODS:
        multiplier = best_multiplier(toy, method, toy.starts(starts, seed + TUNING_SEED), steps) if tuned else 1.0
        last, jumps = descend_many(toy, rule_of(toy, method, steps), points, steps, multiplier)
        ends = toy.distance(last).nan_to_num(math.inf), toy.value(last).nan_to_num(math.inf)
        gd = ends if gd is None else gd
        nearer, lower = (wilson(int((one < other).sum()), starts) for one, other in zip(ends, gd, strict=True))
        distance, loss = (_quantiles(one) for one in ends)
        found[method] = Outcome(distance, loss, nearer, lower, float(jumps.mean()) / max(steps - 1, 1), multiplier)
    return found


def best_multiplier(toy: Toy, method: str, starts: Tensor, steps: int) -> float:
    """Which of :data:`MULTIPLIERS` gives the smallest median distance."""
    factors = torch.tensor(MULTIPLIERS, dtype=starts.dtype).repeat_interleave(len(starts)).unsqueeze(1)
    last, _ = descend_many(toy, rule_of(toy, method, steps), starts.repeat(len(MULTIPLIERS), 1), steps, factors)
    medians = toy.distance(last).nan_to_num(math.inf).view(len(MULTIPLIERS), -1).median(1).values
    return MULTIPLIERS[int(medians.argmin())]


def _quantiles(values: Tensor) -> tuple[float, float, float]:
    ordered = values.sort().values  # without interpolation, which makes NaN of infinities
    first, second, third = (float(ordered[round(q * (len(ordered) - 1))]) for q in NINE_IN_TEN)
    return first, second, third


def wilson(hits: int, number: int, z: float = 1.959964) -> tuple[float, float, float]:
    """A share and its 95 % interval (Wilson 1927)."""
    share, spread = hits / number, z * z / number
    middle = (share + spread / 2) / (1 + spread)
    half = z * math.sqrt(share * (1 - share) / number + spread / (4 * number)) / (1 + spread)
    # Exact at both ends, where rounding leaves 1e-19.
    return share, max(middle - half, 0.0) if hits else 0.0, min(middle + half, 1.0) if hits < number else 1.0


def _all(gradient: Tensor, p: float) -> Tensor:
    return gradient.new_full((len(gradient), 1), p)


def reproduce(
    out: Path, *, seed: int = 0, quick: bool = False, progress: Callable[[str], object] = print
) -> list[Path]:
    """Write ``geometry.png`` and ``geometry.json`` into ``out``."""
    from curvdiag.experiments.saved import make_folder, save

    make_folder(out)
    started = time.perf_counter()
    options = {"starts": 50, "steps": (10, 40)} if quick else {"starts": 1000, "steps": (30, 100, 300)}
    found = run(**options, seed=seed, progress=progress)  # type: ignore[arg-type]
    for toy, angles in found.outcomes.items():
        for angle, rates in angles.items():
            for name, by_steps in rates.items():
                words = ", ".join(f"{m} {o.distance[0]:.2g}" for m, o in by_steps[found.steps[-1]].items())
                progress(f"{toy}, {angle}, {name} rates: median distance after {found.steps[-1]} steps: {words}")
    options |= {"p_max": P_MAX, "a_high": A_HIGH, "start": START, "quick": quick}
    seconds = time.perf_counter() - started
    results = found.to_dict()
    for path in (path for methods in results["paths"].values() for path in methods.values()):
        path.update(every=EVERY, points=path["points"][::EVERY], p=path["p"][::EVERY])
    return save("geometry", out, draw(found), results, options=options, seed=seed, seconds=seconds, digits=4)
