"""What a run file says in words: which optimizer trained, and why a schedule held what it had."""

from __future__ import annotations

import math

import pytest
import torch
from nets import make
from torch.nn import functional as F

from curvdiag import CurvatureMonitor, Objective, RunStore
from curvdiag.errors import CurvdiagError
from curvdiag.optim import LPSGDM
from curvdiag.schedules import AnisotropyP, PredictedDecreaseP
from curvdiag.schedules.source import Source

pytestmark = pytest.mark.filterwarnings("ignore:measuring every")
SGD = torch.optim.SGD


@pytest.fixture
def net():
    return make("mlp-tanh")


def monitor(net, store, **options):
    model, batch = net
    options = {"every": 1, "preset": "light", "steps": 6, "probes": 2, **options}
    return CurvatureMonitor(Objective(model, F.cross_entropy, batch), store, **options)


def events(path):
    with RunStore(path, readonly=True) as store:
        return [(one.step, one.message) for one in store.events() if one.kind == "schedule"]


@pytest.mark.parametrize(
    ("make_optimizer", "rule"),
    [
        (lambda p: torch.optim.AdamW(p, lr=0.01), "AdamW"),
        (lambda p: SGD(p, lr=0.01), "SGD"),
        (lambda p: SGD(p, lr=0.01, momentum=0.9), "SGD, heavy ball"),
        (lambda p: SGD(p, lr=0.01, momentum=0.9, nesterov=True), "SGD, Nesterov"),
        (lambda p: SGD(p, lr=0.01, momentum=0.9, dampening=0.9), "SGD, dampened momentum"),
        (lambda p: type("Mine", (SGD,), {"step": lambda self, closure=None: None})(p, lr=0.01, momentum=0.9), "Mine"),
    ],
)
def test_the_optimizer_and_the_kind_of_its_momentum(net, tmp_path, make_optimizer, rule):
    with monitor(net, tmp_path / "run.db").attach(make_optimizer(net[0].parameters())) as watching:
        watching.measure()
        (info,) = watching.store.runs()
    assert info.config["curvdiag"]["optimizer"] == rule


def test_without_an_optimizer_none_is_named(net, tmp_path):
    with monitor(net, tmp_path / "run.db") as watching:
        watching.measure()
        (info,) = watching.store.runs()
    assert "optimizer" not in info.config["curvdiag"]


def test_what_a_source_logs_is_an_event_once_until_something_succeeds(net, tmp_path):
    answers = iter([ValueError("no"), ValueError("no"), 2.0, ValueError("no")])

    def answer():
        if isinstance(found := next(answers), ValueError):
            raise found
        return found

    with monitor(net, tmp_path / "run.db") as watching:
        source = Source(answer, {"top": ""}, needs=[], owner="Test", monitor=watching)
        for step in range(4):
            watching.steps_done = 10 * step
            source.read(step)
    why = "Test: the measurement failed: ValueError: no;"
    assert events(tmp_path / "run.db") == [
        (0, f"{why} what there was before is held"),
        (30, f"{why} the last measurement, of 1 steps ago, is held"),
    ]


def test_a_schedule_that_follows_a_monitor_says_why_it_held(net, tmp_path):
    optimizer = LPSGDM(net[0].parameters(), lr=0.01, p=4.0)
    with monitor(net, tmp_path / "run.db", preset="standard").attach(optimizer) as watching:
        schedule = AnisotropyP(optimizer, watching)
        watching.measure().scalars["curv/anisotropy/effective_rank"] = math.nan
        watching.steps_done += 1
        schedule.step()
        (choice,) = schedule.history
    ((step, message),) = events(tmp_path / "run.db")
    assert step == 1
    assert message == f"AnisotropyP: {choice.note}"
    assert "effective_rank = nan" in message


def test_one_that_measures_by_itself_says_so_in_the_monitors_run(net, tmp_path, monkeypatch):
    def fail(self):
        raise CurvdiagError("no slope")

    optimizer = LPSGDM(net[0].parameters(), lr=0.01, p=4.0)
    with monitor(net, tmp_path / "run.db").attach(optimizer) as watching:
        schedule = PredictedDecreaseP(optimizer, watching)
        monkeypatch.setattr(PredictedDecreaseP, "_slope_and_curvature", fail)
        watching.measure()
        watching.steps_done += 1
        schedule.step()
    ((_, message),) = events(tmp_path / "run.db")
    assert message.startswith("PredictedDecreaseP: the measurement failed: CurvdiagError: no slope")


def test_after_the_monitor_is_closed_it_is_only_logged(net, tmp_path, caplog):
    with monitor(net, tmp_path / "run.db") as watching:
        watching.measure()
    Source(watching, {"top": "curv/hessian/lambda_max"}, needs=["lambda_max"], owner="Test").complain("late", "late")
    assert "Test: late" in caplog.text
    assert events(tmp_path / "run.db") == []
