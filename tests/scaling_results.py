"""Made-up results of the scaling test with a known exponent, for what draws and writes them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np

from curvdiag.estimate import Estimate


def power_law(
    x: np.ndarray, y: np.ndarray, used: np.ndarray, counts: Any, method: str = "ols", bars: float = 0.06
) -> Any:
    """Least squares of the logarithms over the used ones of the first directions."""
    lines = []
    for count in counts:
        these = used & (np.arange(len(x)) < count)
        lines.append(np.polyfit(np.log10(x[these]), np.log10(y[these]), 1))
    slope, intercept = np.reshape(lines, (-1, 2)).T
    width = bars * np.sqrt(50 / np.asarray(counts))
    return SimpleNamespace(
        counts=np.asarray(counts), exponent=slope, intercept=intercept, r_squared=np.full(len(lines), 0.99),
        low=slope - width, high=slope + width, method=method,
    )  # fmt: skip


def directions(
    n: int = 300, *, gamma: float = 1.2, out: int = 0, biased: bool = False, square: bool = True, seed: int = 0
) -> Any:
    """``C_ii = 0.02 H_ii^gamma`` with a scatter of 20 %; the last ``out`` curvatures are negative."""
    rng = np.random.default_rng(seed)
    x = np.geomspace(20.0, 2e-3, n) * np.exp(0.05 * rng.standard_normal(n))
    y = 0.02 * x**gamma * np.exp(0.2 * rng.standard_normal(n))
    z = 0.5 * x ** (gamma + 0.1) * np.exp(0.1 * rng.standard_normal(n))
    used = np.ones(n, dtype=bool)
    if out:
        used[-out:] = False
        x[-out:] *= -1
    counts = np.unique(np.geomspace(5, n - out, 12).round().astype(int))
    bars = 0.0 if biased else 0.06
    fits = {
        "ols": power_law(x, y, used, counts, bars=bars),
        "deming": power_law(x, 1.1 * y, used, counts, "deming", bars=2 * bars),
    }
    return SimpleNamespace(
        curvature=x, noise=y, square=z if square else None, used=used, reach=n - out, resolved=n - out,
        curvature_error=0.1 * abs(x), noise_error=0.1 * y, departure=None,
        noise_fits=fits, square_fits={"ols": power_law(x, z, used, counts, bars=bars)} if square else {},
        level=0.95, biased=biased,
    )  # fmt: skip


def coupling(m: int = 60, mixing: float = 0.1, seed: int = 0) -> np.ndarray:
    """``V^T C V`` where the eigenvectors of C are turned away from V by about ``mixing``."""
    rng = np.random.default_rng(seed)
    turn, _ = np.linalg.qr(np.eye(m) + mixing * rng.standard_normal((m, m)))
    return (turn * np.geomspace(1.0, 1e-3, m)) @ turn.T


def window(name: str, first: int, last: int) -> Any:
    values = {"commutator": 0.08, "diagonal_recovery": 0.93, "coupling_mean": 0.04, "coupling_variance": 0.002}
    baseline = {"commutator": 0.71, "diagonal_recovery": 0.12, "coupling_mean": 0.2, "coupling_variance": 0.02}
    values["rank_correlation"], baseline["rank_correlation"] = 0.97, 0.0
    return SimpleNamespace(name=name, first=first, last=last, **values, baseline=baseline, left_out=0)


def scaling_result(n: int = 300, *, gamma: float = 1.2, out: int = 0, dense: bool = True, **changes: Any) -> Any:
    """A whole result; ``dense=False`` leaves out what only dense matrices give."""
    rng = np.random.default_rng(1)
    spectrum = np.concatenate([np.geomspace(20, 1e-6, 1800), -np.geomspace(0.3, 1e-7, 500), np.zeros(52)])
    made: dict[str, Any] = {
        "block": "2.weight", "basis": "hessian", "method": "dense" if dense else "matrix-free",
        "size": 2352, "samples": 1797,
        "held_out": directions(n, gamma=gamma, out=out),
        "in_sample": directions(n, gamma=gamma + 0.25, biased=True, seed=1),
        "windows": (window("top", 0, 100), window("bulk", 100, n)),
        "commutator": Estimate(0.081, 0.004, 8), "commutator_baseline": 0.72,
        "cosine": Estimate(0.94, 0.01, 8), "cosine_baseline": 0.05,
        "coupling": coupling(), "coupling_baseline": coupling(mixing=100.0),
        "curvature_spectrum": rng.permutation(spectrum) if dense else None,
        "noise_spectrum": np.abs(spectrum) ** 1.2 * 0.02 if dense else None,
        "bounds": None, "duality": None,
        "verdict": SimpleNamespace(
            word="superlinear",
            reasons=(
                "exponent 1.203 on 300 directions over 4.0 decades of curvature; its 95% interval [1.18, 1.22] "
                "lies above 1",
                "the local exponent goes from 1.18 at the smallest curvature to 1.25 at the largest, a change of 0.07 "
                "(95% interval [-0.10, 0.24]), within sampling error",
                "beyond sampling error, single directions scatter by a factor of 1.12 about the line (p = 0.2), and "
                "C/H by 1.85 (p = 0.0002)",
                "12 of 312 directions have no positive curvature or noise; more than 5 % are missing beyond 275, or "
                "not known to half of their size beyond 80",
            ),
        ),
        "notes": ("12 of 312 directions were left out: their held-out curvature is not positive",),
    }  # fmt: skip
    return MadeUp(**(made | changes))


class MadeUp(SimpleNamespace):
    """Prints and becomes a dictionary, as every result does."""

    def __str__(self) -> str:
        return f"{self.verdict.word}: {'; '.join(self.verdict.reasons)}"

    def to_dict(self) -> dict[str, Any]:
        return {key: plain(value) for key, value in vars(self).items()}


def plain(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, tuple):
        return [plain(one) for one in value]
    if isinstance(value, dict):
        return {key: plain(one) for key, one in value.items()}
    return plain(vars(value)) if hasattr(value, "__dict__") else value
