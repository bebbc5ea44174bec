"""What else a Trainer does with a callback: loggers, interruptions, second fits, validation, and what is refused."""

from __future__ import annotations

import copy
import csv
import pickle
import signal
import subprocess
import sys

import pytest
import torch
from lightning_runs import FAST, dataset, fit, loader, module, package, trainer
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset

from curvdiag import Objective
from curvdiag.errors import ArgumentError, CurvdiagWarning, DataError, MissingExtraError, NotDeterministicError
from curvdiag.integrations.lightning import CurvatureCallback
from curvdiag.loaders import first_batches
from curvdiag.record import RunStore
from curvdiag.sandbox import random_fingerprint

pytestmark = pytest.mark.filterwarnings("ignore:measuring every")

LAMBDA = "curv/hessian/lambda_max"


@pytest.fixture(scope="module")
def pl():
    return package()


def written(logger):
    """The rows of a CSVLogger's file, each with what it has a value for."""
    with open(logger.experiment.metrics_file_path, newline="") as file:
        return [{key: value for key, value in row.items() if value} for row in csv.DictReader(file)]


def test_a_csv_logger_shows_the_numbers_at_the_steps_of_its_own_axis(pl, tmp_path):
    logger = pl.loggers.CSVLogger(tmp_path)
    callback = CurvatureCallback(every=4, **FAST)
    made, _ = fit(pl, [callback], logger=logger, log_every_n_steps=1)
    rows = written(logger)
    seen = {int(row["step"]): float(row[LAMBDA]) for row in rows if LAMBDA in row}
    assert seen == {found.step: found[LAMBDA] for found in callback.monitor.history}
    assert list(seen) == [4, 8, 12, 16]
    assert len([row for row in rows if "train_loss" in row]) == 16  # none from the steps of measurements
    assert not any("train/loss" in row for row in rows)
    assert float(made.callback_metrics[LAMBDA]) == pytest.approx(seen[16])


def test_log_false_sends_nothing(pl, tmp_path):
    logger = pl.loggers.CSVLogger(tmp_path)
    made, _ = fit(pl, [CurvatureCallback(every=4, log=False, **FAST)], logger=logger, log_every_n_steps=1)
    assert not any(key.startswith("curv") for row in written(logger) for key in row)
    assert LAMBDA not in made.callback_metrics


def test_a_logger_that_fails_is_dropped_with_one_warning(pl, tmp_path):
    logger = pl.loggers.CSVLogger(tmp_path)
    write = logger.log_metrics

    def fail(metrics, step=None):
        if LAMBDA in metrics:
            raise OSError("disk full")
        write(metrics, step)

    logger.log_metrics = fail
    callback = CurvatureCallback(every=4, **FAST)
    with pytest.warns(CurvdiagWarning, match="CSVLogger failed and gets no more curvature: OSError: disk full") as seen:
        fit(pl, [callback], logger=logger)
    assert len([one for one in seen if "disk full" in str(one.message)]) == 1
    assert len(callback.monitor.history) == 4


def test_what_training_step_writes_elsewhere_is_not_written_by_measurements(pl, tmp_path):
    def step(net, batch, index):
        net.calls += 1
        net.outputs.append(index)
        net.logger.log_metrics({"mine": 1.0})
        net.log_dict({"a": 1.0}, prog_bar=True)
        return F.cross_entropy(net(batch[0]), batch[1])

    logger = pl.loggers.CSVLogger(tmp_path)
    net = module(pl, step=step, calls=0, outputs=[])
    fit(pl, [CurvatureCallback(every=1, **FAST)], net, logger=logger, max_epochs=1)
    assert net.calls == len(net.outputs) == 8
    assert len([row for row in written(logger) if "mine" in row]) == 8
    assert not {"log", "log_dict", "all_gather"} & set(vars(net))


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_interrupted_training_leaves_a_closed_file_with_what_was_measured(pl, error, tmp_path):
    def step(net, batch, index):
        if index == 6 and net.training:
            raise error("stop")
        return F.cross_entropy(net(batch[0]), batch[1])

    handler = signal.getsignal(signal.SIGINT)
    callback = CurvatureCallback(store=tmp_path / "run.db", every=3, **FAST)
    with pytest.raises((ValueError, SystemExit)):
        fit(pl, [callback], module(pl, step=step))
    signal.signal(signal.SIGINT, handler)
    assert callback.monitor.closed
    assert [file.name for file in tmp_path.iterdir()] == ["run.db"]
    with RunStore(tmp_path / "run.db", readonly=True) as store:
        assert store.scalars(LAMBDA).steps.tolist() == [3, 6]


def test_a_failed_measurement_is_an_event_and_training_goes_on(pl, tmp_path):
    def step(net, batch, index):
        if not net.training and net.trainer.global_step > 0:
            raise RuntimeError("no loss today")
        return F.cross_entropy(net(batch[0]), batch[1])

    callback = CurvatureCallback(store=tmp_path / "run.db", every=3, **FAST)
    with pytest.warns(CurvdiagWarning, match="no loss today"):
        made, _ = fit(pl, [callback], module(pl, step=step))
    assert made.global_step == 16
    with RunStore(tmp_path / "run.db", readonly=True) as store:
        assert any("no loss today" in event.message for event in store.events())


def test_a_fit_that_goes_on_continues_the_run_and_a_new_one_begins_another(pl, tmp_path):
    callback = CurvatureCallback(store=tmp_path / "run.db", every=4, **FAST)
    made, net = fit(pl, [callback], max_epochs=1)
    made.fit_loop.max_epochs = 2
    made.fit(net, loader())
    assert callback.monitor.steps_done == 16
    fit(pl, [callback], max_epochs=1)
    made.fit(net, loader())  # nothing is left to train
    with RunStore(tmp_path / "run.db", readonly=True) as store:
        assert store.scalars(LAMBDA, 1).steps.tolist() == [4, 8, 12, 16]
        assert store.scalars(LAMBDA, 2).steps.tolist() == [4, 8]
        assert len(store.runs()) == 2


def test_validate_and_test_without_fit_and_sanity_checks_do_nothing(pl, tmp_path):
    callback = CurvatureCallback(store=tmp_path / "run.db", every=4, **FAST)
    made = trainer(pl, [callback], num_sanity_val_steps=2)
    net = module(pl)
    made.validate(net, loader(shuffle=False), verbose=False)
    made.predict(net, DataLoader(torch.randn(8, 6), batch_size=4))
    assert callback.monitor is None
    assert callback.state_dict() == {}
    assert list(tmp_path.iterdir()) == []
    made.fit(net, loader(), loader(shuffle=False))
    assert callback.monitor.steps_done == 16


def test_fast_dev_run_writes_no_file(pl, tmp_path):
    callback = CurvatureCallback(store=tmp_path / "run.db", every=1, **FAST)
    fit(pl, [callback], fast_dev_run=2)
    assert len(callback.monitor.history) == 2
    assert list(tmp_path.iterdir()) == []


def test_a_callback_can_be_copied_and_sent_to_another_process(pl):
    callback = CurvatureCallback(every=4, name="a", **FAST)
    fit(pl, [callback], max_epochs=1)
    for twin in (copy.deepcopy(callback), pickle.loads(pickle.dumps(callback))):
        assert isinstance(twin, pl.Callback)
        assert isinstance(twin, CurvatureCallback)
        assert twin.monitor is None
        assert twin.state_key == callback.state_key
        assert len(fit(pl, [twin], max_epochs=1)[0].callbacks) >= 1
        assert twin.monitor.steps_done == 8


def test_two_callbacks_with_names_of_their_own_stand_side_by_side(pl):
    one, two = CurvatureCallback(every=4, name="one", **FAST), CurvatureCallback(every=8, name="two", **FAST)
    fit(pl, [one, two], max_epochs=1)
    assert (len(one.monitor.history), len(two.monitor.history)) == (2, 1)


def test_a_missing_package_is_named_with_the_pip_command(monkeypatch):
    for name in list(sys.modules):
        if name.split(".")[0] in ("lightning", "pytorch_lightning"):
            monkeypatch.delitem(sys.modules, name)
    for name in ("lightning", "pytorch_lightning"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingExtraError, match=r"lightning is not installed.*pip install 'curvdiag\[lightning\]'"):
        CurvatureCallback()


def test_importing_the_callback_imports_no_framework():
    code = (
        "import sys, curvdiag.integrations.lightning; print({n.split('.')[0] for n in sys.modules if 'lightning' in n})"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said.strip() == "{'curvdiag'}"


# What is refused, before the first step


def refused(pl, match, callback, net=None, error=ArgumentError, **options):
    with pytest.raises(error, match=match):
        fit(pl, [callback], net, **options)
    assert callback.monitor is None


def test_a_sharded_strategy_is_refused(pl):
    class FSDPStrategy(pl.strategies.SingleDeviceStrategy):
        pass

    callback = CurvatureCallback(every=4, **FAST)
    refused(
        pl, "under FSDPStrategy, which gives each process a part", callback, strategy=FSDPStrategy("cpu"), devices=1
    )


def test_an_objective_of_another_model_is_refused(pl):
    stranger = Objective(module(pl).net, nn.CrossEntropyLoss(), dataset().tensors)
    refused(pl, "the objective is of another model than the one that the Trainer trains", CurvatureCallback(stranger))


def test_manual_optimization_needs_an_objective(pl):
    net = module(pl, automatic_optimization=False)
    refused(pl, "optimizes by hand.*objective=lambda module, trainer", CurvatureCallback(**FAST), net)


def test_a_step_that_draws_random_numbers_is_refused(pl):
    def step(net, batch, index):
        return F.cross_entropy(net(batch[0] + torch.randn_like(batch[0])), batch[1])

    with pytest.raises(NotDeterministicError, match="draws random numbers"):
        fit(pl, [CurvatureCallback(**FAST)], module(pl, step=step))


def test_reading_probe_batches_leaves_the_loader_and_all_random_states_as_they_were():
    own = torch.Generator().manual_seed(1)
    sampler = DistributedSampler(dataset(), num_replicas=2, rank=1, seed=4)
    sampler.set_epoch(5)
    for data in (loader(generator=own), loader(shuffle=False, sampler=sampler)):
        walking = iter(data)
        next(walking)
        before = random_fingerprint(), own.get_state().tolist(), sampler.epoch
        found = first_batches(data, 3)
        assert len(found) == 3
        assert (random_fingerprint(), own.get_state().tolist(), sampler.epoch) == before
        assert len(list(walking)) == len(data) - 1
        own.manual_seed(2)
        sampler.set_epoch(9)
        assert all(torch.equal(a[0], b[0]) for a, b in zip(found, first_batches(data, 3), strict=True))


def test_data_that_reading_would_take_from_the_training_is_refused(pl):
    class Stream(IterableDataset):
        def __iter__(self):
            raise AssertionError("it was touched")

        def __next__(self):
            raise AssertionError("it was read")

    with pytest.raises(DataError, match="Stream is its own iterator"):
        first_batches(DataLoader(Stream()), 2)
    refused(pl, "batches of a dict cannot be read", CurvatureCallback(**FAST), data={"a": loader()})


@pytest.mark.parametrize(
    ("objective", "match"),
    [
        (lambda net, made: nn.Linear(1, 1), "returns an Objective, not Linear"),
        (nn.Linear(1, 1), "not a Linear"),
        ("run.db", "not a str; the run file is store="),
    ],
)
def test_an_objective_that_is_none_is_refused(pl, objective, match):
    with pytest.raises(ArgumentError, match=match):
        fit(pl, [CurvatureCallback(objective, **FAST)])


def test_a_number_of_an_optimizer_that_is_not_there_is_refused(pl):
    refused(pl, "optimizer=1, and the module has 1", CurvatureCallback(optimizer=1, **FAST))


def test_without_an_optimizer_nothing_is_measured_and_that_is_said(pl):
    callback = CurvatureCallback(every=1, **FAST)
    with pytest.warns(CurvdiagWarning, match="no optimizer whose steps"):
        fit(pl, [callback], module(pl, optimizers=lambda net: None))
    assert callback.monitor is None


def test_schedules_that_are_none_are_refused_and_the_file_is_closed(pl, tmp_path):
    callback = CurvatureCallback(store=tmp_path / "run.db", schedules=lambda o, m: [object()], **FAST)
    refused(pl, "object has no step and no state_dict", callback)
    assert [file.name for file in tmp_path.iterdir()] in ([], ["run.db"])


def test_objectives_of_ones_own_are_kept(pl):
    net = module(pl)
    objective = Objective(net.net, nn.CrossEntropyLoss(), dataset().tensors)
    callback = CurvatureCallback(objective, every=8, **FAST)
    fit(pl, [callback], net, max_epochs=1)
    assert callback.monitor.objective is objective
