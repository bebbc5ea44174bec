"""The monitor measures gradient noise beside curvature, and single quantities by name."""

from __future__ import annotations

import math

import pytest
import torch
from nets import make
from oracles import criterion_loss, dense_hessian
from test_leave_no_trace import differing, reference, train
from torch import nn
from torch.nn import functional as F

from curvdiag import (
    CurvatureMonitor,
    CurvdiagWarning,
    Estimate,
    Hessian,
    NoiseCovariance,
    Objective,
    RunStore,
    anisotropy,
    spectral_density,
    top_eigenpairs,
)
from curvdiag.errors import ArgumentError, LossError, NonFiniteError
from curvdiag.monitor import quantities
from curvdiag.monitor.settings import CURVATURE, NOISE, PRESETS
from curvdiag.noise.cwgd import cwgd
from curvdiag.noise.noise_scale import noise_scale
from curvdiag.scaling.alignment import alignment
from curvdiag.spectrum import MEASURES

pytestmark = pytest.mark.filterwarnings("ignore:measuring every")

STEPS, PROBES, TOL = 8, 3, 1e-6
KEYS = {
    "lambda_max": {"curv/hessian/lambda_max", "curv/hessian/lambda_max_residual"},
    "trace": {"curv/hessian/trace"},
    "density": {"curv/hessian/lambda_min", "curv/hessian/frobenius_norm"},
    "anisotropy": {f"curv/anisotropy/{name}" for name in MEASURES} - {"curv/anisotropy/condition_number"},  # indefinite
    "layers": {f"curv/layer/{name}/{what}" for name in "024" for what in ("lambda_max", "trace")},
    "noise_scale": {"noise/scale", "noise/scale_curvature"},
    "noise_trace": {"noise/trace"},
    "cwgd": {"noise/cwgd"},
    "alignment": {f"align/{name}{end}" for name in ("cosine", "commutator") for end in ("", "_baseline")},
}
ALWAYS = {"curv/cost/seconds", "curv/cost/gradients", "curv/cost/matvecs", "curv/overhead"}


def objective(**options):
    """A little trained, so that there is a gradient to be told from its noise."""
    model, batch = make("mlp-tanh", dtype=torch.float64)
    return Objective(model, F.cross_entropy, batch, **options)


def watch(target=None, **options):
    options = {"steps": STEPS, "probes": PROBES, "tol": TOL, "strict": True, **options}
    return CurvatureMonitor(target or objective(), **options)


def same(one, other):
    if isinstance(other, Estimate):
        assert isinstance(one, Estimate)
        assert one.samples == other.samples
        one, other = (one.value, one.standard_error), (other.value, other.standard_error)
    assert one == pytest.approx(other, rel=1e-9, nan_ok=True)


# What is measured


def test_full_is_what_the_functions_give_when_they_are_called_one_by_one():
    target = objective()
    found = watch(target, preset="full", seed=4).measure()
    hessian = Hessian(target)
    top = top_eigenpairs(hessian, 5, tol=TOL, seed=4)
    density = spectral_density(hessian, steps=STEPS, probes=PROBES, seed=4)
    scale = noise_scale(target, curvature=True, starts=quantities.STARTS, seed=4)
    weighted = cwgd(target, starts=quantities.CWGD_STARTS, steps=STEPS, max_steps=STEPS, seed=4)
    aligned = alignment(hessian, NoiseCovariance(target), probes=quantities.ALIGNMENT_PROBES, seed=4)
    measures = anisotropy(density, top)
    expected = {
        "curv/hessian/lambda_max": float(top.values[0]),
        "curv/hessian/lambda_max_residual": float(top.residuals[0]),
        "curv/hessian/lambda_min": density.lambda_min,
        "curv/hessian/trace": density.trace(),
        "curv/hessian/frobenius_norm": density.frobenius_norm(),
        "noise/scale": scale.b_simple,
        "noise/scale_curvature": scale.b_noise,
        "noise/trace": scale.trace,
        "noise/cwgd": weighted.value,
        "align/cosine": aligned.cosine,
        "align/commutator": aligned.commutator,
        "align/cosine_baseline": aligned.cosine_baseline,
        "align/commutator_baseline": aligned.commutator_baseline,
    }
    expected |= {key: getattr(measures, key.rpartition("/")[2]) for key in KEYS["anisotropy"]}
    for key, value in expected.items():
        same(found.scalars[key], value)
    assert set(found.scalars) == set(expected) | KEYS["layers"] | ALWAYS
    estimated = {
        "noise/scale",
        "noise/scale_curvature",
        "noise/trace",
        "noise/cwgd",
        "align/cosine",
        "align/commutator",
    }
    assert all(isinstance(found.scalars[key], Estimate) for key in estimated)
    assert math.isfinite(found["noise/trace"])
    for text in [f"noise scale: {note}" for note in scale.notes] + [f"CWGD: {note}" for note in weighted.notes]:
        assert text in found.notes


def test_the_noise_is_that_of_one_backward_pass_for_each_sample():
    target = objective()
    found = watch(target, measure=list(NOISE)).measure()
    inputs, targets = target.batches[0]
    parameters = list(target.model.parameters())
    rows = []
    for x, t in zip(inputs, targets, strict=True):
        loss = F.cross_entropy(target.model(x[None]), t[None])
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)]))
    rows = torch.stack(rows)
    n, centred = len(rows), rows - rows.mean(0)
    assert found["noise/trace"] == pytest.approx(float(centred.square().sum()) / (n - 1), rel=1e-9)
    covariance = centred.T @ centred / n
    curvature = dense_hessian(target.model, criterion_loss(F.cross_entropy, (inputs, targets)))
    exact = float((curvature * covariance).sum() / curvature.norm() / covariance.norm())
    cosine = found.scalars["align/cosine"]
    assert abs(cosine.value - exact) < 4 * cosine.standard_error < 0.5
    gradient = rows.mean(0)
    ratio = float((curvature * covariance).sum() / (gradient @ curvature @ gradient))
    scale = found.scalars["noise/scale_curvature"]
    assert abs(scale.value - ratio) < 4 * scale.standard_error


@pytest.mark.parametrize("names", [[name] for name in KEYS] + [["cwgd", "trace"], ["alignment", "lambda_max", "cwgd"]])
def test_measure_gives_the_keys_of_its_names_and_no_other(names):
    full = watch(preset="full").measure()
    found = watch(measure=names).measure()
    assert set(found.scalars) == ALWAYS.union(*(KEYS[name] for name in names))
    for key in set(found.scalars) - ALWAYS:
        if "lambda_max" not in key:  # one eigenpair is looked for with fewer products than five
            same(found.scalars[key], full.scalars[key])
    blocks = {"density": {""}, "layers": {"0", "2", "4"}}
    expected = set().union(*(blocks.get(name, set()) for name in names))
    assert {block for _, block in found.densities} == expected


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_is_a_set_of_names(preset):
    one, other = watch(preset=preset).measure(), watch(measure=PRESETS[preset][::-1]).measure()
    for key in (one.scalars.keys() | other.scalars.keys()) - ALWAYS:
        same(one.scalars[key], other.scalars[key])
    assert {*CURVATURE, *NOISE} == set(PRESETS["full"]) == set(quantities.QUANTITIES) == set(KEYS)


def test_all_products_are_counted_and_h_and_c_share_their_graphs(monkeypatch):
    rows, made = [], []
    for kind in (Hessian, NoiseCovariance):
        multiply, start = kind._multiply, kind.__init__

        def counted(self, v, multiply=multiply):
            rows.append(len(v))
            return multiply(self, v)

        def kept(self, *args, start=start, **options):
            start(self, *args, **options)
            made.append(self)

        monkeypatch.setattr(kind, "_multiply", counted)
        monkeypatch.setattr(kind, "__init__", kept)
    found = watch(preset="full").measure()
    assert found["curv/cost/matvecs"] == sum(rows)
    assert sum(isinstance(one, Hessian) for one in made) == 1
    assert sum(isinstance(one, NoiseCovariance) for one in made) >= 2  # one for the sums, one for the alignment
    assert len({id(one._engine) for one in made}) == 1


def test_the_trace_of_c_alone_makes_no_hessian(monkeypatch):
    monkeypatch.setattr(quantities, "Hessian", None)
    assert watch(measure=["noise_trace"]).measure()["curv/cost/matvecs"] == 0


# What is refused


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["noise_sclae"], "'noise_sclae'; did you mean 'noise_scale'?"),
        (["trace", "Alignment"], "'Alignment'; did you mean 'alignment'?"),
        (["xyz"], "does not know 'xyz'. It knows"),
        ([3], "does not know 3. It knows"),
        (["full"], "it is a preset: preset='full'"),
        ("cwgd", "a list of names, such as ['cwgd']"),
        ([], "measures nothing"),
    ],
)
def test_unknown_names_are_refused_with_those_that_are_known(names, words):
    with pytest.raises(ArgumentError) as caught:
        watch(measure=names)
    assert words in str(caught.value)
    for name in KEYS:
        assert name in str(caught.value)


def test_preset_and_measure_together_are_refused():
    with pytest.raises(ArgumentError, match=r"not both.*'light' measures lambda_max, trace"):
        watch(preset="light", measure=["cwgd"])


def mean_only():
    model, batch = make("mlp-tanh", dtype=torch.float64)
    return Objective.from_loss(model, lambda m, b: F.cross_entropy(m(b[0]), b[1]), batch=batch)


def coupled():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).double()
    batch = torch.randn(8, 3, dtype=torch.float64), torch.arange(8) % 2
    return Objective(model, F.cross_entropy, batch, mode="train")


def two_samples():
    model, (inputs, targets) = make("mlp-tanh", dtype=torch.float64)
    return Objective(model, F.cross_entropy, (inputs[:2], targets[:2]))


OBSTACLES = {
    "a mean only": (mean_only, {}, LossError, "loss of each sample"),
    "BatchNorm in train mode": (coupled, {}, LossError, "BatchNorm in train mode"),
    "two samples": (two_samples, {}, ArgumentError, "at least three samples"),
    "finite differences": (objective, {"hessian": {"method": "finite-difference"}}, ArgumentError, "finite-difference"),
}


@pytest.mark.parametrize("why", OBSTACLES)
def test_without_single_samples_full_leaves_noise_out_with_one_note(why, tmp_path):
    make_objective, options, _, words = OBSTACLES[why]
    with watch(make_objective(), store=tmp_path / "run.db", preset="full", **options) as monitor:
        first, second = monitor.measure(), monitor.measure()
        events = [event.message for event in monitor.run.events()]
    assert not [key for key in first.scalars if key.startswith(("noise/", "align/"))]
    assert {"curv/hessian/trace", "curv/hessian/lambda_max"} < set(first.scalars)
    (note,) = [note for note in first.notes if note.startswith("left out")]
    for word in (words, *NOISE):
        assert word in note
    assert note in events
    assert not [note for note in second.notes if note.startswith("left out")]


@pytest.mark.parametrize("name", NOISE)
@pytest.mark.parametrize("why", OBSTACLES)
def test_noise_that_is_asked_for_by_name_and_cannot_be_is_refused_at_once(why, name):
    make_objective, options, error, words = OBSTACLES[why]
    with pytest.raises(error) as caught:
        watch(make_objective(), measure=["trace", name], **options)
    assert f"{name} needs" in str(caught.value)
    assert words in str(caught.value)
    watch(make_objective(), measure=["trace"], **options).measure()


# What goes wrong on the way


def test_a_noise_scale_that_is_undefined_is_recorded_as_such(tmp_path):
    """Per-sample gradients that cancel: nothing is left of |g|^2 but noise."""
    model = nn.Linear(2, 1, bias=False).double()
    nn.init.zeros_(model.weight)
    inputs = torch.tensor([[1.0, 0.5], [1.0, 0.5], [0.3, 1.0], [0.3, 1.0]], dtype=torch.float64)
    targets = torch.tensor([[1.0], [-1.0], [1.0], [-1.0]], dtype=torch.float64)
    with watch(Objective(model, F.mse_loss, (inputs, targets)), store=tmp_path / "run.db", preset="full") as monitor:
        found = monitor.measure()
    assert math.isnan(found["noise/scale"])
    assert math.isnan(found["noise/scale_curvature"])
    assert found["noise/trace"] > 0
    assert any("cannot be told from its noise" in note for note in found.notes)
    with RunStore(tmp_path / "run.db", readonly=True) as store:
        assert math.isnan(store.scalars("noise/scale").values[0])
        assert store.scalars("noise/trace").values[0] == found["noise/trace"]


def failing(monkeypatch, *names):
    def fail(work):
        work.hessian @ torch.ones(work.hessian.size, dtype=torch.float64)
        raise NonFiniteError("broken on purpose")

    for name in names:
        monkeypatch.setitem(quantities.QUANTITIES, name, fail)


def test_a_quantity_that_fails_leaves_the_others(monkeypatch, tmp_path):
    failing(monkeypatch, "cwgd", "trace")
    with watch(store=tmp_path / "run.db", preset="full", strict=False) as monitor:
        with pytest.warns(CurvdiagWarning) as seen:
            found = monitor.measure()
        monitor.measure()  # warned about once
        errors = [event.message for event in monitor.run.events() if event.kind == "error"]
    kept = set().union(*(KEYS[name] for name in KEYS if name not in ("cwgd", "trace")))
    assert set(found.scalars) == kept | ALWAYS
    messages = [str(warning.message) for warning in seen]
    for name in ("cwgd", "trace"):
        (message,) = [m for m in messages if f"the measurement of {name} at step 0 failed and training goes on" in m]
        assert "NonFiniteError: broken on purpose" in message
    assert len(errors) == 4
    assert len(monitor.history) == 2


def test_a_measurement_of_which_nothing_succeeds_has_failed(monkeypatch):
    failing(monkeypatch, "cwgd", "trace")
    monitor = watch(measure=["cwgd", "trace"], strict=False)
    with pytest.warns(CurvdiagWarning, match="the measurement at step 0 failed"):
        assert monitor.measure() is None
    assert not monitor.history


def test_a_strict_monitor_raises_what_one_quantity_raised(monkeypatch):
    failing(monkeypatch, "cwgd")
    with pytest.raises(NonFiniteError, match="on purpose"):
        watch(preset="full").measure()


# What is left behind


def test_the_run_says_what_was_measured(tmp_path):
    with watch(store=tmp_path / "run.db", measure=["cwgd", "trace", "cwgd"]) as monitor:
        monitor.measure()
        own = monitor.run.info.config["curvdiag"]
    assert (own["preset"], own["measure"]) == (None, ["trace", "cwgd"])
    assert "['trace', 'cwgd']" in repr(monitor)
    with watch(store=tmp_path / "other.db") as monitor:
        monitor.measure()
        own = monitor.run.info.config["curvdiag"]
    assert (own["preset"], tuple(own["measure"])) == ("standard", PRESETS["standard"])


def test_the_same_weights_give_the_same_noise_and_another_seed_other_probes():
    monitor = watch(preset="full")
    first, second = monitor.measure(), monitor.measure()
    other = watch(preset="full", seed=1).measure()
    for key in KEYS["cwgd"] | KEYS["alignment"] | KEYS["noise_scale"] | KEYS["noise_trace"]:
        same(first.scalars[key], second.scalars[key])
    for key in ("noise/scale_curvature", "noise/cwgd", "align/cosine", "align/commutator"):
        assert first[key] != other[key], key
    assert first["noise/trace"] == other["noise/trace"]


def some_noise(model, measure, source):
    """As :func:`test_leave_no_trace.monitor`, with names; and each measurement must hold what it was asked for."""
    data = source
    if source is None:
        data = torch.randn(8, 1, 6, 6, generator=torch.Generator().manual_seed(3)), torch.arange(8) % 3
    target = Objective(model, F.cross_entropy, data)
    return CurvatureMonitor(target, every=2, steps=6, probes=2, strict=True, **measure)


@pytest.mark.parametrize("source", ["batch", "loader"])
@pytest.mark.parametrize("measure", [{"preset": "full"}, *({"measure": [name]} for name in NOISE)])
def test_a_run_whose_noise_is_measured_ends_with_the_same_bits(measure, source):
    run, monitor = train(
        watch=lambda model, batches: some_noise(model, measure, None if source == "batch" else batches)
    )
    assert differing(reference("sgd", "plain"), run.trace()) == []
    assert [one.step for one in monitor.history] == [2, 4, 6, 8, 10]
    wanted = set().union(*(KEYS[name] for name in measure.get("measure", NOISE)))
    assert all(wanted <= set(one.scalars) for one in monitor.history)


def test_measuring_noise_between_backward_and_step_leaves_the_gradients():
    def disturb(run, _):
        before = {name: (p.grad, p.grad.clone()) for name, p in run.model.named_parameters() if p.grad is not None}
        assert some_noise(run.model, {"measure": NOISE}, None).measure() is not None
        for name, p in run.model.named_parameters():
            if p.grad is not None:
                assert p.grad is before[name][0]
                assert torch.equal(p.grad, before[name][1])

    run, _ = train(disturb=disturb)
    assert differing(reference("sgd", "plain"), run.trace()) == []


def test_a_quantity_that_fails_on_the_way_leaves_no_trace(monkeypatch):
    failing(monkeypatch, "cwgd")

    def interrupted(hessian, covariance, **_):
        covariance @ torch.ones(hessian.size)
        raise RuntimeError("out of memory")

    monkeypatch.setattr(quantities, "alignment", interrupted)
    with pytest.warns(CurvdiagWarning, match="failed and training goes on"):
        run, monitor = train(
            watch=lambda model, _: CurvatureMonitor(
                some_noise(model, {}, None).objective, every=2, steps=6, probes=2, preset="full"
            )
        )
    assert differing(reference("sgd", "plain"), run.trace()) == []
    for one in monitor.history:
        assert KEYS["noise_scale"] <= set(one.scalars)
        assert not (KEYS["cwgd"] | KEYS["alignment"]) & set(one.scalars)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_noise_under_modes_without_gradients(mode):
    monitor = watch(preset="full")
    outside = monitor.measure()
    with mode():
        inside = monitor.measure()
    for name in NOISE:
        for key in KEYS[name]:
            same(inside.scalars[key], outside.scalars[key])


def test_precision_and_pieces_of_the_hessian_are_those_of_the_noise():
    model, batch = make("mlp-tanh")
    single = Objective(model, F.cross_entropy, batch)
    double = watch(single, preset="full", hessian={"dtype": torch.float64, "micro_batch": 2}).measure()
    exact = watch(Objective(model.double(), F.cross_entropy, (batch[0].double(), batch[1])), preset="full").measure()
    for name in NOISE:
        for key in KEYS[name] - {"noise/cwgd", "noise/scale_curvature"}:
            value = exact.scalars[key]
            assert double[key] == pytest.approx(float(value), rel=1e-9, nan_ok=True), key
