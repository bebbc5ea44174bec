"""What the monitor counts, records and carries over a restart."""

from __future__ import annotations

import io
import math

import pytest
import torch
from nets import Drop, make, vectors
from oracles import criterion_loss, dense_hessian
from torch.nn import functional as F

from curvdiag import CurvatureMonitor, Estimate, Every, LogSpaced, Objective, OverheadBudget, RunStore
from curvdiag.errors import ArgumentError, CurvdiagWarning
from curvdiag.optim import LPSGDM
from curvdiag.spectrum import MEASURES

pytestmark = pytest.mark.filterwarnings("ignore:measuring every")


class Training:
    """A tiny training run that can be stepped."""

    def __init__(self, make_optimizer=lambda p: torch.optim.SGD(p, lr=0.1), dtype=torch.float64):
        self.model, self.batch = make("mlp-tanh", dtype=dtype)
        self.optimizer = make_optimizer(self.model.parameters())

    def monitor(self, *args, **options):
        objective = Objective(self.model, F.cross_entropy, self.batch)
        return CurvatureMonitor(objective, *args, **{"steps": 6, "probes": 2, **options})

    def loss(self):
        inputs, targets = self.batch
        return F.cross_entropy(self.model(inputs), targets)

    def step(self, times=1):
        for _ in range(times):
            self.optimizer.zero_grad()
            loss = self.loss()
            loss.backward()
            self.optimizer.step()
        return loss


def steps_of(monitor):
    return [m.step for m in monitor.history]


# Counting steps


def test_it_counts_and_measures_after_the_steps_of_the_optimizer():
    training = Training()
    monitor = training.monitor(every=3).attach(training.optimizer)
    training.step(10)
    assert monitor.steps_done == 10
    assert steps_of(monitor) == [3, 6, 9]
    assert monitor.latest is monitor.history[-1]
    monitor.detach()
    training.step(5)
    assert monitor.steps_done == 10
    assert len(monitor.history) == 3
    monitor.attach(training.optimizer)
    training.step(2)
    assert steps_of(monitor) == [3, 6, 9, 12]


def test_any_function_of_the_step_is_a_cadence():
    training = Training()
    asked = []
    monitor = training.monitor(cadence=lambda step: asked.append(step) or step in (1, 2, 5))
    monitor.attach(training.optimizer)
    training.step(6)
    assert steps_of(monitor) == [1, 2, 5]
    assert asked == [1, 2, 3, 4, 5, 6]


def test_log_spaced_in_a_run():
    training = Training()
    monitor = training.monitor(cadence=LogSpaced(2), preset="light").attach(training.optimizer)
    training.step(12)
    assert steps_of(monitor) == [1, 3, 10]


def test_attaching_twice_is_refused():
    training = Training()
    monitor = training.monitor(every=2).attach(training.optimizer)
    for optimizer in (training.optimizer, torch.optim.SGD(training.model.parameters(), lr=0.1)):
        with pytest.raises(ArgumentError, match="detach"):
            monitor.attach(optimizer)
    training.step(2)
    assert monitor.steps_done == 2


def test_a_loop_may_call_step_itself():
    training = Training()
    monitor = training.monitor(every=2)
    results = []
    for _ in range(5):
        loss = training.step()
        results.append(monitor.step(loss))
    assert [r is not None for r in results] == [False, True, False, True, False]
    assert results[3] is monitor.latest
    assert monitor.latest.scalars["train/loss"] > 0


def test_measure_at_will_counts_no_step():
    training = Training()
    monitor = training.monitor(cadence=lambda step: False).attach(training.optimizer)
    assert monitor.measure().step == 0
    training.step(4)
    assert monitor.measure().step == 4
    assert monitor.steps_done == 4


def test_lbfgs_counts_one_step_however_many_closures():
    training = Training(lambda p: torch.optim.LBFGS(p, lr=0.5, max_iter=7))
    monitor, closures = training.monitor(every=2).attach(training.optimizer), []

    def closure():
        closures.append(1)
        training.optimizer.zero_grad()
        loss = training.loss()
        loss.backward()
        return loss

    for _ in range(3):
        training.optimizer.step(closure)
    assert len(closures) > 6
    assert monitor.steps_done == 3
    assert steps_of(monitor) == [2]


@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize(
    "make_optimizer",
    [
        lambda p: torch.optim.SGD(p, lr=0.1),
        lambda p: torch.optim.AdamW(p, lr=0.01, foreach=True),
        lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
        lambda p: torch.optim.SGD(p, lr=0.1, fused=True),
    ],
    ids=["plain", "foreach", "fused", "fused-sgd"],
)
def test_a_step_that_grad_scaler_skips_is_not_counted(make_optimizer, unscale):
    training = Training(make_optimizer, dtype=torch.float32)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    monitor = training.monitor(every=1, preset="light").attach(training.optimizer)
    moved = []
    for step in range(6):
        before = training.model[0].weight.detach().clone()
        training.optimizer.zero_grad()
        scaler.scale(training.loss() * (math.inf if step in (0, 3) else 1.0)).backward()
        if unscale:
            scaler.unscale_(training.optimizer)
        scaler.step(training.optimizer)
        scaler.update()
        moved.append(not torch.equal(before, training.model[0].weight))
        assert monitor.steps_done == sum(moved)
    assert moved == [False, True, True, False, True, True]
    assert steps_of(monitor) == [1, 2, 3, 4]


def test_a_with_statement_detaches_and_closes(tmp_path):
    training = Training()
    with training.monitor(tmp_path / "run.db", every=2) as monitor:
        monitor.attach(training.optimizer)
        training.step(4)
    assert not training.optimizer._optimizer_step_post_hooks
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run.db"]
    with pytest.raises(KeyError), training.monitor(tmp_path / "run.db", every=2) as monitor:
        monitor.attach(training.optimizer)
        raise KeyError("an error of the user's own")
    assert not training.optimizer._optimizer_step_post_hooks
    monitor.close()  # harmless when repeated


def test_a_store_of_the_users_own_stays_open(tmp_path):
    training = Training()
    with RunStore(tmp_path / "run.db") as store:
        for name in ("one", "two"):
            with training.monitor(store, name=name, every=2) as monitor:
                monitor.attach(training.optimizer)
                training.step(2)
        assert [(r.name, r.measurements) for r in store.runs()] == [("one", 1), ("two", 1)]


# What is measured


def test_each_measurement_is_of_the_weights_at_its_step():
    training = Training()
    monitor = training.monitor(every=2, tol=1e-8, preset="light", probes=40).attach(training.optimizer)
    truths = {}
    for step in range(1, 7):
        training.step()
        truths[step] = dense_hessian(training.model, criterion_loss(F.cross_entropy, training.batch))
    assert steps_of(monitor) == [2, 4, 6]
    for one in monitor.history:
        eigenvalues = torch.linalg.eigvalsh(truths[one.step])
        assert one["curv/hessian/lambda_max"] == pytest.approx(float(eigenvalues[-1]), rel=1e-8)
        trace = one.scalars["curv/hessian/trace"]
        assert abs(trace.value - float(eigenvalues.sum())) < 5 * trace.standard_error
    assert len({one["curv/hessian/lambda_max"] for one in monitor.history}) == 3


def test_layers_are_the_diagonal_blocks():
    training = Training()
    one = training.monitor(preset="full", tol=1e-8, steps=25, probes=30).measure()
    truth = dense_hessian(training.model, criterion_loss(F.cross_entropy, training.batch))
    start = 0
    for layer in ("0", "2", "4"):
        size = sum(p.numel() for p in training.model[int(layer)].parameters())
        block = torch.linalg.eigvalsh(truth[start : start + size, start : start + size])
        start += size
        assert one[f"curv/layer/{layer}/lambda_max"] == pytest.approx(float(block[-1]), rel=1e-7)
        trace = one.scalars[f"curv/layer/{layer}/trace"]
        assert abs(trace.value - float(block.sum())) < 5 * trace.standard_error
        assert one.densities["hessian", layer].size == size
    assert start == len(truth)


def test_weights_replaced_in_the_middle_of_a_run_are_the_ones_measured():
    training = Training()
    monitor = training.monitor(tol=1e-8, preset="light", cadence=lambda step: False).attach(training.optimizer)
    training.step(2)
    assert monitor.measure() is not None
    other, _ = make("mlp-tanh", seed=9)
    training.model.load_state_dict(other.state_dict(), assign=True)
    truth = dense_hessian(other, criterion_loss(F.cross_entropy, training.batch))
    measured = monitor.measure()["curv/hessian/lambda_max"]
    assert measured == pytest.approx(float(torch.linalg.eigvalsh(truth)[-1]), rel=1e-8)


# What is recorded

BASE = {"curv/hessian/lambda_max", "curv/hessian/lambda_max_residual", "curv/hessian/trace"}
ALWAYS = {"curv/cost/seconds", "curv/cost/gradients", "curv/cost/matvecs", "curv/overhead"}
STANDARD = {"curv/hessian/lambda_min", "curv/hessian/frobenius_norm"}
NOISE = {"noise/scale", "noise/scale_curvature", "noise/trace", "noise/cwgd", "noise/gradient_square"}
NOISE |= {f"noise/gradient_{name}" for name in ("square_probe", "curvature", "curvature_probe")} | {"noise/trace_hc"}
NOISE |= {f"align/{name}{end}" for name in ("cosine", "commutator") for end in ("", "_baseline")}
OPTIMIZER = {"train/lr/0", "train/momentum/0", "train/loss"}


@pytest.mark.parametrize("preset", ["light", "standard", "full"])
def test_the_keys_of_the_table_are_there(preset, tmp_path):
    training = Training()
    with training.monitor(tmp_path / "run.db", every=1, preset=preset, steps_per_epoch=4) as monitor:
        monitor.attach(training.optimizer)
        for _ in range(3):
            monitor.observe_loss(1.25)
            training.step()
        expected = BASE | ALWAYS | OPTIMIZER
        if preset != "light":
            expected = expected | STANDARD | {f"curv/anisotropy/{name}" for name in MEASURES}
            expected.remove("curv/anisotropy/condition_number")  # this Hessian is indefinite
        if preset == "full":
            expected |= {f"curv/layer/{name}/{what}" for name in "024" for what in ("lambda_max", "trace")}
            expected |= NOISE
        assert set(monitor.latest.scalars) == expected
        blocks = {"light": [], "standard": [""], "full": ["", "0", "2", "4"]}[preset]
        assert sorted(block for _, block in monitor.latest.densities) == blocks

    with RunStore(tmp_path / "run.db", readonly=True) as store:
        assert set(store.scalar_names()) == expected
        for key in expected:
            series = store.scalars(key)
            assert series.steps.tolist() == [1, 2, 3]
            assert series.epochs.tolist() == [0.25, 0.5, 0.75]
            assert series.values.tolist() == [m[key] for m in monitor.history]
            for error, one in zip(series.standard_errors, monitor.history, strict=True):
                value = one.scalars[key]
                assert not isinstance(value, Estimate) or error == value.standard_error
        for block in blocks:
            stored = store.densities("hessian", block).densities
            for one, mine in zip(stored, monitor.history, strict=True):
                assert (one.nodes == mine.densities["hessian", block].nodes).all()
                assert (one.weights == mine.densities["hessian", block].weights).all()
        times = store.scalars("curv/overhead").times
        assert (times[1:] > times[:-1]).all()


def test_a_measure_is_recorded_where_it_has_a_value():
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 1, bias=False)
    inputs = torch.randn(8, 3)
    monitor = CurvatureMonitor(Objective(model, F.mse_loss, (inputs, torch.zeros(8, 1))), steps=6, probes=2)
    eigenvalues = torch.linalg.eigvalsh(2 * inputs.T @ inputs / 8)
    measured = monitor.measure()["curv/anisotropy/condition_number"]
    assert measured == pytest.approx(float(eigenvalues[-1] / eigenvalues[0]), rel=1e-3)


def test_the_table_of_keys_in_the_docstring_is_complete():
    training = Training(lambda p: torch.optim.Adam(p))
    monitor = training.monitor(preset="full").attach(training.optimizer)
    monitor.observe_loss(1.0)
    table = CurvatureMonitor.__doc__
    for key in monitor.measure().scalars:
        room, kind, *rest = key.split("/")
        names = [kind] if kind in ("lr", "momentum", "loss", "anisotropy", "overhead") else [kind, *rest[-1:]]
        for name in (room, *names):
            assert name.removeprefix("lambda_max") in table, key
        assert room not in ("noise", "align") or f"/{kind}``" in table or f"``{kind}``" in table, key


def test_costs_and_the_first_notes():
    training = Training()
    monitor = training.monitor(preset="standard")
    first, second = monitor.measure(), monitor.measure()
    assert any("gradients" in note and " s" in note for note in first.notes)
    assert not any("gradients" in note for note in second.notes)
    for one in (first, second):
        assert one["curv/cost/seconds"] == one.seconds > 0
        assert one["curv/cost/gradients"] > 1
        assert one["curv/cost/matvecs"] >= 6 * 2
        assert 0 < one["curv/overhead"] <= 1


def test_lr_momentum_and_p_of_each_group():
    model, batch = make("mlp-tanh")
    optimizer = torch.optim.SGD(
        [
            {"params": model[0].parameters(), "lr": 0.1, "name": "body"},
            {"params": model[2].parameters(), "lr": torch.tensor(0.02), "momentum": 0.0, "p": 1.5},
            {"params": model[4].parameters(), "lr": 1, "p": torch.tensor([4.0])},
        ],
        momentum=0.9,
    )
    monitor = CurvatureMonitor(Objective(model, F.cross_entropy, batch), preset="light").attach(optimizer)
    found = {k: v for k, v in monitor.measure().scalars.items() if k.startswith("train/")}
    expected = {
        "train/lr/body": 0.1,
        "train/lr/1": 0.02,
        "train/lr/2": 1.0,
        "train/momentum/body": 0.9,
        "train/momentum/1": 0.0,
        "train/momentum/2": 0.9,
        "train/p/1": 1.5,
        "train/p/2": 4.0,
    }
    assert found == pytest.approx(expected)
    assert all(type(value) is float for value in found.values())


@pytest.mark.parametrize(
    ("make_optimizer", "momentum"),
    [
        (lambda p: torch.optim.AdamW(p, lr=0.01, betas=(0.85, 0.99)), 0.85),
        (lambda p: torch.optim.Adam(p, lr=torch.tensor(0.01), betas=(torch.tensor(0.7), torch.tensor(0.9))), 0.7),
        (lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.3), 0.3),
        (lambda p: LPSGDM(p, lr=0.01, beta=0.6), 0.6),
        (lambda p: torch.optim.Adagrad(p, lr=0.01), None),
        (lambda p: torch.optim.Adafactor(p, lr=0.01), None),
        (lambda p: torch.optim.LBFGS(p, lr=0.01), None),
    ],
)
def test_momentum_or_the_first_beta(make_optimizer, momentum):
    training = Training(make_optimizer)
    monitor = training.monitor(preset="light").attach(training.optimizer)
    scalars = monitor.measure().scalars
    assert scalars["train/lr/0"] == pytest.approx(0.01)
    assert scalars.get("train/momentum/0") == (None if momentum is None else pytest.approx(momentum))


def test_an_optimizer_with_strange_groups_is_no_hindrance():
    training = Training()
    training.optimizer.param_groups[0].update(lr=None, momentum=None, betas=None, p="two", nesterov=True)
    monitor = training.monitor(preset="light").attach(training.optimizer)
    assert not any(key.startswith("train/") for key in monitor.measure().scalars)


def test_lr_is_the_one_that_the_step_used():
    training = Training(lambda p: torch.optim.SGD(p, lr=1.0))
    scheduler = torch.optim.lr_scheduler.ExponentialLR(training.optimizer, 0.5)
    monitor = training.monitor(every=1, preset="light").attach(training.optimizer)
    for _ in range(4):
        training.step()
        scheduler.step()
    assert [m["train/lr/0"] for m in monitor.history] == [1.0, 0.5, 0.25, 0.125]


def test_losses_as_numbers_and_tensors():
    training = Training()
    monitor = training.monitor(every=1, preset="light")
    loss = training.loss()
    for given, kept in ((0.5, 0.5), (loss, loss.item()), (loss[None], loss.item()), (None, loss.item()), (3, 3.0)):
        assert monitor.step(given)["train/loss"] == kept
    assert not monitor._loss or not isinstance(monitor._loss, torch.Tensor) or not monitor._loss.requires_grad
    monitor.observe_loss(float("nan"))
    assert math.isnan(monitor.measure()["train/loss"])


def test_a_loss_tensor_that_is_changed_later_is_recorded_as_it_was_given():
    training = Training()
    monitor = training.monitor(preset="light")
    loss = torch.tensor(2.0)
    monitor.observe_loss(loss)
    loss.zero_()  # an accumulator for logging, for instance
    assert monitor.measure()["train/loss"] == 2.0


def test_epochs_as_given_or_from_the_steps_of_one():
    training = Training()
    said = training.monitor(every=1, preset="light")
    assert said.step().epoch is None
    said.epoch(3)
    assert said.step().epoch == 3.0
    counted = training.monitor(every=1, preset="light", steps_per_epoch=4)
    assert [counted.step().epoch for _ in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.25]


def test_the_run_says_how_it_was_measured(tmp_path):
    training = Training()
    options = {"every": 7, "preset": "light", "seed": 3, "name": "mine", "config": {"lr": 0.1}}
    with training.monitor(tmp_path / "run.db", **options) as monitor:
        assert len(monitor.store.runs()) == 0  # a run begins with its first measurement
        monitor.measure()
        info = monitor.run.info
    assert info.name == "mine"
    assert info.config["lr"] == 0.1
    own = info.config["curvdiag"]
    assert (own["preset"], own["steps"], own["probes"], own["seed"]) == ("light", 6, 2, 3)
    assert "7" in own["cadence"]
    assert "Sequential" in own["objective"]


def test_densities_alone_draw_and_light_ones_say_why_not():
    training = Training()
    with pytest.raises(ArgumentError, match="light"):
        training.monitor(preset="light").measure().plot()


@pytest.mark.parametrize("options", [{"preset": "heavy"}, {"steps": 0}, {"probes": 0}])
def test_settings_that_mean_nothing_are_refused_at_once(options):
    with pytest.raises(ArgumentError):
        Training().monitor(**options)


def test_the_same_weights_give_the_same_numbers():
    """Probes are those of the seed at each measurement, so that curves show the model."""
    training = Training()
    monitor = training.monitor(preset="full")
    first, second = monitor.measure(), monitor.measure()
    for key in first.scalars:
        if key.startswith(("curv/hessian", "curv/layer", "curv/anisotropy")):
            assert first[key] == second[key], key
    other = training.monitor(preset="full", seed=1).measure()
    assert other["curv/hessian/trace"] != first["curv/hessian/trace"]


# Restarting


def checkpoint(*objects):
    """Through a file of plain data, as a careful user would."""
    file = io.BytesIO()
    torch.save([thing.state_dict() for thing in objects], file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("saved", ["during", "after"])
@pytest.mark.parametrize("cadence", [lambda: Every(2), lambda: OverheadBudget(0.99), lambda: LogSpaced(8)])
def test_a_restarted_run_goes_on_in_the_store(tmp_path, cadence, saved):
    path = tmp_path / "run.db"
    training = Training()
    with training.monitor(path, name="long one", cadence=cadence(), preset="light") as first:
        first.attach(training.optimizer)
        first.epoch(2)
        training.step(4)
        first.measure()
        state = checkpoint(first, training.model, training.optimizer)
        kept = [m.step for m in first.history]
        elapsed = first.clock.elapsed
        if saved == "during":
            training.step(5)  # beyond the checkpoint, and lost in a crash
            first.measure()
            assert first.run.info.last_step == 9
    if saved == "after":
        state[0] = checkpoint(first)[0]

    again = Training()
    again.model.load_state_dict(state[1])
    again.optimizer.load_state_dict(state[2])
    with again.monitor(path, cadence=cadence(), preset="light") as second:
        second.load_state_dict(state[0])
        second.attach(again.optimizer)
        assert second.steps_done == 4
        assert second.clock.elapsed >= first.clock.state_dict()["elapsed"] * (saved == "after") or elapsed
        assert second.clock.measuring == state[0]["clock"]["measuring"]
        again.step(3)
        measured = second.measure()
        assert measured.step == 7
        assert measured.epoch == 2.0
        assert measured["curv/overhead"] * second.clock.elapsed > state[0]["clock"]["measuring"]

    with RunStore(path, readonly=True) as store:
        (run,) = store.runs()
        assert run.name == "long one"
        series = store.scalars("curv/hessian/lambda_max")
        expected = sorted(set(kept) | {m.step for m in second.history})
        assert series.steps.tolist() == expected
        assert max(series.steps) == 7
        assert (series.times[1:] > series.times[:-1]).all()
        assert [e.kind for e in store.events() if e.kind != "note"] == ["resumed"]


def test_a_run_that_is_stopped_and_continued_measures_what_a_whole_one_does(tmp_path):
    whole = Training()
    straight = whole.monitor(every=2).attach(whole.optimizer)
    whole.step(8)

    training = Training()
    with training.monitor(tmp_path / "run.db", every=2) as first:
        first.attach(training.optimizer)
        training.step(5)
        state = checkpoint(first)
    with training.monitor(tmp_path / "run.db", every=2) as second:
        second.load_state_dict(state[0])
        second.attach(training.optimizer)
        training.step(3)
    with RunStore(tmp_path / "run.db", readonly=True) as store:
        for key in ("curv/hessian/lambda_max", "curv/hessian/trace", "curv/anisotropy/stable_rank", "train/lr/0"):
            series = store.scalars(key)
            assert series.steps.tolist() == [2, 4, 6, 8]
            assert series.values.tolist() == [m[key] for m in straight.history]


def test_a_checkpoint_from_before_the_first_measurement(tmp_path):
    training = Training()
    first = training.monitor(tmp_path / "run.db", every=100).attach(training.optimizer)
    training.step(3)
    state = checkpoint(first)
    first.close()
    with training.monitor(tmp_path / "run.db", every=2) as second:
        second.load_state_dict(state[0])
        second.attach(training.optimizer)
        training.step(3)
        assert steps_of(second) == [4, 6]
        assert len(second.store.runs()) == 1


def test_a_checkpoint_whose_run_is_not_in_the_store_begins_another(tmp_path):
    training = Training()
    with training.monitor(tmp_path / "one.db", name="one") as first:
        first.measure()
        state = checkpoint(first)
    with RunStore(tmp_path / "two.db") as other:
        other.new_run("a stranger").record(0, {"x": 1.0})
    with training.monitor(tmp_path / "two.db", name="two") as second:
        with pytest.warns(CurvdiagWarning, match="holds no run 'one'"):
            second.load_state_dict(state[0])
        second.measure()
        assert [r.name for r in second.store.runs()] == ["a stranger", "two"]
        assert second.store.run("a stranger").measurements == 1


def test_a_state_dict_is_plain_data(tmp_path):
    training = Training(lambda p: torch.optim.SGD(p, lr=0.1))
    with training.monitor(tmp_path / "run.db", every=1) as monitor:
        monitor.attach(training.optimizer)
        training.step(2)
        (loaded,) = checkpoint(monitor)
    assert loaded["steps_done"] == 2

    def plain(value):
        if isinstance(value, dict):
            return all(isinstance(k, str) and plain(v) for k, v in value.items())
        if isinstance(value, list):
            return all(map(plain, value))
        return value is None or type(value) in (int, float, str, bool)

    assert plain(loaded)


def test_a_model_with_dropout_and_batchnorm_is_measured_in_eval_mode_and_trains_on():
    torch.manual_seed(0)
    model, batch = Drop(), vectors()
    monitor = CurvatureMonitor(Objective(model, F.cross_entropy, batch), preset="light", tol=1e-6, warm=False)
    model.train()
    assert monitor.measure()["curv/hessian/lambda_max"] == monitor.measure()["curv/hessian/lambda_max"]
    assert all(module.training for module in model.modules())
