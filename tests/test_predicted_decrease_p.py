"""PredictedDecreaseP in a training: which directions it compares, when, and what it leaves behind."""

from __future__ import annotations

import copy
import gc
import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from nets import Drop, make
from torch import Tensor, nn

from curvdiag import CurvatureMonitor, GaussNewton, Hessian, Objective
from curvdiag.optim import LPSGD, LPSGDM
from curvdiag.schedules.predicted_decrease import candidates
from curvdiag.schedules.predicted_decrease_p import PredictedDecreaseP

P_MAX = 10.0


class Task:
    """A small net on one batch in double precision, and training steps on parts of it."""

    def __init__(self, name: str = "mlp-tanh", seed: int = 0, **optimizer: Any) -> None:
        self.model, self.batch = make(name, samples=12, seed=seed)
        self.criterion = nn.CrossEntropyLoss()
        self.objective = Objective(self.model, self.criterion, self.batch)
        kind = optimizer.pop("kind", LPSGDM)
        self.optimizer = kind(optimizer.pop("params", self.model.parameters()), **{"lr": 0.05, "p": P_MAX, **optimizer})

    def step(self, number: int) -> None:
        rows = torch.arange(4) + 4 * (number % 3)
        self.optimizer.zero_grad()
        self.criterion(self.model(self.batch[0][rows]), self.batch[1][rows]).backward()
        self.optimizer.step()

    def weights(self) -> Tensor:
        return torch.cat([p.detach().reshape(-1) for p in self.model.parameters()])

    def momentum(self) -> np.ndarray:
        parts = [self.optimizer.state[p]["momentum_buffer"].reshape(-1) for p in self.model.parameters()]
        return torch.cat(parts).numpy()


def lp(vector: np.ndarray, p: float, eps: float = 1e-8) -> np.ndarray:
    return vector / (np.abs(vector) + eps) ** ((p - 2) / (p - 1))


def decreases(matrix: np.ndarray, slope: np.ndarray, direction: Callable[[float], np.ndarray]) -> dict[float, float]:
    """By hand, NaN where a direction leads uphill."""
    found = {}
    for p in candidates(P_MAX):
        d = direction(p)
        found[p] = float((slope @ d) ** 2 / (2 * d @ matrix @ d)) if slope @ d >= 0 else float("nan")
    return found


def seen(schedule: PredictedDecreaseP, suffix: str = "") -> dict[float, float]:
    return {p: schedule.history[-1].seen[f"decrease/{p:g}{suffix}"] for p in candidates(P_MAX)}


@pytest.mark.parametrize(("curvature", "operator"), [("gauss-newton", GaussNewton), ("hessian", Hessian)])
def test_with_momentum_the_direction_is_the_momentums_and_the_slope_the_gradients(
    curvature: Any, operator: Any
) -> None:
    task = Task()
    schedule = PredictedDecreaseP(task.optimizer, task.objective, smoothing=0.0, curvature=curvature)
    slope = task.objective.gradient().numpy()
    matrix = operator(task.objective).dense().numpy()
    first = decreases(matrix, slope, lambda p: lp(slope, p))  # no momentum yet: the gradient's own direction
    assert seen(schedule) == pytest.approx(first, rel=1e-6, nan_ok=True)
    for number in range(4):
        task.step(number)
        schedule.step()
    slope, matrix = task.objective.gradient().numpy(), operator(task.objective).dense().numpy()
    momentum = task.momentum()
    by_hand = decreases(matrix, slope, lambda p: lp(momentum, p))
    assert seen(schedule) == pytest.approx(by_hand, rel=1e-6, nan_ok=True)
    assert seen(schedule) != pytest.approx(decreases(matrix, slope, lambda p: lp(slope, p)), rel=1e-3)
    assert task.optimizer.param_groups[0]["p"] == pytest.approx(max(by_hand, key=by_hand.__getitem__))


def groups_of(model: nn.Module, **second: Any) -> list[dict[str, Any]]:
    first, *rest = model.parameters()
    return [{"params": rest, "name": "rest"}, {"params": [first], "lr": 0.2, "eps": 1e-3, **second}]


@pytest.mark.parametrize("dual", [False, True])
def test_groups_share_one_p_along_the_joint_step_with_their_rates_limits_and_norms(dual: bool) -> None:
    model = make("mlp-tanh")[0]
    task = Task(kind=LPSGD, params=groups_of(model, p=3.0), dual_norm=dual)
    task.model = model
    task.objective = Objective(model, task.criterion, task.batch)
    schedule = PredictedDecreaseP(task.optimizer, task.objective, p_max=[P_MAX, 10 / 3])
    slope, matrix = task.objective.gradient().numpy(), GaussNewton(task.objective).dense().numpy()
    cut = next(model.parameters()).numel()

    def direction(p: float) -> np.ndarray:
        parts = []
        for vector, rate, q, eps in ((slope[:cut], 0.2, min(p, 10 / 3), 1e-3), (slope[cut:], 0.05, p, 1e-8)):
            conjugate, rho = q / (q - 1), (q - 2) / (q - 1)
            norm = (np.abs(vector) ** conjugate).sum() ** (rho / conjugate) if dual else 1.0
            parts.append(rate * norm * lp(vector, q, eps))
        return np.concatenate(parts)

    assert seen(schedule) == pytest.approx(decreases(matrix, slope, direction), rel=1e-6)
    winner = schedule.history[-1].seen["winner"]
    ps = [group["p"] for group in task.optimizer.param_groups]
    assert ps == pytest.approx([winner, min(winner, 10 / 3)])
    assert schedule.history[-1].chosen == pytest.approx({"p/rest": ps[0], "p/1": ps[1]})


def test_per_group_each_takes_its_own_block_and_rates_do_not_matter() -> None:
    model = make("mlp-tanh")[0]
    task = Task(kind=LPSGD, params=groups_of(model))
    objective = Objective(model, task.criterion, task.batch)
    schedule = PredictedDecreaseP(task.optimizer, objective, per_group=True, smoothing=0.0)
    slope, matrix = objective.gradient().numpy(), GaussNewton(objective).dense().numpy()
    cut = next(model.parameters()).numel()
    for part, suffix, eps in ((slice(cut), "/1", 1e-3), (slice(cut, None), "/rest", 1e-8)):
        by_hand = decreases(matrix[part, part], slope[part], lambda p, part=part, eps=eps: lp(slope[part], p, eps))
        assert seen(schedule, suffix) == pytest.approx(by_hand, rel=1e-6)
    one = schedule.history[-1]
    assert [g["p"] for g in task.optimizer.param_groups] == pytest.approx(
        [one.seen["winner/rest"], one.seen["winner/1"]]
    )


def test_a_rate_of_zero_in_all_groups_counts_as_equal_rates() -> None:
    found = []
    for rate in (0.0, 0.05):
        task = Task(kind=LPSGD, lr=rate)
        found.append(seen(PredictedDecreaseP(task.optimizer, task.objective)))
    assert found[0] == found[1]


def test_only_what_the_optimizer_moves_is_in_the_direction_and_only_what_the_objective_holds() -> None:
    model = make("mlp-tanh")[0]
    task = Task(kind=LPSGD, params=[model[0].weight, model[2].weight])
    objective = Objective(model, task.criterion, task.batch, params=["0.*"])
    schedule = PredictedDecreaseP(task.optimizer, objective)
    slope, matrix = objective.gradient().numpy(), GaussNewton(objective).dense().numpy()
    moved = np.arange(len(slope)) < model[0].weight.numel()  # its bias is nobody's
    by_hand = decreases(matrix, slope, lambda p: np.where(moved, lp(slope, p), 0.0))
    assert seen(schedule) == pytest.approx(by_hand, rel=1e-6)


def test_p_is_the_smoothed_winner_and_every_says_how_often() -> None:
    winners, points = [], iter([(1.0, 1.0), (30.0, 1.0), (1.0, 1.0), (1.0, 1.0)])
    curvature = torch.diag(torch.tensor([30.0, 1.0]))

    def slope() -> tuple[Tensor, Tensor]:
        # Along (1, 1) all p agree, and the smallest wins; a gradient of (30, 1) has (1, 1) as Newton's direction.
        gradient = torch.tensor(next(points))
        return gradient, curvature

    weight = nn.Parameter(torch.zeros(2))
    schedule = PredictedDecreaseP(LPSGD([weight], p=P_MAX), slope, smoothing=0.75, every=3)
    p, path = None, []
    for step in range(11):
        if step:
            schedule.step()
        assert schedule.age == step % 3
        if step % 3 == 0:
            winners.append(schedule.history[-1].seen["winner"])
            p = winners[-1] if p is None else 0.75 * p + 0.25 * winners[-1]
        path.append(p)
        assert schedule.optimizer.param_groups[0]["p"] == pytest.approx(p, abs=1e-12)
    assert winners == [2.0, P_MAX, 2.0, 2.0]
    assert [choice.step for choice in schedule.history] == [0, 3, 6, 9]


@pytest.mark.parametrize("curvature", ["gauss-newton", "hessian"])
def test_training_is_the_same_to_the_bit_where_p_is_the_same(curvature: Any) -> None:
    finals = []
    for measured in (False, True):
        torch.manual_seed(0)
        model = Drop()
        batch = torch.randn(12, 4), torch.randint(3, (12,))
        optimizer = LPSGDM(model.parameters(), lr=0.1, p=2.0)
        objective = Objective(model, nn.CrossEntropyLoss(), batch)
        schedule = PredictedDecreaseP(optimizer, objective, curvature=curvature) if measured else None
        for _ in range(5):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(batch[0]), batch[1]).backward()  # dropout draws, BatchNorm counts
            optimizer.step()
            if schedule is not None:
                schedule.step()
        assert schedule is None or len(schedule.history) == 6
        finals.append([t.clone() for t in (*model.state_dict().values(), torch.get_rng_state())])
        finals[-1] += [p.grad for p in model.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(*finals, strict=True))


def test_no_operator_outlives_its_measurement() -> None:
    task = Task()
    schedule = PredictedDecreaseP(task.optimizer, task.objective)
    task.step(0)
    schedule.step()
    gc.collect()
    assert not [thing for thing in gc.get_objects() if type(thing) is GaussNewton]


def test_half_precision_is_measured_in_single() -> None:
    task = Task("mlp-relu")
    task.model.bfloat16()
    task.batch = task.batch[0].bfloat16(), task.batch[1]
    optimizer = LPSGD(task.model.parameters(), p=P_MAX)
    schedule = PredictedDecreaseP(optimizer, Objective(task.model, task.criterion, task.batch), smoothing=0.0)
    twin = copy.deepcopy(task.model).double()
    objective = Objective(twin, task.criterion, (task.batch[0].double(), task.batch[1]))
    slope, matrix = objective.gradient().numpy(), GaussNewton(objective).dense().numpy()
    assert seen(schedule) == pytest.approx(decreases(matrix, slope, lambda p: lp(slope, p)), rel=1e-4)


@pytest.mark.parametrize("operator", [GaussNewton, Hessian])
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_it_measures_where_gradients_are_off(context: Any, operator: Any) -> None:
    task = Task()
    gradient, kept = task.objective.gradient(), operator(task.objective)
    sources = (task.objective, lambda: (task.objective.gradient(), operator(task.objective)), lambda: (gradient, kept))
    for source in sources:
        schedule = PredictedDecreaseP(task.optimizer, source)
        with context():
            schedule.step()
        assert not schedule.history[-1].note
        assert schedule.history[-1].seen == schedule.history[0].seen
        schedule.detach()


def test_a_group_that_the_objective_does_not_hold_is_left_alone() -> None:
    model = make("mlp-tanh")[0]
    task = Task(kind=LPSGD, params=[{"params": model[0].parameters()}, {"params": model[2].parameters()}])
    objective = Objective(model, task.criterion, task.batch, params=["0.*"])
    schedule = PredictedDecreaseP(task.optimizer, objective, per_group=True, smoothing=0.0, grid=[2.0, 3.0])
    assert schedule.get_last_p() == pytest.approx([schedule.history[-1].seen["winner/0"], P_MAX])
    assert schedule.get_last_p()[0] <= 3
    assert not schedule.history[-1].note


def make_run(source: str, seed: int = 5) -> tuple[Task, PredictedDecreaseP, CurvatureMonitor | None]:
    task = Task("conv-batchnorm", seed=seed)  # whose winners change at every other step
    if source == "monitor":
        monitor = CurvatureMonitor(task.objective, measure=["trace"], probes=2, every=2).attach(task.optimizer)
        return task, PredictedDecreaseP(task.optimizer, monitor, smoothing=0.6), monitor
    if source == "objective":
        return task, PredictedDecreaseP(task.optimizer, task.objective, smoothing=0.6, every=2), None
    slope = lambda: (task.objective.gradient(), GaussNewton(task.objective))  # noqa: E731
    return task, PredictedDecreaseP(task.optimizer, slope, smoothing=0.6, every=3, per_group=True), None


@pytest.mark.filterwarnings("ignore:measuring every")
@pytest.mark.parametrize("source", ["objective", "monitor", "function"])
def test_a_run_cut_anywhere_goes_on_to_the_bit(source: str) -> None:
    steps = 9
    task, schedule, _ = make_run(source)
    whole = []
    for number in range(steps):
        task.step(number)
        schedule.step()
        whole.append((task.optimizer.param_groups[0]["p"], task.weights()))
    assert len({p for p, _ in whole}) > 3, "a p that does not move would show nothing"
    for cut in (1, 2, 3, 4, 6, 7):
        task, schedule, monitor = make_run(source)
        for number in range(cut):
            task.step(number)
            schedule.step()
        parts = [task.model, task.optimizer, schedule, *([monitor] if monitor is not None else [])]
        file = io.BytesIO()
        torch.save([part.state_dict() for part in parts], file)
        file.seek(0)
        task, schedule, monitor = make_run(source, seed=4)
        parts = [task.model, task.optimizer, schedule, *([monitor] if monitor is not None else [])]
        task.batch = Task(
            "conv-batchnorm", seed=5
        ).batch  # the data are the same; weights and all else come from the file
        task.objective.batches = [task.batch]
        for part, state in zip(parts, torch.load(file, weights_only=True), strict=True):
            part.load_state_dict(state)
        assert schedule.get_last_p() == [whole[cut - 1][0]]
        for number in range(cut, steps):
            task.step(number)
            schedule.step()
            p, weights = whole[number]
            assert task.optimizer.param_groups[0]["p"] == p, (cut, number)
            assert torch.equal(task.weights(), weights), (cut, number)
        assert len(schedule.history) == len({choice.step for choice in schedule.history})
