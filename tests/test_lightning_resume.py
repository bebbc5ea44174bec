"""Checkpoints of a Lightning training hold the callback's state, and curvdiag's schedules are stepped by it."""

from __future__ import annotations

import pytest
import torch
from lightning_runs import FAST, fingerprint, fit, loader, module, package, same, trainer
from torch import nn
from torch.optim import lr_scheduler

from curvdiag import Objective
from curvdiag.errors import ArgumentError, CurvdiagWarning
from curvdiag.integrations.lightning import CurvatureCallback
from curvdiag.loaders import first_batches
from curvdiag.optim import LPSGD
from curvdiag.record import RunStore
from curvdiag.schedules import AnisotropyP, CosineP, SharpnessCappedLR

pytestmark = pytest.mark.filterwarnings("ignore:measuring every")

SLOW_FALL = 40


@pytest.fixture(scope="module")
def pl():
    return package()


def plain(pl, optimizers):
    """No dropout: where training draws no random numbers Lightning itself resumes bit for bit."""
    net = module(pl, optimizers)
    net.net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    generator = torch.Generator().manual_seed(1)
    for parameter in net.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) / 3
    return net


def lpsgd(net):
    return LPSGD(net.parameters(), lr=0.02, p=6.0)


def sgd(net):
    return torch.optim.SGD(net.parameters(), lr=0.3)


def adamw(net):
    return torch.optim.AdamW(net.parameters(), lr=1e-2)


def p_schedules(optimizer, monitor):
    top = optimizer.param_groups[0]["p"]  # of the training's beginning, in a resumed one as well
    return [AnisotropyP(optimizer, monitor, top, smoothing=0.7), CosineP(optimizer, epochs=SLOW_FALL)]


def capped(optimizer, monitor):
    warm_up = lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 10))
    return SharpnessCappedLR(warm_up, monitor, fraction=0.02)


def reader(net, trainer):
    return Objective(net.net, nn.CrossEntropyLoss(), first_batches(trainer.train_dataloader, 4))


CASES = {
    "none": (adamw, None, {"preset": "light", "warm": False}),  # a warm start is not in a checkpoint
    "p": (lpsgd, p_schedules, {"preset": "standard", "steps": 12}),
    "lr": (sgd, capped, {"preset": "light"}),
}


def run(pl, case, store, *, steps, ckpt_path=None, save=None):
    """``save`` is the checkpoint that Lightning writes after the last step."""
    optimizers, schedules, options = CASES[case]
    callback = CurvatureCallback(reader, store, schedules=schedules, every=3, probes=1, **options)
    callbacks, limits = [callback], {"max_epochs": -1, "max_steps": steps}
    if save is not None:
        keep = {"dirpath": save.parent, "filename": save.stem, "every_n_train_steps": steps}
        callbacks.append(pl.callbacks.ModelCheckpoint(**keep))
        limits["enable_checkpointing"] = True
    net = plain(pl, optimizers)
    made, _ = fit(pl, callbacks, net, loader(shuffle=False), ckpt_path=ckpt_path, **limits)
    return callback, made, net


def recorded(path):
    with RunStore(path, readonly=True) as store:
        assert len(store.runs()) == 1
        names = [name for name in store.scalar_names() if not name.startswith(("curv/cost", "curv/overhead"))]
        found = {}
        for name in names:
            series = store.scalars(name)
            found[name] = [series.steps.tolist(), [repr(float(value)) for value in series.values]]
        return found


@pytest.mark.parametrize("case", CASES)
def test_a_resumed_training_is_the_uninterrupted_one_to_the_last_bit(pl, case, tmp_path):
    whole, made, net = run(pl, case, tmp_path / "whole.db", steps=20)
    run(pl, case, tmp_path / "parts.db", steps=8, save=tmp_path / "half.ckpt")
    resumed, *again = run(pl, case, tmp_path / "parts.db", steps=20, ckpt_path=tmp_path / "half.ckpt")
    assert whole.monitor.steps_done == resumed.monitor.steps_done == 20
    assert same(fingerprint(made, net), fingerprint(*again))
    one, other = recorded(tmp_path / "whole.db"), recorded(tmp_path / "parts.db")
    assert one == other
    assert one["curv/hessian/lambda_max"][0] == [3, 6, 9, 12, 15, 18]


def test_a_monitored_checkpoint_finds_its_number_in_a_resumed_training_that_has_not_measured_yet(pl, tmp_path):
    def training(epochs, folder, **options):
        best = pl.callbacks.ModelCheckpoint(folder, monitor="curv/hessian/lambda_max", mode="min")
        watched = CurvatureCallback(reader, cadence=lambda step: step == 4, **FAST)
        made = trainer(pl, [watched, best], max_epochs=epochs, enable_checkpointing=True, num_sanity_val_steps=0)
        made.fit(plain(pl, adamw), loader(shuffle=False), loader(shuffle=False), **options)
        return best, watched

    first, watched = training(1, tmp_path / "first")
    second, again = training(2, tmp_path / "second", ckpt_path=first.best_model_path)
    assert again.monitor.history == []
    expected = watched.monitor.latest["curv/hessian/lambda_max"]
    assert float(first.best_model_score) == float(second.best_model_score) == pytest.approx(expected)


def test_a_checkpoint_of_one_package_resumes_in_the_other(tmp_path):
    run(package("pytorch_lightning"), "p", tmp_path / "run.db", steps=8, save=tmp_path / "half.ckpt")
    resumed, *_ = run(package(), "p", tmp_path / "run.db", steps=12, ckpt_path=tmp_path / "half.ckpt")
    assert resumed.monitor.steps_done == 12
    assert recorded(tmp_path / "run.db")["curv/hessian/lambda_max"][0] == [3, 6, 9, 12]


def test_schedules_are_stepped_at_every_step_and_what_they_choose_is_recorded(pl, tmp_path):
    made_by = []

    def schedules(optimizer, monitor):
        made_by.append((optimizer, monitor))
        return p_schedules(optimizer, monitor)

    optimizers, _, options = CASES["p"]
    callback = CurvatureCallback(reader, tmp_path / "run.db", schedules=schedules, every=3, **options)
    made, _ = fit(pl, [callback], plain(pl, optimizers), loader(shuffle=False), accumulate_grad_batches=2)
    anisotropy, cosine = callback.schedules
    assert made_by == [(made.optimizers[0], callback.monitor)]
    assert anisotropy.last_epoch == cosine.last_epoch == 8
    assert len(anisotropy.history) == 2
    with RunStore(tmp_path / "run.db", readonly=True) as store:
        assert store.scalars("schedule/anisotropy_p/p/0").steps.tolist() == [3, 6]
        assert store.scalars("schedule/cosine_p/p/0").steps.tolist() == [3, 6]
        chosen = store.scalars("schedule/cosine_p/p/0").values
        # What the optimizer steps with next; the cosine begins at one and its factor multiplies that of the anisotropy.
        assert 2 < chosen[1] < chosen[0] < 6
    assert made.optimizers[0].param_groups[0]["p"] == pytest.approx(anisotropy.get_last_p()[0], abs=0.1)


def test_training_goes_as_in_a_loop_of_ones_own_with_the_same_schedule(pl):
    """The oracle is the loop that curvdiag.schedules documents: step, measure, schedule."""
    from curvdiag.monitor import CurvatureMonitor

    callback = CurvatureCallback(reader, schedules=p_schedules, every=3, probes=1, steps=12)
    _, net = fit(pl, [callback], plain(pl, lpsgd), loader(shuffle=False))
    other = plain(pl, lpsgd)
    optimizer = lpsgd(other)
    objective = Objective(other.net, nn.CrossEntropyLoss(), first_batches(loader(shuffle=False), 4))
    monitor = CurvatureMonitor(objective, every=3, probes=1, steps=12).attach(optimizer)
    schedules = p_schedules(optimizer, monitor)
    for _ in range(2):
        for inputs, targets in loader(shuffle=False):
            optimizer.zero_grad()
            nn.functional.cross_entropy(other(inputs), targets).backward()
            optimizer.step()
            for schedule in schedules:
                schedule.step()
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), other.parameters(), strict=True))


def test_two_schedules_of_the_learning_rate_are_warned_about(pl):
    def optimizers(net):
        return [optimizer := sgd(net)], [lr_scheduler.ExponentialLR(optimizer, 0.9)]

    callback = CurvatureCallback(reader, schedules=capped, every=3, **FAST)
    with pytest.warns(
        CurvdiagWarning, match="ExponentialLR of configure_optimizers and SharpnessCappedLR of schedules="
    ):
        fit(pl, [callback], plain(pl, optimizers), max_epochs=1)


def test_probe_batches_are_the_same_in_a_resumed_process_though_the_loader_shuffles(pl):
    found = []

    def objective(net, trainer):
        made = reader(net, trainer)
        found.append(torch.cat([batch[0] for batch in made.batches]))
        return made

    for seed in (1, 2):
        fit(pl, [CurvatureCallback(objective, every=100, **FAST)], seed=seed, max_epochs=1)
    assert torch.equal(*found)
    assert not torch.equal(found[0], loader().dataset.tensors[0][:32])  # shuffled it is


def test_other_schedules_than_the_checkpoint_holds_are_refused_by_name(pl, tmp_path):
    run(pl, "p", None, steps=3, save=tmp_path / "half.ckpt")
    callback = CurvatureCallback(reader, schedules=lambda o, m: CosineP(o, 40), every=3, **FAST)
    with pytest.raises(ArgumentError, match=r"\['AnisotropyP', 'CosineP'\], and schedules= made \['CosineP'\]"):
        fit(pl, [callback], plain(pl, lpsgd), max_epochs=3, ckpt_path=tmp_path / "half.ckpt")
