"""Standard errors of functions of averages, from leaving out one sample at a time."""

from __future__ import annotations

import math

import numpy as np

from curvdiag.estimate import Estimate


def jackknife(value: float, without: np.ndarray) -> Estimate:
    """``value`` with the spread of the same statistic ``without`` each of ``n`` samples ``[n]`` (Tukey 1958).

    The value is left as it is; :func:`jackknife_bias` tells its bias. NaN for fewer than two samples.
    """
    n = len(without)
    error = math.sqrt((n - 1) / n * float(np.sum((without - without.mean()) ** 2))) if n > 1 else math.nan
    return Estimate(float(value), error, max(n, 1))


def jackknife_bias(value: float, without: np.ndarray) -> float:
    """The part of the bias of ``value`` that falls as ``1 / n`` (Quenouille 1956)."""
    n = len(without)
    return (n - 1) * float(without.mean() - value) if n > 1 else math.nan


def ratio_of_means(numerators: np.ndarray, denominators: np.ndarray) -> Estimate:
    """Mean of ``numerators`` ``[n]`` over mean of ``denominators`` ``[n]``, pairs being independent samples."""
    top, bottom = numerators.sum(), denominators.sum()
    if len(numerators) < 2:
        return Estimate(float(top / bottom), math.nan, len(numerators))
    return jackknife(float(top / bottom), (top - numerators) / (bottom - denominators))
