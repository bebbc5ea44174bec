"""A random number together with how sure it is."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import stdtrit

from curvdiag.errors import ArgumentError
from curvdiag.results import Result


@dataclass(frozen=True)
class Estimate(Result):
    """A Monte-Carlo mean with its standard error.

    Attributes:
        value: The estimate; a float, or an array for vector-valued quantities.
        standard_error: Standard deviation of ``value`` over repetitions, same shape; NaN when one
            sample leaves it unknown, 0 when the value is exact.
        samples: How many independent samples (probes) were averaged.
    """

    value: Any
    standard_error: Any
    samples: int

    figure = "estimate"

    @classmethod
    def from_samples(cls, samples: Any) -> Estimate:
        """Mean over the first axis of independent samples, with its standard error."""
        x = np.asarray(samples, dtype=np.float64)
        if x.ndim == 0 or x.shape[0] == 0:
            raise ArgumentError("an estimate needs at least one sample along its first axis")
        n = x.shape[0]
        error = x.std(axis=0, ddof=1) / math.sqrt(n) if n > 1 else np.full(x.shape[1:], np.nan)
        mean = x.mean(axis=0)
        return cls(float(mean), float(error), n) if x.ndim == 1 else cls(mean, error, n)

    @classmethod
    def exact(cls, value: Any) -> Estimate:
        """A value without sampling error."""
        return cls(value, 0.0 if np.ndim(value) == 0 else np.zeros(np.shape(value)), 0)

    def interval(self, level: float = 0.95) -> tuple[Any, Any]:
        """Two-sided Student-t interval with ``samples - 1`` degrees of freedom.

        Infinite for fewer than three samples: two probes say nothing usable about their own spread.
        An exact value gives the interval of zero width.
        """
        if not 0 < level < 1:
            raise ArgumentError(f"the level of an interval lies between 0 and 1, not {level}")
        if self.samples == 0:
            return self.value, self.value
        t = math.inf if self.samples < 3 else float(stdtrit(self.samples - 1, 0.5 + level / 2))
        half = t * np.asarray(self.standard_error) if self.samples >= 3 else np.full(np.shape(self.value), np.inf)
        low, high = self.value - half, self.value + half
        return (float(low), float(high)) if np.ndim(self.value) == 0 else (low, high)

    def __float__(self) -> float:
        return float(self.value)

    def __str__(self) -> str:
        if np.ndim(self.value):
            return f"array of {np.size(self.value)} estimates from {self.samples} samples"
        if self.samples == 0:
            return f"{self.value:.6g} (exact)"
        if self.samples == 1:
            return f"{self.value:.6g} (1 sample, of unknown error)"
        return f"{self.value:.6g} ± {self.standard_error:.2g} ({self.samples} samples)"
