"""The same tuning for every method: as many settings, at the same places of a range of the same width."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from curvdiag.errors import ArgumentError

LR_DECADES = 3.0
DECAY_DECADES = 3.0
GOLDEN = (math.sqrt(5) - 1) / 2
EDGE = 0.1
"""Share of the range, at either end, in which the best rate is said to be at the edge."""


@dataclass(frozen=True)
class Setting:
    """One point of the search."""

    lr: float
    weight_decay: float


@dataclass(frozen=True)
class Range:
    """Where to search, in logarithms: :data:`LR_DECADES` and :data:`DECAY_DECADES` about these two."""

    lr: float
    weight_decay: float

    def settings(self, count: int, seed: int) -> list[Setting]:
        """``count`` points of a lattice, shifted at random; the same count and seed give every range the same places.

        The learning rates are evenly spaced, and multiples of the golden ratio spread the decays.
        """
        if count < 1:
            raise ArgumentError(f"a search tries at least one setting, not {count}")
        shift = np.random.default_rng(seed).random(2)
        rows = np.arange(count)
        places = np.stack([(rows + shift[0]) / count, (rows * GOLDEN + shift[1]) % 1], 1) - 0.5
        return [
            Setting(self.lr * 10 ** (LR_DECADES * float(x)), self.weight_decay * 10 ** (DECAY_DECADES * float(y)))
            for x, y in places
        ]

    def place(self, setting: Setting) -> float:
        """Where in the range of learning rates a setting lies, from 0 to 1."""
        return 0.5 + math.log10(setting.lr / self.lr) / LR_DECADES

    def at_edge(self, setting: Setting) -> bool:
        """Whether a wider range might have held something better."""
        return not EDGE <= self.place(setting) <= 1 - EDGE


@dataclass(frozen=True)
class Trial:
    """What a setting gave on the validation images of one seed."""

    setting: Setting
    accuracy: float
    loss: float


def ranked(trials: Sequence[Trial]) -> list[Setting]:
    """The settings by mean accuracy, highest first; by mean loss among equals.

    A loss that is not finite counts as the worst.
    """
    if not trials:
        raise ArgumentError("there is no trial to choose from")
    by_setting: dict[Setting, list[Trial]] = {}
    for trial in trials:
        by_setting.setdefault(trial.setting, []).append(trial)
    return sorted(by_setting, key=lambda setting: _merit(by_setting[setting]), reverse=True)


def _merit(trials: Sequence[Trial]) -> tuple[float, float]:
    loss = float(np.mean([trial.loss for trial in trials]))
    accuracy = round(float(np.mean([trial.accuracy for trial in trials])), 12)  # equal counts of images are equal
    return accuracy, -loss if math.isfinite(loss) else -math.inf
