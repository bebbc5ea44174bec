"""What few samples do to the exponent of C in H, held out and in sample, where the population's is known.

Two made-up problems with 400 directions over four decades, rank-one Hessians ``h = s w w^T`` of rows ``w`` with
covariance ``H``:

- ``"superlinear"``: ``s = 1``, and gradients drawn for themselves with covariance ``C = H^1.5``. Eigenvectors from few
  samples mix the population's directions, so that the exponent in their basis is nearer to 1.
- ``"proportional"``: gradients ``+-s w``, with ``log s`` normal of standard deviation 2. C is proportional to H in the
  population, in every basis. Eigenvectors that fit the few samples of large ``s`` make it look superlinear in sample.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from curvdiag.scaling.power_law import DirectionSamples, measure_power_law

DIRECTIONS, DECADES, SPREAD = 400, 4.0, 2.0
EXPONENTS = {"superlinear": 1.5, "proportional": 1.0}
COUNTS = (100, 200, 400)


def exponents(kind: str, samples: int, *, counts: Sequence[int] = COUNTS, seed: int = 0) -> dict[str, list[float]]:
    """Least-squares exponents on the first ``counts`` directions, ``"held out"`` and ``"in sample"``.

    Args:
        kind: ``"superlinear"`` or ``"proportional"``.
        samples: All of them; half gives the held-out basis.
    """
    generator = np.random.default_rng(seed)
    spectrum = np.logspace(0, -DECADES, DIRECTIONS)
    white = generator.standard_normal((samples, DIRECTIONS))
    rows = white * np.sqrt(spectrum)
    if kind == "superlinear":
        gradients = generator.standard_normal(rows.shape) * spectrum ** (EXPONENTS[kind] / 2)
    else:
        scale = np.exp(SPREAD * generator.standard_normal((samples, 1)))
        gradients = rows * scale * generator.choice([-1.0, 1.0], (samples, 1))
        rows *= np.sqrt(scale)
    half, found = samples // 2, {}
    for side, basis, measured in (("held out", rows[:half], slice(half, None)), ("in sample", rows, slice(None))):
        vectors = np.linalg.eigh(basis.T @ basis)[1][:, ::-1]
        slopes, along = (torch.from_numpy(part[measured] @ vectors) for part in (gradients, rows))
        fits = measure_power_law(DirectionSamples(slopes, along.square()), counts=counts, bootstrap=0, methods=("ols",))
        found[side] = fits.noise_fits["ols"].exponent.tolist()
    return found


def main() -> None:
    """``python -m curvdiag.experiments.mixing``: a table in half a minute."""
    for kind, exponent in EXPONENTS.items():
        for samples in (960, 20_000):
            for side, values in exponents(kind, samples).items():
                text = ", ".join(f"{value:.2f} on {count}" for value, count in zip(values, COUNTS, strict=True))
                print(f"{kind} ({exponent:g}), {samples:,} samples, {side}: {text}")


if __name__ == "__main__":
    main()
