"""CWGD-Cosine against cosine on a net that is not convex: a small MLP on digits, CWGD measured by curvdiag.

SGD with batches of 32 over 16 epochs. CWGD is measured before the first step and then every T/8 steps, on 256 of the
training samples: the diagonal form as published, with 20 fresh probes each time, and the full form.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from curvdiag.estimate import Estimate
from curvdiag.experiments.cwgd_adaptive import Method, Outcome, chosen, compared, entries_at
from curvdiag.experiments.cwgd_cases import PROBES, REFRESHES
from curvdiag.experiments.cwgd_cells import ALPHA
from curvdiag.experiments.digits import digits, small_mlp
from curvdiag.experiments.quadratics import Array, cosine
from curvdiag.noise.cwgd import cwgd
from curvdiag.objective import Objective
from curvdiag.schedules.cwgd_cosine_lr import CWGDCosineLR

EPOCHS, BATCH, HELD_OUT, PROBE = 16, 32, 300, 256
RATES = 2.0 ** (np.arange(-11, -1) / 4)
"""Peak rates that every method is tuned over: 10 from 0.15 to 0.71, beyond which the net often stops learning."""
FORMS = ("full", "diagonal")
DELTA = 0.03
"""Added to ``|H|`` in the full form: 1/20 of the largest eigenvalue at the start, and the same number throughout, so
that the ratio of two measurements is of the net and not of the regularisation. A smaller one takes many more products.
"""
STARTS, STEPS, MAX_STEPS = 4, 32, 64
MEASURES = ("training loss", "held-out loss", "held-out errors")


class End(NamedTuple):
    """Of one run: training loss, held-out loss, share of held-out digits it gets wrong, and factors ``[T]``."""

    errors: tuple[float, float, float]
    factors: Array


def train(method: Method, seed: int, epochs: int = EPOCHS, refreshes: int = REFRESHES) -> End:
    """Train once. The seed decides the split, the first weights and the order of the batches, for all methods alike."""
    images, classes = digits()
    shuffle = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(classes), generator=shuffle)
    test, rows = order[:HELD_OUT], order[HELD_OUT:]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = small_mlp()
    criterion = nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), method.eta_max)
    steps = epochs * (len(rows) // BATCH)
    probe = Objective(model, criterion, (images[rows[:PROBE]], classes[rows[:PROBE]]))
    schedule = _schedule(method, optimizer, steps, max(1, steps // refreshes), probe, seed)
    curve, factors = method.eta_max * cosine(steps), np.empty(steps)
    t = 0
    for _ in range(epochs):
        shuffled = rows[torch.randperm(len(rows), generator=shuffle)]
        for batch in shuffled[: steps // epochs * BATCH].split(BATCH):
            factors[t] = optimizer.param_groups[0]["lr"] / curve[t]
            optimizer.zero_grad()
            criterion(model(images[batch]), classes[batch]).backward()
            optimizer.step()
            schedule.step()
            t += 1
    with torch.no_grad():
        losses = [float(criterion(model(images[part]), classes[part])) for part in (rows, test)]
        wrong = float((model(images[test]).argmax(1) != classes[test]).float().mean())
    ends = tuple(value if math.isfinite(value) else math.inf for value in losses)
    return End((ends[0], ends[1], wrong), factors)


def _schedule(
    method: Method, optimizer: torch.optim.Optimizer, steps: int, refresh: int, probe: Objective, seed: int
) -> LRScheduler:
    if not method.form or method.replay is not None:
        shape = cosine(steps) if method.replay is None else cosine(steps) * method.replay
        return LambdaLR(optimizer, lambda t: float(shape[t]) if t < steps else 0.0)
    measure = partial(_measured, probe, method.form, torch.Generator().manual_seed(seed), seed)
    return CWGDCosineLR(optimizer, steps, measure, alpha=ALPHA, normalized=method.normalized, refresh=refresh)


def _measured(probe: Objective, form: str, fresh: torch.Generator, seed: int) -> Estimate:
    """Fresh probes for the diagonal form, as published; the same signs for the full one, so that ratios are surer."""
    if form == "diagonal":
        return cwgd(probe, "diagonal", probes=PROBES, seed=fresh).value
    return cwgd(probe, "full", delta=DELTA, starts=STARTS, steps=STEPS, max_steps=MAX_STEPS, seed=seed).value


def compare_on_digits(
    *,
    rates: Array = RATES,
    tuning_seeds: int = 4,
    seeds: int = 12,
    epochs: int = EPOCHS,
    refreshes: int = REFRESHES,
    seed: int = 0,
    forms: Sequence[str] = FORMS,
    progress: Callable[[str], object] = lambda text: None,
) -> Outcome:
    """Tune each method on its own seeds, by training loss, and compare them on others."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # so small a net gains nothing from more
    try:
        first = 1_000_003 * seed
        tuning = range(first + seeds, first + seeds + tuning_seeds)
        tried: dict[str, list[list[End]]] = {}
        for form in ("", *forms):
            progress(f"digits: {form + ' form' if form else 'cosine'} at {len(rates)} rates, {tuning_seeds} seeds each")
            tried[form] = [
                [train(Method(float(rate), form), one, epochs, refreshes) for one in tuning] for rate in rates
            ]
        table = {form: np.array([[end.errors[0] for end in row] for row in rows]) for form, rows in tried.items()}
        means = {form: errors.mean(1) for form, errors in table.items()}
        best, coarse, at_edge = chosen(means, dict.fromkeys(means, rates))
        index = {form: int(np.flatnonzero(rates == rate)[0]) for form, rate in best.items()}
        traces = {form: np.mean([end.factors for end in tried[form][index[form]]], axis=0) for form in forms}
        entries = entries_at(best, traces)
        ends = []
        for (name, form), method in list(entries.items()):
            if name == "normalised, untuned":  # measured runs are dear
                del entries[name, form]
                continue
            progress(f"digits: {name} {form}".rstrip() + f" on {seeds} seeds")
            ends.append([train(method, first + one, epochs, refreshes).errors for one in range(seeds)])
    finally:
        torch.set_num_threads(threads)
    errors = np.array(ends).transpose(2, 1, 0)  # [measures, seeds, entries]
    steps = len(next(iter(traces.values())))
    times = np.unique(np.linspace(0, steps - 1, 101).round().astype(int))
    return Outcome(
        name="MLP on digits",
        steps=steps,
        seeds=seeds,
        eta_max=best[""],
        error=float(errors[0, :, 0].mean()),
        at_edge=at_edge,
        comparisons=compared(entries, errors[0], coarse),
        times=tuple(times.tolist()),
        factors={form: trace[times].tolist() for form, trace in traces.items()},
        also={name: compared(entries, errors[i], {}) for i, name in enumerate(MEASURES) if i},
    )
