"""Gradient noise of samples on several ranks is that of the same samples in one process."""

import pytest
import torch
from data_parallel import SHARES, cases, objective_of
from data_parallel_noise import CASES, noise, rows
from ranks import launch

ACCEPTED = {torch.float64: 1e-12, torch.float32: 1e-5}
WORLD = 3

SCRIPT = """
from data_parallel import cases, objective_of
from data_parallel_noise import CASES, noise, reductions, refusal, rows

for name, dtype in [*((name, torch.float64) for name in CASES), ("mlp", torch.float32)]:
    objective = objective_of(cases(dtype)[name], rank, world, "world")
    saved[name, dtype] = noise(objective)
    saved[name, dtype, "rows"] = rows(objective)
saved["reductions"], saved["size"] = reductions(objective), objective.parameters.size
saved["refusal"] = refusal(objective)
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return launch(SCRIPT, WORLD, tmp_path_factory.mktemp("ranks"), limit=300)


@pytest.mark.parametrize(
    ("name", "dtype"), [*((name, torch.float64) for name in CASES), ("mlp", torch.float32)], ids=str
)
def test_noise_of_all_ranks_is_that_of_one_process(runs, name, dtype):
    truth = noise(objective_of(cases(dtype)[name]))
    for saved in runs:
        found = saved[name, dtype]
        assert found.keys() == truth.keys()
        for kind, one in truth.items():
            if not isinstance(one, torch.Tensor):
                assert found[kind] == one, kind
                continue
            assert found[kind].shape == one.shape, kind
            error = (found[kind].double() - one.double()).norm() / one.double().norm().clamp_min(1e-300)
            assert torch.equal(found[kind].isnan(), one.isnan()), kind
            assert one.isnan().any() or error <= ACCEPTED[dtype], kind


@pytest.mark.parametrize("name", CASES)
def test_each_rank_has_the_gradients_of_its_own_samples(runs, name):
    truth = rows(objective_of(cases(torch.float64)[name]))
    for saved, own in zip(runs, truth.split(SHARES[WORLD]), strict=True):
        assert saved[name, torch.float64, "rows"].shape == own.shape
        assert float((saved[name, torch.float64, "rows"] - own).norm()) <= 1e-12 * float(truth.norm())


def test_moments_take_one_reduction_and_products_of_samples_none(runs):
    for saved in runs:
        size = saved["size"]
        assert saved["reductions"] == {"moments": [2 * size], "products": [], "signed sums": [4 * size]}


def test_a_matrix_of_all_pairs_of_samples_is_refused_with_what_remains(runs):
    for saved in runs:
        assert "on several ranks" in saved["refusal"]
        assert "top_eigenpairs" in saved["refusal"]
