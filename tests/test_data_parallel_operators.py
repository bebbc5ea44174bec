"""Products of several ranks, each with a share of the samples, are those of one process with all of them."""

import pytest
import torch
from data_parallel import MAIN, SHARES, cases, objective_of, products
from ranks import launch

ACCEPTED = {torch.float64: 1e-12, torch.float32: 1e-5}
OF_DIFFERENCES = {torch.float64: 1e-10, torch.float32: 1e-4}
"""Gradients are rounded as products are, and then divided by a step of the cube root of the precision."""

SCRIPT = """
from data_parallel import MAIN, cases, objective_of, products, traffic_of

everything = [(name, torch.float64) for name in cases(torch.float64)] + [(name, torch.float32) for name in MAIN]
for name, dtype in everything if world == 3 else [(name, torch.float64) for name in MAIN]:
    objective = objective_of(cases(dtype)[name], rank, world, "world")
    saved[name, dtype] = products(objective, name)
    saved[name, dtype, "sizes"] = objective.size, objective.local_size, objective.first_sample, repr(objective)
    if world == 2:
        saved[name, "traffic"] = traffic_of(objective, name)
"""


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return launch(SCRIPT, 2, tmp_path_factory.mktemp("two"), limit=300)


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    return launch(SCRIPT, 3, tmp_path_factory.mktemp("three"), limit=300)


@pytest.fixture(scope="module")
def alone():
    known = {}

    def measured(name, dtype):
        if (name, dtype) not in known:
            known[name, dtype] = products(objective_of(cases(dtype)[name]), name)
        return known[name, dtype]

    return measured


def error(found, truth):
    return float((found.double() - truth.double()).norm() / truth.double().norm().clamp_min(1e-300))


def compare(runs, truth, key):
    assert len(truth) >= 17
    for saved in runs:
        assert saved[key].keys() == truth.keys()
        for kind, one in truth.items():
            if isinstance(one, list):
                assert saved[key][kind] == one
                continue
            accepted = (OF_DIFFERENCES if kind.startswith("differences") else ACCEPTED)[key[1]]
            assert error(saved[key][kind], one) <= accepted, kind
            assert torch.equal(saved[key][kind], runs[0][key][kind]), kind


@pytest.mark.parametrize("name", sorted(cases(torch.float64)))
def test_products_of_three_ranks_are_those_of_one_process(three, alone, name):
    compare(three, alone(name, torch.float64), (name, torch.float64))


@pytest.mark.parametrize("name", MAIN)
def test_products_in_single_precision_are_those_of_one_process(three, alone, name):
    compare(three, alone(name, torch.float32), (name, torch.float32))


@pytest.mark.parametrize("name", MAIN)
def test_products_of_two_ranks_are_those_of_one_process(two, alone, name):
    compare(two, alone(name, torch.float64), (name, torch.float64))


def test_an_objective_counts_the_samples_of_all_ranks(two, three):
    for runs in (two, three):
        shares = SHARES[len(runs)]
        for rank, saved in enumerate(runs):
            size, held, first, text = saved["mlp", torch.float64, "sizes"]
            assert (size, held, first) == (11, shares[rank], sum(shares[:rank]))
            assert f"11 samples on {len(runs)} ranks, {shares[rank]} in" in text


@pytest.mark.parametrize("name", MAIN)
def test_a_product_takes_one_reduction_of_its_size(two, name):
    for saved in two:
        for what, (wire, counted, size, width) in saved[name, "traffic"].items():
            large = [numbers for operation, numbers in wire if numbers >= size]
            small = [numbers for operation, numbers in wire if numbers < size]
            assert {operation for operation, _ in wire} == {"allreduce_"}, what
            assert large == [size], what
            centred = 2 if what.endswith("blocks") else 1  # of the noise covariance: one number for each vector
            rounds = [6] if "noise" not in what else [6, centred, 6]
            assert small == rounds, what
            assert counted == (1 + len(rounds) // 2, size * width + len(rounds) // 2 * centred * 8), what
