"""What a comparison found: curvdiag's figure, the reference's, how far apart, and how far that may be."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from curvdiag.results import Result


@dataclass(frozen=True)
class Check(Result):
    """One comparison.

    Attributes:
        problem: Which problem.
        quantity: What is compared; "relative" where ``difference`` is.
        against: Whose reference it is.
        value, reference: What curvdiag and the reference say; norms for vectors.
        difference, tolerance: In one unit.
        note: What a reader should know about this row.
    """

    problem: str
    quantity: str
    against: str
    value: float
    reference: float
    difference: float
    tolerance: float
    note: str = ""

    @property
    def passed(self) -> bool:
        """Whether the difference is a number and within the tolerance."""
        return bool(self.difference <= self.tolerance)

    def to_dict(self) -> dict[str, Any]:
        """Fields and verdict; numbers that JSON does not know as strings."""
        plain = {**super().to_dict(), "passed": self.passed}
        return {
            key: str(value) if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in plain.items()
        }


@dataclass(frozen=True)
class Verification(Result):
    """All comparisons, in the order in which they were made."""

    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        return bool(self.checks) and all(check.passed for check in self.checks)

    @property
    def failures(self) -> tuple[Check, ...]:
        return tuple(check for check in self.checks if not check.passed)

    def __str__(self) -> str:
        return f"{len(self.checks) - len(self.failures)} of {len(self.checks)} checks passed"
