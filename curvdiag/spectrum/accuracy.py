"""Steps and probes chosen from a wanted relative accuracy.

Accuracy is meant of three numbers: the trace and the trace norm ``tr|H|``, both as shares of the trace norm (a trace
may be near zero, or negative), and ``||H||_F^2`` as a share of itself. For each of them at most one call in twenty says
that it was reached where it was not.

What is deflated is taken for exact: its residuals, of a hundredth at most, can take 2e-4 off ``||H||_F^2``, and as much
off ``tr|H|``.

Steps: runs go on until two thirds and five sixths of their steps give the same trace norm, to half of the accuracy.
The other two numbers are exact from the second step on.

Probes: a first stage tells their spread, and says how many it takes in all, by Student's t with the degrees of freedom
of that stage (Stein 1945, Ann. Math. Statist. 16): stopping where the error of those at hand happens to be small would
stop too soon too often. Outliers make the spread, so deflation saves probes here more than anywhere.
"""

from __future__ import annotations

import math

import numpy as np
from scipy.special import stdtrit

from curvdiag.errors import ArgumentError
from curvdiag.spectrum.lanczos import Reorthogonalize, Tridiagonal
from curvdiag.spectrum.quadrature import Quadrature

LEVEL = 0.95
# Probes of the first stage at least, and in all at most so many times as many.
FIRST, MOST = 4, 16
# Steps before the first look, and by what factor they grow.
LOOK, GROWTH = 12, 1.5


def check_rtol(rtol: float, reorthogonalize: Reorthogonalize) -> None:
    """Raises ArgumentError where the accuracy is no share, or the runs could not go on."""
    if isinstance(rtol, bool) or not 0 < rtol < 1:
        raise ArgumentError(f"rtol is a share between 0 and 1, not {rtol!r}")
    if reorthogonalize != "none":
        raise ArgumentError('runs that go on until an accuracy is reached take reorthogonalize="none"')


def reach(run: Quadrature, rtol: float, steps: int, probes: int) -> str:
    """Take probes until the accuracy is reached, of at most ``steps`` steps each; returns a note on it."""
    size, known = run.operator.size, run.deflation.values
    share = 1 - len(known) / size
    first = max(probes, FIRST)

    def samples(nodes: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """``[3, probes]``: traces, trace norms, squared norms."""
        functions = (lambda x: x, np.abs, np.square)
        return np.stack([size * share * (weights * f(nodes)).sum(1) + f(known).sum() for f in functions])

    def settled(group: Tridiagonal) -> bool:
        done = group.alphas.shape[1]
        if done >= size - len(known) or (group.lengths < done).all():
            return True
        now = samples(*group.quadrature())[1].mean()
        return all(
            abs(samples(*cut(group, done * part // 6).quadrature())[1].mean() - now) <= rtol / 2 * now
            for part in (4, 5)
        )

    taken, converged = run.take_until(first, steps, settled, LOOK, GROWTH)
    found = samples(*run.arrays())
    scale = found.mean(1)[[1, 1, 2]]
    spread = found.std(1, ddof=1)
    allowed = np.maximum(rtol * scale, np.finfo(np.float64).tiny)
    need = float(np.max((stdtrit(first - 1, 0.5 + LEVEL / 2) * spread / allowed) ** 2))
    total = min(max(first, math.ceil(min(need, 1e9))), MOST * first)
    run.take(total - first, taken, run.matvecs + (total - first) * taken)
    missing = []
    if need > total:
        missing.append(f"about {need:.3g} probes are needed")
    if not converged:
        missing.append(f"tr|H| still changes at {taken} steps")
    end = (
        f"not reached after {taken} steps and {total} probes: {', and '.join(missing)}"
        if missing
        else (f"reached after {taken} steps and {total} probes")
    )
    return f"rtol={rtol:g} {end}"


def cut(run: Tridiagonal, steps: int) -> Tridiagonal:
    """The same run after fewer steps."""
    steps = max(1, steps)
    return Tridiagonal(
        run.alphas[:, :steps], run.betas[:, :steps], run.norms, np.minimum(run.lengths, steps), None, run.matvecs
    )
