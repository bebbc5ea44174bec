"""A run that is stopped and continued from its checkpoint ends with the same bits as one that was not."""

from __future__ import annotations

import io
import math

import pytest
import torch
from nets import make
from torch.nn import functional as F
from torch.optim.lr_scheduler import ChainedScheduler, CosineAnnealingLR

from curvdiag import CurvatureMonitor, Objective, RunStore
from curvdiag.operators import Hessian
from curvdiag.optim import LPSGDM
from curvdiag.schedules import AnisotropyP, CosineP
from curvdiag.spectrum import anisotropy

pytestmark = pytest.mark.filterwarnings("ignore:measuring every")
STEPS = 17
CUTS = [2, 5, 6, 10, 14]


class Run:
    """Everything that a training script holds; ``per`` is after how many optimizer steps the p-schedule steps."""

    def __init__(self, name, store=None, per=1):
        self.model, (self.inputs, self.targets) = make("mlp-tanh", samples=16)
        named = dict(self.model.named_parameters())
        groups = [[p for name, p in named.items() if name.endswith(end)] for end in ("weight", "bias")]
        self.optimizer = LPSGDM([{"params": groups[0]}, {"params": groups[1], "p": 4.0}], lr=0.05, p=6.0)
        self.per, self.done = per, 0
        self.objective = Objective(self.model, F.cross_entropy, (self.inputs, self.targets))
        measure = ["layer_anisotropy" if "layer" in name else "anisotropy"]
        self.monitor = CurvatureMonitor(self.objective, store, every=5, measure=measure, steps=4, probes=2)
        self.monitor.attach(self.optimizer)
        self.generator = torch.Generator().manual_seed(3)
        self.rate = CosineAnnealingLR(self.optimizer, STEPS)
        self.p = SCHEDULES[name](self)
        self.parts = {name: getattr(self, name) for name in ("model", "optimizer", "monitor", "rate", "p")}
        self.seen = []

    def step(self, times):
        for _ in range(times):
            rows = torch.randperm(16, generator=self.generator)[:8]
            self.optimizer.zero_grad()
            F.cross_entropy(self.model(self.inputs[rows]), self.targets[rows]).backward()
            self.optimizer.step()
            self.rate.step()
            self.done += 1
            if self.done % self.per == 0:
                self.p.step()
            self.seen.append([float(group[key]) for group in self.optimizer.param_groups for key in ("p", "lr")])

    def checkpoint(self):
        buffer = io.BytesIO()
        states = {name: part.state_dict() for name, part in self.parts.items()}
        torch.save({**states, "generator": self.generator.get_state(), "done": self.done, "seen": self.seen}, buffer)
        buffer.seek(0)
        return buffer

    def load(self, buffer, order=1):
        states = torch.load(buffer, weights_only=True)
        for name in list(self.parts)[::order]:
            self.parts[name].load_state_dict(states[name])
        self.generator.set_state(states["generator"])
        self.done, self.seen = states["done"], states["seen"]

    def bits(self):
        """Weights, momenta, p and rate of every step, the history, and what goes into the next checkpoint."""
        tensors = [*self.model.state_dict().values()]
        tensors += [state["momentum_buffer"] for state in self.optimizer.state.values()]
        history = list(getattr(self.p, "history", []))
        return [tensor.numpy().tobytes() for tensor in tensors], self.seen, history, self.p.state_dict()


def follow(**options):
    return lambda run: AnisotropyP(run.optimizer, run.monitor, **{"a_high": 10.0, **options})


def by_hand(run):
    """A function that measures, asked every third step; some of its answers fail."""

    def measured():
        if run.done in (6, 9):
            raise RuntimeError("busy")
        return math.nan if run.done == 12 else anisotropy(Hessian(run.objective), steps=4, probes=2)

    return AnisotropyP(run.optimizer, measured, a_high=10.0, refresh=3, smoothing=0)


def chained(run):
    schedules = [CosineP(run.optimizer, 30), follow()(run)]
    return ChainedScheduler(schedules, optimizer=run.optimizer)


SCHEDULES = {
    "cosine": lambda run: CosineP(run.optimizer, STEPS),
    "anisotropy": follow(smoothing=0.7, monotone="up"),
    "first as a_high": follow(measure="participation_ratio", a_high=None),
    "by layer": follow(per_layer=True, a_high=2.0),
    "a function": by_hand,
    "chained": chained,
}


@pytest.fixture(scope="module")
def whole():
    """The runs that were not stopped: their bits, and their checkpoints on the way."""
    found = {}
    for name in SCHEDULES:
        run, checkpoints = Run(name), {}
        for step in range(1, STEPS + 1):
            run.step(1)
            if step in CUTS:
                checkpoints[step] = run.checkpoint()
        found[name] = run.bits(), checkpoints
    return found


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("name", SCHEDULES)
def test_a_stopped_run_continues_bit_for_bit(name, cut, whole):
    bits, checkpoints = whole[name]
    again = Run(name)
    again.load(checkpoints[cut], order=1 if cut % 2 else -1)
    assert again.done == cut
    again.step(STEPS - cut)
    assert again.bits() == bits


def test_the_runs_differ_and_their_p_moves(whole):
    tracks = {name: tuple(map(tuple, seen)) for name, ((_, seen, _, _), _) in whole.items()}
    assert len(set(tracks.values())) == len(tracks)
    for name, track in tracks.items():
        assert len({row[0] for row in track}) > 2, name


@pytest.mark.parametrize("cut", [3, 5, 6, 12])
def test_a_measurement_that_waits_for_the_next_epoch_is_not_lost(cut):
    """``p`` steps every 8 optimizer steps, and the monitor measures every 5: a cut may lie between the two."""
    uncut = Run("anisotropy", per=8)
    uncut.step(cut)
    saved = uncut.checkpoint()
    uncut.step(STEPS - cut)
    again = Run("anisotropy", per=8)
    again.load(saved)
    again.step(STEPS - cut)
    assert again.bits() == uncut.bits()
    assert [choice.step for choice in again.p.history] == [1, 2]


def test_stopped_twice_it_is_one_run_in_the_file(tmp_path):
    def numbers(path):
        with RunStore(path, readonly=True) as store:
            assert len(store.runs()) == 1
            found = [store.scalars(f"schedule/anisotropy_p/{key}") for key in ("a", "p/0", "p/1")]
            return [(series.steps.tolist(), series.values.tolist()) for series in found]

    uncut = Run("anisotropy", tmp_path / "whole.db")
    uncut.step(STEPS)
    uncut.monitor.close()
    run = Run("anisotropy", tmp_path / "cut.db")
    for cut in (6, 12):
        run.step(cut - run.done)
        saved = run.checkpoint()
        run.step(4)  # which the crash takes back
        run.monitor.close()
        run = Run("anisotropy", tmp_path / "cut.db")
        run.load(saved)
    run.step(STEPS - run.done)
    assert run.bits() == uncut.bits()
    run.monitor.close()
    found = numbers(tmp_path / "whole.db")
    assert found[0][0] == [5, 10, 15]
    assert numbers(tmp_path / "cut.db") == found
