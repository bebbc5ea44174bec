"""The noise scale of ranks that train: numbers, training that stays the same, and what it asks of the ranks."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from rank_noise_runs import Net
from ranks import launch

from curvdiag.errors import ArgumentError
from curvdiag.noise import RankNoiseScale

SCRIPT = """
import rank_noise_cases as cases

saved["bits"] = cases.same_bits()
saved["numbers"] = cases.numbers()
saved["scaled"] = cases.scaled()
saved["checkpointed"] = cases.checkpointed()
saved["traffic"] = cases.traffic()
saved["manners"] = cases.manners()
saved["joined"] = cases.joined()
saved["halves"] = cases.halves()
if world == 2:
    saved["known"] = cases.known_noise()
"""


@pytest.fixture(scope="module", params=[2, 3])
def ranks(request, tmp_path_factory) -> list[dict[str, Any]]:
    return launch(SCRIPT, request.param, tmp_path_factory.mktemp(f"ranks{request.param}"), limit=280)


def test_training_ends_with_the_same_bits(ranks):
    for saved in ranks:
        assert len(saved["bits"]) == 16
        assert [name for name, same in saved["bits"].items() if not same] == []


def test_numbers_are_those_of_gradients_taken_one_by_one(ranks):
    for saved in ranks:
        assert len(saved["numbers"]) == 35
        for name, case in saved["numbers"].items():
            assert case["found"] == pytest.approx(case["expected"], rel=1e-7, nan_ok=True), name
            assert (case["updates"], case["skipped"]) == (3, 0), name
            assert not math.isnan(case["found"][3]), name


def test_all_ranks_hold_the_same_value_after_each_step(ranks):
    for name, case in ranks[0]["numbers"].items():
        assert [updates for _, updates, _ in case["values"]] == [1, 2, 3], name
        for other in ranks[1:]:
            assert repr(other["numbers"][name]) == repr({**case, "values": case["values"]}), name


def test_a_step_that_a_scaler_skips_is_left_out_and_the_scale_taken_off(ranks):
    for saved in ranks:
        for case in saved["scaled"].values():
            assert (case["updates"], case["skipped"], case["scale"]) == (4, 1, 512.0)
            assert case["found"] == pytest.approx(case["expected"], rel=1e-7)


def test_recomputation_is_no_pass_of_its_own(ranks):
    for saved in ranks:
        plain, *others = saved["checkpointed"]
        assert plain[1:] == (3, 0)
        assert others == [pytest.approx(plain, rel=1e-12)] * 2


def test_only_seven_numbers_are_exchanged_at_each_reduction_and_no_pass_is_added(ranks):
    for saved in ranks:
        for engine, found in saved["traffic"].items():
            assert found == {"sizes": [7, 7, 7], "passes": 3, "updates": 3}, engine


def test_it_goes_on_from_a_state_and_closing_leaves_nothing(ranks):
    for saved in ranks:
        found = saved["manners"]
        for engine in ("ddp", "fsdp"):
            again, state = found[f"{engine} state"]
            assert again == state
            assert state["updates"] == 3
            assert state == ranks[0]["manners"][f"{engine} state"][1]
            assert found[f"{engine} hooks"] == 0
            assert found[f"{engine} closed"] == (3, 0)
        assert found["copy"] == (0, 0)


def test_one_rank_needs_several_micro_batches_and_says_so(ranks):
    for saved in ranks:
        found = saved["manners"]
        assert found["alone"] == 3
        assert len(found["alone told"]) == 1
        assert "noise_scale(objective)" in found["alone told"][0]
        assert found["alone several"] == 3


def test_a_number_of_samples_that_one_rank_does_not_know_leaves_the_step_out_on_all(ranks):
    told = [saved["manners"]["unknown"] for saved in ranks]
    assert told == [(3, 0, 1)] + [(3, 0, 0)] * (len(ranks) - 1)


def test_ranks_that_give_different_arguments_are_told_so(ranks):
    for saved in ranks:
        told = saved["manners"]["disagreement"]
        assert "the ranks have different noise scales" in told
        assert "(0.9, 'mean', 6) on rank 0, (0.91, 'mean', 6) on rank 1" in told
        assert saved["manners"]["hooks after it"] == 1  # of the one that was made before


def test_steps_under_join_are_left_out(ranks):
    """And after it: PyTorch leaves the model in that state."""
    for rank, saved in enumerate(ranks):
        found, skipped = saved["joined"], 1 + rank
        assert found == {"told": 1, "within": (0, skipped), "after": (0, skipped + 2)}


def test_half_precision_gives_the_same_to_its_two_digits(ranks):
    for saved in ranks:
        case = saved["halves"]
        assert case["found"][2:] == pytest.approx(case["expected"][2:], rel=0.02)
        assert case["found"][2:] != pytest.approx(case["expected"][2:], rel=1e-5)


def test_known_noise_is_found_within_its_standard_errors(ranks):
    """40 runs of 40 steps, micro-batches of 2 and 3 samples on one rank, of 4 and 5 on the other."""
    if len(ranks) != 2:
        pytest.skip("of two ranks only: it takes thousands of steps")
    truth = {"value": 5 / 0.65, "gradient_square": 0.65, "trace": 5.0}
    for name, value in truth.items():
        runs = torch.tensor(ranks[0]["known"][name])
        assert torch.equal(runs, torch.tensor(ranks[1]["known"][name]))
        hits = int(((runs[:, 2] <= value) & (value <= runs[:, 3])).sum())
        assert hits >= 34, (name, hits)  # 95% of 40 are 38; fewer than 34 have a chance of 1 in 300
        mean, error = float(runs[:, 0].mean()), float(runs[:, 0].std()) / len(runs) ** 0.5
        if name != "value":  # a ratio has a bias of its own
            assert abs(mean - value) < 4 * error, (name, mean, error)
            assert error < 0.03 * value


def test_a_model_that_no_engine_spreads_is_refused_with_what_to_do_instead():
    model = Net(torch.float64)
    with pytest.raises(ArgumentError, match="RunningNoiseScale gets the noise scale from micro-batches"):
        RankNoiseScale(model, torch.optim.SGD(model.parameters(), lr=0.1))


@pytest.mark.parametrize(
    "wrong", [{"samples": 0}, {"accumulation": "total"}, {"divisor": 0}, {"accumulation": "sum", "divisor": 2}]
)
def test_wrong_arguments_are_refused(wrong):
    model = Net(torch.float64)
    with pytest.raises(ArgumentError, match=r"sample|accumulation|divisor"):
        RankNoiseScale(model, torch.optim.SGD(model.parameters(), lr=0.1), **wrong)
