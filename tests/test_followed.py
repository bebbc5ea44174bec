"""What a schedule keeps of its measurements: smoothed numbers, and a history of what it saw and chose."""

from __future__ import annotations

import json
import math

import pytest

from curvdiag.errors import ArgumentError
from curvdiag.schedules.source import KEPT, Choice, Followed


def test_smoothing_is_the_weight_of_the_old_value_and_the_first_is_taken_as_it_is():
    kept = Followed(0.75)
    assert kept.take({"a": 0.1}) == {"a": 0.1}
    assert kept.take({"a": 0.5, "b": 2.0}) == {"a": 0.75 * 0.1 + 0.25 * 0.5, "b": 2.0}
    assert kept.take({"b": 4.0}) == {"a": 0.75 * 0.1 + 0.25 * 0.5, "b": 2.5}
    plain = Followed(0.0)
    for value in (0.1, 0.7, 1e-300):
        assert plain.take({"a": value}) == {"a": value}


@pytest.mark.parametrize("smoothing", [-0.1, 1.0, 2.0, math.nan])
def test_smoothing_outside_its_range_is_refused(smoothing):
    with pytest.raises(ArgumentError, match="at least 0 and below 1"):
        Followed(smoothing)


def test_values_and_history_survive_a_checkpoint_and_the_history_is_bounded():
    kept = Followed(0.5)
    kept.take({"a": 1 / 3})
    for step in range(KEPT + 5):
        kept.history.append(Choice(step, {"a": 1 / 3}, {"p": 2.0}, "note"))
    again = Followed(0.5)
    again.load_state_dict(json.loads(json.dumps(kept.state_dict())))
    assert again.values == kept.values
    assert again.history == kept.history
    assert len(again.history) == KEPT
    assert again.history[0] == Choice(5, {"a": 1 / 3}, {"p": 2.0}, "note")
    again.history.append(Choice(0, {}, {}))
    assert len(again.history) == KEPT
