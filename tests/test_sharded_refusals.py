"""What cannot be measured of sharded weights says why, and what remains; every rank says so."""

from __future__ import annotations

from typing import Any

import pytest
from ranks import launch

pytestmark = pytest.mark.timeout(280)

SCRIPT = """
import time
from shard_cases import *
from curvdiag import (
    EmpiricalFisher, Fisher, GaussNewton, Hessian, NoiseCovariance, gradient_moments, noise_scale, scaling_test
)
from curvdiag.errors import CurvdiagError
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy

def told(name, function):
    try:
        saved[name] = "", str(function())
    except CurvdiagError as error:
        saved[name] = type(error).__name__, str(error)

dtype = torch.float32
objective = Objective(sharded(net(dtype)), nn.CrossEntropyLoss(), data(rank, dtype), group="world")
saved["sharded"] = objective.sharded, of_all(1, dtype).sharded
for function in (
    Hessian, GaussNewton, Fisher, EmpiricalFisher, NoiseCovariance, gradient_moments, noise_scale, scaling_test
):
    told(function.__name__, lambda: function(objective))
told("float64", lambda: Hessian(objective, method="finite-difference", dtype=torch.float64))
torch.manual_seed(0)
bent = fully_shard(nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 3)))
many = torch.randn(64, 4), torch.randint(0, 3, (64,))
told("kinks", lambda: Hessian(Objective(bent, nn.CrossEntropyLoss(), many, group="world"), method="finite-difference"))
coarse = sharded(net(dtype), mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
told("coarse", lambda: Hessian(of_rank(coarse, rank, dtype), method="finite-difference"))
same = sharded(net(dtype), mp_policy=MixedPrecisionPolicy(param_dtype=torch.float32))
told("same", lambda: Hessian(of_rank(same, rank, dtype), method="finite-difference"))
told("alone", lambda: of_rank(sharded(net(dtype)), rank, dtype, group=None))
told("older", lambda: of_rank(FullyShardedDataParallel(net(dtype), device_id=torch.device("cpu")), rank, dtype))

batches = data(rank, dtype)
batches[0][0][-1] = float("nan") if rank == 1 else 1.0
told("infinite", lambda: Objective(sharded(net(dtype)), criterion(dtype), batches, group="world"))
model = sharded(net(dtype))
objective = of_rank(model, rank, dtype)
hessian = Hessian(objective, method="finite-difference")
if rank == 1:
    objective.batches[0][0][-1] = float("inf")
told("later", lambda: hessian.apply(hessian.space.gaussian(1, seed=0, dtype=dtype, device="cpu")))
saved["restored"] = all(torch.equal(p.full_tensor(), q) for p, q in zip(model.parameters(), net(dtype).parameters()))

model = sharded(net(dtype))
model.register_forward_hook(lambda module, args, output: output + 1.0 * (output - output.detach()))
told("slope", lambda: Hessian(of_rank(model, rank, dtype), method="finite-difference"))
told("mean", lambda: Objective.from_loss(
    sharded(net(dtype)), lambda m, b: m(b[0]).sum(), batches=data(rank, dtype), group="world"))

quick = dist.new_group(timeout=datetime.timedelta(seconds=10))
model = sharded(net(dtype), mesh=DeviceMesh.from_group(quick, "cpu"))
hessian = Hessian(of_rank(model, rank, dtype, group=quick), method="finite-difference")
row = hessian.space.gaussian(1, seed=0, dtype=dtype, device="cpu")
before = [p.to_local().clone() for p in model.parameters()]

def fail(module, args):
    if rank == 1:
        raise ValueError("my own mistake")

model[3].register_forward_pre_hook(fail)
for name in ("within a pass", "after it"):
    started = time.monotonic()
    try:
        hessian.apply(row)
    except Exception as error:
        saved[name] = type(error).__name__, str(error), time.monotonic() - started
saved["unmoved"] = all(torch.equal(p.to_local(), q) for p, q in zip(model.parameters(), before))
"""

WHOLE = (
    "Hessian",
    "GaussNewton",
    "Fisher",
    "EmpiricalFisher",
    "NoiseCovariance",
    "gradient_moments",
    "noise_scale",
    "scaling_test",
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: Any) -> list[dict[str, Any]]:
    return launch(SCRIPT, 2, tmp_path_factory.mktemp("refusals"), limit=270)


@pytest.mark.parametrize("name", WHOLE)
def test_whatever_needs_whole_weights_says_what_remains(runs: list[dict[str, Any]], name: str) -> None:
    for one in runs:
        kind, text = one[name]
        assert kind == "ArgumentError"
        for part in ("needs whole weights", "2 ranks", "method='finite-difference'", "curvdiag scan", "data-parallel"):
            assert part in text
    assert runs[0]["sharded"] == (True, False)


def test_kinks_are_named_on_every_rank(runs: list[dict[str, Any]]) -> None:
    for one in runs:
        kind, text = one["kinks"]
        assert kind == "SecondDerivativeError"
        assert "ReLU '1'" in text
        assert "curvdiag scan" in text
        assert "exact" not in text
    assert runs[0]["kinks"] == runs[1]["kinks"]


def test_mixed_precision_is_refused_and_float32_in_its_policy_is_not(runs: list[dict[str, Any]]) -> None:
    for one in runs:
        assert one["coarse"][0] == "SecondDerivativeError"
        assert "torch.bfloat16" in one["coarse"][1]
        assert "MixedPrecisionPolicy" in one["coarse"][1]
        assert one["same"][0] == ""
        assert one["float64"][0] == "ArgumentError"
        assert "leave dtype out" in one["float64"][1]


def test_a_group_that_is_not_the_engines_is_refused(runs: list[dict[str, Any]]) -> None:
    for one in runs:
        assert one["alone"][0] == "ArgumentError"
        assert "'world' for all" in one["alone"][1]
        assert one["older"][0] == "ArgumentError"
        assert "fully_shard" in one["older"][1]


def test_a_loss_that_is_infinite_on_one_rank_ends_all_of_them_and_leaves_the_weights(
    runs: list[dict[str, Any]],
) -> None:
    for name in ("infinite", "later"):
        assert runs[1][name][0] == "NonFiniteError"
        assert runs[0][name][0] == "RankFailedError"
        assert "rank 1 failed: NonFiniteError" in runs[0][name][1]
    assert all(one["restored"] for one in runs)


def test_a_gradient_that_is_not_the_slope_of_the_loss_is_refused(runs: list[dict[str, Any]]) -> None:
    for one in runs:
        assert one["slope"][0] == "LossError"
        assert "loss rises 0.5" in one["slope"][1]


def test_a_sum_over_samples_is_noticed_with_unequal_numbers_of_passes(runs: list[dict[str, Any]]) -> None:
    for one in runs:
        assert one["mean"][0] in ("LossError", "RankFailedError")
        assert "sum over samples" in one["mean"][1]


def test_an_error_within_a_pass_of_one_rank_ends_the_others_by_the_timeout_of_their_group(
    runs: list[dict[str, Any]],
) -> None:
    """The others are in the middle of a collective of the engine, where nobody can tell them."""
    assert runs[0]["within a pass"][0] == "RankLostError"
    assert "product of 1 vectors" in runs[0]["within a pass"][1]
    assert runs[1]["within a pass"][:2] == ("ValueError", "my own mistake")
    for one in runs:
        assert one["within a pass"][2] < 60  # which is the timeout of the world's group
        assert one["after it"][0] == "RankLostError"
        assert one["unmoved"]
